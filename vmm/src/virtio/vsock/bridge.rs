//! Connections to and from the shim: packets of `husk_protocol::bridge` with a socket beside them.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use husk_protocol::bridge::{Connection, PACKET_LEN};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

/// Most fds of one packet (`SCM_MAX_FD`): with room for all of them none is left over, open and unknown.
const MAX_FDS: usize = 253;

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
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut iov = [IoSliceMut::new(&mut packet)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let socket = self.socket.as_raw_fd();
        let message = match recvmsg::<()>(socket, &mut iov, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                return Ok(Incoming::Nothing);
            }
            Err(error) => return Err(error.into()),
        };
        let len = message.bytes;
        let mut sockets = Vec::new();
        // The packet has been taken, whatever is wrong with it: without room for its fds in this process, for one.
        let Ok(controls) = message.cmsgs() else {
            return Ok(Incoming::Noise);
        };
        for control in controls {
            if let ControlMessageOwned::ScmRights(fds) = control {
                sockets.extend(fds.into_iter().map(own));
            }
        }
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

#[allow(unsafe_code, reason = "recvmsg(2) hands over fds as numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this fd for us, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
