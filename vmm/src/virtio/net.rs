//! virtio-net (virtio 1.2, 5.1): an Ethernet device whose other end is a tap of the host.
//!
//! The kernel's tap speaks virtio's own packet header, so that packets and their offloads (checksums and TCP segments left to
//! whoever comes later) go between the tap and guest memory in one system call and without a copy. Each pair of
//! queues has a thread of its own; a tap has a queue for each pair, or fewer.
//!
//! The device is there before its tap: the guest boots while the shim looks for the pod's network. It starts without a link, and
//! [`NicHandle::attach`] gives it one, before or after the driver has come up.
//!
//! - `features`: what is offered, and what of it is the tap's to do.
//! - `link`: the tap, whether the driver is up, and which queues are in use; what device, handle and threads share.
//! - `tap`: a checked tap; `ioctl` and `io` are its system calls.
//! - `vhost`: the host's kernel in place of the threads, where it has vhost-net. The control queue stays here, and so do queues without
//!   a tap.
//! - `pair`: the thread of a pair of queues; `rx`, `tx` and `ctrl` are what it does with each.

mod ctrl;
mod features;
mod io;
mod ioctl;
mod link;
mod pair;
mod rx;
mod tap;
mod tx;
mod vhost;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::ctrl::Ctrl;
pub use self::ioctl::open as open_tap;
use self::link::{Driver, Link};
use self::pair::Pair;
use self::rx::Rx;
pub use self::tap::TapError;
use self::tap::Taps;
use self::tx::Tx;
pub use self::vhost::{Vhost, VhostError};
use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_bytes};
use crate::jail::seccomp::Kind;

const DEVICE_ID: u32 = 1;

/// Descriptors of each queue. Linux fills the receive queue with buffers of 1.5 to 4 KiB: enough for several of the largest packets,
/// and no more than a mebibyte of the guest's memory.
const QUEUE_SIZE: u16 = 256;

/// Bytes of the header in front of each packet (5.1.6): `struct virtio_net_hdr_v1`.
const HEADER_LEN: usize = HEADER_BYTES as usize;
const HEADER_BYTES: u8 = 12;

/// Bytes of the largest packet: the header, an Ethernet header with a VLAN tag, and what one IP packet left whole
/// may have (`GSO_MAX_SIZE` of Linux).
const MAX_PACKET: usize = HEADER_LEN + 14 + 4 + 65536;

/// The network device.
pub struct Net {
    pairs: u16,
    features: u64,
    queue_sizes: Vec<u16>,
    /// The address after a reset.
    mac: [u8; 6],
    link: Arc<Link>,
    worker: Option<Worker>,
}

/// Gives a network device its tap.
#[derive(Clone)]
pub struct NicHandle {
    link: Arc<Link>,
    pairs: u16,
}

/// Index of a pair's receive queue (5.1.2). A device has a few pairs ([`husk_protocol::vm::MAX_QUEUE_PAIRS`]).
fn rx_index(pair: u16) -> u16 {
    pair.saturating_mul(2)
}

/// Index of a pair's transmit queue.
fn tx_index(pair: u16) -> u16 {
    rx_index(pair).saturating_add(1)
}

impl Net {
    /// A device with this address and so many `pairs` of queues (at least one), and the handle that connects it.
    pub fn new(mac: [u8; 6], pairs: u16) -> (Self, NicHandle) {
        let pairs = pairs.max(1);
        let link = Arc::new(Link::new(mac));
        let handle = NicHandle {
            link: Arc::clone(&link),
            pairs,
        };
        let net = Self {
            pairs,
            features: features::offered(pairs),
            // A receive and a transmit queue each, and the control queue.
            queue_sizes: vec![QUEUE_SIZE; usize::from(tx_index(pairs))],
            mac,
            link,
            worker: None,
        };
        (net, handle)
    }

