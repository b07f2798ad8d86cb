//! virtio-vsock: bytes go to where they are sent, each side gets no more than it has room for, and who breaks that is cut off.

use std::{
    collections::HashMap,
    io::{ErrorKind, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
};

use arbitrary::Arbitrary;
use husk_protocol::bridge::{Connection, PACKET_LEN};
use husk_vmm::{
    rights,
    virtio::{VirtioDevice, vsock::Vsock},
};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use super::{Manner, Sent, World};
use crate::guest::{Guest, Used};

const CID: u64 = 3;
/// All that the host says.
const SAID: u8 = 0x5a;
/// All that the guest says.
const HEARD: u8 = 0x11;
/// What the guest may send before the host has taken it, in bytes.
const BUFFER: u32 = 256 << 10;
/// Bytes of the longest payload.
const MAX_PAYLOAD: u32 = 64 << 10;

const REQUEST: u16 = 1;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;

/// A packet, so many times.
#[derive(Arbitrary, Debug)]
pub struct Packet {
    op: u8,
    host: u8,
    guest: u8,
    len: Len,
    flags: u8,
    credit: Credit,
    forwarded: Forwarded,
    odd: Odd,
    times: u8,
}

#[derive(Arbitrary, Debug)]
enum Len {
    None,
    Small(u8),
    Any(u16),
    Most,
}

#[derive(Arbitrary, Debug)]
enum Credit {
    Much,
    Little(u8),
    None,
    All,
}

#[derive(Arbitrary, Debug)]
enum Forwarded {
    /// All that the guest has got.
    All,
    Any(u16),
}

#[derive(Debug)]
enum Odd {
    No,
    Kind(u16),
    From(u8),
    To(u8),
    Longer(u32),
}

impl<'a> Arbitrary<'a> for Odd {
    fn arbitrary(u: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? {
            0..=223 => Self::No,
            224..=231 => Self::Kind(u.arbitrary()?),
            232..=239 => Self::From(u.arbitrary()?),
            240..=247 => Self::To(u.arbitrary()?),
            _ => Self::Longer(u.arbitrary()?),
        })
    }
}

impl Packet {
    fn op(&self) -> u16 {
        match self.op {
            0..=47 => REQUEST,
            48..=79 => 2,
            80..=91 => RESET,
            92..=107 => SHUTDOWN,
            108..=207 => DATA,
            208..=223 => 6,
            224..=239 => 7,
            other => u16::from(other % 16),
        }
    }

    fn key(&self) -> Key {
        Key {
            host: port(self.host),
            guest: u32::from(self.guest % 2),
        }
    }

    fn len(&self) -> u32 {
        match self.len {
            Len::None => 0,
            Len::Small(len) => len.into(),
            Len::Any(len) => len.into(),
            Len::Most => MAX_PAYLOAD,
        }
    }

    /// With the bytes that the guest has got.
    fn bytes(&self, got: u32) -> Vec<u8> {
        let Key { host, guest } = self.key();
        let len = self.len();
        let mut header = Header {
            from: CID,
            to: 2,
            from_port: guest,
            to_port: host,
            len,
            kind: 1,
            op: self.op(),
            flags: u32::from(self.flags % 4),
            buf_alloc: match self.credit {
                Credit::Much => 0x4_0000,
                Credit::Little(bytes) => u32::from(bytes),
                Credit::None => 0,
                Credit::All => u32::MAX,
            },
            forwarded: match self.forwarded {
                Forwarded::All => got,
                Forwarded::Any(bytes) => bytes.into(),
            },
        };
        match self.odd {
            Odd::No => {}
            Odd::Kind(kind) => header.kind = kind,
            Odd::From(from) => header.from = u64::from(from),
            Odd::To(to) => header.to = u64::from(to),
            Odd::Longer(by) => header.len = header.len.wrapping_add(by),
        }
        let mut bytes = header.bytes();
        bytes.resize(bytes.len() + len as usize, HEARD);
        bytes
    }
}

/// Ports of the host, those that the device gives itself among them.
fn port(byte: u8) -> u32 {
    match byte {
        0..=127 => 1024 + u32::from(byte % 2),
        _ => (1 << 30) + u32::from(byte % 4),
    }
}

