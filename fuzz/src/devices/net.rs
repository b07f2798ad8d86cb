//! virtio-net: packets come and go whole, commands are answered as virtio 1.2, 5.1.6.5 has it.

use std::{collections::HashMap, os::unix::net::UnixDatagram};

use arbitrary::Arbitrary;
use husk_vmm::virtio::{
    VirtioDevice,
    net::{Net, NicHandle},
};

use super::{Manner, Sent, World};
use crate::guest::{Guest, Used};

/// What the host's packets are full of.
const SAID: u8 = 0x5a;
/// Bytes of the header in front of each packet.
const HEADER: usize = 12;
/// Bytes of the largest packet.
const MAX_PACKET: usize = HEADER + 14 + 4 + 65536;
/// Bytes of the longest command.
const MAX_COMMAND: usize = 4096;
/// The address after a reset.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;

/// What a driver sends.
#[derive(Arbitrary, Debug)]
pub enum Message {
    /// A packet.
    Frame(Len),
    /// On the control queue.
    Command(Command),
}

/// Of a packet, its header included.
#[derive(Arbitrary, Debug)]
pub enum Len {
    /// Shorter than a header, or hardly longer.
    Short(u8),
    /// Any.
    Any(u16),
    /// About as long as it may be.
    Large(u8),
}

impl Len {
    fn bytes(&self) -> usize {
        match self {
            Self::Short(len) => usize::from(len % 32).max(1),
            Self::Any(len) => usize::from(*len).max(1),
            Self::Large(by) => MAX_PACKET - 128 + usize::from(*by),
        }
    }
}

/// A command, mostly well-formed.
#[derive(Arbitrary, Debug)]
pub enum Command {
    /// Promiscuous, or all multicast.
    Filter(u8, u8),
    /// Tables of so many addresses, and bytes behind them.
    Tables(u8, u8, u8),
    /// A table that says how long it is.
    Long(u32),
    /// The address.
    Address([u8; 6], u8),
    /// Pairs of queues.
    Pairs(u8),
    /// Any.
    Any(u8, u8, Vec<u8>),
}

impl Command {
    fn bytes(&self) -> Vec<u8> {
        let table = |count: u8| {
            let mut bytes = u32::from(count).to_le_bytes().to_vec();
            bytes.resize(4 + 6 * usize::from(count), 2);
            bytes
        };
        match self {
            Self::Filter(command, value) => vec![0, command % 3, value % 4],
            Self::Tables(first, second, behind) => {
                let mut bytes = [&[1, 0][..], &table(*first), &table(*second)].concat();
                bytes.resize(bytes.len() + usize::from(behind % 8 / 6), 0);
                bytes
            }
            Self::Long(count) => [&[1, 0][..], &count.to_le_bytes(), &[0; 64]].concat(),
            Self::Address(address, behind) => {
                let behind = &[0; 2][..usize::from(behind % 16 / 14)];
                [&[1, 1][..], address, behind].concat()
            }
            Self::Pairs(count) => vec![4, 0, count % 4, count / 128],
            Self::Any(class, command, data) => [&[class % 8, command % 4], &data[..]].concat(),
        }
    }
}

/// What a command of a driver with these features does.
#[derive(PartialEq)]
enum Effect {
    None,
    Address([u8; 6]),
    Refused,
}

fn effect(command: &[u8], features: u64) -> Effect {
    let has = |feature| features & feature != 0;
    let is_table = |data: &[u8]| {
        let mut at = 0;
        for _ in 0..2 {
            let Some(count) = data.get(at..at + 4) else {
                return false;
            };
            let count = u32::from_le_bytes(count.try_into().unwrap()) as usize;
            at += 4 + 6 * count;
        }
        at == data.len()
    };
    match command {
        _ if command.len() > MAX_COMMAND => Effect::Refused,
        [0, 0 | 1, 0 | 1] if has(CTRL_RX) => Effect::None,
        [1, 0, data @ ..] if has(CTRL_RX) && is_table(data) => Effect::None,
        [1, 1, data @ ..] if has(CTRL_MAC_ADDR) && data.len() == 6 => {
            Effect::Address(data.try_into().unwrap())
        }
        [4, 0, 1 | 2, 0] if has(MQ) => Effect::None,
        _ => Effect::Refused,
    }
}

/// What the host does.
#[derive(Arbitrary, Debug)]
pub enum Host {
    /// Connects the device to its socket.
    Attach,
    /// Has a packet for the guest.
    Say(Len),
}

/// A packet that is coming in.
#[derive(Default)]
struct Merged {
    /// Buffers that have yet to come.
    left: u16,
    len: usize,
}

/// See the module's head.
pub struct Wire {
    handle: NicHandle,
    socket: UnixDatagram,
    other: Option<UnixDatagram>,
    /// Packets of the guest that have not come to the host.
    sent: Vec<Vec<u8>>,
    /// Bytes of the host's packets that have not come to the guest.
    said: Vec<usize>,
    /// By queue.
    coming: HashMap<usize, Merged>,
    /// Commands that have not been answered, by their heads.
    commands: HashMap<u16, Vec<u8>>,
    mac: [u8; 6],
}

