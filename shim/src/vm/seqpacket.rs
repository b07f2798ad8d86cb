//! An asynchronous `SOCK_SEQPACKET` socket: whole packets, and fds beside them.

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net,
    },
};

use husk_protocol::vm::MAX_QUEUE_PAIRS;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::{io::Interest, net::UnixDatagram};

/// Fds beside a packet that is sent, at most: the queues of one network device.
const MAX_FDS: usize = MAX_QUEUE_PAIRS as usize;

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

    /// Sends one packet, and up to [`MAX_FDS`] fds beside it.
    ///
    /// # Errors
    /// When the other end has gone, or there are too many fds.
    pub async fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = self.0.async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            }
            let parts = [io::IoSlice::new(packet)];
            Ok(sendmsg(
                self.0.as_fd(),
                &parts,
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?)
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
