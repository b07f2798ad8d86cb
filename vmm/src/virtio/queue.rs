//! Checked access to a virtqueue: the one way in which devices see what a guest has queued.
//!
//! virtio-queue keeps the ring's indices; its `DescriptorChain`, however, ends quietly at the first descriptor it cannot
//! follow, so that a malformed chain looks like a short one. Here a chain is walked once, copied out of the guest's
//! reach and checked as a whole ([`Chain`]); whatever is wrong with it is a [`QueueError`], upon which the
//! device stops and asks for a reset. After that no descriptor is read again: a guest that rewrites
//! its table while the device works changes nothing.

mod chain;
mod layout;
mod lend;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::chain::Table;
pub use self::chain::{Buffers, Chain, ChainError, MAX_DESCRIPTORS, Segment, Short};
pub use self::layout::areas;
use self::layout::{USED_INDEX, is_among_last, used_entry, used_event};
use super::worker::{Fault, TURN, again};
use super::{ActiveQueue, Interrupt};

/// What every queue here can do; the transport offers it for each device.
pub const RING_FEATURES: u64 = (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// What a driver may not do with its queue. The device that meets one stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available index is further ahead than the ring is long, or the ring cannot be reached.
    #[error("queue {queue}: the driver's ring is broken")]
    Ring {
        /// Queue index.
        queue: u16,
        /// What virtio-queue found.
        #[source]
        source: RingError,
    },
    /// One chain is malformed.
    #[error("queue {queue}: the descriptor chain at {head} is malformed")]
    Chain {
        /// Queue index.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        #[source]
        source: ChainError,
    },
    /// The device expects another layout than the chain has.
    #[error("queue {queue}: the buffer at {head} does not fit its purpose: {what}")]
    Layout {
        /// Queue index.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
        /// What was expected.
        what: &'static str,
    },
    /// Who works on it in the device's place does not say more.
    #[error(
        "queue {queue}, or the other of its pair: the host's kernel finds ring or chain broken"
    )]
    Lent {
        /// Queue index.
        queue: u16,
    },
}

/// One queue of a running device.
pub struct DeviceQueue {
    queue: Queue,
    index: u16,
    max_bytes: u32,
    event_idx: bool,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// Chains used since the driver was last asked whether it wants to be notified.
    unannounced: u16,
}

impl DeviceQueue {
    /// Takes over queue `index`; a chain of more than `max_bytes` bytes is malformed.
    pub fn new(
        active: ActiveQueue,
        index: u16,
        max_bytes: u32,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            event_idx: active.queue.state().event_idx_enabled,
            queue: active.queue,
            index,
            max_bytes,
            kick: active.kick,
            interrupt,
            unannounced: 0,
        }
    }

    /// Readable when the driver has made buffers available.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// [`QueueError`] when ring or chain are malformed.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let index = self.index;
        let ring = |source| QueueError::Ring {
            queue: index,
            source,
        };
        let Some(chain) = self.queue.iter(memory).map_err(ring)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let table = Table {
            addr: GuestAddress(self.queue.desc_table()),
            len: u32::from(self.queue.size()),
        };
        Chain::read(memory, table, head, self.max_bytes)
            .map(Some)
            .map_err(|source| QueueError::Chain {
                queue: index,
                head,
                source,
            })
    }

    /// Puts the last `count` chains back; the next [`Self::pop`] returns the first of them again.
    pub fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives the chain at `head` back to the driver, `len` bytes of its writable part written.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring cannot be written.
    pub fn push_used(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        self.push_used_together(memory, &[(head, len)])
    }

    /// Gives several chains back, each with the bytes of its writable part that were written; the driver sees all of them or none.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring cannot be written.
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        used: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (head, len) in used {
            if *head >= size {
                return Err(self.ring(RingError::InvalidDescriptorIndex));
            }
            let at = self.at(self.queue.used_ring(), used_entry(next, size))?;
            memory
                .write_obj([u32::from(*head).to_le(), len.to_le()], at)
                .map_err(|source| self.ring(RingError::GuestMemory(source)))?;
            next = next.wrapping_add(1);
            self.unannounced = self.unannounced.saturating_add(1);
        }
        // Whoever sees the index sees the entries.
        let index = self.at(self.queue.used_ring(), USED_INDEX)?;
        memory
            .store(next.to_le(), index, Ordering::Release)
            .map_err(|source| self.ring(RingError::GuestMemory(source)))?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Interrupts the driver if something was used since the last call and it wants to know.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the driver's wish cannot be read.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let count = std::mem::take(&mut self.unannounced);
        if count > 0 && self.wants_notification(memory, count)? {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// True if the index at which the driver wants to be notified is among the last `count` of the used ring.
    fn wants_notification(&self, memory: &GuestMemoryMmap, count: u16) -> Result<bool, QueueError> {
        if !self.event_idx {
            return Ok(true);
        }
        // The driver writes its wish and then looks at the used index; here it is the other way round.
        fence(Ordering::SeqCst);
        let wish = self.at(self.queue.avail_ring(), used_event(self.queue.size()))?;
        let wish: u16 = memory
            .load(wish, Ordering::Relaxed)
            .map_err(|source| self.ring(RingError::GuestMemory(source)))?;
        let next = self.queue.next_used();
        Ok(is_among_last(u16::from_le(wish), next, count))
    }

    fn at(&self, ring: u64, offset: u64) -> Result<GuestAddress, QueueError> {
        GuestAddress(ring)
            .checked_add(offset)
            .ok_or_else(|| self.ring(RingError::AddressOverflow))
    }

    /// Descriptors of the queue: the most chains that it can hold.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Lets `serve` have each available chain, at most a turn of them (see [`crate::virtio::worker`]), and tells the driver of what was
    /// used. If there are more, the queue has been kicked.
    ///
    /// # Errors
    /// What `serve` says, and [`QueueError`].
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        mut serve: impl FnMut(&mut Self, Chain<'m>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        for _ in 0..TURN {
            match self.pop(memory)? {
                Some(chain) => serve(self, chain)?,
                None if self.rearm(memory)? => {}
                None => return Ok(self.notify(memory)?),
            }
        }
        self.notify(memory)?;
        again(&self.kick);
        Ok(())
    }

    /// Asks the driver for a kick at its next buffer; true if one is there already.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring cannot be reached.
    pub fn rearm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(|source| self.ring(source))
    }

    /// The error of a chain whose parts are not what the device expects.
    pub fn layout(&self, head: u16, what: &'static str) -> QueueError {
        QueueError::Layout {
            queue: self.index,
            head,
            what,
        }
    }

    fn ring(&self, source: RingError) -> QueueError {
        QueueError::Ring {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests;
