//! The device's side of the interrupt registers, shared with its threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::ending::{Cause, Ending};
use crate::virtio::Interrupt;

/// `InterruptStatus`, `ConfigGeneration`, `DEVICE_NEEDS_RESET` and the interrupt line.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Someone outside of this process fires the line ([`Interrupt::queue_event`]).
    is_given_away: AtomicBool,
    irq: EventFd,
    ending: Arc<Ending>,
}

impl MmioInterrupt {
    /// As after a reset.
    pub fn new(irq: EventFd, ending: Arc<Ending>) -> Self {
        Self {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            is_given_away: AtomicBool::new(false),
            irq,
            ending,
        }
    }

    /// `InterruptStatus`.
    ///
    /// Who fires the line from outside, the kernel's vhost, cannot set a bit here. So from then on the queues' bit always reads as set.
    /// That is sound: it only bids the driver look at its rings, which it may do at any time, and which say themselves what has been
    /// used. One look too many, after a change of the configuration, finds nothing. No interrupt hangs on the bit going away: the line is
    /// an edge.
    pub fn status(&self) -> u32 {
        let always = if self.is_given_away.load(Ordering::SeqCst) {
            VIRTIO_MMIO_INT_VRING
        } else {
            0
        };
        self.status.load(Ordering::SeqCst) | always
    }

    /// `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// `ConfigGeneration`.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the device has asked for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The driver has reset the device, and nobody works on its queues any more.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.is_given_away.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn fire(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // EAGAIN: the counter is full, so KVM has interrupts to deliver anyway.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self, _index: u16) {
        self.fire(VIRTIO_MMIO_INT_VRING);
    }

    fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.fire(VIRTIO_MMIO_INT_CONFIG);
    }

    fn signal_failed(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.fire(VIRTIO_MMIO_INT_CONFIG);
    }

    fn host_failed(&self, sentence: String) {
        self.ending.report(Cause::Failed(sentence));
    }

    fn queue_event(&self) -> io::Result<EventFd> {
        let event = self.irq.try_clone()?;
        self.is_given_away.store(true, Ordering::SeqCst);
        Ok(event)
    }
}
