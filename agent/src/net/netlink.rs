//! An rtnetlink socket: messages out, answers in.
//!
//! The kernel works a request off while it is sent, so the answer to one is there when `send` returns: nothing waits here. Requests
//! are built field by field and answers taken apart slice by slice, without a cast: layouts are those of `linux/netlink.h`.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::setsockopt_impl;
use nix::sys::socket::sockopt::SetBool;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket,
};

/// `sizeof(struct nlmsghdr)`.
const HEADER_LEN: usize = 16;

/// `sizeof(struct nlattr)`.
const ATTRIBUTE_HEADER_LEN: usize = 4;

/// `NLMSG_ALIGNTO` and `NLA_ALIGNTO`.
const ALIGNMENT: usize = 4;

/// The most that the kernel puts into one answer (`netlink_recvmsg` in `net/netlink/af_netlink.c`).
const ANSWER_MAX: usize = 32 * 1024;

/// The text that goes with an error (`enum nlmsgerr_attrs`).
const NLMSGERR_ATTR_MSG: u16 = 1;

nix::sockopt_impl!(
    /// The kernel explains its errors.
    ExtendedAck, SetOnly, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, bool, SetBool
);

nix::sockopt_impl!(
    /// And does not send the request back with them.
    CappedAck, SetOnly, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, bool, SetBool
);

/// A request that the kernel refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) errno: Errno,
    /// What the kernel says about it; often nothing.
    text: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.errno)?;
        match self.text.as_str() {
            "" => Ok(()),
            text => write!(f, " ({text})"),
        }
    }
}

impl std::error::Error for Refused {}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            text: String::new(),
        }
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::new(Self::from(refused.errno).kind(), refused)
    }
}

/// A request: its header, the fixed part of its kind, attributes.
#[derive(Debug)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// A request of this kind (`RTM_*`) with these flags (`NLM_F_*`) besides `NLM_F_REQUEST`.
    pub(super) fn new(kind: u16, flags: libc::c_int) -> Self {
        // Flags have 16 bits in a message and an int's in the headers.
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        Self(Vec::with_capacity(128))
            .bytes(&[0; 4])
            .bytes(&kind.to_ne_bytes())
            .bytes(&flags.to_ne_bytes())
            .bytes(&[0; 8])
    }

    /// Adds a field, or several, of the fixed part.
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds an attribute.
    pub(super) fn attribute(self, kind: u16, value: &[u8]) -> Self {
        self.bytes(&attribute(kind, value))
    }

    /// Fills in what the header knows last.
    fn seal(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        if let Some(to) = self.0.first_chunk_mut() {
            *to = length.to_ne_bytes();
        }
        if let Some(to) = self.0.get_mut(8..12) {
            to.copy_from_slice(&sequence.to_ne_bytes());
        }
        self.0
    }
}

/// An attribute (`struct nlattr`), by itself the contents of another. Its value is far shorter than the 64 KiB that fit.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = ATTRIBUTE_HEADER_LEN + value.len();
    let mut bytes = [&(length as u16).to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(length.next_multiple_of(ALIGNMENT), 0);
    bytes
}

/// A message of the kernel's.
#[derive(Debug, PartialEq, Eq)]
struct Answer<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages of a datagram, up to the first whose length makes no sense.
fn answers(mut rest: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let message = rest.get(..length)?;
        let answer = Answer {
            kind: u16_at(message, 4)?,
            sequence: u32_at(message, 8)?,
            payload: message.get(HEADER_LEN..)?,
        };
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or_default();
        Some(answer)
    })
}

/// The attributes in a message after its fixed part, by kind (flags removed), up to the first whose length makes no sense.
pub(super) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & libc::NLA_TYPE_MASK as u16;
        let value = rest.get(ATTRIBUTE_HEADER_LEN..length)?;
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or_default();
        Some((kind, value))
    })
}

/// Reads a number in host byte order.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What an `NLMSG_ERROR` or an `NLMSG_DONE` says: both start with zero or a negative errno.
fn verdict(kind: u16, payload: &[u8]) -> Result<(), Refused> {
    let code = u32_at(payload, 0).ok_or(Errno::EBADMSG)?.cast_signed();
    if code == 0 {
        return Ok(());
    }
    let told = match libc::c_int::from(kind) {
        // The request's header stands between.
        libc::NLMSG_ERROR => payload.get(4 + HEADER_LEN..),
        _ => payload.get(4..),
    };
    let text = attributes(told.unwrap_or_default())
        .find(|&(kind, _)| kind == NLMSGERR_ATTR_MSG)
        .map(|(_, text)| String::from_utf8_lossy(text))
        .unwrap_or_default();
    Err(Refused {
        errno: Errno::from_raw(code.wrapping_neg()),
        text: text.trim_end_matches('\0').to_owned(),
    })
}