/// What the host does.
#[derive(Arbitrary, Debug)]
pub enum Host {
    /// Sends bytes on a connection.
    Say(u8, u16),
    /// Reads from one.
    Hear(u8),
    /// Dials a port.
    Dial(u8),
    /// Ends one.
    Close(u8),
    /// Sends no more on one.
    HalfClose(u8),
    /// Says on the bridge what is no dial.
    Noise(Vec<u8>),
}

/// What names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

/// What both ends of a connection have told and sent.
#[derive(Default)]
struct Account {
    /// Bytes to the guest.
    got: u32,
    /// Bytes from the guest.
    sent: u32,
    /// Of these, what the host has taken, as the guest has heard.
    taken: u32,
    /// The guest has ended something: not all that it sends is counted.
    is_ending: bool,
    /// The guest has sent more than there is room for.
    is_overrun: bool,
}

/// See the module's head.
pub struct Bridge {
    bridge: OwnedFd,
    connections: Vec<UnixStream>,
    /// Connections that the guest may think there are.
    accounts: HashMap<Key, Account>,
    /// The room that the guest has told last of, and what it has taken out of it.
    credits: HashMap<Key, (u32, u32)>,
    /// The host has ended a connection: what the guest sends on it is not counted.
    has_closed: bool,
}

impl Bridge {
    /// With its device.
    pub fn new() -> (Box<dyn VirtioDevice>, Self) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        let world = Self {
            bridge: theirs,
            connections: Vec::new(),
            accounts: HashMap::new(),
            credits: HashMap::new(),
            has_closed: false,
        };
        (Box::new(Vsock::new(CID, ours)), world)
    }

    fn pick(&self, which: u8) -> Option<&UnixStream> {
        let count = self.connections.len();
        self.connections.get(usize::from(which).checked_rem(count)?)
    }

    fn send_beside(&self, packet: &[u8], socket: &UnixStream) -> bool {
        sendmsg::<()>(
            self.bridge.as_raw_fd(),
            &[IoSlice::new(packet)],
            &[ControlMessage::ScmRights(&[socket.as_raw_fd()])],
            MsgFlags::MSG_DONTWAIT,
            None,
        )
        .is_ok()
    }

    /// The guest has sent a packet.
    fn note(&mut self, header: &Header, payload: usize) {
        if (header.from, header.to) != (CID, 2) {
            return;
        }
        let key = Key {
            host: header.to_port,
            guest: header.from_port,
        };
        let is_sound =
            header.kind == 1 && header.len as usize <= payload && header.len <= MAX_PAYLOAD;
        if !is_sound || header.op == RESET {
            self.accounts.remove(&key);
            return;
        }
        self.credits
            .insert(key, (header.buf_alloc, header.forwarded));
        match header.op {
            REQUEST => drop(self.accounts.insert(key, Account::default())),
            SHUTDOWN => {
                if let Some(account) = self.accounts.get_mut(&key) {
                    account.is_ending = true;
                }
            }
            DATA => {
                if let Some(account) = self.accounts.get_mut(&key) {
                    account.sent = account.sent.wrapping_add(header.len);
                    let under_way = account.sent.wrapping_sub(account.taken);
                    let is_counted = !account.is_ending && !self.has_closed;
                    account.is_overrun |= is_counted && under_way > BUFFER;
                }
            }
            _ => {}
        }
    }
}

impl World for Bridge {
    type Message = Packet;
    type Host = Host;

    fn bytes(&self, packet: &Packet) -> Vec<u8> {
        let account = self.accounts.get(&packet.key());
        packet.bytes(account.map_or(0, |account| account.got))
    }

    fn manner(&self, _: &Guest, packet: &Packet) -> Manner {
        Manner {
            split: 44,
            times: packet.times % 8 + 1,
            ..Manner::on(1)
        }
    }

    fn sent(&mut self, _: &mut Guest, sent: &Sent<'_, Packet>) {
        if let Some((header, payload)) = sent.bytes.split_at_checked(44)
            && sent.queue == 1
        {
            self.note(&Header::read(header), payload.len());
        }
    }

