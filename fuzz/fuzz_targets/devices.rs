//! Every device behind its registers, and a driver that brings it up, offers it buffers and breaks the rules. What a device may change is in
//! `husk_fuzz::guest`; what only one of them promises is here.
#![no_main]

use std::{
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
};

use husk_fuzz::guest::{Guest, QUEUE_SIZE, Used, memory};
use husk_fuzz::model::descriptor;
use husk_protocol::bridge::{Connection, PACKET_LEN};
use husk_vmm::{
    devices::console::Console,
    rights,
    virtio::{
        GuestMemory, VirtioDevice,
        balloon::{Balloon, BalloonHandle},
        mem::{Mem, MemHandle, Region},
        net::{Net, NicHandle},
        rng::Rng,
        vsock::Vsock,
    },
};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

#[derive(arbitrary::Arbitrary, Debug)]
struct Session {
    device: Device,
    /// No driver has brought it up yet.
    is_bare: bool,
    steps: Vec<Step>,
}

#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
enum Device {
    Rng,
    Balloon,
    Mem,
    Net { pairs: bool },
    Vsock,
    Console,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    BringUp {
        refused: u32,
        size: Size,
    },
    Send {
        queue: Option<u8>,
        message: Message,
        split: u8,
        room: Vec<u8>,
        is_indirect: bool,
    },
    /// Buffers for what the device has to say.
    Offer {
        queue: u8,
        count: u8,
        len: u16,
        is_indirect: bool,
    },
    Host(Host),
    Kick(u8),
    Settle,
    Read {
        offset: u16,
        len: u8,
    },
    Register {
        register: Register,
        value: Value,
    },
    Config {
        offset: u8,
        bytes: Vec<u8>,
    },
    Noise {
        queue: u8,
        index: u8,
        address: Address,
        len: u16,
        flags: u16,
        next: u16,
        head: u8,
    },
    Index {
        queue: u8,
        by: i8,
    },
}

