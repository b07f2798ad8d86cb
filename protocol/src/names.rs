//! Name queries on their way from a guest to the resolver that an engine has in the pod's network namespace on the host.
//!
//! One stream carries all of a pod's: a [`Header`], and as many bytes of a DNS message as it says (RFC 1035, section 4). An answer has
//! its query's number; without a message it says that none comes.

use std::net::{Ipv4Addr, SocketAddrV4};

/// Where Docker's resolver answers in the networks that its users make (moby, libnetwork/resolver_unix.go).
pub const RESOLVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// Bytes of a [`Header`].
pub const HEADER_LEN: usize = 8;

/// Queries under way at the same time, of a pod.
pub const MAX_QUERIES: usize = 64;

/// How a query was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// By a connection, for answers that a datagram does not hold.
    Tcp,
}

/// What stands before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The asker's number for it; one that is under way has no other's.
    pub query: u32,
    /// How it was asked.
    pub transport: Transport,
    /// Bytes of the message that follows.
    pub length: u16,
}

/// Eight bytes that are no header.
#[derive(Debug, thiserror::Error)]
#[error("{0:#06x} is no transport of a name query")]
pub struct BadHeader(u16);

impl Header {
    /// As it is sent.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let transport = match self.transport {
            Transport::Udp => 0,
            Transport::Tcp => 1,
        };
        let [a, b, c, d] = self.query.to_be_bytes();
        let [e, f] = self.length.to_be_bytes();
        [a, b, c, d, 0, transport, e, f]
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`BadHeader`].
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, BadHeader> {
        let [a, b, c, d, reserved, transport, e, f] = bytes;
        let transport = match u16::from_be_bytes([reserved, transport]) {
            0 => Transport::Udp,
            1 => Transport::Tcp,
            other => return Err(BadHeader(other)),
        };
        Ok(Self {
            query: u32::from_be_bytes([a, b, c, d]),
            transport,
            length: u16::from_be_bytes([e, f]),
        })
    }

    /// The frame of a message; `None` where it is longer than DNS has any.
    pub fn frame(query: u32, transport: Transport, message: &[u8]) -> Option<Vec<u8>> {
        let length = u16::try_from(message.len()).ok()?;
        let header = Self {
            query,
            transport,
            length,
        };
        Some([&header.encode()[..], message].concat())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn eight_bytes_are_the_header_that_they_are_made_from_or_none(bytes: [u8; HEADER_LEN]) {
            let is_one = bytes[4] == 0 && bytes[5] < 2;
            match Header::decode(bytes) {
                Ok(header) => prop_assert!(is_one && header.encode() == bytes),
                Err(_) => prop_assert!(!is_one),
            }
        }
    }

    #[test]
    fn a_message_has_at_most_64_kib() {
        let frame = Header::frame(7, Transport::Tcp, &[1, 2]).unwrap();
        assert_eq!(frame, [0, 0, 0, 7, 0, 1, 0, 2, 1, 2]);
        assert!(Header::frame(7, Transport::Udp, &[0; 65535]).is_some());
        assert!(Header::frame(7, Transport::Udp, &[0; 65536]).is_none());
    }
}
