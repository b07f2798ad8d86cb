//! Gives pages of guest memory back to the host.
#![allow(unsafe_code, reason = "madvise(2) on the guest's mapping")]

use std::io;

use vm_memory::{
    Address as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

/// Host page size; x86-64 has one.
const PAGE: u64 = 4096;

/// Drops the whole pages within `len` bytes at `start`. What lies outside guest memory is left alone, and so is
/// everything if the host refuses: the guest only keeps its memory longer then.
pub fn discard(memory: &GuestMemoryMmap, start: GuestAddress, len: u64) {
    let Some(end) = start.checked_add(len) else {
        return;
    };
    let end = end.0 & !(PAGE - 1);
    let Some(mut at) = start.0.checked_next_multiple_of(PAGE) else {
        return;
    };
    while let Some(left) = end.checked_sub(at).filter(|left| *left > 0) {
        let Some((region, offset)) = memory.to_region_addr(GuestAddress(at)) else {
            return;
        };
        // At least a byte: the offset lies within the region.
        let here = region.len().saturating_sub(offset.0).min(left);
        if let Err(error) = discard_in_region(region, offset, here) {
            tracing::debug!(at, here, %error, "pages not given back");
        }
        at = at.saturating_add(here);
    }
}

fn discard_in_region(
    region: &vm_memory::GuestRegionMmap,
    offset: MemoryRegionAddress,
    len: u64,
) -> io::Result<()> {
    let host = region.get_host_address(offset).map_err(io::Error::other)?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    // SAFETY: `offset..offset + len` lies within the region (the caller cut it so), whose mapping lives as long as
    // the region is borrowed; nothing here holds references into guest memory, only volatile slices. The mapping is
    // private and anonymous (`crate::memory`), so that its pages are freed and read as zero from then on.
    let result = unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
