//! Mounts whose owners are shifted.
//!
//! Two have a use for it. What a pod with a user namespace (`hostUsers: false`) has as its files: a file that belongs to user 0 on the disk is
//! to belong to the pod's user 0, who is somebody like 65536 to the guest and to the host, whose file server acts for him by that
//! number. containerd asks for it by the options `uidmap=` and `gidmap=` of a root file system, as its own mount code reads them,
//! and by the mappings of a bind mount in the spec ([`IdMap`]). And the VMM, whose user 0 is not the host's ([`VmmUsers`]): it is to own
//! what is root's on the disk.
//!
//! The mapping is made here, on the host, where the kernel knows the file system: virtio-fs cannot be mapped in the guest. The kernel takes it in
//! the form of a user namespace.

#![allow(unsafe_code, reason = "clone(2) of a process that only waits")]

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{Pid, chdir},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{mount::set_attributes, vmm_users::VmmUsers};

/// Owners that cannot be shifted.
#[derive(Debug, thiserror::Error)]
pub enum IdMapError {
    /// A file system that the kernel cannot do this with, or a mount whose owners are shifted already.
    #[error("the kernel cannot shift the owners of the files in {0}")]
    Unmappable(PathBuf, #[source] io::Error),
    /// A step on the way.
    #[error(transparent)]
    Os(#[from] io::Error),
}

impl From<nix::Error> for IdMapError {
    fn from(errno: nix::Error) -> Self {
        Self::Os(errno.into())
    }
}

/// The ids that a mount's are shown as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    /// As `uid_map` of proc(5) has it.
    pub(crate) uids: String,
    /// As `gid_map`.
    pub(crate) gids: String,
}

impl IdMap {
    /// Reads the values of `uidmap=` and `gidmap=`: ranges `first:shown as:length`, separated by commas. `None` where one is none.
    pub fn parse(uids: &str, gids: &str) -> Option<Self> {
        Some(Self {
            uids: lines(uids)?,
            gids: lines(gids)?,
        })
    }

    /// A user namespace with this map. It takes a process to make one: a copy of this that does nothing, and is gone on return.
    ///
    /// # Errors
    /// When the kernel makes none, or does not take the map.
    pub fn user_namespace(&self) -> io::Result<OwnedFd> {
        let holder = Holder::start()?;
        let file = |name: &str| format!("/proc/{}/{name}", holder.0);
        fs::write(file("uid_map"), &self.uids)?;
        fs::write(file("gid_map"), &self.gids)?;
        Ok(fs::File::open(file("ns/user"))?.into())
    }
}

/// Maps a mount that is not attached yet, with those below it if `below`: all of them or none. `what`: for people.
///
/// # Errors
/// [`IdMapError`].
pub fn map(
    tree: impl AsFd,
    below: bool,
    namespace: BorrowedFd<'_>,
    what: &Path,
) -> Result<(), IdMapError> {
    let attributes = (libc::MOUNT_ATTR_IDMAP, 0);
    let namespace = Some(namespace);
    set_attributes(tree.as_fd(), below, attributes, MsFlags::empty(), namespace).map_err(|error| {
        match error.raw_os_error() {
            // mount_setattr(2): the file system's type, or that it is mapped.
            Some(libc::EINVAL | libc::EPERM) => IdMapError::Unmappable(what.to_owned(), error),
            _ => error.into(),
        }
    })
}

/// How an overlay's layers are shown, as an overlay cannot be mapped itself.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// The lower layers.
    pub lower: BorrowedFd<'a>,
    /// The upper one, and whom the overlay itself acts as in it.
    pub upper: Option<&'a VmmUsers>,
}

