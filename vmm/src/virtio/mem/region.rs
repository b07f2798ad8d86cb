//! The memory that a guest may plug: a mapping of its own above RAM, of which nothing is accessible but what is plugged.
//!
//! What is not plugged is `PROT_NONE`. A guest that touches it all the same cannot make the host give it a page: KVM_RUN fails with
//! EFAULT, a system call on a device's behalf with the same, and a device thread that copies ends the process (SIGSEGV). Each ends
//! that guest's VM and nothing else, and only a guest that breaks the rules gets there: the device says that what is unplugged is
//! inaccessible (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).
#![allow(
    unsafe_code,
    reason = "mprotect(2) and madvise(2) on a mapping that it owns"
)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{
    Address as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MmapRegion,
};

use crate::layout::HIGH_RAM_START;
use crate::memory::MemoryError;

const MIB: u64 = 1 << 20;

/// Linux adds memory in pieces of this size and alignment (`MIN_MEMORY_BLOCK_SIZE` of arch/x86/mm/init_64.c): the rest of a region
/// that is aligned otherwise could not be used.
const ALIGNMENT: u64 = 128 * MIB;

/// Memory that can be plugged.
#[derive(Debug, Clone)]
pub struct Region(Arc<GuestRegionMmap>);

impl Region {
    /// Maps room for `mib` MiB above `ram`, rounded up to what Linux can use. No page of it is there, or accessible.
    ///
    /// # Errors
    /// [`MemoryError`]: more than can be addressed, or refused by the host's kernel.
    pub fn map(ram: &GuestMemoryMmap, mib: u64) -> Result<Self, MemoryError> {
        let too_large = || MemoryError::TooLarge(mib);
        let len = mib
            .checked_mul(MIB)
            .and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT))
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(too_large)?;
        let start = ram
            .last_addr()
            .raw_value()
            .max(HIGH_RAM_START - 1)
            .checked_next_multiple_of(ALIGNMENT)
            .ok_or_else(too_large)?;
        let mapping = MmapRegion::build(
            None,
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|source| MemoryError::MapPluggable { asked: mib, source })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or_else(too_large)?;
        Ok(Self(Arc::new(region)))
    }

    /// `ram` with this region.
    ///
    /// # Errors
    /// They overlap: `ram` is not what the region was made for.
    pub fn join(&self, ram: &GuestMemoryMmap) -> Result<GuestMemoryMmap, MemoryError> {
        ram.insert_region(Arc::clone(&self.0))
            .map_err(MemoryError::Overlap)
    }

    /// Its first guest address.
    pub fn start(&self) -> u64 {
        self.0.start_addr().raw_value()
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.0.len()
    }

    /// Makes `range`, in bytes from the start, accessible; it reads as zero.
    pub fn open(&self, range: Range<u64>) -> io::Result<()> {
        let opened = self.protect(&range, libc::PROT_READ | libc::PROT_WRITE);
        if opened.is_err() {
            // The kernel may have got half way.
            let _ = self.protect(&range, libc::PROT_NONE);
        }
        opened
    }

    /// Makes `range` inaccessible and gives its pages back to the host.
    pub fn close(&self, range: Range<u64>) -> io::Result<()> {
        // In this order: nobody can touch them again in between.
        self.protect(&range, libc::PROT_NONE)?;
        let (start, len) = self.host(&range)?;
        // SAFETY: within this region's mapping (`host` checks), which lives as long as `self`. It is private and anonymous, and nothing
        // holds references into guest memory, only volatile slices.
        check(unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) })
    }

    fn protect(&self, range: &Range<u64>, protection: libc::c_int) -> io::Result<()> {
        let (start, len) = self.host(range)?;
        // SAFETY: within this region's mapping (`host` checks). Nothing holds references into guest memory; who copies from or to
        // what is closed here faults, which the module's head says more about.
        check(unsafe { libc::mprotect(start.cast(), len, protection) })
    }

    /// Where `range` lies in this process.
    fn host(&self, range: &Range<u64>) -> io::Result<(*mut u8, usize)> {
        let outside = || io::Error::other("outside the region");
        let start = usize::try_from(range.start).map_err(|_| outside())?;
        let end = usize::try_from(range.end).map_err(|_| outside())?;
        let len = end.checked_sub(start).ok_or_else(outside)?;
        if end > self.0.size() {
            return Err(outside());
        }
        Ok((self.0.as_ptr().wrapping_add(start), len))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_region_lies_above_ram_as_linux_wants_it() {
        for (ram_mib, mib, start, len) in [
            (64, 1, HIGH_RAM_START, 128 * MIB),
            (3072, 200, HIGH_RAM_START, 256 * MIB),
            (3073, 128, HIGH_RAM_START + 128 * MIB, 128 * MIB),
        ] {
            let pieces: Vec<_> = crate::memory::ranges(ram_mib * MIB)
                .into_iter()
                .map(|(base, len)| (GuestAddress(base), len as usize))
                .collect();
            let ram = GuestMemoryMmap::from_ranges(&pieces).unwrap();
            let region = Region::map(&ram, mib).unwrap();
            assert_eq!((region.start(), region.bytes()), (start, len));
            let all = region.join(&ram).unwrap();
            assert!(all.check_range(GuestAddress(start), len as usize));
        }
    }

    #[test]
    fn what_cannot_be_addressed_is_refused() {
        let ram = crate::memory::allocate(64).unwrap();
        for mib in [u64::MAX, u64::MAX / MIB, 1 << 40] {
            assert!(Region::map(&ram, mib).is_err(), "{mib}");
        }
    }

    #[test]
    fn nothing_outside_the_region_is_touched() {
        let ram = crate::memory::allocate(64).unwrap();
        let region = Region::map(&ram, 128).unwrap();
        for range in [0..129 * MIB, u64::MAX - 1..u64::MAX] {
            assert!(region.open(range.clone()).is_err());
            assert!(region.close(range).is_err());
        }
    }
}