#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
enum Size {
    Full,
    One,
    Two,
    Eight,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Register {
    Status,
    Queue(u8),
    Any(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Value {
    Small(u8),
    Any(u32),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Address {
    Memory(u16),
    Canary(u8),
    Any(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Message {
    Bytes(Vec<u8>),
    /// Page numbers.
    Pages(Vec<u8>),
    Mem {
        kind: u8,
        block: u8,
        count: u8,
        off: u8,
    },
    Command {
        class: u8,
        command: u8,
        data: Vec<u8>,
    },
    Frame(u16),
    Packet {
        op: u8,
        host: u8,
        guest: u8,
        len: u16,
        flags: u8,
        credit: Credit,
        forwarded: u16,
        odd: Odd,
    },
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Credit {
    Much,
    Little(u8),
    None,
    All,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Odd {
    No,
    NoEither,
    Kind(u16),
    From(u8),
    To(u8),
    Longer(u32),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Host {
    /// The balloon, or memory, is to have this size.
    Target(u16),
    /// Connects the network device to its socket.
    Attach,
    /// A packet for the guest, or bytes on a connection.
    Say {
        which: u8,
        len: u16,
    },
    Dial(u8),
    Noise(Vec<u8>),
    Close(u8),
    HalfClose(u8),
    Hear(u8),
}

const CID: u64 = 3;
const BLOCK: u64 = 2 << 20;
/// All that the host says.
const SAID: u8 = 0x5a;

fuzz_target!(|session: Session| {
    if matches!(session.device, Device::Console) {
        return console(&session.steps);
    }
    let (device, mut world) = World::new(session.device);
    let mut guest = Guest::new(device);
    if !session.is_bare {
        guest.bring_up(0, QUEUE_SIZE);
    }
    for step in session.steps.iter().take(64) {
        world.step(&mut guest, step);
    }
    world.settle(&mut guest);
    guest.end();
});

/// The host's side.
enum World {
    Nothing,
    Balloon(BalloonHandle),
    Mem {
        handle: MemHandle,
        region: Region,
        asked: u64,
    },
    Net {
        handle: NicHandle,
        socket: UnixDatagram,
        other: Option<UnixDatagram>,
        sent: Vec<Vec<u8>>,
    },
    Vsock {
        bridge: OwnedFd,
        connections: Vec<UnixStream>,
    },
}

impl World {
    fn new(device: Device) -> (Box<dyn VirtioDevice>, Self) {
        match device {
            Device::Rng | Device::Console => (Box::new(Rng::default()), Self::Nothing),
            Device::Balloon => {
                let (balloon, handle) = Balloon::new(&GuestMemory::new(memory()));
                (Box::new(balloon), Self::Balloon(handle))
            }
            Device::Mem => {
                // The region is not joined to memory: who has a device copy to what is unplugged ends the process, as is meant to be.
                let region = Region::map(&memory(), 128).unwrap();
                let (mem, handle) = Mem::new(region.clone()).unwrap();
                let world = Self::Mem {
                    handle,
                    region,
                    asked: 0,
                };
                (Box::new(mem), world)
            }
            Device::Net { pairs } => {
                let (net, handle) = Net::new([2, 0, 0, 0, 0, 1], if pairs { 2 } else { 1 });
                let (socket, other) = UnixDatagram::pair().unwrap();
                socket.set_nonblocking(true).unwrap();
                other.set_nonblocking(true).unwrap();
                let world = Self::Net {
                    handle,
                    socket,
                    other: Some(other),
                    sent: Vec::new(),
                };
                (Box::new(net), world)
            }
            Device::Vsock => {
                let (ours, theirs) = socketpair(
                    AddressFamily::Unix,
                    SockType::SeqPacket,
                    None,
                    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                )
                .unwrap();
                let world = Self::Vsock {
                    bridge: theirs,
                    connections: Vec::new(),
                };
                (Box::new(Vsock::new(CID, ours)), world)
            }
        }
    }

    fn step(&mut self, guest: &mut Guest, step: &Step) {
        match step {
            Step::BringUp { refused, size } => {
                self.settle(guest);
                let size = match size {
                    Size::Full => QUEUE_SIZE,
                    Size::One => 1,
                    Size::Two => 2,
                    Size::Eight => 8,
                };
                guest.bring_up(u64::from(*refused), size);
                if let Self::Net { sent, .. } = self {
                    sent.clear();
                }
            }
            Step::Send {
                queue,
                message,
                split,
                room,
                is_indirect,
            } => {
                let queue = queue.map_or_else(|| self.usual_queue(guest, message), usize::from);
                let bytes = self.bytes(message);
                let (first, second) = bytes.split_at(bytes.len().min(usize::from(*split)));
                let parts: Vec<_> = [first, second]
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .collect();
                let room: Vec<_> = room.iter().take(8).map(|len| usize::from(*len)).collect();
                if room.contains(&0) {
                    // An empty buffer breaks the queue; the chain is known all the same.
                    guest.is_wild = true;
                }
                if guest.add(queue, &parts, &room, *is_indirect).is_some() {
                    self.note(guest, queue, &bytes, message);
                    guest.kick(queue as u32);
                    self.settle(guest);
                }
            }
            Step::Offer {
                queue,
                count,
                len,
                is_indirect,
            } => {
                let queue = usize::from(*queue % 3);
                for _ in 0..=count % 16 {
                    let len = usize::from(*len).max(1);
                    guest.add(queue, &[], &[len], *is_indirect);
                }
                if let Self::Balloon(_) = self {
                    // What is reported is dropped.
                    guest.is_wild = true;
                }
                guest.kick(queue as u32);
                self.settle(guest);
            }
            Step::Host(host) => self.host(guest, host),
            Step::Kick(queue) => {
                guest.kick(u32::from(*queue));
                self.settle(guest);
            }
            Step::Settle => self.settle(guest),
            Step::Read { offset, len } => {
                let mut data = vec![0xff; usize::from(*len % 17)];
                guest.read(u64::from(*offset), &mut data);
            }
            Step::Register { register, value } => {
                let offset = match register {
                    Register::Status => 0x70,
                    Register::Queue(at) => 0x30 + 4 * u64::from(*at % 32),
                    Register::Any(offset) => u64::from(*offset),
                };
                let value = match value {
                    Value::Small(value) => u32::from(*value),
                    Value::Any(value) => *value,
                };
                guest.write(offset, &value.to_le_bytes());
            }
            Step::Config { offset, bytes } => {
                let len = bytes.len().min(9);
                guest.write(0x100 + u64::from(*offset), &bytes[..len]);
            }
            Step::Noise {
                queue,
                index,
                address,
                len,
                flags,
                next,
                head,
            } => {
                let address = match address {
                    Address::Memory(page) => u64::from(*page) << 4,
                    Address::Canary(by) => 0x10_0000 + u64::from(*by) - 128,
                    Address::Any(address) => *address,
                };
                let bytes = descriptor(address, u32::from(*len), *flags, *next);
                guest.add_noise(
                    usize::from(*queue % 5),
                    u16::from(*index),
                    bytes,
                    u16::from(*head),
                );
            }
            Step::Index { queue, by } => guest.move_index(usize::from(*queue % 5), *by),
        }
    }

    /// The queue for such a message.
    fn usual_queue(&self, guest: &Guest, message: &Message) -> usize {
        match (self, message) {
            (Self::Net { .. }, Message::Command { .. }) => guest.queue_count().saturating_sub(1),
            (Self::Net { .. } | Self::Vsock { .. }, _) => 1,
            _ => 0,
        }
    }

    fn bytes(&self, message: &Message) -> Vec<u8> {
        match message {
            Message::Bytes(bytes) => bytes.clone(),
            Message::Pages(pages) => pages
                .iter()
                .flat_map(|page| {
                    let number = match page {
                        // The first pages are the rings'.
                        0..16 => u32::MAX - u32::from(*page),
                        16..192 => u32::from(*page % 64).max(16),
                        _ => Guest::last_page() + u32::from(*page) - 200,
                    };
                    number.to_le_bytes()
                })
                .collect(),
            Message::Mem {
                kind,
                block,
                count,
                off,
            } => {
                let start = match self {
                    Self::Mem { region, .. } => region.start(),
                    _ => 0,
                };
                let mut bytes = [0; 24];
                bytes[0] = *kind % 8;
                let address = start
                    .wrapping_add(u64::from(*block).wrapping_sub(8).wrapping_mul(BLOCK))
                    .wrapping_add(u64::from(off.saturating_sub(200)));
                bytes[8..16].copy_from_slice(&address.to_le_bytes());
                bytes[16] = *count;
                bytes.to_vec()
            }
            Message::Command {
                class,
                command,
                data,
            } => [&[class % 8, command % 4], &data[..]].concat(),
            Message::Frame(len) => {
                let len = usize::from(*len);
                (0..len).map(|at| at as u8).collect()
            }
            Message::Packet {
                op,
                host,
                guest,
                len,
                flags,
                credit,
                forwarded,
                odd,
            } => {
                let mut header = Header {
                    from: CID,
                    to: 2,
                    from_port: u32::from(guest % 4),
                    to_port: port(*host),
                    len: u32::from(*len),
                    kind: 1,
                    op: u16::from(op % 9),
                    flags: u32::from(*flags % 4),
                    buf_alloc: match credit {
                        Credit::Much => 0x4_0000,
                        Credit::Little(bytes) => u32::from(*bytes),
                        Credit::None => 0,
                        Credit::All => u32::MAX,
                    },
                    forwarded: u32::from(*forwarded),
                };
                match odd {
                    Odd::No | Odd::NoEither => {}
                    Odd::Kind(kind) => header.kind = *kind,
                    Odd::From(from) => header.from = u64::from(*from),
                    Odd::To(to) => header.to = u64::from(*to),
                    Odd::Longer(by) => header.len = header.len.wrapping_add(*by),
                }
                let mut bytes = header.bytes();
                bytes.resize(bytes.len() + usize::from(*len), 0x11);
                bytes
            }
        }
    }

    /// What will come of a message that was queued.
    fn note(&mut self, guest: &mut Guest, queue: usize, bytes: &[u8], message: &Message) {
        match self {
            Self::Balloon(_) if queue == 0 => {
                for number in bytes.chunks_exact(4) {
                    let page = u32::from_le_bytes(number.try_into().unwrap());
                    guest.allow(u64::from(page) << 12, 4096);
                }
                // The rings may be among them.
                guest.is_wild |= !matches!(message, Message::Pages(_));
            }
            Self::Balloon(_) if queue == 2 => guest.is_wild = true,
            Self::Net { sent, .. } if queue % 2 == 1 => sent.push(bytes.to_vec()),
            _ => {}
        }
    }

    /// Lets the device do what there is to do, and looks at what it has done.
    fn settle(&mut self, guest: &mut Guest) {
        guest.settle();
        match self {
            Self::Net { socket, sent, .. } => {
                let mut packet = vec![0; 0x1_2000];
                while let Ok(len) = socket.recv(&mut packet) {
                    let found = sent.iter().position(|one| *one == packet[..len]);
                    assert!(
                        found.is_some() || guest.is_wild,
                        "a packet that nobody has sent"
                    );
                    found.map(|at| sent.remove(at));
                    guest.settle();
                }
            }
            Self::Vsock {
                bridge,
                connections,
            } => accept(bridge, connections),
            Self::Mem { handle, asked, .. } => {
                assert!(
                    handle.plugged_bytes() <= *asked,
                    "more memory than the host has ever asked for"
                );
                let mut plugged = [0; 8];
                guest.read(0x128, &mut plugged);
                assert_eq!(u64::from_le_bytes(plugged), handle.plugged_bytes());
            }
            Self::Balloon(handle) => {
                let mut held = [0; 4];
                guest.read(0x104, &mut held);
                let most = u32::from_le_bytes(held).min(Guest::PAGES);
                assert_eq!(handle.held_pages(), most);
            }
            Self::Nothing => {}
        }
        for queue in 0..guest.queue_count() {
            for used in guest.used(queue) {
                self.look(queue, &used);
            }
        }
    }

    /// Looks at what the device has said.
    fn look(&self, queue: usize, used: &Used) {
        match self {
            Self::Nothing => assert!(used.data.len() <= 4096, "{used:?}"),
            Self::Balloon(_) => assert!(used.data.is_empty(), "{used:?}"),
            Self::Mem { .. } => {
                assert_eq!(used.data.len(), 10);
                assert!(used.data[0] < 4 && used.data[8] < 3, "{used:?}");
            }
            Self::Vsock { .. } if queue == 0 => {
                let (header, payload) = used.data.split_at(44);
                let header = Header::read(header);
                assert_eq!((header.from, header.to), (2, CID));
                assert_eq!(header.len as usize, payload.len());
                assert!(
                    payload.iter().all(|byte| *byte == SAID),
                    "bytes that the host has not said"
                );
                assert!((1..=7).contains(&header.op), "{header:?}");
                assert!(header.op == 5 || payload.is_empty(), "{header:?}");
            }
            Self::Vsock { .. } => assert!(used.data.is_empty(), "{used:?}"),
            Self::Net { .. } => {}
        }
    }

    fn host(&mut self, guest: &mut Guest, host: &Host) {
        match (&mut *self, host) {
            (Self::Balloon(handle), Host::Target(pages)) => {
                handle.set_target_pages((*pages).into());
            }
            (Self::Mem { handle, asked, .. }, Host::Target(blocks)) => {
                let bytes = u64::from(*blocks % 80) * BLOCK / 2;
                *asked = (*asked).max(bytes.next_multiple_of(BLOCK));
                handle.request(bytes);
            }
            (Self::Net { handle, other, .. }, Host::Attach) => {
                if let Some(other) = other.take() {
                    handle.attach_socket(other.into()).unwrap();
                }
            }
            (Self::Net { socket, .. }, Host::Say { len, .. }) => {
                let packet = vec![SAID; usize::from(*len)];
                let _ = socket.send(&packet);
            }
            (Self::Vsock { connections, .. }, Host::Say { which, len }) => {
                if let Some(mut one) = pick(connections, *which) {
                    let _ = one.write(&vec![SAID; usize::from(*len)]);
                }
            }
            (
                Self::Vsock {
                    bridge,
                    connections,
                },
                Host::Dial(port),
            ) => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                let packet = Connection::ToGuest {
                    port: u32::from(*port % 4),
                }
                .encode();
                if send_beside(bridge, &packet, &[theirs]) {
                    connections.push(ours);
                }
            }
            (Self::Vsock { bridge, .. }, Host::Noise(bytes)) if !bytes.is_empty() => {
                let (_, theirs) = UnixStream::pair().unwrap();
                send_beside(bridge, &bytes[..bytes.len().min(16)], &[theirs]);
            }
            (Self::Vsock { connections, .. }, Host::Close(which)) => {
                if !connections.is_empty() {
                    connections.remove(usize::from(*which) % connections.len());
                }
            }
            (Self::Vsock { connections, .. }, Host::HalfClose(which)) => {
                if let Some(one) = pick(connections, *which) {
                    let _ = one.shutdown(std::net::Shutdown::Write);
                }
            }
            (Self::Vsock { connections, .. }, Host::Hear(which)) => {
                if let Some(mut one) = pick(connections, *which) {
                    let mut bytes = vec![0; 0x1_0000];
                    match one.read(&mut bytes) {
                        Ok(len) => {
                            assert!(bytes[..len].iter().all(|byte| *byte == 0x11) || guest.is_wild)
                        }
                        Err(error) => assert!(
                            [ErrorKind::WouldBlock, ErrorKind::ConnectionReset]
                                .contains(&error.kind()),
                            "{error}"
                        ),
                    }
                }
            }
            _ => return,
        }
        self.settle(guest);
    }
}

/// Ports of the host, those that the device gives itself among them.
fn port(byte: u8) -> u32 {
    match byte {
        0..=63 => 1024 + u32::from(byte % 4),
        _ => (1 << 30) + u32::from(byte % 4),
    }
}

fn pick(connections: &[UnixStream], which: u8) -> Option<&UnixStream> {
    connections.get(usize::from(which).checked_rem(connections.len())?)
}

fn send_beside(bridge: &OwnedFd, packet: &[u8], sockets: &[UnixStream]) -> bool {
    let fds: Vec<_> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
    sendmsg::<()>(
        bridge.as_raw_fd(),
        &[std::io::IoSlice::new(packet)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_DONTWAIT,
        None,
    )
    .is_ok()
}

/// Takes the connections that the guest has dialled.
fn accept(bridge: &OwnedFd, connections: &mut Vec<UnixStream>) {
    let mut packet = [0; PACKET_LEN + 1];
    while let Ok(received) = rights::receive(bridge.as_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
        let connection = Connection::decode(&packet[..received.len]);
        let Ok(Connection::FromGuest { .. }) = connection else {
            panic!("{connection:?}");
        };
        let mut fds = received.fds.unwrap();
        assert_eq!(fds.len(), 1);
        let socket = UnixStream::from(fds.remove(0));
        socket.set_nonblocking(true).unwrap();
        connections.push(socket);
    }
}

/// A vsock packet's header (virtio 1.2, 5.10.6).
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

/// What a guest prints ends up in logs: so many lines of so many characters, and none of them controls a terminal.
fn console(steps: &[Step]) {
    let mut console = Console::new(None).unwrap();
    for step in steps {
        if let Step::Send {
            message: Message::Bytes(bytes),
            split,
            ..
        } = step
        {
            for _ in 0..=*split {
                console.write_all(bytes).unwrap();
            }
        }
    }
    let tail = console.tail();
    assert!(tail.len() <= husk_protocol::vm::CONSOLE_TAIL_LINES);
    for line in tail {
        assert!(line.chars().count() <= 400, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}
