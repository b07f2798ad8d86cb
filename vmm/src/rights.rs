//! Packets with descriptors beside them (`SCM_RIGHTS`), as the vsock bridge and the control channel take them.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Most descriptors of one packet (`SCM_MAX_FD` of Linux): with room for all of them none is left over, open and unknown.
const MAX_FDS: usize = 253;

/// A packet that has come.
#[derive(Debug)]
pub struct Received {
    /// Its length in bytes.
    pub len: usize,
    /// What came beside it, close-on-exec; `None` if some of it was lost, for want of room in this process's table.
    pub fds: Option<Vec<OwnedFd>>,
}

/// Takes the next packet of `socket`, as much of it as fits `packet`.
///
/// # Errors
/// As `recvmsg(2)`.
pub fn receive(
    socket: BorrowedFd<'_>,
    packet: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(packet)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    // An error says that the kernel cut the control data short.
    let fds = message.cmsgs().ok().map(|controls| {
        controls
            .filter_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .map(own)
            .collect()
    });
    Ok(Received {
        len: message.bytes,
        fds,
    })
}

#[allow(unsafe_code, reason = "recvmsg(2) hands over descriptors as numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd as _;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::socket::{
        AddressFamily, ControlMessage, SockFlag, SockType, sendmsg, socketpair,
    };

    use super::*;

    fn send(socket: &OwnedFd, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let iov = [IoSlice::new(bytes)];
        sendmsg::<()>(socket.as_raw_fd(), &iov, rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn descriptors_come_close_on_exec_as_many_as_a_packet_may_have() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for count in [0, 1, MAX_FDS] {
            send(&theirs, b"packet", &vec![null.as_raw_fd(); count]);
            let mut packet = [0; 16];
            let received = receive(ours.as_fd(), &mut packet, MsgFlags::empty()).unwrap();
            assert_eq!(&packet[..received.len], b"packet");
            let fds = received.fds.unwrap();
            assert_eq!(fds.len(), count);
            for fd in fds {
                let flags = fcntl(&fd, FcntlArg::F_GETFD).unwrap();
                assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
            }
        }
    }
}
