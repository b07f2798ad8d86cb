//! Fds that the runtime polls.

#![allow(
    unsafe_code,
    reason = "registering an fd is unsafe because a type could lie about owning it"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;

/// A non-blocking fd, shared by those who read and those who write it.
pub type Polled = Arc<AsyncFd<OwnedFd>>;

/// Makes an fd non-blocking and hands it to the runtime.
///
/// # Errors
/// Where the fd cannot be polled (a regular file), or the kernel is out of memory.
pub fn polled(fd: OwnedFd) -> io::Result<Polled> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: an OwnedFd is the one owner of its fd and always names the same one.
    let registered = unsafe { AsyncFd::register(fd) };
    Ok(Arc::new(registered.map_err(|e| e.into_parts().1)?))
}
