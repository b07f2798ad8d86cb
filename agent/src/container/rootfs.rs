//! The container's file system tree, from the share's rootfs to the root of the process.
//!
//! Everything is put together while the guest's own tree is still there, on descriptors below the new root; then
//! pivot_root makes the new tree the only one and the old one is let go of. (That needs a guest root which is mounted on
//! something: `boot` has seen to it.)

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, Spec};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{chdir, fchdir, pivot_root};

use super::devices;
use super::error::{LaunchError, OsError, Step};
use super::mount_options::{Bind, Propagation};
use super::mounts::{
    Prepared, attach, clone_path, clone_tree, make_read_only, new_file_system, set_root_propagation,
};
use super::namespaces::Plan;
use super::paths::{self, Missing, is_directory, resolve};

/// Where the root of a container in a user namespace is put together: root.path itself may lie behind
/// directories that the namespace's root cannot enter.
const USER_NAMESPACE_MOUNT_POINT: &str = "/run/husk/rootfs";

/// What is opened with the guest's full rights, before the container's namespaces exist.
#[derive(Debug)]
pub(crate) struct Prepare<'a> {
    spec: &'a Spec,
    tree: OwnedFd,
    mount_point: PathBuf,
    mounts: Vec<Prepared<'a>>,
    devices: devices::Prepare,
}

impl<'a> Prepare<'a> {
    /// Opens the rootfs, the sources of binds, and devices that a user namespace could not make.
    pub(crate) fn open(
        spec: &'a Spec,
        namespaces: &Plan,
        shared_cgroup: Option<&Path>,
    ) -> Result<Self, LaunchError> {
        let user_namespace = namespaces.has_user();
        let path = spec
            .root()
            .as_ref()
            .map(|root| root.path().clone())
            .unwrap_or_default();
        let tree = clone_path(&path, Bind::Recursive)
            .spec_step(|| format!("invalid rootfs: stat {}", path.display()))?;
        if !is_directory(&tree).step(|| "stat of the rootfs".to_owned())? {
            return Err(LaunchError::invalid(format!(
                "invalid rootfs: {} is not a directory",
                path.display()
            )));
        }
        let mount_point = if user_namespace {
            let mount_point = PathBuf::from(USER_NAMESPACE_MOUNT_POINT);
            std::fs::create_dir_all(&mount_point)
                .step(|| format!("creating {}", mount_point.display()))?;
            mount_point
        } else {
            path
        };
        let mounts = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| Prepared::open(mount, namespaces, shared_cgroup))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            spec,
            tree,
            mount_point,
            mounts,
            devices: devices::Prepare::open(spec, user_namespace)?,
        })
    }

    /// Puts the tree together in the container's own mount namespace.
    pub(crate) fn assemble(self) -> Result<Rootfs, LaunchError> {
        set_root_propagation(libc::MS_SLAVE, true)?;
        let target = openat(
            CWD,
            &self.mount_point,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(|| format!("opening {}", self.mount_point.display()))?;
        let slave = super::sys::MountAttributes {
            propagation: libc::MS_SLAVE,
            ..Default::default()
        };
        super::sys::mount_setattr(&self.tree, true, &slave)
            .step(|| "detaching the rootfs from the guest's mounts".to_owned())?;
        attach(&self.tree, &target).step(|| "attaching the rootfs".to_owned())?;
        let root = self.tree;
        let make_devices = !self.mounts.iter().any(Prepared::binds_dev);
        let mut late_read_only = Vec::new();
        for mount in self.mounts {
            late_read_only.extend(mount.mount(&root)?);
        }
        if make_devices {
            self.devices.make(&root)?;
        }
        make_working_directory(&root, self.spec)?;
        Ok(Rootfs {
            root,
            late_read_only,
        })
    }
}

/// An assembled tree that is not yet the process's root.
#[derive(Debug)]
pub(crate) struct Rootfs {
    root: OwnedFd,
    late_read_only: Vec<OwnedFd>,
}

impl Rootfs {
    /// Hides and protects what the spec says, makes the tree the root and lets go of the guest's. The
    /// rootfs and its tmpfs stay writable until [`Entered::finish`], for the terminal's mount point.
    pub(crate) fn enter(self, linux: &Linux) -> Result<Entered, LaunchError> {
        for path in linux.readonly_paths().iter().flatten() {
            protect(&self.root, Path::new(path))?;
        }
        for path in linux.masked_paths().iter().flatten() {
            mask(&self.root, Path::new(path))?;
        }
        fchdir(&self.root).step(|| "entering the rootfs".to_owned())?;
        pivot_root(".", ".").step(|| "pivot_root".to_owned())?;
        // The old root lies on top of the new one now, and "." is the old one.
        unmount(".", UnmountFlags::DETACH).step(|| "unmounting the old root".to_owned())?;
        chdir("/").step(|| "chdir to the new root".to_owned())?;
        Ok(Entered {
            late_read_only: self.late_read_only,
        })
    }
}