    fn host(&mut self, guest: &mut Guest, host: &Host) {
        match host {
            Host::Say(which, len) => {
                if let Some(mut one) = self.pick(*which) {
                    let _ = one.write(&vec![SAID; usize::from(*len)]);
                }
            }
            Host::Hear(which) => {
                if let Some(mut one) = self.pick(*which) {
                    let mut bytes = vec![0; 0x1_0000];
                    match one.read(&mut bytes) {
                        Ok(len) => {
                            let is_heard = bytes[..len].iter().all(|byte| *byte == HEARD);
                            assert!(is_heard || guest.is_wild);
                        }
                        Err(error) => assert!(
                            [ErrorKind::WouldBlock, ErrorKind::ConnectionReset]
                                .contains(&error.kind()),
                            "{error}"
                        ),
                    }
                }
            }
            Host::Dial(port) => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                let port = u32::from(*port % 2);
                let packet = Connection::ToGuest { port }.encode();
                if self.send_beside(&packet, &theirs) {
                    self.connections.push(ours);
                }
            }
            Host::Close(which) => {
                self.has_closed = true;
                if !self.connections.is_empty() {
                    let which = usize::from(*which) % self.connections.len();
                    self.connections.remove(which);
                }
            }
            Host::HalfClose(which) => {
                if let Some(one) = self.pick(*which) {
                    let _ = one.shutdown(std::net::Shutdown::Write);
                }
            }
            Host::Noise(bytes) if bytes.is_empty() => {}
            Host::Noise(bytes) => {
                let (_, theirs) = UnixStream::pair().unwrap();
                self.send_beside(&bytes[..bytes.len().min(16)], &theirs);
            }
        }
    }

    fn brought_up(&mut self) {
        self.accounts.clear();
    }

    /// Takes the connections that the guest has dialled.
    fn take(&mut self, _: &mut Guest) -> bool {
        let mut packet = [0; PACKET_LEN + 1];
        let received = rights::receive(self.bridge.as_fd(), &mut packet, MsgFlags::MSG_DONTWAIT);
        let Ok(received) = received else {
            return false;
        };
        let connection = Connection::decode(&packet[..received.len]);
        let Ok(Connection::FromGuest { .. }) = connection else {
            panic!("{connection:?}");
        };
        let mut fds = received.fds.unwrap();
        assert_eq!(fds.len(), 1);
        let socket = UnixStream::from(fds.remove(0));
        socket.set_nonblocking(true).unwrap();
        self.connections.push(socket);
        true
    }

    fn look(&mut self, _: &Guest, queue: usize, used: &Used) {
        if queue != 0 {
            assert!(used.data.is_empty(), "{used:?}");
            return;
        }
        let (header, payload) = used.data.split_at(44);
        let header = Header::read(header);
        assert_eq!((header.from, header.to), (2, CID));
        assert_eq!(header.len as usize, payload.len());
        assert!(
            payload.iter().all(|byte| *byte == SAID),
            "bytes that the host has not said"
        );
        assert!((1..=7).contains(&header.op), "{header:?}");
        assert!(header.op == DATA || payload.is_empty(), "{header:?}");
        let key = Key {
            host: header.from_port,
            guest: header.to_port,
        };
        if header.op == RESET {
            self.accounts.remove(&key);
            return;
        }
        if header.op == REQUEST {
            self.accounts.insert(key, Account::default());
        }
        let Some(account) = self.accounts.get_mut(&key) else {
            return;
        };
        assert!(
            !account.is_overrun,
            "it goes on with a guest that sends more than there is room for: {header:?}"
        );
        account.taken = header.forwarded;
        let (room, taken) = self.credits.get(&key).copied().unwrap_or_default();
        let left = room.saturating_sub(account.got.wrapping_sub(taken));
        assert!(
            header.len <= left,
            "{} bytes where {left} have room",
            header.len
        );
        account.got = account.got.wrapping_add(header.len);
    }
}

/// A packet's header (virtio 1.2, 5.10.6).
#[derive(Debug)]
struct Header {
    from: u64,
    to: u64,
    from_port: u32,
    to_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    forwarded: u32,
}

impl Header {
    fn bytes(&self) -> Vec<u8> {
        [
            &self.from.to_le_bytes()[..],
            &self.to.to_le_bytes(),
            &self.from_port.to_le_bytes(),
            &self.to_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ]
        .concat()
    }

    fn read(bytes: &[u8]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let short = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            from: long(0),
            to: long(8),
            from_port: word(16),
            to_port: word(20),
            len: word(24),
            kind: short(28),
            op: short(30),
            flags: word(32),
            buf_alloc: word(36),
            forwarded: word(40),
        }
    }
}
