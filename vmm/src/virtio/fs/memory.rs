//! Guest memory and descriptor chains in the types that virtiofsd's `Reader` and `Writer` take.
//!
//! They want guest memory with the dirty bitmap of vhost-user (ours has none) and read descriptors themselves. So the
//! guest's mapping is shown to them a second time under the other type, and the descriptors of a checked
//! [`Chain`] are written to a private table from which they read what has been checked, not what the guest
//! has made of it since.
#![allow(unsafe_code, reason = "a second view of the guest's mapping")]

use std::io;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::virtio::queue::{Chain, MAX_DESCRIPTORS};

/// Guest memory as virtiofsd's types want it.
pub type FsMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// The guest's memory under the other type.
pub struct Alias {
    view: FsMemory,
    /// Keeps the mapping that `view` points to.
    _owner: GuestMemoryMmap,
}

impl Alias {
    /// A second view of `memory`.
    ///
    /// # Errors
    /// When vm-memory refuses a region; ours have been accepted once.
    pub fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let owner = memory.clone();
        let mut regions = Vec::with_capacity(owner.num_regions());
        for region in owner.iter() {
            // SAFETY: the mapping is valid for exactly this size and lives as long as `owner`, which is stored beside
            // the view and so outlives it; a region built from a raw pointer does not unmap it.
            let mapping = unsafe {
                MmapRegion::build_raw(
                    region.as_ptr(),
                    region.size(),
                    region.prot(),
                    region.flags(),
                )
            }
            .map_err(io::Error::other)?;
            let region = GuestRegionMmap::new(mapping, region.start_addr())
                .ok_or_else(|| io::Error::other("a region wraps around"))?;
            regions.push(region);
        }
        let view = FsMemory::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self {
            view,
            _owner: owner,
        })
    }

    /// The view.
    pub fn view(&self) -> &FsMemory {
        &self.view
    }
}

/// Where a thread writes the descriptors of the chain it is working on.
pub struct PrivateTable {
    memory: GuestMemoryMmap,
    queue: Queue,
}

/// Table at 0, then an available ring of one entry.
const AVAIL: u64 = MAX_DESCRIPTORS as u64 * 16;
const SIZE: usize = AVAIL as usize + 4096;

impl PrivateTable {
    /// An empty table.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn new() -> io::Result<Self> {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(io::Error::other)?;
        let size = u16::try_from(MAX_DESCRIPTORS).map_err(io::Error::other)?;
        let mut queue = Queue::new(size).map_err(io::Error::other)?;
        queue
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .map_err(io::Error::other)?;
        queue.set_ready(true);
        // The ring says for good: one chain, starting at descriptor 0.
        memory
            .write_obj(1u16, GuestAddress(AVAIL + 2))
            .map_err(io::Error::other)?;
        Ok(Self { memory, queue })
    }

    /// The same chain in the private table.
    ///
    /// # Errors
    /// Never for a chain of at most [`MAX_DESCRIPTORS`]: the table holds that many.
    pub fn rewrite(&mut self, chain: &Chain<'_>) -> io::Result<DescriptorChain<&GuestMemoryMmap>> {
        let readable = chain.readable.segments().iter().map(|s| (s, 0));
        let writable = chain
            .writable
            .segments()
            .iter()
            .map(|s| (s, VRING_DESC_F_WRITE as u16));
        let count = chain.readable.segments().len() + chain.writable.segments().len();
        for ((segment, write), index) in readable.chain(writable).zip(0u16..) {
            let last = usize::from(index) + 1 == count;
            let next = if last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let len = u32::try_from(segment.slice.len()).map_err(io::Error::other)?;
            let descriptor = Descriptor::new(segment.addr.0, len, write | next, index + 1);
            self.memory
                .write_obj(
                    RawDescriptor::from(descriptor),
                    GuestAddress(16 * u64::from(index)),
                )
                .map_err(io::Error::other)?;
        }
        self.queue.set_next_avail(0);
        self.queue
            .iter(&self.memory)
            .map_err(io::Error::other)?
            .next()
            .ok_or_else(|| io::Error::other("the private table shows no chain"))
    }
}