/// Mounts an overlay whose layers are mapped, and returns the mount, not attached yet. `data`: its options. The mapped layers are mounted in a
/// mount namespace that ends with this call; the overlay has copies.
///
/// # Errors
/// What the kernel refuses. Nothing stays then.
pub fn overlay(
    layers: Layers<'_>,
    target: &Path,
    flags: MsFlags,
    data: &[String],
) -> Result<OwnedFd, IdMapError> {
    unseen(|| {
        let mapped = |path: &str, namespace: BorrowedFd<'_>| {
            let tree = clone(path)?;
            map(&tree, false, namespace, Path::new(path))?;
            Ok::<_, IdMapError>(tree)
        };
        let lower = lower_layers(data)
            .iter()
            .map(|layer| mapped(layer, layers.lower))
            .collect::<Result<Vec<_>, _>>()?;
        // One mount for both: the kernel wants them in one.
        let upper = match (layers.upper, upper_directories(data)) {
            (Some(users), Some([upper, work])) => {
                let (dir, names) = below_one_directory([upper, work]);
                let tree = mapped(&dir.display().to_string(), users.namespace())?;
                // The kernel makes the work directory's files as who mounts the overlay: the host's root is nobody in a mapped mount.
                users.act_as_root()?;
                Some((tree, names))
            }
            _ => None,
        };
        // Short names for them; nobody else sees this tmpfs.
        let tmpfs = Some("tmpfs");
        mount(tmpfs, target, tmpfs, MsFlags::empty(), None::<&str>)?;
        chdir(target)?;
        let attached = |tree: &OwnedFd, name: &str| {
            fs::create_dir(name)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(tree, c"", CWD, name, flags).map_err(io::Error::from)
        };
        let mut names = Vec::new();
        for (number, layer) in lower.iter().enumerate() {
            let name = number.to_string();
            attached(layer, &name)?;
            names.push(name);
        }
        let mut options = vec![format!("{LOWER}{}", names.join(":"))];
        let mut replaced = vec![LOWER];
        if let Some((tree, [upper, work])) = upper {
            attached(&tree, "upper")?;
            options.push(format!("{UPPER}upper/{}", upper.display()));
            options.push(format!("{WORK}upper/{}", work.display()));
            replaced.extend([UPPER, WORK]);
        }
        let is_replaced = |option: &str| replaced.iter().any(|name| option.starts_with(name));
        let others = data.iter().filter(|option| !is_replaced(option)).cloned();
        let options = options.into_iter().chain(others).collect::<Vec<_>>();
        fs::create_dir("overlay")?;
        mount(
            Some("overlay"),
            "overlay",
            Some("overlay"),
            flags,
            Some(options.join(",").as_str()),
        )?;
        Ok(clone("overlay")?)
    })
}

/// Mounts something where nobody else sees it, on a thread of its own, as that gives up the mount namespace and the working directory of the
/// others.
///
/// # Errors
/// Those of `build`.
pub fn unseen(
    build: impl FnOnce() -> Result<OwnedFd, IdMapError> + Send,
) -> Result<OwnedFd, IdMapError> {
    let build = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        build()
    };
    std::thread::scope(|scope| {
        let built = scope.spawn(build).join();
        built.unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked").into()))
    })
}

/// A copy of what is mounted at this path, without what is mounted below.
///
/// # Errors
/// The kernel's.
pub fn clone(path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, path.as_ref(), flags)?)
}

/// As prctl(2) takes it.
const KILL: libc::c_ulong = libc::SIGKILL as libc::c_ulong;

/// Options that name an overlay's layers.
const LOWER: &str = "lowerdir=";
const UPPER: &str = "upperdir=";
const WORK: &str = "workdir=";

fn lower_layers(data: &[String]) -> Vec<&str> {
    let lists = data.iter().filter_map(|option| option.strip_prefix(LOWER));
    lists.flat_map(|list| list.split(':')).collect()
}

/// The upper layer, and the work directory.
fn upper_directories(data: &[String]) -> Option<[&Path; 2]> {
    let named = |name| data.iter().find_map(|option| option.strip_prefix(name));
    Some([Path::new(named(UPPER)?), Path::new(named(WORK)?)])
}

/// The directory that two lie in, and the way from there to each.
fn below_one_directory(paths: [&Path; 2]) -> (PathBuf, [PathBuf; 2]) {
    let [first, second] = paths;
    let common: PathBuf = first
        .components()
        .zip(second.components())
        .take_while(|(one, other)| one == other)
        .map(|(component, _)| component)
        .collect();
    let rest = |path: &Path| path.strip_prefix(&common).unwrap_or(path).to_owned();
    let names = [rest(first), rest(second)];
    (common, names)
}

/// `0:65536:1000` as a line of a map file.
fn lines(ranges: &str) -> Option<String> {
    let line = |range: &str| {
        let numbers: Vec<u32> = range
            .split(':')
            .map(|n| n.parse().ok())
            .collect::<Option<_>>()?;
        match *numbers {
            [first, shown, length] => Some(format!("{first} {shown} {length}\n")),
            _ => None,
        }
    };
    ranges.split(',').map(line).collect()
}

/// A process in a user namespace of its own. It ends with this.
struct Holder(Pid);

