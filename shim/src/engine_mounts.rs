//! The mounts that the engine has, which are not all in the shim's own mount namespace.
//!
//! What is mounted on the host after the shim's start arrives there where the mount around it is shared, as systemd makes all of them.
//! containers/storage (podman, buildah, CRI-O) makes its directory a private mount, and puts each container's root file system in it: that of a
//! container which joins a running pod would not be seen. So root file systems and the sources of bind mounts are taken from the namespace
//! that the shim was started in. The shim holds that namespace until the pod's end: it is the host's own, but where an engine has been given one.

use std::{fs::File, io, os::fd::OwnedFd, path::Path, sync::Arc};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::{chroot, fchdir},
};
use rustix::{
    fs::{CWD, Mode, OFlags, open},
    mount::{OpenTreeFlags, open_tree},
};

/// The mount namespace of whoever has made this, and the root directory there.
#[derive(Debug, Clone)]
pub struct EngineMounts(Arc<Namespace>);

#[derive(Debug)]
struct Namespace {
    mounts: File,
    root: OwnedFd,
}

impl EngineMounts {
    /// Those that the calling thread sees.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of_this_thread() -> io::Result<Self> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(Arc::new(Namespace {
            mounts: File::open("/proc/thread-self/ns/mnt")?,
            root: open("/", directory, Mode::empty())?,
        })))
    }

    /// What is at this path, to be looked at: opened with `O_PATH`. Blocks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        self.there(|| Ok(open(path, flags, Mode::empty())?))
            .map(File::from)
    }

    /// A copy of what is mounted at this path, with what is mounted below if `below`, not attached yet. It belongs to the peer groups that
    /// the original belongs to. Blocks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn copy(&self, path: &Path, below: bool) -> io::Result<OwnedFd> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, below);
        self.there(|| Ok(open_tree(CWD, path, flags)?))
    }

    /// Does this on a thread that is in the namespace, as a copy can be had of one's own mounts only.
    fn there(&self, what: impl FnOnce() -> io::Result<OwnedFd> + Send) -> io::Result<OwnedFd> {
        let enter = || {
            // A thread that shares its root with others cannot leave for another namespace (setns(2)).
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.0.mounts, CloneFlags::CLONE_NEWNS)?;
            fchdir(&self.0.root)?;
            chroot(".")?;
            what()
        };
        std::thread::scope(|scope| {
            let done = scope.spawn(enter).join();
            done.unwrap_or_else(|_| {
                Err(io::Error::other(
                    "the thread in the engine's mounts panicked",
                ))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread};

    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::mount::{MountRequest, apply};

    fn change(at: &Path, flags: MsFlags) {
        mount(None::<&str>, at, None::<&str>, flags, None::<&str>).unwrap();
    }

    fn tmpfs(at: &Path) {
        let kind = Some("tmpfs");
        mount(kind, at, kind, MsFlags::empty(), None::<&str>).unwrap();
    }

    /// An engine on a thread of its own, with a private directory, and beside it a shim that has started: `engine` mounts something there,
    /// `shim` gets the directory and the engine's mounts. Needs root, as husk does.
    fn beside_each_other(
        engine: impl FnOnce(&Path) + Send,
        shim: impl FnOnce(&Path, &EngineMounts) + Send,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let (started, start) = mpsc::channel();
        let (mounted, go) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE);
                tmpfs(dir);
                let mounts = EngineMounts::of_this_thread().unwrap();
                thread::scope(|scope| {
                    scope.spawn(move || {
                        unshare(CloneFlags::CLONE_NEWNS).unwrap();
                        change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE);
                        started.send(()).unwrap();
                        go.recv().unwrap();
                        shim(dir, &mounts);
                    });
                    start.recv().unwrap();
                    engine(dir);
                    mounted.send(()).unwrap();
                });
            });
        });
    }

    #[test]
    fn a_private_mount_made_later_is_found() {
        let engine = |dir: &Path| {
            fs::create_dir_all(dir.join("merged")).unwrap();
            tmpfs(&dir.join("merged"));
            fs::create_dir(dir.join("merged/below")).unwrap();
            tmpfs(&dir.join("merged/below"));
            fs::write(dir.join("merged/below/file"), "the engine's").unwrap();
        };
        beside_each_other(engine, |dir, engine| {
            let merged = dir.join("merged");
            assert_eq!(fs::read_dir(&merged).unwrap().count(), 0);
            assert!(engine.look(&merged).unwrap().metadata().unwrap().is_dir());
            let shown = dir.join("shown");
            fs::create_dir(&shown).unwrap();
            let request = MountRequest {
                kind: "rbind".into(),
                source: merged.display().to_string(),
                ..MountRequest::default()
            };
            apply(&request, &shown, None, engine).unwrap();
            let read = fs::read(shown.join("below/file")).unwrap();
            assert_eq!(read, b"the engine's");
            let missing = engine.look(&dir.join("none")).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        });
    }

    /// The engine's mounts are a shared one's peers.
    #[test]
    fn what_is_mounted_in_a_copy_stays_from_the_engine() {
        let engine = |dir: &Path| {
            for name in ["volume/below", "seen", "shown"] {
                fs::create_dir_all(dir.join(name)).unwrap();
            }
            tmpfs(&dir.join("volume"));
            change(&dir.join("volume"), MsFlags::MS_SHARED);
            fs::create_dir(dir.join("volume/below")).unwrap();
        };
        beside_each_other(engine, |dir, engine| {
            let request = |option: &str| MountRequest {
                kind: "rbind".into(),
                source: dir.join("volume").display().to_string(),
                options: vec![option.into()],
                ..MountRequest::default()
            };
            for (shown, option) in [("shown", "rw"), ("seen", "rshared")] {
                let shown = dir.join(shown);
                apply(&request(option), &shown, None, engine).unwrap();
                tmpfs(&shown.join("below"));
                fs::write(shown.join("below/file"), "ours").unwrap();
            }
            let of_engine = engine.look(&dir.join("volume/below/file")).unwrap_err();
            assert_eq!(of_engine.kind(), io::ErrorKind::NotFound);
        });
    }
}
