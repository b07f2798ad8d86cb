//! Packets, headers and commands of virtio-net that no driver makes. Who has the last word is the host, which must hear each honest
//! packet in between.

mod frames;

use crate::machine::{word, write};
use crate::queues::{self, lying_configuration};
use crate::start::Start;
use crate::virtio::{
    CONFIG, Device, MEM, NET, NEXT, QUEUE_NOTIFY, Queue, RUNNING, SIZE, STATUS, WRITE, fill,
    is_filled, wait,
};
use crate::{Tally, check};
use frames::{HEADER, Header, LIES, datagram, frame};

const RINGS: u64 = 0x110_0000;
const COMMAND: u64 = 0x120_0000;
const ACK: u64 = 0x121_0000;
/// Received packets, a page each.
const RECEIVED: u64 = 0x130_0000;
/// A header and a packet, with room for far too large ones.
const PACKET: u64 = 0x140_0000;
const LARGE: u32 = 0x100_0000;

/// Features, of the lower half: mergeable buffers, the control queue and what it commands, checksums and segments left to others.
const MERGEABLE: u32 = 1 << 15;
const CONTROL: u32 = 1 << 17 | 1 << 18 | 1 << 22 | 1 << 23;
const OFFLOADS: u32 = 1 | 1 << 1 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 7 | 1 << 8 | 1 << 9;
const ALL: u32 = MERGEABLE | CONTROL | OFFLOADS;

/// Queues of a device of two pairs.
const RX: usize = 0;
const TX: usize = 1;
const SECOND_TX: usize = 3;
const CTRL: usize = 4;

/// The largest packet that the device takes, with its header.
const MAX_PACKET: u32 = HEADER + 14 + 4 + 65_536;

