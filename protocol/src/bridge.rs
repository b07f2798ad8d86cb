//! vsock connections between the VMM and the shim.
//!
//! Both hold an end of one `SOCK_SEQPACKET` socketpair. A vsock connection crosses it as one packet: these
//! eight bytes and, by `SCM_RIGHTS`, one end of a fresh `SOCK_STREAM` socketpair that then carries the
//! connection's bytes (a `shutdown` of one direction is vsock's half-close). There is no path and no
//! listener, so a jailed VMM needs neither, and nothing is left behind when either side dies.
//! A connection that the receiver does not want is closed, which the sender sees as a reset.

/// Length of a packet's payload, in bytes.
pub const PACKET_LEN: usize = 8;

/// A connection that crosses the bridge; its fd travels beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    /// VMM to shim: the guest dialled this port of the host.
    FromGuest {
        /// Host port.
        port: u32,
    },
    /// Shim to VMM: the host wants this port of the guest.
    ToGuest {
        /// Guest port.
        port: u32,
    },
}

const FROM_GUEST: u32 = 1;
const TO_GUEST: u32 = 2;

impl Connection {
    /// The packet: kind and port, both little-endian `u32`.
    pub fn encode(self) -> [u8; PACKET_LEN] {
        let (kind, port) = match self {
            Self::FromGuest { port } => (FROM_GUEST, port),
            Self::ToGuest { port } => (TO_GUEST, port),
        };
        let mut packet = [0; PACKET_LEN];
        packet[..4].copy_from_slice(&kind.to_le_bytes());
        packet[4..].copy_from_slice(&port.to_le_bytes());
        packet
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// [`BadPacket`] for a wrong length or an unknown kind.
    pub fn decode(packet: &[u8]) -> Result<Self, BadPacket> {
        let [k0, k1, k2, k3, p0, p1, p2, p3] = *packet else {
            return Err(BadPacket);
        };
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            FROM_GUEST => Ok(Self::FromGuest { port }),
            TO_GUEST => Ok(Self::ToGuest { port }),
            _ => Err(BadPacket),
        }
    }
}

/// A packet that is none of ours.
#[derive(Debug, thiserror::Error)]
#[error("malformed packet on the vsock bridge")]
pub struct BadPacket;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn encode_then_decode(port: u32, from_guest: bool) {
            let connection = if from_guest {
                Connection::FromGuest { port }
            } else {
                Connection::ToGuest { port }
            };
            prop_assert_eq!(Connection::decode(&connection.encode()).unwrap(), connection);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(packet in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Ok(connection) = Connection::decode(&packet) {
                prop_assert_eq!(&connection.encode()[..], &packet[..]);
            }
        }
    }
}
