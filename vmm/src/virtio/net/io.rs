//! Packets between a tap and guest memory, in one system call and without a copy.
#![allow(unsafe_code, reason = "iovecs that point into the guest's mapping")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most slices of one packet: Linux's `IOV_MAX`, and one for [`receive`]'s own.
pub const MAX_SLICES: usize = 1023;

/// Reads the next packet into `slices`, in order. More bytes than they have mean that the packet did not fit: its end is
/// lost.
///
/// # Errors
/// As `readv(2)`; `WouldBlock` when there is none.
pub fn receive(tap: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    // The kernel cuts a packet to the room there is and does not say so; it shows by this byte.
    let mut overflow = 0u8;
    let last = libc::iovec {
        iov_base: (&raw mut overflow).cast(),
        iov_len: 1,
    };
    let iovecs: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .chain(std::iter::once(last))
        .collect();
    let len = i32::try_from(iovecs.len()).map_err(io::Error::other)?;
    // SAFETY: the iovecs describe memory of the guest that the volatile slices vouch for and keep mapped during the call, and
    // which the kernel may write at any time as the guest itself may; and one byte of ours, which lives as long.
    let count = unsafe { libc::readv(tap.as_raw_fd(), iovecs.as_ptr(), len) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes `slices`, in order, as one packet.
///
/// # Errors
/// As `writev(2)`; `WouldBlock` when the tap takes none now.
pub fn send(tap: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let iovecs: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let len = i32::try_from(iovecs.len()).map_err(io::Error::other)?;
    // SAFETY: as in `receive`; the kernel only reads.
    let count = unsafe { libc::writev(tap.as_raw_fd(), iovecs.as_ptr(), len) };
    if count < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
