//! The files that a container's proxy shows to an engine, which enters the proxy's mount namespace as it would the container's: `podman cp` of a
//! running container.
//!
//! The namespace's root is the container's root file system with the bind mounts on it. What else the guest has mounted is not to be had here,
//! and an empty file system that nobody can write to lies in its place: a copy there fails, where it would otherwise be hidden from the container.
//! The proxy itself is in an empty directory that is in no namespace; it opens nothing of a container's.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{chdir, chroot, fchdir, pivot_root},
};
use rustix::{
    fs::{
        CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, open,
        openat2,
    },
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};
use serde_json::Value;

use crate::spec::{is_bind, read_json};

/// Nobody on the host opens a device or runs a program of a container's.
const LOCKED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// One mount of a container's.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    destination: PathBuf,
    /// Of a bind mount; the guest alone has any other.
    source: Option<PathBuf>,
    is_read_only: bool,
}

/// What a container has, of this host.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Files {
    root: PathBuf,
    mounts: Vec<Mount>,
}

impl Files {
    /// Of the spec that the shim has been given.
    pub(super) fn of(spec: &Path) -> Result<Self> {
        let spec = read_json(spec)?;
        let root = spec["root"]["path"].as_str();
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        Ok(Self {
            root: root.context("the spec has no root.path")?.into(),
            mounts: mounts.filter_map(Mount::of).collect(),
        })
    }

    /// Puts it together on `place`, from what this thread sees.
    fn lay_out(&self, place: &Path) -> Result<()> {
        let seen = |at: &Path| open(at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        bind(&self.root, &seen(place)?, false)
            .with_context(|| format!("showing {}", self.root.display()))?;
        // What is mounted there by now.
        let root = seen(place)?;
        for made in &self.mounts {
            made.make(&root)
                .with_context(|| format!("showing {}", made.destination.display()))?;
        }
        Ok(())
    }
}

impl Mount {
    fn of(mount: &Value) -> Option<Self> {
        let options = mount["options"].as_array();
        let has = |name: &str| options.is_some_and(|list| list.iter().any(|o| o == name));
        let source = mount["source"].as_str().filter(|_| is_bind(mount));
        Some(Self {
            destination: mount["destination"].as_str()?.into(),
            source: source.map(PathBuf::from),
            is_read_only: has("ro"),
        })
    }

    /// Below a root whose links lead nowhere else. What is not there is in something that the guest alone has.
    fn make(&self, root: &OwnedFd) -> Result<()> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let target = match openat2(root, &self.destination, flags, Mode::empty(), inside) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            opened => opened?,
        };
        let shown = match &self.source {
            Some(source) => bind(source, &target, self.is_read_only).is_ok(),
            None => false,
        };
        match shown {
            true => Ok(()),
            false => hide(&target),
        }
    }
}

/// Has nobody copy anything there, if it is a directory.
fn hide(target: &OwnedFd) -> Result<()> {
    match FileType::from_raw_mode(fstat(target)?.st_mode) {
        FileType::Directory => Ok(attach(empty()?, target)?),
        _ => Ok(()),
    }
}

/// Shows a directory or file, with what is mounted below. The flags are those of the first mount alone.
fn bind(source: &Path, target: &OwnedFd, is_read_only: bool) -> io::Result<()> {
    let copy = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, copy)?;
    let is_read_only = is_read_only || fstatvfs(&tree)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    attach(&tree, target)?;
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | LOCKED;
    flags.set(MsFlags::MS_RDONLY, is_read_only);
    // By its descriptor: its path may lead elsewhere by now.
    let itself = format!("/proc/self/fd/{}", tree.as_raw_fd());
    let none = None::<&str>;
    mount(none, itself.as_str(), none, flags, none)?;
    Ok(())
}

