//! A tap, checked once: after that, packets go in and out of it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::raw::{c_int, c_uint};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::VolatileSlice;

use super::ioctl::{self, Interface};
use super::{HEADER_BYTES, io as packets};

/// Why descriptors are not the queues of a tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Something else.
    #[error("a descriptor that came with the request is not a tap (or its interface is gone)")]
    NotATap(#[source] io::Error),
    /// Made in another way.
    #[error("the interface {name} was made without {missing}, which a VM's network device needs")]
    Flags {
        /// Interface.
        name: String,
        /// Names of the flags.
        missing: String,
    },
    /// Queues of several interfaces.
    #[error(
        "the tap descriptors that came with the request belong to {0} and {1}: one device has one tap"
    )]
    Mixed(String, String),
    /// The kernel refused a setting.
    #[error("cannot set {what} of the tap {name}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// Interface.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

/// What a tap has to give.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet of so many bytes, its header included.
    Packet(usize),
    /// None now.
    Nothing,
    /// A packet that could not be had, and is lost.
    Lost,
    /// None any more: the queue is out of use, or the interface gone.
    Gone,
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Taken,
    /// The tap takes none now; it is writable when it does.
    Full,
    /// The tap does not want it: malformed, or the interface is down or gone.
    Dropped,
}

impl Tap {
    /// For waiting.
    pub fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes the next packet into `slices`; one of more bytes than they have has been cut.
    ///
    /// # Errors
    /// What is the matter with the host.
    pub fn receive(&self, slices: &[VolatileSlice<'_>]) -> io::Result<Received> {
        match packets::receive(self.fd.as_fd(), slices) {
            Ok(count) => Ok(Received::Packet(count)),
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                // Interrupted: it is still there, and so is the event that says so.
                Errno::EAGAIN | Errno::EINTR => Ok(Received::Nothing),
                Errno::EBADFD => Ok(Received::Gone),
                Errno::EINVAL => Ok(Received::Lost),
                _ => Err(error),
            },
        }
    }

    /// Sends `slices` as one packet.
    pub fn send(&self, slices: &[VolatileSlice<'_>]) -> Sent {
        match packets::send(self.fd.as_fd(), slices) {
            Ok(()) => Sent::Taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            Err(error) => {
                tracing::debug!(%error, "the tap refuses a packet");
                Sent::Dropped
            }
        }
    }
}

/// The queues of one tap, of which the first few are in use.
#[derive(Debug)]
pub struct Taps {
    name: String,
    queues: Vec<Arc<Tap>>,
    in_use: usize,
}

impl Taps {
    /// Checks that `fds` are queues of one tap, and sets it up as a network device needs it. All of them are in use.
    ///
    /// # Errors
    /// [`TapError`]; none at all are [`TapError::NotATap`].
    pub fn adopt(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut names = Vec::with_capacity(fds.len());
        for fd in &fds {
            let interface = ioctl::interface(fd.as_fd()).map_err(TapError::NotATap)?;
            check_flags(&interface, fds.len() > 1)?;
            names.push(interface.name);
        }
        let mut names = names.into_iter();
        let name = names
            .next()
            .ok_or_else(|| TapError::NotATap(io::ErrorKind::NotFound.into()))?;
        if let Some(other) = names.find(|other| *other != name) {
            return Err(TapError::Mixed(name, other));
        }
        let in_use = fds.len();
        let queues = fds.into_iter().map(|fd| Arc::new(Tap { fd })).collect();
        let taps = Self {
            name,
            queues,
            in_use,
        };
        for tap in &taps.queues {
            taps.set("non-blocking mode", not_blocking(tap).map_err(Into::into))?;
        }
        // These belong to the interface, whichever queue they are set through.
        taps.each_setting("the header's length", |tap| {
            ioctl::set_header_len(tap.fd.as_fd(), c_int::from(HEADER_BYTES))
        })?;
        taps.each_setting("the header's byte order", |tap| {
            ioctl::set_header_little_endian(tap.fd.as_fd())
        })?;
        Ok(taps)
    }

    /// Sets what the tap may leave to the guest (see [`super::features::offloads`]).
    ///
    /// # Errors
    /// [`TapError::Setting`].
    pub fn set_offloads(&self, offloads: c_uint) -> Result<(), TapError> {
        self.each_setting("offloads", |tap| {
            ioctl::set_offloads(tap.fd.as_fd(), offloads)
        })
    }

    /// Uses the first `count` queues, at least one and at most all; the interface puts no packets into the others.
    ///
    /// # Errors
    /// [`TapError::Setting`]; as many are in use as could be set then.
    pub fn use_queues(&mut self, count: usize) -> Result<(), TapError> {
        let count = count.clamp(1, self.queues.len().max(1));
        while self.in_use != count {
            let more = self.in_use < count;
            // One more is no more than all of them, one less no less than one.
            let index = if more {
                self.in_use
            } else {
                self.in_use.saturating_sub(1)
            };
            if let Some(tap) = self.queues.get(index) {
                let set = ioctl::set_queue_in_use(tap.fd.as_fd(), more);
                self.set("the queues in use", set)?;
            }
            self.in_use = if more { index.saturating_add(1) } else { index };
        }
        Ok(())
    }

    /// The queue for a pair of the device, and whether it is that pair's alone to receive from. A pair that has none of its own
    /// may send through another's.
    pub fn for_pair(&self, pair: usize) -> Option<(Arc<Tap>, bool)> {
        let index = pair.checked_rem(self.in_use)?;
        let tap = self.queues.get(index)?;
        Some((Arc::clone(tap), index == pair))
    }

    fn each_setting(
        &self,
        what: &'static str,
        set: impl Fn(&Tap) -> io::Result<()>,
    ) -> Result<(), TapError> {
        // One that is in use, since the others have no interface.
        match self.queues.first() {
            Some(tap) => self.set(what, set(tap)),
            None => Ok(()),
        }
    }

    fn set(&self, what: &'static str, result: io::Result<()>) -> Result<(), TapError> {
        if cfg!(feature = "fuzzing") {
            // What stands in for a tap has no settings.
            return Ok(());
        }
        result.map_err(|source| TapError::Setting {
            what,
            name: self.name.clone(),
            source,
        })
    }

    /// Anything that packets can be read from and written to, for tests of what a tap seldom does.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn unchecked(fd: OwnedFd) -> Self {
        Self {
            name: "test".into(),
            queues: vec![Arc::new(Tap { fd })],
            in_use: 1,
        }
    }
}

fn not_blocking(tap: &Tap) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&tap.fd, FcntlArg::F_GETFL)?);
    fcntl(&tap.fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

fn check_flags(interface: &Interface, several: bool) -> Result<(), TapError> {
    let mut wanted = vec![
        (libc::IFF_TAP, "IFF_TAP"),
        // IFF_NO_PI cannot be asked for: TUNGETIFF sets the same bit when no socket filter is attached (IFF_NOFILTER).
        (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
    ];
    if several {
        wanted.push((libc::IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"));
    }
    let missing: Vec<_> = wanted
        .into_iter()
        .filter(|(flag, _)| interface.flags & flag == 0)
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(TapError::Flags {
        name: interface.name.clone(),
        missing: missing.join(", "),
    })
}
