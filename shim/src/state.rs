//! What a pod keeps on disk: `/run/husk/<namespace>/<sandbox>/`.
//!
//! `state.json` says which processes, cgroup and socket belong to the pod, so that `delete` (another process, after the
//! shim may have been killed) and the next start can clear them away; `share/` is where the guest's tree is put together and `served/` is that
//! tree as the guest sees it ([`crate::share`]). A process is named by pid and start time together: a pid alone may be somebody else's by the time it is killed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::cleanup;

/// The state file's name.
const STATE_FILE: &str = "state.json";
/// The directory below which everything for the guest is mounted.
const SHARE_DIR: &str = "share";
/// The directory on which the share appears for the VMM.
const SERVED_DIR: &str = "served";
/// Name of the link from a bundle to its pod's directory.
const BUNDLE_LINK: &str = "husk-state";

/// A process, told apart from a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in the host's pid namespace.
    pub pid: i32,
    /// Clock ticks from boot to its start (field 22 of `/proc/PID/stat`).
    pub starttime: u64,
}

/// How often the state directory is made again when it has just been removed.
const TRIES: u32 = 100;

/// The contents of `state.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// The shim.
    pub shim: Option<ProcessId>,
    /// The VMM, once started.
    pub vmm: Option<ProcessId>,
    /// A cgroup that husk made, or is about to make, for the pod alone: absolute path below `/sys/fs/cgroup`.
    pub cgroup: Option<PathBuf>,
    /// The shim's socket.
    pub socket: PathBuf,
    /// Ids of the containers that the shim was started or asked for and that are not deleted.
    pub containers: BTreeSet<String>,
    /// Those of them that have hooks for their end, which are still to be run.
    #[serde(default)]
    pub hooked: BTreeSet<String>,
}

/// One pod's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir {
    namespace_dir: PathBuf,
    path: PathBuf,
}

/// Exclusive hold of a namespace's directory while pods are made or cleared away.
#[derive(Debug)]
pub struct NamespaceLock {
    _lock: Flock<fs::File>,
    namespace_dir: PathBuf,
}

impl Drop for NamespaceLock {
    fn drop(&mut self) {
        remove_if_empty(&self.namespace_dir);
    }
}

/// Removes a namespace's directory with its last pod, and the state directory with its last namespace.
fn remove_if_empty(namespace_dir: &Path) {
    if fs::remove_dir(namespace_dir).is_ok()
        && let Some(root) = namespace_dir.parent()
    {
        // Not empty while other namespaces live.
        let _ = fs::remove_dir(root);
    }
}

/// Makes the state directory where it is missing (0700), and names it without links: what lies below is looked up in the kernel's table of
/// mounts, which has none, and removed without following any.
///
/// # Errors
/// With the path, when the file system refuses.
pub fn make_state_dir(path: &Path) -> io::Result<PathBuf> {
    let mut made = make_and_name(path);
    // The end of the last pod takes it away, maybe just now.
    for _ in 0..TRIES {
        match &made {
            Err(error) if is_just_removed(error) => made = make_and_name(path),
            _ => break,
        }
    }
    made.map_err(|e| {
        let message = format!("cannot make the state directory {}: {e}", path.display());
        io::Error::new(e.kind(), message)
    })
}

/// Whether that is what making a directory comes to when somebody takes it away at the same time: it was there when it was to be made,
/// or its parent was not.
fn is_just_removed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
    )
}

fn make_and_name(path: &Path) -> io::Result<PathBuf> {
    let make = |path: &Path| {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
    };
    let made = match (make(path), fs::read_link(path)) {
        // A link whose target went with the last pod.
        (Err(_), Ok(target)) => make(&path.parent().unwrap_or(path).join(target)),
        (made, _) => made,
    };
    made.and_then(|()| fs::canonicalize(path))
}

/// The state directory without links, if it is there.
pub fn find_state_dir(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// An id that cannot be a directory name.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not usable as an id: letters, digits, '.', '_' and '-', at most 200 bytes, not starting with a dot"
)]
pub struct BadId(pub String);