/// A file system without anything, not attached anywhere.
fn empty() -> rustix::io::Result<OwnedFd> {
    let system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "1"), ("mode", "0")] {
        fsconfig_set_string(system.as_fd(), key, value)?;
    }
    fsconfig_create(system.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(system.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn attach(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, c"", target, c"", flags)
}

/// Into a root without anything, in a mount namespace with these files or without any. `place`: any directory that is there.
///
/// # Errors
/// Something of it cannot be shown.
pub(super) fn leave_host(place: &Path, files: Option<&Files>) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    match files {
        Some(files) => files.lay_out(place)?,
        None => attach(
            empty()?,
            open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?,
        )?,
    }
    let own = empty()?;
    chdir(place)?;
    // The old root comes to lie upon the new one (pivot_root(2)).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    fchdir(&own)?;
    chroot(".")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::symlink,
        sync::mpsc,
        thread,
    };

    use nix::{sched::setns, unistd::gettid};
    use serde_json::json;

    use super::*;

    /// Has a thread leave the host, and another go after it by its mount namespace. Needs root, as husk does.
    fn seen(place: &Path, files: Option<&Files>, look: impl FnOnce() + Send) {
        let (ready, is_ready) = mpsc::channel();
        let (done, is_done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                unshare(CloneFlags::CLONE_FS).unwrap();
                leave_host(place, files).unwrap();
                assert_eq!(fs::read_dir("/").unwrap().count(), 0);
                fs::write("/x", "").unwrap_err();
                ready.send(gettid()).unwrap();
                let _ = is_done.recv();
            });
            let proxy = is_ready.recv().unwrap();
            let namespace = File::open(format!("/proc/self/task/{proxy}/ns/mnt")).unwrap();
            let looked = scope.spawn(move || {
                unshare(CloneFlags::CLONE_FS).unwrap();
                setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
                look();
            });
            let looked = looked.join();
            drop(done);
            looked.unwrap();
        });
    }

    fn is_read_only(path: &str) -> bool {
        let error = fs::write(path, "").err();
        error.and_then(|error| error.raw_os_error()) == Some(libc::EROFS)
    }

    #[test]
    fn an_engine_finds_the_containers_files_and_nothing_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for path in [
            "root/etc",
            "root/data",
            "root/fixed",
            "root/tmp",
            "volume",
            "place",
        ] {
            fs::create_dir_all(at(path)).unwrap();
        }
        fs::write(at("root/etc/passwd"), "root").unwrap();
        fs::write(at("root/etc/hosts"), "").unwrap();
        fs::write(at("hosts"), "the engine's").unwrap();
        // A link of the container's own, that would lead to the host.
        symlink("/etc", at("root/link")).unwrap();
        let mount = |to: &str, from: &str, options: &[&str]| json!({"destination": to, "type": "bind", "source": at(from), "options": options});
        let spec = json!({
            "root": {"path": at("root")},
            "mounts": [
                mount("/data", "volume", &["rbind", "rw"]),
                mount("/fixed", "volume", &["rbind", "ro"]),
                mount("/link/hosts", "hosts", &["bind"]),
                mount("/missing/hosts", "hosts", &["bind"]),
                mount("/etc/passwd", "gone", &["bind"]),
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
        });
        fs::write(at("config.json"), spec.to_string()).unwrap();
        let files = Files::of(&at("config.json")).unwrap();
        let host = fs::read("/etc/hosts").unwrap();
        seen(&at("place"), Some(&files), || {
            let mut names: Vec<_> = fs::read_dir("/")
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            assert_eq!(names, ["data", "etc", "fixed", "link", "tmp"]);
            fs::write("/data/copied", "x").unwrap();
            fs::write("/etc/new", "x").unwrap();
            assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), "the engine's");
            assert!(is_read_only("/fixed/x") && is_read_only("/tmp/x"));
        });
        assert!(at("volume/copied").exists() && at("root/etc/new").exists());
        assert_eq!(fs::read("/etc/hosts").unwrap(), host);
    }

    #[test]
    fn without_files_there_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        seen(dir.path(), None, || {
            assert_eq!(fs::read_dir("/").unwrap().count(), 0);
            assert!(is_read_only("/x"));
        });
    }

    #[test]
    fn what_is_no_bind_mount_is_the_guests_alone() {
        let of = |mount| Mount::of(&mount).map(|mount| (mount.source, mount.is_read_only));
        let proc =
            json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro"]});
        assert_eq!(of(proc), Some((None, true)));
        let bound = json!({"destination": "/a", "source": "/b", "options": ["bind"]});
        assert_eq!(of(bound), Some((Some("/b".into()), false)));
        assert_eq!(of(json!({"type": "bind"})), None);
    }
}
