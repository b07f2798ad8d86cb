//! Gives pages of guest memory back to the host.
#![allow(
    unsafe_code,
    reason = "madvise(2) and fallocate(2) on the guest's mapping"
)]

use std::io;
use std::os::fd::AsRawFd;

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
    let (mut at, end) = (start.0.next_multiple_of(PAGE), end.0 & !(PAGE - 1));
    while at < end {
        let Some((region, offset)) = memory.to_region_addr(GuestAddress(at)) else {
            return;
        };
        let here = (region.len() - offset.0).min(end - at);
        if let Err(error) = discard_in_region(region, offset, here) {
            tracing::debug!(at, here, %error, "pages not given back");
        }
        at += here;
    }
}

fn discard_in_region(
    region: &vm_memory::GuestRegionMmap,
    offset: MemoryRegionAddress,
    len: u64,
) -> io::Result<()> {
    // A shared file's pages live in the file: unmapping them here would free nothing.
    if let Some(file) = region.file_offset()
        && region.flags() & libc::MAP_SHARED != 0
    {
        let at = file.start() + offset.0;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (libc::off_t::try_from(at), libc::off_t::try_from(len));
        let (Ok(at), Ok(len)) = (at, len) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: a call on a file that the region keeps open; the guest's pages read as zero afterwards, which
        // it has agreed to by giving them up.
        return check(unsafe { libc::fallocate(file.file().as_raw_fd(), mode, at, len) });
    }
    let host = region.get_host_address(offset).map_err(io::Error::other)?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    // SAFETY: `offset..offset + len` lies within the region (the caller cut it so), whose mapping lives as long as
    // the region is borrowed; nothing here holds references into guest memory, only volatile slices.
    check(unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
