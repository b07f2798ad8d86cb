//! A request in the types that virtiofsd's `Reader` and `Writer` take.
//!
//! They want guest memory with the dirty bitmap of vhost-user (ours has none) and read descriptors themselves, and the
//! server reads a request's bytes after anyone else has checked them. So each thread has a view of its own: the guest's mapping
//! under the other type, and behind it private pages. A request's descriptors are written to a private table
//! and the bytes that were checked to a private buffer, which take the place of the guest's: what has been checked is
//! what is served, whatever the guest makes of its memory meanwhile.
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

use crate::virtio::half;
use crate::virtio::queue::{Chain, MAX_DESCRIPTORS};

/// Guest memory as virtiofsd's types want it.
pub type FsMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// Largest request that is copied whole: names, a link's target (4 KiB) and extensions. Longer ones carry file data.
pub const BUFFER_LEN: usize = 16 * 1024;

/// Where the private buffer is in the view: far behind any guest's memory.
const BUFFER: GuestAddress = GuestAddress(1 << 62);

/// One more descriptor than a chain may have, for the private buffer; a power of two.
const TABLE_LEN: u16 = 2048;
const _: () = assert!(TABLE_LEN as usize > MAX_DESCRIPTORS);
/// The private queue: the table at 0, then an available ring of one entry.
const AVAIL: GuestAddress = GuestAddress(TABLE_LEN as u64 * 16);
const QUEUE_LEN: usize = TABLE_LEN as usize * 16 + 4096;

const NEXT: u16 = half(VRING_DESC_F_NEXT);
const WRITE: u16 = half(VRING_DESC_F_WRITE);

/// A thread's view of the guest, and where it prepares the request that it is working on.
pub struct Scratch {
    view: FsMemory,
    table: GuestMemoryMmap,
    queue: Queue,
    /// Keeps the mapping that `view` points to.
    _owner: GuestMemoryMmap,
}

impl Scratch {
    /// A view of `memory`.
    ///
    /// # Errors
    /// When private pages cannot be mapped.
    pub fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let owner = memory.clone();
        let wraps = || io::Error::other("a memory region wraps around");
        let mut regions = Vec::with_capacity(owner.num_regions().saturating_add(1));
        for region in owner.iter() {
            let (prot, flags) = (region.prot(), region.flags());
            // SAFETY: the mapping is valid for exactly this size and lives as long as `owner`, which is stored beside
            // the view and so outlives it; a region built from a raw pointer does not unmap it.
            let mapping =
                unsafe { MmapRegion::build_raw(region.as_ptr(), region.size(), prot, flags) }
                    .map_err(io::Error::other)?;
            regions.push(GuestRegionMmap::new(mapping, region.start_addr()).ok_or_else(wraps)?);
        }
        let buffer = MmapRegion::new(BUFFER_LEN).map_err(io::Error::other)?;
        regions.push(GuestRegionMmap::new(buffer, BUFFER).ok_or_else(wraps)?);
        let view = FsMemory::from_regions(regions).map_err(io::Error::other)?;

        let table = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), QUEUE_LEN)])
            .map_err(io::Error::other)?;
        let mut queue = Queue::new(TABLE_LEN).map_err(io::Error::other)?;
        queue
            .try_set_avail_ring_address(AVAIL)
            .map_err(io::Error::other)?;
        queue.set_ready(true);
        // The ring says for good: one chain, starting at descriptor 0.
        table
            .write_obj(1u16, GuestAddress(AVAIL.0 + 2))
            .map_err(io::Error::other)?;
        Ok(Self {
            view,
            table,
            queue,
            _owner: owner,
        })
    }

    /// The chain with `copied`, its first bytes, in the private buffer, and the view to read it in.
    ///
    /// # Errors
    /// When `copied` is empty, or longer than [`BUFFER_LEN`].
    pub fn prepare(
        &mut self,
        chain: &Chain<'_>,
        copied: &[u8],
    ) -> io::Result<(&FsMemory, DescriptorChain<&GuestMemoryMmap>)> {
        self.view
            .write_slice(copied, BUFFER)
            .map_err(io::Error::other)?;
        let first = Some((BUFFER, copied.len(), 0));
        #[cfg(feature = "weakened")]
        let (first, copied) = if crate::weakened::Safeguard::Copies.is_left_out() {
            std::thread::sleep(crate::weakened::TIME_TO_CHANGE);
            (None, Default::default())
        } else {
            (first, copied)
        };
        let readable = chain
            .readable
            .runs(copied.len())
            .map(|(at, len)| (at, len, 0));
        let writable = chain.writable.runs(0).map(|(at, len)| (at, len, WRITE));
        let mut runs = first
            .into_iter()
            .chain(readable)
            .chain(writable)
            .zip(0u16..)
            .peekable();
        while let Some(((at, len, write), index)) = runs.next() {
            let next = match runs.peek() {
                Some(_) => NEXT,
                None => 0,
            };
            let len = u32::try_from(len).map_err(io::Error::other)?;
            // Within the table, or writing it fails.
            let following = index.saturating_add(1);
            let descriptor = Descriptor::new(at.0, len, write | next, following);
            self.table
                .write_obj(
                    RawDescriptor::from(descriptor),
                    GuestAddress(16 * u64::from(index)),
                )
                .map_err(io::Error::other)?;
        }
        self.queue.set_next_avail(0);
        let prepared = self
            .queue
            .iter(&self.table)
            .map_err(io::Error::other)?
            .next()
            .ok_or_else(|| io::Error::other("the private table shows no chain"))?;
        Ok((&self.view, prepared))
    }
}
