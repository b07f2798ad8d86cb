//! How the end of a VM reaches the control loop: the first cause wins, and an event wakes the loop.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Why the VM is over, as the part that noticed it saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself, which a husk guest does only after a panic.
    Reset,
    /// KVM could not go on; a sentence with vCPU, reason and registers.
    Kvm(String),
    /// A part of the VMM failed; a sentence.
    Failed(String),
}

/// Where the first [`Cause`] is kept.
#[derive(Debug)]
pub struct Ending {
    cause: Mutex<Option<Cause>>,
    event: EventFd,
}

impl Ending {
    /// An ending that has not come.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            cause: Mutex::new(None),
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// Reports a cause; later ones are its consequences and only logged.
    pub fn report(&self, cause: Cause) {
        let mut first = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            tracing::debug!(?cause, "after the end of the VM");
            return;
        }
        *first = Some(cause);
        // The counter cannot overflow with one write, which is eventfd's only way to fail.
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot signal the end of the VM");
        }
    }

    /// Readable once the VM is over.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The cause, if there is one.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_wins_and_wakes() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.cause(), None);
        assert!(ending.event.read().is_err());
        ending.report(Cause::PowerOff);
        ending.report(Cause::Failed("later".into()));
        assert_eq!(ending.cause(), Some(Cause::PowerOff));
        assert_eq!(ending.event.read().unwrap(), 1);
    }
}
