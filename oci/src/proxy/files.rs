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
        CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, makedev,
        mkdirat, mknodat, open, openat2,
    },
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
        open_tree,
    },
};
use serde_json::Value;

use crate::spec::{is_bind, read_json};

/// Nobody on the host opens a device or runs a program of a container's.
const LOCKED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// A container's terminals: the major number of those of a devpts (Linux, `Documentation/admin-guide/devices.txt`), and how many are shown.
const TERMINAL: u32 = 136;
const TERMINALS: u32 = 8;

/// One mount of a container's.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    destination: PathBuf,
    kind: Kind,
    is_read_only: bool,
}

/// What a mount is of.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A directory or file of this host.
    Bind(PathBuf),
    /// A procfs, of which there is something to be told.
    Proc,
    /// `/dev`, in which somebody may look for terminals.
    Devices,
    /// Those.
    Terminals,
    /// Something else that the guest alone has.
    Guests,
}

/// What a container has, of this host.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    mounts: Vec<Mount>,
    proc: Option<OwnedFd>,
}

impl Files {
    /// Of the spec that the shim has been given, and a file system for where the container has a procfs, if there is one.
    pub(super) fn of(spec: &Path, proc: Option<OwnedFd>) -> Result<Self> {
        let spec = read_json(spec)?;
        let root = spec["root"]["path"].as_str();
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        Ok(Self {
            root: root.context("the spec has no root.path")?.into(),
            mounts: mounts.filter_map(Mount::of).collect(),
            proc,
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
        // Last, as nobody serves it yet who could say what is below.
        let place = self.mounts.iter().rfind(|mount| mount.kind == Kind::Proc);
        if let (Some(proc), Some(place)) = (&self.proc, place)
            && let Some(target) = place.target(&root)?
        {
            attach(proc, &target).context("showing the processes")?;
        }
        Ok(())
    }
}

impl Mount {
    fn of(mount: &Value) -> Option<Self> {
        let options = mount["options"].as_array();
        let has = |name: &str| options.is_some_and(|list| list.iter().any(|o| o == name));
        let destination = mount["destination"].as_str()?;
        let kind = match (mount["type"].as_str(), mount["source"].as_str()) {
            (_, Some(source)) if is_bind(mount) => Kind::Bind(source.into()),
            (Some("proc"), _) => Kind::Proc,
            (Some("tmpfs"), _) if destination == "/dev" => Kind::Devices,
            (Some("devpts"), _) => Kind::Terminals,
            _ => Kind::Guests,
        };
        Some(Self {
            destination: destination.into(),
            kind,
            is_read_only: has("ro"),
        })
    }

    /// Where it goes, below a root whose links lead nowhere else. What is not there is in something that the guest alone has.
    fn target(&self, root: &OwnedFd) -> Result<Option<OwnedFd>> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        match openat2(root, &self.destination, flags, Mode::empty(), inside) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            opened => Ok(Some(opened?)),
        }
    }

    fn make(&self, root: &OwnedFd) -> Result<()> {
        let Some(target) = self.target(root)? else {
            return Ok(());
        };
        let shown = match &self.kind {
            Kind::Bind(source) if bind(source, &target, self.is_read_only).is_ok() => return Ok(()),
            // Nobody copies anything there, if it is a directory.
            _ if !is_directory(&target)? => return Ok(()),
            Kind::Devices => devices(),
            Kind::Terminals => terminals(),
            Kind::Bind(_) | Kind::Proc | Kind::Guests => empty(),
        };
        Ok(attach(shown?, &target)?)
    }
}

fn is_directory(file: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::Directory)
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
    fixed(0, |_| Ok(()))
}

/// One with a place for [`terminals`].
fn devices() -> rustix::io::Result<OwnedFd> {
    fixed(1, |root| mkdirat(root, "pts", Mode::from(0o555)))
}

/// What a process' terminal is found by (`podman top`): the numbers of those that a container has, which nobody can open here.
fn terminals() -> rustix::io::Result<OwnedFd> {
    fixed(TERMINALS, |root| {
        (0..TERMINALS).try_for_each(|number| {
            let device = makedev(TERMINAL, number);
            let name = number.to_string();
            mknodat(
                root,
                name,
                FileType::CharacterDevice,
                Mode::from(0o600),
                device,
            )
        })
    })
}

