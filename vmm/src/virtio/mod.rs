//! virtio: what a device is to its transport, and what the transport gives a device.
//!
//! A device never sees registers, and a transport never sees a descriptor. The transport (virtio-mmio today) speaks the
//! guest's configuration dialogue, checks every queue the guest describes, and hands the device an [`Activation`]
//! once: the checked queues, the memory and the interrupt. From then on the device works on its own thread until
//! [`VirtioDevice::reset`] or the end of the VM.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

pub mod balloon;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory, as every device holds it.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A virtio device behind whichever transport.
pub trait VirtioDevice: Send {
    /// Device ID of virtio 1.2, section 5.
    fn device_id(&self) -> u32;

    /// Largest size of each queue, in descriptors: a power of two up to 32768. Its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device's own feature bits. The transport adds `VIRTIO_F_VERSION_1` and what [`queue`] can do
    /// ([`queue::RING_FEATURES`]).
    fn features(&self) -> u64;

    /// Reads device configuration space; what lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space; a write that the device does not allow is dropped.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the device with what the driver has set up (`DRIVER_OK`).
    ///
    /// # Errors
    /// The device stays inert; the transport sets `DEVICE_NEEDS_RESET` for what the driver did wrong, and ends the VM for what
    /// the host refused.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device and drops its queues; it may be activated again. Idempotent.
    fn reset(&mut self);
}

/// What the transport hands a device when the driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The queues the driver enabled, checked (`mmio`), by index; `None` where it enabled none.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Feature bits that driver and device agreed on.
    pub features: u64,
    /// Tells the driver about used buffers and configuration changes.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A checked queue and the event that the guest's notification signals.
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// Readable when the driver has made buffers available.
    pub kick: EventFd,
}

/// The way from a device to its driver.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used. (The caller has asked `needs_notification`.)
    fn signal_queue(&self, index: u16);
    /// The device's configuration changed.
    fn signal_config(&self);
    /// The guest broke something that the device cannot recover from: sets `DEVICE_NEEDS_RESET`.
    fn signal_failed(&self);
    /// The host refused what the device needs, in a sentence: the VM ends, since its guest could only wait.
    fn host_failed(&self, sentence: String);
    /// The event by which someone outside of this process, who uses buffers in the device's place, interrupts the driver. Until the
    /// device is reset, the driver looks at its queues at every interrupt then, since nobody can tell it what an interrupt was for.
    ///
    /// # Errors
    /// There is no such event, or no descriptor to be had for it.
    fn queue_event(&self) -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device needs.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(u16),
    /// A host resource was refused.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ActivateError {
    /// What the host refused while `what` was being done.
    pub fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}

/// Log lines that a guest can cause, in all. It may break things as often as it likes; it must not fill the host's disk with
/// the news.
static GUEST_LINES: AtomicU32 = AtomicU32::new(100);

/// True if one more line about what the guest has done wrong may be logged.
fn may_log_about_guest() -> bool {
    takes_one(&GUEST_LINES)
}

/// Takes one of what is left, if there is any.
fn takes_one(left: &AtomicU32) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(1)
    })
    .is_ok()
}

/// A constant of the kernel's headers, which bindgen makes 32 bits wide, as a field of 8 bits has it. For constants only: one that does
/// not fit is an error of the compiler's.
const fn byte(constant: u32) -> u8 {
    assert!(constant <= 0xff, "the constant has more than 8 bits");
    (constant & 0xff) as u8
}

/// The same for a field of 16 bits.
const fn half(constant: u32) -> u16 {
    assert!(constant <= 0xffff, "the constant has more than 16 bits");
    (constant & 0xffff) as u16
}

/// Reads from `config`, a device's configuration space, as [`VirtioDevice::read_config`] does.
fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests;
