//! A queue that someone outside of this process works on for a while: the host's kernel, by vhost.

use std::io;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceQueue, QueueError};

impl DeviceQueue {
    /// Where its rings are, and which chain is the next.
    pub fn state(&self) -> &Queue {
        &self.queue
    }

    /// See [`crate::virtio::Interrupt::queue_event`].
    ///
    /// # Errors
    /// As there.
    pub fn queue_event(&self) -> io::Result<EventFd> {
        self.interrupt.queue_event()
    }

    /// Goes on where somebody else has stopped, who would have taken the available chain number `next_avail`.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be reached.
    pub fn resume(&mut self, memory: &GuestMemoryMmap, next_avail: u16) -> Result<(), QueueError> {
        let used = self.queue.used_idx(memory, Ordering::Acquire);
        let used = used.map_err(|source| self.ring(source))?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(used.0);
        self.unannounced = 0;
        // What was used last may not have been announced.
        self.interrupt.signal_queue(self.index);
        Ok(())
    }

    /// The error of a queue that somebody else finds broken.
    pub fn broken(&self) -> QueueError {
        QueueError::Lent { queue: self.index }
    }
}
