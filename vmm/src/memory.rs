#![allow(
    unsafe_code,
    reason = "asks the kernel which pages of a mapping that it owns are resident"
)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]
//! Guest RAM: anonymous, private, never prefaulted.
//!
//! The host hands out a page when the guest first touches it (`MAP_NORESERVE`), so a VM costs what it uses.
//! RAM is one piece up to the 32-bit MMIO gap and a second one above 4 GiB for what is left.

use std::io;

use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::{GAP_START, HIGH_RAM_START};

const MIB: u64 = 1 << 20;
/// The host's page size.
const PAGE: usize = 4096;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has in all.
    #[error(
        "{asked} MiB of guest memory asked for, but this host has {total} MiB in all: ask for less, or use a larger host"
    )]
    HostTooSmall {
        /// MiB asked for.
        asked: u64,
        /// MiB of RAM in the host.
        total: u64,
    },
    /// Not addressable.
    #[error("{0} MiB of guest memory asked for, which is more than a machine can address")]
    TooLarge(u64),
    /// The host refused the mapping.
    #[error(
        "cannot map {asked} MiB of guest memory (the host has {total} MiB in all, {free} MiB free)"
    )]
    Map {
        /// MiB asked for.
        asked: u64,
        /// MiB of RAM in the host.
        total: u64,
        /// MiB of it free.
        free: u64,
        /// What the kernel said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// The host refused the mapping that memory would be plugged in.
    #[error("cannot reserve addresses for {asked} MiB of memory that the guest may plug later")]
    MapPluggable {
        /// MiB asked for.
        asked: u64,
        /// What the kernel said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Two pieces at one address.
    #[error("the memory that the guest may plug later overlaps its RAM")]
    Overlap(#[source] vm_memory::GuestRegionCollectionError),
    /// The host's figures could not be read.
    #[error("cannot read how much memory the host has")]
    Sysinfo(#[source] io::Error),
    /// Residency could not be read.
    #[error("cannot read how much of the guest's memory is resident")]
    Residency(#[source] io::Error),
}

/// The ranges of guest-physical memory that `bytes` of RAM fill, in ascending order: base and length.
#[must_use]
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(GAP_START);
    let mut ranges = vec![(0, low)];
    if let Some(high) = bytes.checked_sub(low).filter(|high| *high > 0) {
        ranges.push((HIGH_RAM_START, high));
    }
    ranges
}

/// Maps `mib` MiB of guest RAM.
///
/// # Errors
/// More than the host has in all, or refused by the host's kernel.
pub fn allocate(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let host = nix::sys::sysinfo::sysinfo().map_err(|e| MemoryError::Sysinfo(e.into()))?;
    let total = host.ram_total() / MIB;
    if mib > total {
        return Err(MemoryError::HostTooSmall { asked: mib, total });
    }
    let bytes = mib.checked_mul(MIB).ok_or(MemoryError::TooLarge(mib))?;
    let pieces = ranges(bytes)
        .into_iter()
        .map(|(base, len)| Ok((GuestAddress(base), usize::try_from(len)?)))
        .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
        .map_err(|_| MemoryError::TooLarge(mib))?;
    GuestMemoryMmap::from_ranges(&pieces).map_err(|source| MemoryError::Map {
        asked: mib,
        total,
        free: host.ram_unused() / MIB,
        source,
    })
}

/// Bytes of guest RAM.
#[must_use]
pub fn total_bytes(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Bytes of guest RAM below the MMIO gap.
#[must_use]
pub fn low_bytes(memory: &GuestMemoryMmap) -> u64 {
    memory
        .iter()
        .filter(|r| r.start_addr().raw_value() < GAP_START)
        .map(GuestMemoryRegion::len)
        .sum()
}

/// Bytes of guest RAM that the host has backed with pages.
///
/// # Errors
/// [`MemoryError::Residency`] with what `mincore` said.
pub fn resident_bytes(memory: &GuestMemoryMmap) -> Result<u64, MemoryError> {
    // A mebibyte-sized answer at a time covers 4 GiB of guest.
    const CHUNK_PAGES: usize = 1 << 20;
    let mut answer = Vec::new();
    let mut pages = 0u64;
    for region in memory.iter() {
        let len = region.size();
        let mut done = 0usize;
        while let Some(left) = len.checked_sub(done).filter(|left| *left > 0) {
            let chunk = left.min(CHUNK_PAGES * PAGE);
            answer.resize(chunk.div_ceil(PAGE), 0u8);
            // SAFETY: `done + chunk <= len`, so the range lies inside this region's mapping, which lives as long as
            // `region`; `answer` has a byte for each of its pages. mincore only writes to `answer`.
            let result = unsafe {
                libc::mincore(
                    region.as_ptr().wrapping_add(done).cast(),
                    chunk,
                    answer.as_mut_ptr(),
                )
            };
            if result != 0 {
                return Err(MemoryError::Residency(io::Error::last_os_error()));
            }
            // Only the lowest bit is defined.
            let resident = answer.iter().map(|page| u64::from(page & 1)).sum();
            // Neither can be more than the region has.
            pages = pages.saturating_add(resident);
            done = done.saturating_add(chunk);
        }
    }
    Ok(pages.saturating_mul(PAGE as u64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_is_split_around_the_gap() {
        assert_eq!(ranges(64 * MIB), [(0, 64 * MIB)]);
        assert_eq!(ranges(3072 * MIB), [(0, 3072 * MIB)]);
        assert_eq!(ranges(3584 * MIB), [(0, 3072 * MIB), (1 << 32, 512 * MIB)]);
        assert_eq!(ranges(8192 * MIB), [(0, 3072 * MIB), (1 << 32, 5120 * MIB)]);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_in_the_gap(mib in 64u64..4 * 1024 * 1024) {
            let ranges = ranges(mib * MIB);
            prop_assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), mib * MIB);
            for (base, len) in ranges {
                let end = base + len;
                prop_assert!(len > 0 && (end <= GAP_START || base >= HIGH_RAM_START));
            }
        }
    }

    #[test]
    fn a_page_is_resident_once_touched() {
        let memory = allocate(64).unwrap();
        assert_eq!(total_bytes(&memory), 64 * MIB);
        let before = resident_bytes(&memory).unwrap();
        memory.write_slice(&[1], GuestAddress(5 * MIB)).unwrap();
        assert!(resident_bytes(&memory).unwrap() > before);
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_figures() {
        let error = allocate(u64::MAX / MIB).unwrap_err();
        assert!(matches!(error, MemoryError::HostTooSmall { .. }));
        assert!(error.to_string().contains("this host has"));
    }
}
