//! Bytes between a stream socket and guest memory, in one system call and without a copy.
#![allow(unsafe_code, reason = "iovecs that point into the guest's mapping")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Reads into `slices`, in order, what the socket has; 0 is its end.
///
/// # Errors
/// As `recvmsg(2)`; `WouldBlock` when there is nothing yet.
pub fn receive(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut iovecs: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let mut message = header(&mut iovecs);
    // SAFETY: `message` describes memory of the guest that the volatile slices vouch for and keep mapped during the call, and
    // which the kernel may write at any time as the guest itself may.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes `slices`, in order, as far as the socket takes them.
///
/// # Errors
/// As `sendmsg(2)`; `WouldBlock` when it takes nothing now.
pub fn send(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let mut iovecs: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let message = header(&mut iovecs);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the kernel only reads.
    let count = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn header(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr is plain data, for which zero means "absent".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}