    /// What each pair's thread works with, and what wakes it. The control queue goes to the first.
    fn take_queues(
        &self,
        activation: Activation,
    ) -> Result<(Vec<Pair>, Vec<EventFd>), ActivateError> {
        let features = activation.features;
        let mut queues = activation.queues;
        let mut take = |index: u16| {
            queues
                .get_mut(usize::from(index))
                .and_then(Option::take)
                .ok_or(ActivateError::MissingQueue(index))
        };
        let most = if features::has(features, features::MQ) {
            self.pairs
        } else {
            1
        };
        let interrupt = || Arc::clone(&activation.interrupt);
        // 5.1.2: behind the queues of those pairs that the driver knows of.
        let index = rx_index(most);
        let mut ctrl = features::has(features, features::CTRL_VQ)
            .then(|| take(index))
            .transpose()?
            .map(|queue| {
                let link = Arc::clone(&self.link);
                Ctrl::new(queue, index, interrupt(), features, link)
            });
        let (mut pairs, mut wakes) = (Vec::new(), Vec::new());
        for pair in 0..most {
            let (rx, tx) = match (take(rx_index(pair)), take(tx_index(pair))) {
                (Ok(rx), Ok(tx)) => (rx, tx),
                (Err(error), _) | (_, Err(error)) if pair == 0 => return Err(error),
                // A driver need not use all that there are.
                _ => break,
            };
            let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .and_then(|wake| Ok((wake.try_clone()?, wake)))
                .map_err(ActivateError::host("making a network device's eventfd"))?;
            wakes.push(wake.1);
            pairs.push(Pair::new(
                pair.into(),
                activation.memory.clone(),
                Arc::clone(&self.link),
                wake.0,
                Rx::new(rx, rx_index(pair), interrupt(), features),
                Tx::new(tx, tx_index(pair), interrupt()),
                ctrl.take(),
            ));
        }
        Ok((pairs, wakes))
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // 5.1.4: address, status and pairs of queues; what follows belongs to features not offered.
        let ([m0, m1, m2, m3, m4, m5], up) = self.link.config();
        let [s0, s1] = features::status(up).to_le_bytes();
        let [p0, p1] = self.pairs.to_le_bytes();
        read_bytes(&[m0, m1, m2, m3, m4, m5, s0, s1, p0, p1], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let features = activation.features;
        let (pairs, wakes) = self.take_queues(activation)?;
        let driver = Driver {
            features,
            interrupt: Arc::clone(&interrupt),
            wakes,
        };
        self.link
            .driver_up(driver)
            .map_err(|error| ActivateError::Host {
                what: "setting the tap up for the guest's driver".into(),
                source: std::io::Error::other(error),
            })?;
        match Worker::spawn(Kind::Net, &interrupt, pairs) {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => {
                self.link.driver_down(self.mac);
                return Err(error);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.link.driver_down(self.mac);
    }
}

impl NicHandle {
    /// Connects the device to a tap, by a descriptor for each of the tap's queues: the guest sees its link come up. `vhosts` carry
    /// the packets, where there is one for each of those queues; none at all, and this process does.
    ///
    /// # Errors
    /// [`AttachError`]; the device is as it was then.
    pub fn attach(&self, fds: Vec<OwnedFd>, vhosts: Vec<Vhost>) -> Result<(), AttachError> {
        if fds.is_empty() || fds.len() > usize::from(self.pairs) {
            return Err(AttachError::Count {
                given: fds.len(),
                most: self.pairs,
            });
        }
        self.link.attach(Taps::adopt(fds)?, vhosts)
    }

    /// Connects the device to a non-blocking socket that keeps packets apart.
    ///
    /// # Errors
    /// As [`Self::attach`].
    #[cfg(feature = "fuzzing")]
    pub fn attach_socket(&self, socket: OwnedFd) -> Result<(), AttachError> {
        self.link.attach(Taps::unchecked(socket), vec![])
    }
}

/// Why a network device was not connected.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It has a tap.
    #[error("it is connected already")]
    Attached,
    /// Not a descriptor for each of 1 to so many queues.
    #[error(
        "{given} tap descriptors came with the request: it takes one for each queue of the tap, 1 to {most}"
    )]
    Count {
        /// Descriptors that came.
        given: usize,
        /// Pairs of queues of the device.
        most: u16,
    },
    /// Not a tap, or one that the device cannot use.
    #[error(transparent)]
    Tap(#[from] TapError),
}

#[cfg(test)]
mod tests;
