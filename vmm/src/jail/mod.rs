//! The jail: what this process still has when its guest begins to run.
//!
//! A guest is hostile, and one bug of the devices may hand this process to it. What it gets then is a process that sees its pod's files
//! and nothing else: a root of its own with only the share below it ([`root`]), namespaces of its own, users of its own where the kernel
//! can show it the share so, the file server's capabilities
//! and no way to more of them ([`privileges`]), the share once more where the host has [`landlock`], and system calls by lists
//! ([`seccomp`]). Whatever step fails, the VM does not start.
//!
//! The shim has its part: it starts this process in PID and network namespaces of its own, with the descriptors it may use and nothing in
//! its environment, and every mount of the share with `nosuid`, `nodev` and `noexec`: nobody here opens a device or runs a program.
//!
//! What a debugger has with `husk-vmm run` is not jailed, as its files are the host's; its threads have their filters.

pub mod landlock;
pub mod privileges;
pub mod root;
pub mod seccomp;

use std::io;
use std::os::fd::OwnedFd;

use crate::parts::Share;

/// A step into the jail that failed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Started by something else than the shim.
    #[error(
        "husk-vmm must be the first process of a PID namespace, and has PID {0}: the shim that started it is of another version"
    )]
    PidNamespace(i32),
    /// The kernel refused a step.
    #[error("cannot {doing}, which the VMM's jail needs")]
    Step {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel has Landlock and refused.
    #[error("cannot restrict the VMM by Landlock")]
    Landlock(#[from] ::landlock::RulesetError),
    /// Another directory than the one that was handed over.
    #[error("the share {0} has moved while the VMM went into its jail")]
    Moved(String),
}

impl JailError {
    fn step<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Step {
            doing,
            source: source.into(),
        }
    }
}

/// Goes in, with `shares`, whose directories are found inside from then on, and as user 0 of the user namespace `users`, if there is one.
/// Only while this process has one thread.
///
/// # Errors
/// [`JailError`]; the process must end then.
pub fn enter(shares: &mut [Share], users: Option<OwnedFd>) -> Result<(), JailError> {
    match nix::unistd::getpid().as_raw() {
        1 => {}
        other => return Err(JailError::PidNamespace(other)),
    }
    privileges::raise_descriptor_limit()?;
    #[cfg(feature = "weakened")]
    if crate::weakened::Safeguard::Jail.is_left_out() {
        return Ok(());
    }
    root::enter(shares)?;
    // The namespaces made until now are not this one's, whose capabilities say nothing of them.
    if let Some(users) = users {
        privileges::change_users(users)?;
    }
    privileges::give_up()?;
    landlock::enter(shares)?;
    Ok(())
}
