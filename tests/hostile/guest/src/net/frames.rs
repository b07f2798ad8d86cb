//! Packets and their headers: honest ones, and such as say what is not there.

use crate::machine::write;

/// Bytes of a header.
pub const HEADER: u32 = 12;

/// What the test has given the two ends of the link (tests/src/e2e/hostile/devices.rs).
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0x97, 1];
const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0x97, 2];
const HOST: [u8; 4] = [10, 97, 0, 1];
const OWN: [u8; 4] = [10, 97, 0, 2];
/// Where the host listens.
const PORT: u16 = 9797;

/// `struct virtio_net_hdr_v1`.
#[derive(Clone, Copy, Default)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    pub fn bytes(self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        for (slot, field) in bytes[2..].chunks_mut(2).zip([
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ]) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// `NEEDS_CSUM` and GSO types.
const CSUM: u8 = 1;
const TCP4: u8 = 1;
const UDP: u8 = 3;
const TCP6: u8 = 4;
const UDP_L4: u8 = 5;
const ECN: u8 = 0x80;

/// A checksum to be made where it says.
const fn csum(csum_start: u16, csum_offset: u16) -> Header {
    Header {
        flags: CSUM,
        csum_start,
        csum_offset,
        ..NONE
    }
}

/// Segments to be made, with a checksum as of TCP over IPv4.
const fn gso(gso_type: u8, gso_size: u16, hdr_len: u16) -> Header {
    Header {
        gso_type,
        gso_size,
        hdr_len,
        ..csum(34, 16)
    }
}

const NONE: Header = Header {
    flags: 0,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
    num_buffers: 0,
};

/// Headers that do not say what is there.
pub const LIES: &[(&str, Header)] = &[
    ("a checksum beyond the packet", csum(60_000, 16)),
    ("a checksum at the end of all", csum(u16::MAX, u16::MAX)),
    ("a checksum far behind its start", csum(14, u16::MAX)),
    ("a checksum on the last byte", csum(13, 0)),
    ("a checksum over the Ethernet header", csum(0, 0)),
    ("a checksum at an odd place", csum(33, 3)),
    ("segments of no size", gso(TCP4, 0, 54)),
    ("segments of one byte", gso(TCP4, 1, 54)),
    ("segments larger than all", gso(TCP4, u16::MAX, 54)),
    ("headers of no length", gso(TCP4, 1000, 0)),
    ("headers longer than the packet", gso(TCP4, 1000, u16::MAX)),
    ("segments of IPv6", gso(TCP6, 1000, 74)),
    ("segments of UDP", gso(UDP, 1000, 42)),
    ("segments of UDP, the other kind", gso(UDP_L4, 1, 42)),
    ("segments of nothing", gso(0x7f, 1000, 54)),
    ("ECN alone", gso(ECN, 1000, 54)),
    ("all bits", gso(0xff, u16::MAX, u16::MAX)),
    (
        "segments without a checksum",
        Header {
            flags: 0,
            ..gso(TCP4, 8, 54)
        },
    ),
    (
        "every flag",
        Header {
            flags: 0xff,
            ..NONE
        },
    ),
    (
        "many buffers",
        Header {
            num_buffers: u16::MAX,
            ..NONE
        },
    ),
];

/// An Ethernet frame of IP with this protocol, and so many bytes after the IP header.
pub fn frame(at: u64, version: u8, protocol: u8, payload: u16) -> u32 {
    write(at, &HOST_MAC);
    write(at + 6, &OWN_MAC);
    if version == 6 {
        let [high, low] = payload.to_be_bytes();
        write(
            at + 12,
            &[0x86, 0xdd, 0x60, 0, 0, 0, high, low, protocol, 64],
        );
        write(at + 22, &[0xfe; 32]);
        return 54 + u32::from(payload);
    }
    let [high, low] = (20 + payload).to_be_bytes();
    let mut header = [
        0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0, OWN[0], OWN[1], OWN[2], OWN[3],
        HOST[0], HOST[1], HOST[2], HOST[3],
    ];
    let words = header
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    write(at + 12, &[8, 0]);
    write(at + 14, &header);
    34 + u32::from(payload)
}

/// The same as a datagram to the host, with these words.
pub fn datagram(at: u64, words: &[u8]) -> u32 {
    let udp = 8 + words.len() as u16;
    let len = frame(at, 4, 17, udp);
    let port = PORT.to_be_bytes();
    let [high, low] = udp.to_be_bytes();
    // Without a checksum.
    write(
        at + 34,
        &[port[0], port[1], port[0], port[1], high, low, 0, 0],
    );
    write(at + 42, words);
    len
}
