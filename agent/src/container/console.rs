//! The container's terminal: a pty of its own devpts, so that its name means something inside.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Process;
use rustix::fs::{CWD, Mode, OFlags, fstatfs, openat};
use rustix::pty::unlockpt;

use super::error::{LaunchError, Step};
use super::mount_options::Bind;
use super::mounts::{attach, clone_tree};
use super::paths::{Missing, open_guest, resolve};
use crate::terminal;

/// f_type of devpts.
const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Both ends of a terminal.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Console {
    /// Opens a terminal; the process is inside the container's mount namespace.
    pub(crate) fn open(process: &Process) -> Result<Self, LaunchError> {
        let master = openat(
            CWD,
            "/dev/pts/ptmx",
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .spec_step(|| "opening a terminal at /dev/pts/ptmx (is devpts mounted?)".to_owned())?;
        // In an exec the path is what the container has made of it: no ioctl on anything but a terminal.
        let devpts = fstatfs(&master).is_ok_and(|fs| fs.f_type == DEVPTS_SUPER_MAGIC);
        if !devpts {
            return Err(LaunchError::invalid(
                "opening a terminal at /dev/pts/ptmx: it is not on a devpts file system",
            ));
        }
        unlockpt(&master).step(|| "unlocking the terminal".to_owned())?;
        // Not by its path, which the image could have covered.
        let slave = terminal::open_other_end(&master)
            .step(|| "opening the terminal's other end".to_owned())?;
        if let Some(size) = process.console_size() {
            let cells = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
            terminal::resize(&master, cells(size.width()), cells(size.height()))
                .step(|| "setting the terminal's size".to_owned())?;
        }
        Ok(Self { master, slave })
    }

    /// Shows the terminal as /dev/console. The process's root is the container's, still writable.
    pub(crate) fn bind_dev_console(&self) -> Result<(), LaunchError> {
        let what = || "mounting the terminal at /dev/console".to_owned();
        let root = open_guest(Path::new("/")).step(what)?;
        let target = resolve(&root, Path::new("/dev/console"), Missing::MakeFile).step(what)?;
        let tree = clone_tree(&self.slave, Bind::Single).step(what)?;
        attach(&tree, &target).step(what)
    }

    /// Makes it the controlling terminal of this session.
    pub(crate) fn control(&self) -> Result<(), LaunchError> {
        rustix::process::ioctl_tiocsctty(self.slave.as_fd())
            .step(|| "taking the controlling terminal".to_owned())
    }
}
