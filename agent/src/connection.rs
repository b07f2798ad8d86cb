//! A polled socket as the byte stream that ttrpc wants, and the news of its end.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket;
use nix::unistd::{read, write};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::polled::Polled;

/// The connection of the agent API.
#[derive(Debug)]
pub struct Connection {
    socket: Polled,
    /// Dropped, and thereby heard, at the end of what the host sends.
    gone: Option<oneshot::Sender<()>>,
}

impl Connection {
    /// Wraps a socket. The receiver resolves when the host has gone, which ttrpc tells nobody.
    pub fn new(socket: Polled) -> (Self, oneshot::Receiver<()>) {
        let (gone, receiver) = oneshot::channel();
        let gone = Some(gone);
        (Self { socket, gone }, receiver)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let mut ready = ready!(this.socket.poll_read_ready(cx))?;
            let Ok(done) = ready.try_io(|fd| Ok(read(fd.get_ref(), buf.initialize_unfilled())?))
            else {
                continue;
            };
            if !matches!(done, Ok(1..)) {
                this.gone = None;
            }
            return Poll::Ready(done.map(|n| buf.advance(n)));
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_write_ready(cx))?;
            if let Ok(done) = ready.try_io(|fd| Ok(write(fd.get_ref(), buf)?)) {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(socket::shutdown(
            self.socket.get_ref().as_raw_fd(),
            socket::Shutdown::Write,
        )?))
    }
}
