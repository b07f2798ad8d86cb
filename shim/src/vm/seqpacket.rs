//! An asynchronous `SOCK_SEQPACKET` socket: whole packets, and fds beside them.

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net,
    },
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};
use tokio::{io::Interest, net::UnixDatagram};

/// One end of a connected pair. tokio has no type for these sockets; its datagram one only watches the fd here, every
/// system call on it is our own.
#[derive(Debug)]
pub struct Seqpacket(UnixDatagram);

impl Seqpacket {
    /// Our end (asynchronous) and the other one (blocking, close-on-exec), to be handed to a process.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let ours = net::UnixDatagram::from(ours);
        ours.set_nonblocking(true)?;
        Ok((Self(UnixDatagram::from_std(ours)?), theirs))
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// When the other end has gone.
    pub async fn send(&self, packet: &[u8]) -> io::Result<()> {
        let sent = self.0.async_io(Interest::WRITABLE, || {
            Ok(send(self.0.as_fd(), packet, SendFlags::NOSIGNAL)?)
        });
        sent.await.map(drop)
    }

    /// Receives one packet and the fds beside it, of which one at most is ours. Length 0 is the other end's close.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let received = self.0.async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [io::IoSliceMut::new(buffer)];
            let message = recvmsg(
                self.0.as_fd(),
                &mut parts,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            // Every fd that came is taken, so that those nobody wants are closed.
            let fds: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|part| match part {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            Ok((message.bytes, fds.into_iter().next()))
        });
        received.await
    }
}