/// The socket, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens the socket.
    pub(super) fn open() -> nix::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&socket, ExtendedAck, &true)?;
        setsockopt(&socket, CappedAck, &true)?;
        // To the kernel: nobody else's messages reach the socket then.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; ANSWER_MAX],
        })
    }

    /// Has one thing done. The request carries `NLM_F_ACK`.
    pub(super) fn call(&mut self, request: Request) -> Result<(), Refused> {
        self.dump(request, |_| {})
    }

    /// Hands over the payload of each message of the answer. The request carries `NLM_F_DUMP`.
    pub(super) fn dump(
        &mut self,
        request: Request,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Refused> {
        self.sequence = self.sequence.wrapping_add(1);
        let socket = self.socket.as_raw_fd();
        send(socket, &request.seal(self.sequence), MsgFlags::empty())?;
        loop {
            // With MSG_TRUNC the length is the datagram's, not what the buffer took of it.
            let length = recv(socket, &mut self.buffer, MsgFlags::MSG_TRUNC)?;
            let datagram = self.buffer.get(..length).ok_or(Errno::EMSGSIZE)?;
            for answer in answers(datagram).filter(|answer| answer.sequence == self.sequence) {
                match libc::c_int::from(answer.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        return verdict(answer.kind, answer.payload);
                    }
                    _ => each(answer.payload),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_header_says() {
        let sent = Request::new(libc::RTM_NEWLINK, libc::NLM_F_ACK)
            .bytes(&[7; 16])
            .attribute(libc::IFLA_IFNAME, b"ab\0")
            .seal(9);
        let mut wanted = Vec::new();
        for part in [
            &40_u32.to_ne_bytes()[..],
            &16_u16.to_ne_bytes(),
            &5_u16.to_ne_bytes(),
            &9_u32.to_ne_bytes(),
            &[0; 4],
            &[7; 16],
            &7_u16.to_ne_bytes(),
            &3_u16.to_ne_bytes(),
            b"ab\0\0",
        ] {
            wanted.extend_from_slice(part);
        }
        assert_eq!(sent, wanted);
    }

    #[test]
    fn a_refusal_comes_with_the_kernels_words() {
        let told = Request(Vec::new())
            .attribute(99, b"?")
            .attribute(NLMSGERR_ATTR_MSG, b"no\0")
            .0;
        let error = |between| [&(-22_i32).to_ne_bytes()[..], &vec![0; between], &told].concat();
        for (kind, payload) in [
            (libc::NLMSG_ERROR, error(HEADER_LEN)),
            (libc::NLMSG_DONE, error(0)),
        ] {
            let refused = verdict(kind as u16, &payload).unwrap_err();
            assert_eq!(refused.errno, Errno::EINVAL);
            assert_eq!(
                io::Error::from(refused).to_string(),
                "EINVAL: Invalid argument (no)"
            );
        }
        assert_eq!(verdict(libc::NLMSG_ERROR as u16, &[0; 20]), Ok(()));
        assert_eq!(
            verdict(libc::NLMSG_ERROR as u16, &[0; 3]),
            Err(Errno::EBADMSG.into())
        );
    }

    proptest! {
        #[test]
        fn attributes_are_read_as_written(
            written in prop::collection::vec((0_u16..0x4000, prop::collection::vec(any::<u8>(), 0..40)), 0..8)
        ) {
            let mut request = Request(Vec::new());
            for (kind, value) in &written {
                request = request.attribute(*kind, value);
            }
            let read: Vec<_> = attributes(&request.0)
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect();
            prop_assert_eq!(read, written);
        }

        #[test]
        fn requests_are_read_as_sent(
            sent in prop::collection::vec((any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8)
        ) {
            let mut datagram = Vec::new();
            for (kind, sequence, payload) in &sent {
                datagram.extend(Request::new(*kind, 0).bytes(payload).seal(*sequence));
                datagram.resize(datagram.len().next_multiple_of(ALIGNMENT), 0);
            }
            let read: Vec<_> = answers(&datagram)
                .map(|answer| (answer.kind, answer.sequence, answer.payload.to_vec()))
                .collect();
            prop_assert_eq!(read, sent);
        }

        #[test]
        fn any_bytes_come_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            // Each step takes at least a header off.
            prop_assert!(answers(&bytes).count() <= bytes.len() / HEADER_LEN);
            prop_assert!(attributes(&bytes).count() <= bytes.len() / ATTRIBUTE_HEADER_LEN);
            let _ = verdict(libc::NLMSG_ERROR as u16, &bytes);
        }
    }
}
