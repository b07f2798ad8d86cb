//! Checked access to a virtqueue: the one way in which devices see what a guest has queued.
//!
//! virtio-queue keeps the ring's indices; its `DescriptorChain`, however, ends quietly at the first descriptor it cannot
//! follow, so that a malformed chain looks like a short one. Here a chain is walked once, copied out of the guest's
//! reach and checked as a whole ([`Chain`]); whatever is wrong with it is a [`QueueError`], upon which the
//! device stops and asks for a reset. After that no descriptor is read again: a guest that rewrites
//! its table while the device works changes nothing.

mod layout;
mod lend;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

pub use self::layout::areas;
use self::layout::{DESCRIPTOR_SIZE, USED_INDEX, is_among_last, used_entry, used_event};
use super::{ActiveQueue, Interrupt};

/// What every queue here can do; the transport offers it for each device.
pub const RING_FEATURES: u64 = (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// Most descriptors of one chain. Linux's `IOV_MAX`, so that every chain fits one `readv`; drivers stay far below.
pub const MAX_DESCRIPTORS: usize = 1024;

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

/// What is wrong with a descriptor chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// An index lies outside its table.
    #[error("descriptor {0} lies outside its table")]
    Index(u16),
    /// The table lies outside guest memory.
    #[error("no descriptor can be read at {0:#x}")]
    Table(u64),
    /// More descriptors than the table holds or the device accepts: the chain is a loop.
    #[error("the chain is a loop, or longer than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A buffer without bytes.
    #[error("the buffer at {0:#x} is empty")]
    Empty(u64),
    /// A buffer lies outside guest memory.
    #[error("{len} bytes at {addr:#x} lie outside guest memory")]
    Bounds {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More bytes than the device accepts at once.
    #[error("the chain has more than {0} bytes")]
    TooManyBytes(u32),
    /// An indirect table inside another, or in the middle of a chain.
    #[error("an indirect table stands where none may")]
    Indirect,
    /// An indirect table whose length is no multiple of a descriptor's.
    #[error("an indirect table has {0} bytes")]
    IndirectLength(u32),
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

/// A descriptor table, direct or indirect.
#[derive(Clone, Copy)]
struct Table {
    addr: GuestAddress,
    len: u32,
}

impl Table {
    fn read(self, memory: &GuestMemoryMmap, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.len {
            return Err(ChainError::Index(index));
        }
        let offset = u64::from(index).saturating_mul(DESCRIPTOR_SIZE.into());
        self.addr
            .checked_add(offset)
            .and_then(|addr| memory.read_obj(addr).ok())
            .ok_or(ChainError::Table(self.addr.0))
    }
}

/// A descriptor chain that has been checked as a whole: every byte lies in guest memory, all readable buffers come first,
/// and none is empty.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of the first descriptor: the chain's name in [`DeviceQueue::push_used`].
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers<'m>,
    /// What the device may write.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    fn read(
        memory: &'m GuestMemoryMmap,
        mut table: Table,
        head: u16,
        max_bytes: u32,
    ) -> Result<Self, ChainError> {
        let mut chain = Self {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let (mut index, mut indirect, mut bytes) = (head, false, 0u32);
        // Every turn reads one descriptor, so the bound ends loops too.
        for _ in 0..=MAX_DESCRIPTORS {
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                if indirect || descriptor.has_next() {
                    return Err(ChainError::Indirect);
                }
                let len = descriptor.len();
                if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
                    return Err(ChainError::IndirectLength(len));
                }
                table = Table {
                    addr: descriptor.addr(),
                    len: len / DESCRIPTOR_SIZE,
                };
                (index, indirect) = (0, true);
                continue;
            }
            bytes = bytes
                .checked_add(descriptor.len())
                .filter(|bytes| *bytes <= max_bytes)
                .ok_or(ChainError::TooManyBytes(max_bytes))?;
            if descriptor.is_write_only() {
                chain.writable.add(memory, descriptor)?;
            } else if chain.writable.is_empty() {
                chain.readable.add(memory, descriptor)?;
            } else {
                return Err(ChainError::Order);
            }
            let segments = chain.readable.segments.len();
            if segments.saturating_add(chain.writable.segments.len()) > MAX_DESCRIPTORS {
                return Err(ChainError::TooLong);
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(ChainError::TooLong)
    }
}

/// A run of guest memory, checked.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'m> {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// The bytes.
    pub slice: VolatileSlice<'m>,
}

/// The readable or the writable part of a chain, in order.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    segments: Vec<Segment<'m>>,
    len: usize,
}

/// A read or write past the end of a chain's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the buffer ends before byte {end}")]
pub struct Short {
    /// Where the access would have ended.
    pub end: usize,
}

impl<'m> Buffers<'m> {
    fn add(
        &mut self,
        memory: &'m GuestMemoryMmap,
        descriptor: Descriptor,
    ) -> Result<(), ChainError> {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(ChainError::Empty(addr.0));
        }
        let bounds = ChainError::Bounds { addr: addr.0, len };
        // Guest-physically contiguous memory may lie in several regions.
        let mut at = addr;
        for slice in memory.get_slices(addr, len as usize) {
            let slice = slice.map_err(|_| bounds)?;
            self.segments.push(Segment { addr: at, slice });
            self.len = self.len.checked_add(slice.len()).ok_or(bounds)?;
            at = at.checked_add(slice.len() as u64).ok_or(bounds)?;
        }
        Ok(())
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if the chain has no such part.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The runs of memory, in order.
    pub fn segments(&self) -> &[Segment<'m>] {
        &self.segments
    }

    /// Address and length of each run of memory from `offset` on.
    pub fn runs(&self, offset: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = offset;
        self.segments.iter().filter_map(move |segment| {
            let here = segment.slice.len();
            let start = skip.min(here);
            skip = skip.saturating_sub(start);
            let at = segment.addr.checked_add(start as u64)?;
            (start < here).then_some((at, here.saturating_sub(start)))
        })
    }

    /// The slices that make up `len` bytes from `offset`, or fewer where the part ends sooner.
    pub fn slices(&self, offset: usize, len: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        let (mut skip, mut left) = (offset, len);
        self.segments.iter().filter_map(move |segment| {
            let here = segment.slice.len();
            let start = skip.min(here);
            skip = skip.saturating_sub(start);
            let take = left.min(here.saturating_sub(start));
            left = left.saturating_sub(take);
            (take > 0)
                .then(|| segment.slice.subslice(start, take).ok())
                .flatten()
        })
    }

    /// Copies bytes from `offset` out of the guest.
    ///
    /// # Errors
    /// [`Short`] when there are not enough; nothing useful is in `data` then.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), Short> {
        self.check(offset, data.len())?;
        let mut rest = data;
        for slice in self.slices(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(slice.len().min(rest.len()));
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Copies `data` into the guest at `offset`.
    ///
    /// # Errors
    /// [`Short`] when it does not fit; the guest's memory is untouched then.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<(), Short> {
        self.check(offset, data.len())?;
        let mut rest = data;
        for slice in self.slices(offset, rest.len()) {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
        Ok(())
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), Short> {
        let end = offset.saturating_add(len);
        (end <= self.len).then_some(()).ok_or(Short { end })
    }
}

#[cfg(test)]
mod tests;
