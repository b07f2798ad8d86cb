//! Packets of vsock that no kernel sends, and dials to whom no pod is given.

use crate::check;
use crate::machine::{word, write};
use crate::virtio::{Device, Queue, VSOCK, WRITE, wait};

const RINGS: u64 = 0x110_0000;
pub const PACKET: u64 = 0x120_0000;
const RECEIVED: u64 = 0x140_0000;
const BUFFERS: u16 = 64;
const BUFFER_LEN: u32 = 4096;

const HEADER: u32 = 44;
const HOST: u64 = 2;
const SELF: u64 = 3;
const STREAM: u16 = 1;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;

/// Dials, each of which takes a pair of sockets of the VMM's and one of the shim's.
const FLOOD: u32 = 200;

/// Where nobody listens; what answers there is the device itself.
const NOBODY: u32 = 4000;

#[derive(Clone, Copy)]
struct Packet {
    from: u64,
    to: u64,
    port: u32,
    len: u32,
    kind: u16,
    op: u16,
    /// Of the payload, as the chain has it.
    payload: u32,
}

impl Packet {
    fn new(op: u16, port: u32) -> Self {
        Self {
            from: SELF,
            to: HOST,
            port,
            len: 0,
            kind: STREAM,
            op,
            payload: 0,
        }
    }
}

/// A driver of the device.
pub struct Socket {
    device: Device,
    receive: Queue,
    pub send: Queue,
}

impl Socket {
    pub fn new(device: Device) -> Self {
        let [mut receive, send, _events] = device.start(RINGS);
        for index in 0..BUFFERS {
            let at = RECEIVED + u64::from(index) * u64::from(BUFFER_LEN);
            receive.descriptor(index, (at, BUFFER_LEN, WRITE, 0));
            receive.offer(index);
        }
        receive.kick();
        Self {
            device,
            receive,
            send,
        }
    }

    fn send(&mut self, packet: Packet) {
        let ports = packet.port;
        for (offset, field) in [(0, packet.from), (8, packet.to)] {
            write(PACKET + offset, &field.to_le_bytes());
        }
        for (offset, field) in [
            (16, 5000),
            (20, ports),
            (24, packet.len),
            (32, 0),
            (36, 1 << 18),
            (40, 0),
        ] {
            write(PACKET + offset, &field.to_le_bytes());
        }
        write(PACKET + 28, &packet.kind.to_le_bytes());
        write(PACKET + 30, &packet.op.to_le_bytes());
        let sent = self.send.request((PACKET, HEADER + packet.payload), (0, 0));
        assert!(sent.is_some(), "a packet is not taken");
    }

    /// The next packet: its operation, the host's port, and how many bytes it carries.
    fn receive(&mut self) -> Option<(u16, u32, u32)> {
        let (head, _) = self.receive.taken()?;
        Some(self.heard(head))
    }

    /// The same, if there is one already.
    pub fn received(&mut self) -> Option<(u16, u32, u32)> {
        let (head, _) = self.receive.take()?;
        Some(self.heard(head))
    }

    fn heard(&mut self, head: u16) -> (u16, u32, u32) {
        let at = RECEIVED + u64::from(head) * u64::from(BUFFER_LEN);
        let heard = (
            word::<2>(at + 30) as u16,
            word::<4>(at + 16) as u32,
            word::<4>(at + 24) as u32,
        );
        self.receive.offer(head);
        self.receive.kick();
        heard
    }

    /// Sends what only a reset can answer, and looks whether that is what comes first.
    fn is_quiet(&mut self) -> bool {
        self.send(Packet::new(DATA, NOBODY));
        self.receive() == Some((RESET, NOBODY, 0))
    }
}

