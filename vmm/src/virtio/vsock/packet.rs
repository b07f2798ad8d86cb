//! The header in front of every vsock packet (virtio 1.2, 5.10.6).

/// Size of a header, in bytes.
pub const HEADER_LEN: usize = HEADER_BYTES as usize;
/// The same, as used rings have it.
pub const HEADER_BYTES: u32 = 44;

/// The host's CID.
pub const HOST_CID: u64 = 2;

/// Stream sockets: the only type served here.
pub const TYPE_STREAM: u16 = 1;

/// Largest payload that a packet from the guest may have: what Linux sends at most.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// `SHUTDOWN` flag: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN` flag: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Opens a connection.
    Request,
    /// Accepts one.
    Response,
    /// Ends or refuses one.
    Reset,
    /// Ends directions of one.
    Shutdown,
    /// Carries bytes.
    Data,
    /// Carries credit alone.
    CreditUpdate,
    /// Asks for credit.
    CreditRequest,
    /// None of the above.
    Unknown(u16),
}

impl Op {
    fn decode(code: u16) -> Self {
        match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn encode(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's CID.
    pub src_cid: u64,
    /// Receiver's CID.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Length of the payload, in bytes.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// What the packet is for.
    pub op: Op,
    /// What they mean depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// How much the sender has taken out of that buffer since the start, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: Op::decode(u16::from_le_bytes(fields.take())),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// Writes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.encode().to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// The rest of a header that is being read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// The next field; past the end, zeroes (a header is long enough for all of its fields).
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk() else {
            return [0; N];
        };
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_header_survives(bytes in proptest::array::uniform32(any::<u8>()), rest in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }

    #[test]
    fn fields_lie_where_linux_has_them() {
        // <linux/virtio_vsock.h>, struct virtio_vsock_hdr.
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = 3;
        bytes[8] = 2;
        bytes[16..18].copy_from_slice(&[0x34, 0x12]);
        bytes[20] = 9;
        bytes[24] = 100;
        bytes[28] = 1;
        bytes[30] = 5;
        bytes[32] = 2;
        bytes[36] = 7;
        bytes[40] = 8;
        let header = Header::decode(&bytes);
        assert_eq!((header.src_cid, header.dst_cid), (3, 2));
        assert_eq!((header.src_port, header.dst_port), (0x1234, 9));
        assert_eq!((header.len, header.kind, header.op), (100, 1, Op::Data));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (2, 7, 8));
    }
}