impl Wire {
    /// With its device of so many pairs of queues.
    pub fn new(pairs: u16) -> (Box<dyn VirtioDevice>, Self) {
        let (net, handle) = Net::new(MAC, pairs);
        let (socket, other) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let world = Self {
            handle,
            socket,
            other: Some(other),
            sent: Vec::new(),
            said: Vec::new(),
            coming: HashMap::new(),
            commands: HashMap::new(),
            mac: MAC,
        };
        (Box::new(net), world)
    }

    /// Behind the queues of those pairs that the driver knows of.
    fn control_queue(guest: &Guest) -> usize {
        if guest.features & MQ != 0 { 4 } else { 2 }
    }

    fn is_command(guest: &Guest, queue: usize) -> bool {
        guest.features & CTRL_VQ != 0 && queue == Self::control_queue(guest)
    }

    fn packet_comes(&mut self, guest: &Guest, queue: usize, used: &Used) {
        let data = &used.data;
        let coming = self.coming.entry(queue).or_default();
        let mut bytes = &data[..];
        if coming.left == 0 {
            assert!(data.len() >= HEADER, "half a header: {used:?}");
            let buffers = u16::from_le_bytes([data[10], data[11]]);
            let is_mergeable = guest.features & MRG_RXBUF != 0;
            assert!(buffers == 1 || is_mergeable && buffers > 1, "{buffers}");
            assert!(data[..10].iter().all(|byte| *byte == SAID));
            *coming = Merged {
                left: buffers,
                len: 0,
            };
            bytes = &data[HEADER..];
        }
        assert!(
            bytes.iter().all(|byte| *byte == SAID),
            "bytes that the host has not said"
        );
        coming.left -= 1;
        coming.len += data.len();
        if coming.left == 0 {
            let len = coming.len;
            let found = self.said.iter().position(|said| *said == len);
            self.said
                .remove(found.expect("a packet that the host has not sent"));
        }
    }
}

impl World for Wire {
    type Message = Message;
    type Host = Host;

    fn bytes(&self, message: &Message) -> Vec<u8> {
        match message {
            Message::Frame(len) => (0..len.bytes()).map(|at| at as u8).collect(),
            Message::Command(command) => command.bytes(),
        }
    }

    fn manner(&self, guest: &Guest, message: &Message) -> Manner {
        match message {
            // In more than one buffer, since none has more than 64 KiB.
            Message::Frame(_) => Manner {
                split: 1024,
                ..Manner::on(1)
            },
            Message::Command(_) => Manner {
                split: 2,
                room: vec![1],
                ..Manner::on(Self::control_queue(guest))
            },
        }
    }

    fn sent(&mut self, guest: &mut Guest, sent: &Sent<'_, Message>) {
        if Self::is_command(guest, sent.queue) {
            self.commands.insert(sent.head, sent.bytes.to_vec());
        } else if sent.queue % 2 == 1 {
            self.sent.push(sent.bytes.to_vec());
        }
    }

    fn host(&mut self, _: &mut Guest, host: &Host) {
        match host {
            Host::Attach => {
                if let Some(other) = self.other.take() {
                    self.handle.attach_socket(other.into()).unwrap();
                }
            }
            Host::Say(len) => {
                let len = len.bytes();
                if self.socket.send(&vec![SAID; len]).is_ok() {
                    self.said.push(len);
                }
            }
        }
    }

    fn brought_up(&mut self) {
        self.sent.clear();
        self.coming.clear();
        self.commands.clear();
        self.mac = MAC;
    }

    fn take(&mut self, guest: &mut Guest) -> bool {
        let mut packet = vec![0; 0x1_2000];
        let Ok(len) = self.socket.recv(&mut packet) else {
            return false;
        };
        assert!((HEADER..=MAX_PACKET).contains(&len), "a packet of {len}");
        let found = self.sent.iter().position(|one| *one == packet[..len]);
        assert!(
            found.is_some() || guest.is_wild,
            "a packet that nobody has sent"
        );
        found.map(|at| self.sent.remove(at));
        true
    }

    fn look(&mut self, guest: &Guest, queue: usize, used: &Used) {
        if Self::is_command(guest, queue) {
            // Buffers without anything to read are a command of no bytes.
            let command = self.commands.remove(&used.head).unwrap_or_default();
            let effect = effect(&command, guest.features);
            let answer = u8::from(matches!(effect, Effect::Refused));
            assert_eq!(used.data, [answer], "the answer to {command:?}");
            if let Effect::Address(address) = effect {
                self.mac = address;
            }
        } else if queue % 2 == 0 {
            self.packet_comes(guest, queue, used);
        } else {
            assert!(used.data.is_empty(), "{used:?}");
        }
    }

    fn check(&mut self, guest: &mut Guest) {
        if guest.queue_count() == 0 {
            self.mac = MAC;
        }
        let [m0, m1, m2, m3] = guest.field(0);
        let [m4, m5] = guest.field(4);
        let mac = [m0, m1, m2, m3, m4, m5];
        // A command is carried out also where there is no room for its answer.
        let may_be = |command: &Vec<u8>| effect(command, guest.features) == Effect::Address(mac);
        assert!(
            guest.is_wild || mac == self.mac || self.commands.values().any(may_be),
            "{mac:?}"
        );
    }
}