impl Holder {
    fn start() -> io::Result<Self> {
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: without CLONE_VM and with no stack given this is fork(2): the child goes on with a copy of everything. It makes
        // system calls that need no lock which another thread may have held, and no other thing, until it is killed.
        let pid =
            unsafe { libc::syscall(libc::SYS_clone, flags, nothing, nothing, nothing, nothing) };
        match i32::try_from(pid) {
            Ok(0) => loop {
                // SAFETY: both calls take and return plain numbers.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, KILL);
                    libc::pause();
                }
            },
            Ok(pid) if pid > 0 => Ok(Self(Pid::from_raw(pid))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It is ours, and not reaped yet: the pid is no other's.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use super::*;
    use crate::{
        cleanup,
        mount::{MountRequest, apply_here},
    };

    const MAPS: [&str; 2] = ["uidmap=0:65536:1000", "gidmap=0:65536:500,500:7000:1"];

    #[test]
    fn ranges_become_lines() {
        assert_eq!(lines("0:65536:1000").unwrap(), "0 65536 1000\n");
        assert_eq!(lines("0:1:2,3:4:5").unwrap(), "0 1 2\n3 4 5\n");
        for bad in [
            "",
            "0",
            "0:1",
            "0:1:2:3",
            "a:1:2",
            "0:1:2,",
            "-1:0:1",
            "0:1:4294967296",
        ] {
            assert_eq!(lines(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn two_directories_are_named_from_the_one_they_lie_in() {
        for (upper, work, dir, names) in [
            ("/s/7/fs", "/s/7/work", "/s/7", ["fs", "work"]),
            ("/s/7/a/fs", "/s/8/work", "/s", ["7/a/fs", "8/work"]),
            ("/fs", "/work", "/", ["fs", "work"]),
        ] {
            let found = below_one_directory([Path::new(upper), Path::new(work)]);
            assert_eq!(found, (dir.into(), names.map(PathBuf::from)));
        }
    }

    /// In a mount namespace of its own, on a tmpfs, which can be mapped. Needs root, as husk does.
    pub(crate) fn on_tmpfs(test: impl FnOnce(&Path) + Send) {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let tmpfs = Some("tmpfs");
            mount(tmpfs, dir.path(), tmpfs, MsFlags::empty(), None::<&str>).unwrap();
            test(dir.path());
            cleanup::unmount_below(dir.path()).unwrap();
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap());
    }

    pub(crate) fn owner(path: &Path) -> (u32, u32) {
        let of = fs::symlink_metadata(path).unwrap();
        (of.uid(), of.gid())
    }

    fn request(kind: &str, source: &Path, options: &[String]) -> MountRequest {
        let maps = MAPS.map(str::to_owned);
        MountRequest {
            kind: kind.into(),
            source: source.display().to_string(),
            options: options.iter().cloned().chain(maps).collect(),
            ..MountRequest::default()
        }
    }

    #[test]
    fn a_bind_mount_shows_other_owners() {
        on_tmpfs(|dir| {
            let (data, shown) = (dir.join("data"), dir.join("shown"));
            fs::create_dir(&data).unwrap();
            fs::create_dir(&shown).unwrap();
            chown(&data, Some(7), Some(500)).unwrap();
            apply_here(&request("bind", &data, &["rbind".into()]), &shown, None).unwrap();
            assert_eq!(owner(&shown), (65543, 7000));
            // The host's root is nobody there.
            fs::write(shown.join("file"), "").unwrap_err();
            let mut bad = request("bind", &data, &["uidmap=0:x:1".into()]);
            bad.options.retain(|option| option != MAPS[0]);
            let error = apply_here(&bad, &shown, None).unwrap_err().to_string();
            assert!(error.contains("uidmap=0:x:1"), "{error}");
        });
    }

    #[test]
    fn an_overlay_shows_its_layers_with_other_owners() {
        on_tmpfs(|dir| {
            for name in ["a", "b", "upper", "work", "shown"] {
                fs::create_dir(dir.join(name)).unwrap();
            }
            fs::write(dir.join("a/root"), "").unwrap();
            fs::write(dir.join("b/five"), "").unwrap();
            chown(dir.join("b/five"), Some(5), Some(5)).unwrap();
            let at = |name: &str| dir.join(name).display().to_string();
            let options = [
                format!("lowerdir={}:{}", at("a"), at("b")),
                format!("upperdir={}", at("upper")),
                format!("workdir={}", at("work")),
            ];
            let shown = dir.join("shown");
            apply_here(
                &request("overlay", Path::new("overlay"), &options),
                &shown,
                None,
            )
            .unwrap();
            assert_eq!(owner(&shown.join("root")), (65536, 65536));
            assert_eq!(owner(&shown.join("five")), (65541, 65541));
            fs::write(shown.join("root"), "changed").unwrap();
            assert_eq!(owner(&dir.join("upper/root")), (65536, 65536));
            assert_eq!(owner(&dir.join("a/root")), (0, 0));
            // Of the layers' mounts nothing is left: the tmpfs of this test, and the overlay.
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
            assert_eq!(
                points
                    .filter(|point| Path::new(point).starts_with(dir))
                    .count(),
                2,
                "{mounts}"
            );
        });
    }
}