impl ProcessId {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        starttime(&stat)
            .map(|starttime| Self { pid, starttime })
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("unexpected /proc/{pid}/stat"),
                )
            })
    }

    /// This process.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn current() -> io::Result<Self> {
        Self::of(nix::unistd::getpid().as_raw())
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        let zombie = stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']));
        !zombie && starttime(&stat) == Some(self.starttime)
    }

    /// Sends SIGKILL to exactly this process and waits until it has ended, at most `limit`. Returns whether it has.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn kill(&self, limit: Duration) -> io::Result<bool> {
        let Some(pidfd) = self.pidfd()? else {
            return Ok(true);
        };
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(n) => return Ok(n > 0),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// `None` when it has ended.
    fn pidfd(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Checked after the open: from here on the fd cannot change its meaning.
            Ok(fd) => Ok(self.is_alive().then_some(fd)),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Field 22 of a stat line. The second field, the name in parentheses, may hold anything.
fn starttime(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

impl PodDir {
    /// Names the directory of a pod; makes nothing.
    ///
    /// # Errors
    /// [`BadId`] where an id cannot be one component of a path.
    pub fn new(state_dir: &Path, namespace: &str, sandbox_id: &str) -> Result<Self, BadId> {
        let namespace_dir = state_dir.join(component(namespace)?);
        let path = namespace_dir.join(component(sandbox_id)?);
        Ok(Self {
            namespace_dir,
            path,
        })
    }

    /// The directory that a bundle's link leads to.
    pub fn of_bundle(bundle: &Path) -> Option<Self> {
        let path = fs::read_link(bundle.join(BUNDLE_LINK)).ok()?;
        let namespace_dir = path.parent()?.to_owned();
        path.is_absolute().then_some(Self {
            namespace_dir,
            path,
        })
    }

    /// Leaves the link to this pod in a bundle.
    ///
    /// # Errors
    /// When the bundle cannot be written to.
    pub fn link_bundle(&self, bundle: &Path) -> io::Result<()> {
        let link = bundle.join(BUNDLE_LINK);
        match fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => std::os::unix::fs::symlink(&self.path, link),
        }
    }

    /// The pod's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the tree that the guest sees is put together.
    pub fn share(&self) -> PathBuf {
        self.path.join(SHARE_DIR)
    }

    /// The tree as the guest sees it.
    pub fn served(&self) -> PathBuf {
        self.path.join(SERVED_DIR)
    }

    /// The pod's id.
    pub fn sandbox_id(&self) -> String {
        self.path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The other pods of the namespace, and this one, that have a directory.
    pub fn siblings(&self) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(&self.namespace_dir) else {
            return Vec::new();
        };
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
            .map(|entry| Self {
                namespace_dir: self.namespace_dir.clone(),
                path: entry.path(),
            })
            .collect()
    }

    /// Makes the directory (0700) and in it `share/` and `served/`.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn create(&self) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path)?;
        builder.create(self.share())?;
        builder.create(self.served())
    }

    /// Holds the namespace for a change of its pods; waits at most `limit` for another holder.
    ///
    /// # Errors
    /// When the directory cannot be made, or somebody holds it for longer.
    pub fn lock_namespace(&self, limit: Duration) -> io::Result<NamespaceLock> {
        let deadline = Instant::now() + limit;
        loop {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.namespace_dir);
            let dir = match made.and_then(|()| fs::File::open(&self.namespace_dir)) {
                Ok(dir) => dir,
                // Somebody has just removed it with its last pod.
                Err(e) if is_just_removed(&e) && Instant::now() < deadline => continue,
                Err(e) => return Err(e),
            };
            match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                // The last pod's removal takes the directory with it: then ours is a new one.
                Ok(lock) if self.is_namespace_dir(&lock) => {
                    return Ok(NamespaceLock {
                        _lock: lock,
                        namespace_dir: self.namespace_dir.clone(),
                    });
                }
                Ok(_) => {}
                Err((_, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    let message = format!(
                        "another start or delete holds {}",
                        self.namespace_dir.display()
                    );
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Err((_, e)) => return Err(e.into()),
            }
        }
    }

    fn is_namespace_dir(&self, dir: &fs::File) -> bool {
        match (dir.metadata(), fs::metadata(&self.namespace_dir)) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
    }

    /// Reads the state; `None` where there is none or it cannot be understood.
    pub fn load(&self) -> Option<PodState> {
        let text = fs::read(self.path.join(STATE_FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Replaces the state: a reader sees the old one or the new one.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn store(&self, state: &PodState) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(state)?;
        let new = self
            .path
            .join(format!(".{STATE_FILE}.{}", std::process::id()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        io::Write::write_all(&mut file, &text)?;
        fs::rename(new, self.path.join(STATE_FILE))
    }

    /// Removes the directory, and the namespace's with its last pod. Mounts below must be gone.
    ///
    /// # Errors
    /// When something stays.
    pub fn remove(&self) -> io::Result<()> {
        cleanup::remove_tree(&self.path)?;
        remove_if_empty(&self.namespace_dir);
        Ok(())
    }

    /// Changes the state under the pod's own lock (short: file operations only).
    ///
    /// # Errors
    /// When the directory is gone or the file system refuses.
    pub fn update(&self, change: impl FnOnce(&mut PodState)) -> io::Result<()> {
        let dir = fs::File::open(&self.path)?;
        let _lock =
            Flock::lock(dir, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
        let mut state = self.load().unwrap_or_default();
        change(&mut state);
        self.store(&state)
    }
}

/// An id as one path component. containerd allows less than this.
fn component(id: &str) -> Result<&str, BadId> {
    let ok = !id.is_empty()
        && id.len() <= 200
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if ok {
        Ok(id)
    } else {
        Err(BadId(id.to_owned()))
    }
}

#[cfg(test)]
mod tests;
