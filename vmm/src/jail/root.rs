//! The root that the process has: an empty, read-only directory with the shares in it.
//!
//! ```text
//! /           tmpfs, read-only
//! /share0     the pod's share, a slave of the shim's: what that mounts for a container appears here
//! ```
//!
//! Nothing else of the host is to be reached by any path. That needs care with descriptors, as one of a directory outside is a way there
//! (`..`): those of the shares are closed for new ones from inside, and that of `/proc/self/fd`, by which the file server
//! opens a file that it knows, is of a mount of that directory alone, attached to nothing.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{chdir, pivot_root};

use super::JailError;
use crate::parts::Share;

/// Where the new root is put together: a directory of every host that nothing is needed of.
const TREE: &str = "/dev";

/// The process' own descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

const O_DIR: OFlag = OFlag::O_PATH
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// A directory to serve, and how the file server gets at it.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    /// By which it is opened.
    path: String,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
}

impl Root {
    /// A directory, as long as the process is in no jail.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn outside(directory: OwnedFd) -> nix::Result<Self> {
        Ok(Self {
            // The final dot makes the kernel follow the link: the file server opens its root without.
            path: format!("{DESCRIPTORS}/{}/.", directory.as_raw_fd()),
            descriptors: open(DESCRIPTORS, O_DIR, Mode::empty())?,
            directory,
        })
    }

    /// The directory itself.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// By which it is opened.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `/proc/self/fd`.
    #[must_use]
    pub fn descriptors(&self) -> BorrowedFd<'_> {
        self.descriptors.as_fd()
    }
}

/// Makes the root, and the namespaces that the process can make itself.
///
/// # Errors
/// [`JailError`].
pub fn enter(shares: &mut [Share]) -> Result<(), JailError> {
    // Their paths are those of the shim's mount namespace, which is still this process' own.
    let outside = shares
        .iter()
        .map(|share| {
            fs::read_link(format!(
                "{DESCRIPTORS}/{}",
                share.root.directory.as_raw_fd()
            ))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(JailError::step("find the share"))?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(JailError::step("make namespaces"))?;
    // Nothing that happens here is seen outside; the shares go on hearing from the shim, whose slaves they are already.
    set_flags("/", MsFlags::MS_REC | MsFlags::MS_SLAVE)
        .map_err(JailError::step("set the mounts apart from the host's"))?;
    let inside = build(&outside).map_err(JailError::step("build the root directory"))?;
    let descriptors = lone_descriptors().map_err(JailError::step("open /proc/self/fd"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | LOCKED;
    set_flags(TREE, read_only).map_err(JailError::step("make the root directory read-only"))?;
    change_root().map_err(JailError::step(
        "change the root directory (pivot_root, which a root file system in RAM has not)",
    ))?;
    for (share, path) in shares.iter_mut().zip(inside) {
        move_in(share, path, &descriptors)?;
    }
    Ok(())
}

const LOCKED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

fn set_flags(at: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
}

fn bind(from: &Path, to: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(from), to, None::<&str>, flags, None::<&str>)
}

/// Puts the tree together, for whatever user this process will be: nobody else sees it. Where the shares will be in it.
fn build(shares: &[PathBuf]) -> std::io::Result<Vec<String>> {
    mount(
        Some("husk"),
        TREE,
        Some("tmpfs"),
        LOCKED,
        Some("mode=0755,size=64k"),
    )?;
    let mut inside = Vec::new();
    for (number, share) in shares.iter().enumerate() {
        let path = format!("/share{number}");
        let target = PathBuf::from(format!("{TREE}{path}"));
        fs::create_dir(&target)?;
        bind(share, &target)?;
        inside.push(path);
    }
    Ok(inside)
}

/// `/proc/self/fd` as the root of a mount that is attached nowhere: `..` does not lead into the host's /proc.
fn lone_descriptors() -> std::io::Result<OwnedFd> {
    let target = PathBuf::from(TREE).join("fd");
    fs::create_dir(&target)?;
    bind(Path::new(DESCRIPTORS), &target)?;
    let descriptors = open(&target, O_DIR, Mode::empty())?;
    umount2(&target, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&target)?;
    Ok(descriptors)
}

fn change_root() -> nix::Result<()> {
    chdir(TREE)?;
    // The old root comes to lie upon the new one (pivot_root(2), NOTES), and goes.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

/// Takes a share's new directory for its old one, which is outside.
fn move_in(share: &mut Share, path: String, descriptors: &OwnedFd) -> Result<(), JailError> {
    let directory = open(path.as_str(), O_DIR, Mode::empty());
    let directory = directory.map_err(JailError::step("open the share"))?;
    let identity = |fd: BorrowedFd<'_>| {
        let stat = fstat(fd).map_err(JailError::step("examine the share"))?;
        Ok::<_, JailError>((stat.st_dev, stat.st_ino))
    };
    if identity(directory.as_fd())? != identity(share.root.directory.as_fd())? {
        return Err(JailError::Moved(share.tag.clone()));
    }
    let descriptors = descriptors.try_clone();
    share.root = Root {
        directory,
        path,
        descriptors: descriptors.map_err(JailError::step("duplicate a descriptor"))?,
    };
    Ok(())
}
