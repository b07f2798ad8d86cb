//! Opens vsock connections to the host.
//!
//! The agent listens on nothing: every connection, the API's own included, is one that it has dialled. The driver is
//! built into the kernel, so the device is there before PID 1 is.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use async_trait::async_trait;
use husk_protocol::ports;
use husk_protocol::stream::Token;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt,
};
use tokio::time::{sleep, timeout};

use crate::polled::{Polled, polled};

/// The host's context id (`VMADDR_CID_HOST`).
const HOST_CID: u32 = 2;

/// A host that has not answered by then will not.
const PATIENCE: Duration = Duration::from_secs(30);

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` of linux/vm_sockets.h, with a `timeval` as on every 64-bit machine.
const CONNECT_TIMEOUT: libc::c_int = 6;

/// Gives a connect as long as [`PATIENCE`]: the kernel's default of 2 s is too short where a busy host starves the VM.
#[allow(unsafe_code, reason = "no crate offers this socket option")]
fn set_connect_timeout(fd: &OwnedFd) -> io::Result<()> {
    let patience = libc::timeval {
        tv_sec: PATIENCE.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_usec: 0,
    };
    let length = libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap_or(0);
    // SAFETY: the fd is open, and the kernel reads `length` bytes of a timeval that lives across the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const patience).cast(),
            length,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Pauses between tries while the device is missing, or has no room, double from the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// The way to the host; the tests have one of their own.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Connects to a port of the host.
    async fn dial(&self, port: u32) -> io::Result<Polled>;

    /// Opens the stream that the shim knows by this token.
    async fn open_stream(&self, token: Token) -> io::Result<Polled> {
        let connection = self.dial(ports::STREAM).await?;
        let mut rest = token.as_bytes().as_slice();
        while !rest.is_empty() {
            let sent = connection
                .async_io(tokio::io::Interest::WRITABLE, |fd| {
                    Ok(nix::unistd::write(fd, rest)?)
                })
                .await?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(connection)
    }
}

/// The host behind the virtio-vsock device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Vsock;

#[async_trait]
impl Host for Vsock {
    async fn dial(&self, port: u32) -> io::Result<Polled> {
        let attempts = async {
            let mut pause = FIRST_PAUSE;
            loop {
                match connect_once(port).await {
                    Err(e) if may_come(&e) => {
                        sleep(pause).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                    done => return done,
                }
            }
        };
        timeout(PATIENCE, attempts).await?
    }
}

/// What `connect` says before the driver has found its device; and when the device refuses: a container that dials without end may have
/// left no room for a moment.
fn may_come(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENODEV | Errno::ENETUNREACH | Errno::EADDRNOTAVAIL | Errno::ECONNRESET)
    )
}

async fn connect_once(port: u32) -> io::Result<Polled> {
    let fd: OwnedFd = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    set_connect_timeout(&fd)?;
    let pending = match connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
        Ok(()) => false,
        Err(Errno::EINPROGRESS) => true,
        Err(e) => return Err(e.into()),
    };
    let connection = polled(fd)?;
    if pending {
        // Writable means decided; the socket's error says how.
        drop(connection.writable().await?);
        match getsockopt(connection.get_ref(), sockopt::SocketError)? {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    Ok(connection)
}
