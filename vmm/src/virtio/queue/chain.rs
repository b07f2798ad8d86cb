//! A descriptor chain, read once and checked as a whole.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, VolatileSlice};

use super::layout::DESCRIPTOR_SIZE;

/// Most descriptors of one chain. Linux's `IOV_MAX`, so that every chain fits one `readv`; drivers stay far below.
pub const MAX_DESCRIPTORS: usize = 1024;

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

/// A descriptor table, direct or indirect.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub addr: GuestAddress,
    pub len: u32,
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
    pub(super) fn read(
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
    pub(super) fn add(
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