/// The process's root, still writable where it is not to stay so.
#[derive(Debug)]
pub(crate) struct Entered {
    late_read_only: Vec<OwnedFd>,
}

impl Entered {
    /// The last settings of the mounts, the root's among them.
    pub(crate) fn finish(self, spec: &Spec) -> Result<(), LaunchError> {
        for mount in self.late_read_only {
            make_read_only(&mount)?;
        }
        let propagation = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.rootfs_propagation().as_deref())
            .and_then(Propagation::parse);
        if let Some(propagation) = propagation {
            set_root_propagation(propagation.kind, propagation.recursive)?;
        }
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()) == Some(true);
        if read_only {
            let root = paths::open_guest(Path::new("/")).step(|| "opening /".to_owned())?;
            make_read_only(&root)?;
        }
        Ok(())
    }
}

/// runc makes a missing working directory, owned by root.
fn make_working_directory(root: &OwnedFd, spec: &Spec) -> Result<(), LaunchError> {
    let Some(process) = spec.process() else {
        return Ok(());
    };
    match resolve(root, process.cwd(), Missing::MakeDirectory) {
        // A file there, or a link to one: chdir will say so.
        Ok(_) | Err(Errno::NOTDIR) => Ok(()),
        Err(errno) => Err(LaunchError::invalid(format!(
            "creating the working directory {:?}: {}",
            process.cwd(),
            errno.text()
        ))),
    }
}

/// Opens a path to mask or protect; a missing one needs neither.
fn existing(root: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, LaunchError> {
    match resolve(root, path, Missing::Fail) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(LaunchError::internal(format!(
            "opening {}: {}",
            path.display(),
            errno.text()
        ))),
    }
}

fn protect(root: &OwnedFd, path: &Path) -> Result<(), LaunchError> {
    let Some(target) = existing(root, path)? else {
        return Ok(());
    };
    let what = || format!("making {} read-only", path.display());
    let copy = clone_tree(&target, Bind::Recursive).step(what)?;
    make_read_only(&copy)?;
    attach(&copy, &target).step(what)
}

fn mask(root: &OwnedFd, path: &Path) -> Result<(), LaunchError> {
    let Some(target) = existing(root, path)? else {
        return Ok(());
    };
    let what = || format!("masking {}", path.display());
    if is_directory(&target).step(what)? {
        let empty = new_file_system(
            "tmpfs",
            Some("tmpfs"),
            &[],
            &[("nr_blocks", Some("1")), ("nr_inodes", Some("1"))],
        )
        .map_err(|reason| LaunchError::internal(format!("{}: {reason}", what())))?;
        make_read_only(&empty)?;
        return attach(&empty, &target).step(what);
    }
    // The guest's own /dev/null: the container's could be anything.
    let null = guest_device(Path::new("/dev/null"))?;
    attach(&null, &target).step(what)
}

/// Opens the tree of a device of the guest, for a container that cannot make its own. Read-only: that leaves the device
/// as it is, and keeps the container from changing the mode or owner that it has for everyone.
pub(crate) fn guest_device(path: &Path) -> Result<OwnedFd, LaunchError> {
    let device = clone_path(path, Bind::Single).step(|| format!("opening {}", path.display()))?;
    make_read_only(&device)?;
    Ok(device)
}

/// Opens the guest's /dev/null for a process of a container, through a mount of its own that is read-only: whoever owned the
/// file could otherwise change its mode through the descriptor.
pub(crate) fn open_null(access: OFlags) -> io::Result<OwnedFd> {
    let null = guest_device(Path::new("/dev/null")).map_err(io::Error::other)?;
    // By the link that leads to this very mount. The open file keeps the mount.
    let link = format!("/proc/self/fd/{}", null.as_raw_fd());
    Ok(openat(CWD, link, access | OFlags::CLOEXEC, Mode::empty())?)
}

/// Puts a device of the guest at a path of the container.
pub(crate) fn attach_device(source: impl AsFd, root: impl AsFd, path: &Path) -> Result<(), Errno> {
    let target = resolve(root, path, Missing::MakeFile)?;
    attach(source, target)
}