/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`.
const OK: u8 = 0;
const ERR: u8 = 1;

struct Net {
    device: Device,
    queues: [Queue; 5],
    /// Honest packets so far.
    honest: u8,
}

impl Net {
    fn restart(&mut self) {
        self.queues = self.device.start_with(RINGS, ALL);
    }

    /// Offers buffers to receive into, each a page.
    fn receive(&mut self) {
        let queue = &mut self.queues[RX];
        for index in 0..SIZE {
            queue.descriptor(index, (received(index), 4096, WRITE, 0));
            queue.offer(index);
        }
        queue.kick();
    }

    /// A chain on the transmit queue is used, and nothing stops.
    fn transmits(&mut self, buffers: &[(u64, u32, u16)]) -> bool {
        let used = self.queues[TX].send(buffers);
        let fine = used && !self.device.needs_reset();
        if !fine {
            self.restart();
        }
        fine
    }

    /// An honest packet, which the host counts.
    fn says(&mut self, what: &str) {
        let digits = [b'0' + self.honest / 10, b'0' + self.honest % 10];
        let words = [
            b'h', b'o', b'n', b'e', b's', b't', b' ', digits[0], digits[1],
        ];
        write(PACKET, &Header::default().bytes());
        let len = HEADER + datagram(PACKET + u64::from(HEADER), &words);
        let used = self.queues[TX].send(&[(PACKET, len, 0)]);
        check!(used, "an honest packet after {what}");
        self.honest += 1;
    }

    /// The answer to a command, which was made with these features.
    fn command(&mut self, bytes: &[u8]) -> Option<u8> {
        fill(ACK, 1, 0x5a);
        for (at, piece) in (COMMAND..).step_by(64).zip(bytes.chunks(64)) {
            write(at, piece);
        }
        let ctrl = &mut self.queues[CTRL];
        ctrl.request((COMMAND, bytes.len() as u32), (ACK, 1))?;
        Some(word::<1>(ACK) as u8)
    }
}

fn received(index: u16) -> u64 {
    RECEIVED + u64::from(index) * 4096
}

/// Tries all of it.
pub fn attack(start: &Start) {
    let Some(device) = Device::find(NET) else {
        check!(false, "no network to attack");
        return;
    };
    let has_link = wait(|| device.get(CONFIG + 4) >> 16 & 1 == 1);
    check!(has_link, "the device has a link");
    let mut net = Net {
        device,
        queues: device.start_with(RINGS, ALL),
        honest: 0,
    };
    net.says("the start");
    for queue in [RX, TX, CTRL] {
        let bring_up = || device.start_with::<5>(RINGS, ALL)[queue];
        queues::faults(&"the network", queue, start, bring_up);
    }
    rings_elsewhere(device, start);
    net.restart();
    net.says("broken queues");
    lies(&mut net);
    net.says("lies");
    sizes(&mut net);
    net.says("sizes");
    strange_chains(&mut net, start);
    net.says("strange chains");
    commands(&mut net);
    net.says("commands");
    receives(&mut net);
    net.says("strange buffers");
    resets(&mut net);
    net.says("resets");
    lying_configuration();
    net.restart();
    net.says("a configuration of ones");
    // The host looks for as many.
    crate::say!("held: {} honest packets", net.honest);
    device.reset();
}

/// The device does not start with a ring of any queue that is not in memory.
fn rings_elsewhere(device: Device, start: &Start) {
    for bad_queue in [RX, SECOND_TX, CTRL] {
        let mut tally = Tally::default();
        for bad in [start.ram - 16, u64::MAX - 15] {
            for which in 0..3 {
                let queues = device.start_with::<5>(RINGS, ALL);
                device.reset();
                device.negotiate_with(ALL);
                for (index, queue) in queues.iter().enumerate() {
                    let mut rings = queue.rings();
                    if index == bad_queue {
                        rings[which] = bad;
                    }
                    queue.set_up(rings);
                }
                device.set(STATUS, RUNNING);
                tally.note(
                    device.needs_reset(),
                    format_args!("the network, queue {bad_queue}: ring {which} at {bad:#x}"),
                );
            }
        }
        tally.told(format_args!(
            "rings of the network's queue {bad_queue} that are nowhere"
        ));
    }
    device.reset();
}

/// Each lie about each sort of packet.
fn lies(net: &mut Net) {
    let at = PACKET + u64::from(HEADER);
    for (sort, version, protocol, payload) in [
        ("a datagram", 4, 17, 60),
        ("as much as one may have", 4, 6, 65_000),
        ("IPv6", 6, 6, 3000),
        ("nothing behind the IP header", 4, 6, 0),
    ] {
        let len = frame(at, version, protocol, payload);
        // TCP's own length: five words.
        write(at + if version == 6 { 66 } else { 46 }, &[0x50, 0x10]);
        let mut tally = Tally::default();
        for (what, header) in LIES {
            write(PACKET, &header.bytes());
            let held = net.transmits(&[(PACKET, HEADER + len, 0)]);
            tally.note(held, format_args!("{what}, of {sort}"));
        }
        tally.told(format_args!("lies about {sort}"));
    }
}

/// Packets without as much as a header, and beyond all bounds.
fn sizes(net: &mut Net) {
    write(PACKET, &Header::default().bytes());
    frame(PACKET + u64::from(HEADER), 4, 17, 60);
    for len in [
        1,
        HEADER - 1,
        HEADER,
        HEADER + 1,
        HEADER + 13,
        HEADER + 14,
        MAX_PACKET - 1,
        MAX_PACKET,
        MAX_PACKET + 1,
        1 << 20,
        LARGE,
    ] {
        let held = net.transmits(&[(PACKET, len, 0)]);
        check!(held, "a packet of {len} bytes");
    }
}

/// Packets in pieces, over each other, with room to write, and of memory that is not there.
fn strange_chains(net: &mut Net, start: &Start) {
    write(PACKET, &Header::default().bytes());
    let len = HEADER + frame(PACKET + u64::from(HEADER), 4, 17, 30);
    let bytes: [(u64, u32, u16); 60] = core::array::from_fn(|index| (PACKET + index as u64, 1, 0));
    check!(net.transmits(&bytes), "a byte in each buffer");
    check!(
        net.transmits(&[(PACKET, len, 0); 40]),
        "forty times the same buffer"
    );
    let rings = net.queues[TX].rings()[0];
    check!(
        net.transmits(&[(PACKET, HEADER, 0), (rings, 0x1800, 0)]),
        "its own rings as a packet"
    );
    check!(
        net.transmits(&[(PACKET, len, 0), (PACKET, 64, WRITE)]),
        "a packet with room for an answer"
    );
    check!(
        net.transmits(&[(start.ram - 64, 64, 0)]),
        "the last bytes of memory"
    );
    // Memory that could be plugged and is not: it is mapped, and nobody may touch it.
    if let Some(memory) = Device::find(MEM) {
        let unplugged =
            u64::from(memory.get(CONFIG + 16)) | u64::from(memory.get(CONFIG + 20)) << 32;
        check!(
            net.transmits(&[(PACKET, HEADER, 0), (unplugged, 60, 0)]),
            "a packet of memory that is not plugged"
        );
    }
    // Offered once, and many times over.
    let queue = &mut net.queues[TX];
    queue.descriptor(0, (PACKET, len, 0, 0));
    (0..SIZE).for_each(|_| queue.offer(0));
    queue.kick();
    let used = (0..SIZE).filter(|_| queue.taken().is_some()).count();
    check!(
        used == usize::from(SIZE),
        "one packet {SIZE} times ({used} used)"
    );
}

/// Commands that are none, that name what is not there, and that the driver may not make.
fn commands(net: &mut Net) {
    net.restart();
    let long = [0; 4097];
    let pairs = |pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        [4, 0, low, high]
    };
    let tables: [&[u8]; 4] = [
        &[1, 0, 0, 0, 0, 0],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 1, 2, 3, 4, 5, 6],
    ];
    let addresses: [&[u8]; 3] = [
        &[1, 1],
        &[1, 1, 2, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0, 0, 0],
    ];
    for count in [0, 3, 8, 9, 0x8000, u16::MAX] {
        let answer = net.command(&pairs(count));
        check!(answer == Some(ERR), "{count} pairs of queues ({answer:?})");
    }
    for bytes in tables {
        let answer = net.command(bytes);
        check!(
            answer == Some(ERR),
            "a table of {} bytes that lies ({answer:?})",
            bytes.len()
        );
    }
    for bytes in addresses {
        let answer = net.command(bytes);
        check!(
            answer == Some(ERR),
            "an address of {} bytes ({answer:?})",
            bytes.len() - 2
        );
    }
    for bytes in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 2],
        &[4, 0, 1],
        &[200, 0, 1],
        &long,
    ] {
        let answer = net.command(bytes);
        check!(
            answer == Some(ERR),
            "a command of {} bytes that is none ({answer:?})",
            bytes.len()
        );
    }
    // Back and forth, as often as it likes.
    let turns = (0..6).filter(|turn| net.command(&pairs(1 + turn % 2)) == Some(OK));
    let turns = turns.count();
    check!(turns == 6, "pairs changed 6 times ({turns} obeyed)");
    for what in ["no room for an answer", "an empty command with none"] {
        net.restart();
        let ctrl = &mut net.queues[CTRL];
        write(COMMAND, &pairs(1));
        let len = if what.starts_with("no") { 4 } else { 1 };
        let used = ctrl.send(&[(COMMAND, len, 0)]);
        check!(!used && net.device.needs_reset(), "{what} ({used})");
    }
    // Of a driver that has not asked for any of it: the control queue comes behind one pair.
    let device = net.device;
    net.queues = device.start_with(RINGS, 1 << 17);
    net.queues[CTRL] = net.queues[2];
    for bytes in [&pairs(2)[..], &[1, 1, 2, 0, 0, 0, 0, 1], &[0, 0, 1]] {
        let answer = net.command(bytes);
        check!(
            answer == Some(ERR),
            "a command of a feature that was not accepted ({answer:?})"
        );
    }
    net.restart();
}

/// Buffers to receive into that are too small, in one place, or the queue's own rings. The host sends all the while.
fn receives(net: &mut Net) {
    let comes = |net: &mut Net| net.queues[RX].taken().is_some();
    net.restart();
    net.receive();
    check!(comes(net), "the host's packets come");
    for (what, len, flags) in [
        ("without room for a header", HEADER - 1, WRITE),
        ("of one byte", 1, WRITE),
        ("that may not be written", 4096, 0),
    ] {
        net.restart();
        let queue = &mut net.queues[RX];
        for index in 0..SIZE {
            fill(received(index), 64, 0xa5);
            queue.descriptor(index, (received(index), len, flags, 0));
            queue.offer(index);
        }
        queue.kick();
        let device = net.device;
        let stopped = wait(|| device.needs_reset());
        // Whoever works on the queue has had its turn.
        net.queues[TX].send(&[(PACKET, HEADER, 0)]);
        device.reset();
        let beyond = u64::from(len & 0xfff);
        let untouched =
            (0..SIZE).all(|index| is_filled(received(index) + beyond, 64 - beyond, 0xa5));
        check!(
            stopped && untouched,
            "buffers {what} (stopped {stopped}, untouched {untouched})"
        );
    }
    for (what, len, at) in [
        ("as long as a header", HEADER, RECEIVED),
        ("in one place", 4096, RECEIVED),
        ("on the queue's rings", 0x1800, RINGS),
    ] {
        net.restart();
        let queue = &mut net.queues[RX];
        for index in 0..SIZE {
            queue.descriptor(index, (at, len, WRITE, 0));
            queue.offer(index);
        }
        queue.kick();
        // It takes them or it stops; afterwards there is a device.
        comes(net);
        net.restart();
        net.receive();
        check!(comes(net), "packets come after buffers {what}");
    }
    // A chain that is as long as the ring, and the host's packet in all of it.
    net.restart();
    let queue = &mut net.queues[RX];
    for index in 0..SIZE {
        let (flags, next) = match index + 1 {
            SIZE => (WRITE, 0),
            next => (WRITE | NEXT, next),
        };
        queue.descriptor(index, (received(index), 1, flags, next));
    }
    queue.offer(0);
    queue.kick();
    net.restart();
}

/// The device goes while the host sends; what it has let go of stays as it is.
fn resets(net: &mut Net) {
    let mut untouched = true;
    for turn in 0..6 {
        net.restart();
        net.receive();
        net.device.set(QUEUE_NOTIFY, TX as u32);
        if turn % 2 == 0 {
            net.queues[RX].taken();
        }
        net.device.reset();
        (0..SIZE).for_each(|index| fill(received(index), 64, 0xc3));
        net.queues[RX].kick();
        untouched &= (0..SIZE).all(|index| is_filled(received(index), 64, 0xc3));
    }
    check!(untouched, "resets while packets come");
    net.restart();
}