impl Socket {
    /// The same, once what was under way has come.
    pub fn is_quiet_in_time(&mut self) -> bool {
        self.send(Packet::new(DATA, NOBODY));
        loop {
            match self.receive() {
                Some((RESET, NOBODY, 0)) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    }
}

/// Tries all of it.
pub fn attack() {
    let Some(device) = Device::find(VSOCK) else {
        check!(false, "no vsock to attack");
        return;
    };
    let mut socket = Socket::new(device);
    strangers(&mut socket);
    nonsense(&mut socket);
    ports(&mut socket);
    flood(&mut socket);
    short_packet(&mut socket);
}

/// Packets from others, or to others than the host.
fn strangers(socket: &mut Socket) {
    for (from, to) in [
        (HOST, SELF),
        (SELF, SELF),
        (SELF, 1),
        (SELF, 0),
        (SELF, u64::MAX),
        (0, HOST),
        (99, HOST),
        (u64::MAX, HOST),
    ] {
        socket.send(Packet {
            from,
            to,
            ..Packet::new(REQUEST, 1025)
        });
        check!(socket.is_quiet(), "a dial from {from} to {to} is nobody's");
    }
}

/// What belongs to no connection is answered by a reset, and a reset by nothing.
fn nonsense(socket: &mut Socket) {
    for op in [0, RESPONSE, SHUTDOWN, DATA, 6, 7, 8, 99, u16::MAX] {
        socket.send(Packet::new(op, NOBODY + 1));
        check!(
            socket.receive() == Some((RESET, NOBODY + 1, 0)),
            "operation {op} on no connection"
        );
    }
    socket.send(Packet::new(RESET, NOBODY));
    check!(socket.is_quiet(), "a reset of no connection");
    for kind in [0, 2, 3, u16::MAX] {
        socket.send(Packet {
            kind,
            ..Packet::new(REQUEST, 1025)
        });
        check!(
            matches!(socket.receive(), Some((RESET, 1025, 0))),
            "a dial of type {kind}"
        );
    }
    for len in [1, 4096, 65_537, u32::MAX] {
        socket.send(Packet {
            len,
            ..Packet::new(REQUEST, 1025)
        });
        check!(
            matches!(socket.receive(), Some((RESET, 1025, 0))),
            "a dial with {len} bytes that are not there"
        );
    }
}

/// Dials: but for the agent's port, nobody says anything, and nobody stays.
fn ports(socket: &mut Socket) {
    for port in [
        0,
        1,
        22,
        80,
        111,
        443,
        514,
        1023,
        1025,
        1027,
        2049,
        2375,
        6443,
        10_250,
        65_535,
        65_536,
        1 << 31,
        u32::MAX,
    ] {
        socket.send(Packet::new(REQUEST, port));
        let mut said = 0;
        let mut over = false;
        let mut talked = false;
        while !over && let Some((op, _, len)) = socket.receive() {
            said += len;
            over = [RESET, SHUTDOWN].contains(&op);
            if op == RESPONSE && !talked {
                // A token of nobody, to the port on which streams come.
                talked = true;
                socket.send(Packet {
                    len: 64,
                    payload: 64,
                    ..Packet::new(DATA, port)
                });
            }
        }
        check!(
            over && said == 0,
            "port {port} of the host (closed {over}, {said} bytes heard)"
        );
        socket.send(Packet::new(RESET, port));
        // Whatever was still on its way comes first.
        while !socket.is_quiet() {}
    }
}

/// Many dials at once, and none of them answered.
fn flood(socket: &mut Socket) {
    let mut heard = 0;
    for port in 0..FLOOD {
        socket.send(Packet::new(REQUEST, 10_000 + port));
        // Who does not take the answers is not heard any more: the device keeps few for it.
        while socket.received().is_some() {
            heard += 1;
        }
    }
    // Each connection that was made ends by a packet, and each that was not is a reset.
    let mut last = 0;
    while last != 10_000 + FLOOD - 1
        && let Some((_, port, _)) = socket.receive()
    {
        heard += 1;
        last = port;
    }
    check!(
        heard >= FLOOD,
        "a flood of {FLOOD} dials ({heard} packets heard)"
    );
}

/// A chain that is no packet stops the device, until it is reset.
fn short_packet(socket: &mut Socket) {
    socket.send.request((PACKET, HEADER - 1), (0, 0));
    let device = socket.device;
    check!(wait(|| device.needs_reset()), "half a header");
    *socket = Socket::new(device);
    socket.send(Packet::new(DATA, NOBODY));
    let mut answer = socket.receive();
    // What the flood has left comes first.
    while answer.is_some_and(|(_, port, _)| port != NOBODY) {
        answer = socket.receive();
    }
    check!(
        answer == Some((RESET, NOBODY, 0)),
        "served again after a reset"
    );
}
