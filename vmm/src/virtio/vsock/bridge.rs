//! Connections to and from the shim: packets of `husk_protocol::bridge` with a socket beside them.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use husk_protocol::bridge::{Connection, PACKET_LEN};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use crate::rights::{self, Received};

/// The VMM's end of the bridge.
pub struct Bridge {
    socket: OwnedFd,
}

/// What came over the bridge.
pub enum Incoming {
    /// The shim wants this port of the guest and will speak through the socket.
    Dial {
        /// Guest port.
        port: u32,
        /// One end of the connection.
        socket: OwnedFd,
    },
    /// Nothing that means anything; it has been dropped.
    Noise,
    /// No more for now.
    Nothing,
    /// The shim is gone.
    End,
}

impl Bridge {
    /// Speaks through `socket`, a `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// For waiting.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Offers a connection that the guest dials; what the shim says comes out of the returned socket.
    ///
    /// # Errors
    /// When no socket is to be had, or the shim is gone or does not take it now.
    pub fn offer(&self, port: u32) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
        // The shim chooses its own mode: it gets a blocking socket, as `socketpair` makes them.
        nix::fcntl::fcntl(
            &theirs,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )?;
        let packet = Connection::FromGuest { port }.encode();
        let fds = [theirs.as_raw_fd()];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&packet)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(ours)
    }

    /// Takes the next packet.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn take(&self) -> io::Result<Incoming> {
        let mut packet = [0; PACKET_LEN + 1];
        let received = rights::receive(self.as_fd(), &mut packet, MsgFlags::MSG_DONTWAIT);
        let Received { len, fds } = match received {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Incoming::Nothing),
            Err(error) => return Err(error.into()),
        };
        // The packet has been taken, whatever is wrong with it.
        let Some(mut sockets) = fds else {
            return Ok(Incoming::Noise);
        };
        if len == 0 {
            return Ok(Incoming::End);
        }
        let connection = packet.get(..len).map(Connection::decode);
        match (connection, sockets.pop()) {
            (Some(Ok(Connection::ToGuest { port })), Some(socket)) if sockets.is_empty() => {
                Ok(Incoming::Dial { port, socket })
            }
            _ => Ok(Incoming::Noise),
        }
    }
}