/// A file system with these entries that nobody can write to, not attached anywhere.
fn fixed(
    entries: u32,
    make: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
) -> rustix::io::Result<OwnedFd> {
    let inodes = (entries + 1).to_string();
    let options = [("size", "4k"), ("nr_inodes", &*inodes), ("mode", "0")];
    let (system, root) = detached("tmpfs", &options, MountAttrFlags::empty())?;
    make(&root)?;
    fsconfig_set_flag(system.as_fd(), "ro")?;
    fsconfig_reconfigure(system.as_fd())?;
    Ok(root)
}

/// A new file system of this type, and its mount, which is not attached anywhere, with these attributes and those of [`LOCKED`].
pub(super) fn detached(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let system = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(system.as_fd(), *key, *value)?;
    }
    fsconfig_create(system.as_fd())?;
    let attributes = attributes
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(system.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok((system, mount))
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
        os::unix::fs::{MetadataExt as _, symlink},
        sync::mpsc,
        thread,
    };

    use nix::{sched::setns, unistd::gettid};
    use serde_json::json;

    use super::{
        super::{proc_fs::ProcFs, processes::Processes},
        *,
    };

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
            "root/proc",
            "root/dev",
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
        let (proc, told) = ProcFs::new().unwrap();
        let spec = json!({
            "root": {"path": at("root")},
            "mounts": [
                mount("/data", "volume", &["rbind", "rw"]),
                mount("/fixed", "volume", &["rbind", "ro"]),
                mount("/link/hosts", "hosts", &["bind"]),
                mount("/missing/hosts", "hosts", &["bind"]),
                mount("/etc/passwd", "gone", &["bind"]),
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
                mount("/proc/version", "hosts", &["bind"]),
            ],
        });
        fs::write(at("config.json"), spec.to_string()).unwrap();
        let files = Files::of(&at("config.json"), Some(told)).unwrap();
        proc.serve(Box::new(|| Some(Processes::default()))).unwrap();
        let host = fs::read("/etc/hosts").unwrap();
        seen(&at("place"), Some(&files), || {
            let mut names: Vec<_> = fs::read_dir("/")
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            assert_eq!(
                names,
                ["data", "dev", "etc", "fixed", "link", "proc", "tmp"]
            );
            fs::write("/data/copied", "x").unwrap();
            fs::write("/etc/new", "x").unwrap();
            assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), "the engine's");
            assert!(is_read_only("/fixed/x") && is_read_only("/tmp/x"));
            assert_eq!(fs::read_to_string("/proc/stat").unwrap(), "btime 0\n");
            assert_eq!(fs::read_dir("/proc").unwrap().count(), 1);
            assert_eq!(fs::metadata("/dev/pts/7").unwrap().rdev(), makedev(136, 7));
            assert!(File::open("/dev/pts/0").is_err());
            assert!(is_read_only("/dev/x") && is_read_only("/dev/pts/x"));
        });
        assert!(at("volume/copied").exists() && at("root/etc/new").exists());
        assert_eq!(fs::read("/etc/hosts").unwrap(), host);
    }

    #[test]
    fn without_fuse_nothing_is_told_of_processes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("root/proc")).unwrap();
        fs::create_dir(at("place")).unwrap();
        let proc = json!({"destination": "/proc", "type": "proc", "source": "proc"});
        let spec = json!({"root": {"path": at("root")}, "mounts": [proc]});
        fs::write(at("config.json"), spec.to_string()).unwrap();
        let files = Files::of(&at("config.json"), None).unwrap();
        seen(&at("place"), Some(&files), || {
            assert_eq!(fs::read_dir("/proc").unwrap().count(), 0);
            assert!(is_read_only("/proc/x"));
        });
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
        let of = |mount| Mount::of(&mount).map(|mount| (mount.kind, mount.is_read_only));
        let proc =
            json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro"]});
        assert_eq!(of(proc), Some((Kind::Proc, true)));
        let tmpfs = |at| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"});
        assert_eq!(of(tmpfs("/dev")), Some((Kind::Devices, false)));
        assert_eq!(of(tmpfs("/tmp")), Some((Kind::Guests, false)));
        let bound =
            json!({"destination": "/proc", "type": "proc", "source": "/b", "options": ["rbind"]});
        assert_eq!(of(bound), Some((Kind::Bind("/b".into()), false)));
        let bound = json!({"destination": "/a", "source": "/b", "options": ["bind"]});
        assert_eq!(of(bound), Some((Kind::Bind("/b".into()), false)));
        assert_eq!(of(json!({"type": "bind"})), None);
    }
}
