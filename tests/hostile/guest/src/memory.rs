//! Requests of virtio-mem that no driver makes, and memory that is not plugged.

use crate::fuse::Session;
use crate::machine::{read_pluggable, word, write, write_pluggable};
use crate::queues;
use crate::start::Start;
use crate::virtio::{CONFIG, Device, FS, MEM, Queue, RNG, fill, is_filled, wait};
use crate::{Tally, check};

const RINGS: u64 = 0x110_0000;
const REQUEST: u64 = 0x120_0000;
const ANSWER: u64 = 0x121_0000;
/// Rings of a second device.
const OTHER_RINGS: u64 = 0x112_0000;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Answers, and states with an `ACK`.
const ACK: u64 = 0;
const NACK: u64 = 1;
const ERROR: u64 = 3;
const PLUGGED: u64 = 0;
const UNPLUGGED: u64 = 1;
const MIXED: u64 = 2;

const BLOCK: u64 = 2 << 20;

const EFAULT: i32 = 14;
/// Fields of the configuration.
const REGION: u64 = 16;
const REGION_SIZE: u64 = 24;
const PLUGGED_SIZE: u64 = 40;
const REQUESTED_SIZE: u64 = 48;

struct Memory {
    device: Device,
    queue: Queue,
    start: u64,
    size: u64,
}

impl Memory {
    fn new(device: Device) -> Self {
        let [queue] = device.start(RINGS);
        let mut memory = Self {
            device,
            queue,
            start: 0,
            size: 0,
        };
        (memory.start, memory.size) = (memory.field(REGION), memory.field(REGION_SIZE));
        memory
    }

    fn field(&self, offset: u64) -> u64 {
        let half = |offset| u64::from(self.device.get(CONFIG + offset));
        half(offset) | half(offset + 4) << 32
    }

    /// The answer to a request and the state in it.
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> Option<(u64, u64)> {
        write(REQUEST, &[0; 24]);
        write(REQUEST, &kind.to_le_bytes());
        write(REQUEST + 8, &address.to_le_bytes());
        write(REQUEST + 16, &blocks.to_le_bytes());
        write(ANSWER, &[0xff; 10]);
        self.queue.request((REQUEST, 24), (ANSWER, 10))?;
        Some((word::<2>(ANSWER), word::<2>(ANSWER + 8)))
    }

    fn answer(&mut self, kind: u16, address: u64, blocks: u16) -> Option<u64> {
        self.ask(kind, address, blocks).map(|(answer, _)| answer)
    }

    fn state(&mut self, address: u64, blocks: u16) -> Option<u64> {
        let (answer, state) = self.ask(STATE, address, blocks)?;
        (answer == ACK).then_some(state)
    }

    /// Of the `index`th block.
    fn block(&self, index: u64) -> u64 {
        self.start + index * BLOCK
    }
}

/// Does what `try` says: `requests` where the host gives nothing, `granted` where it gives 16 MiB, or one touch of what is not plugged.
pub fn attack(start: &Start) {
    let Some(device) = Device::find(MEM) else {
        check!(false, "no memory to plug");
        return;
    };
    let mut memory = Memory::new(device);
    let unplugged = memory.start;
    match start.word("try") {
        "requests" => {
            queues::faults(&"virtio-mem", 0, start, || device.start::<1>(RINGS)[0]);
            lengths(device);
            memory = Memory::new(device);
            nonsense(&mut memory);
            nothing_is_granted(&mut memory);
            files(start, unplugged);
        }
        "granted" => granted(&mut memory),
        "processor" => {
            let found = read_pluggable(unplugged);
            check!(false, "read what is not plugged ({found:#x})");
        }
        "processor_again" => {
            granted_blocks(&memory);
            memory.answer(PLUG, unplugged, 2);
            write_pluggable(unplugged, 7);
            memory.answer(UNPLUG, unplugged, 1);
            write_pluggable(unplugged, 8);
            check!(false, "wrote what is plugged no more");
        }
        "device" => {
            let filled = Device::find(RNG).map(|device| {
                let [mut queue] = device.start(OTHER_RINGS);
                queue.request((0, 0), (unplugged, 64))
            });
            check!(false, "a device wrote what is not plugged ({filled:?})");
        }
        "rings" => {
            if let Some(device) = Device::find(RNG) {
                device.negotiate();
                Queue::new(device, 0, OTHER_RINGS).set_up([
                    unplugged,
                    unplugged + 0x800,
                    unplugged + 0x1000,
                ]);
                device.set(crate::virtio::STATUS, crate::virtio::RUNNING);
                device.set(crate::virtio::QUEUE_NOTIFY, 0);
                wait(|| device.needs_reset());
            }
            check!(false, "a device works by rings that are not plugged");
        }
        "answer" => {
            granted_blocks(&memory);
            memory.answer(PLUG, unplugged, 1);
            // The answer goes to what the request takes away.
            write(REQUEST, &UNPLUG.to_le_bytes());
            let answered = memory.queue.request((REQUEST, 24), (unplugged, 10));
            check!(false, "answered where nothing is plugged ({answered:?})");
        }
        other => check!(false, "nothing is called {other:?}"),
    }
}

/// Requests and answers that are too short or too long.
fn lengths(device: Device) {
    for (request, answer) in [(23, 10), (24, 9), (1, 10), (24, 0), (0, 10), (24, 5000)] {
        let [mut queue] = device.start(RINGS);
        fill(ANSWER, 64, 0xa5);
        write(REQUEST, &[0; 24]);
        let used = match answer {
            0 => queue.send(&[(REQUEST, 24, 0)]),
            _ => {
                let used = queue.request((REQUEST, request), (ANSWER, answer));
                used.is_some()
            }
        };
        check!(
            !used && device.needs_reset() && is_filled(ANSWER, 64, 0xa5),
            "a request of {request} bytes with {answer} for its answer"
        );
    }
}

/// What can never be carried out, whatever the host grants.
fn nonsense(memory: &mut Memory) {
    let (start, end) = (memory.start, memory.start + memory.size);
    let blocks = (memory.size / BLOCK) as u16;
    for kind in [PLUG, UNPLUG, STATE] {
        let mut tally = Tally::default();
        for (address, count) in [
            (start, 0),
            (start + 4096, 1),
            (start + BLOCK - 1, 1),
            (start - BLOCK, 1),
            (start - BLOCK, 2),
            (end, 1),
            (end - BLOCK, 2),
            (start, blocks + 1),
            (start, u16::MAX),
            (0, 1),
            (BLOCK, 1),
            (0u64.wrapping_sub(BLOCK), 1),
            (0u64.wrapping_sub(BLOCK), u16::MAX),
            (u64::MAX, 1),
        ] {
            let answer = memory.answer(kind, address, count);
            tally.note(
                answer == Some(ERROR),
                format_args!("request {kind} of {count} blocks at {address:#x} ({answer:?})"),
            );
        }
        tally.told(format_args!("requests {kind} that cannot be carried out"));
    }
    for kind in [4, 99, u16::MAX] {
        let answer = memory.answer(kind, start, 1);
        check!(
            answer == Some(ERROR),
            "request {kind}, which is none ({answer:?})"
        );
    }
}

/// Without the host's word nothing is plugged, nor does anything that is not go.
fn nothing_is_granted(memory: &mut Memory) {
    for (kind, index, count, expected) in [
        (PLUG, 0, 1, NACK),
        (PLUG, 3, 60, NACK),
        (UNPLUG, 0, 1, ERROR),
        (UNPLUG, 0, 64, ERROR),
        (UNPLUG_ALL, 0, 0, ACK),
    ] {
        let answer = memory.answer(kind, memory.block(index), count);
        check!(
            answer == Some(expected),
            "request {kind} of {count} blocks without a grant ({answer:?})"
        );
    }
    let state = memory.state(memory.start, 64);
    check!(
        state == Some(UNPLUGGED) && memory.field(PLUGGED_SIZE) == 0,
        "nothing is plugged ({state:?})"
    );
}

/// A file is not read into what is not plugged: the host's kernel copies there, and cannot.
fn files(start: &Start, unplugged: u64) {
    let Some(device) = Device::find(FS) else {
        check!(false, "no share to read");
        return;
    };
    let mut session = Session::new(device);
    let Some(volume) = session.volume(start) else {
        return;
    };
    let Ok((node, handle)) = session.create(volume, b"read") else {
        check!(false, "no file to read");
        return;
    };
    let written = session.write(node.id, handle, 0, 8, b"12345678");
    let elsewhere = session.read_into(node.id, handle, unplugged, 4096);
    check!(
        elsewhere == Err(EFAULT),
        "read into what is not plugged ({written:?}, {elsewhere:?})"
    );
    session.revive();
    let found = session.lookup(volume, b"read").map(|node| node.mode);
    check!(found.is_ok(), "and served as before ({found:?})");
}

/// Waits until the host has given some.
fn granted_blocks(memory: &Memory) -> u64 {
    wait(|| memory.field(REQUESTED_SIZE) != 0);
    memory.field(REQUESTED_SIZE) / BLOCK
}

/// Plugs less than it may, and more, and what overlaps.
fn granted(memory: &mut Memory) {
    let granted = granted_blocks(memory);
    check!(granted == 8, "the host has given {granted} blocks");
    nonsense(memory);
    for (what, kind, index, count, expected) in [
        ("all that there is", PLUG, 0, 64, NACK),
        ("one more than it may", PLUG, 0, 9, NACK),
        ("four", PLUG, 2, 4, ACK),
        ("the same once more", PLUG, 2, 4, ERROR),
        ("what overlaps at its end", PLUG, 4, 4, ERROR),
        ("what overlaps at its start", PLUG, 1, 2, ERROR),
        ("what surrounds it", UNPLUG, 1, 6, ERROR),
        ("half of what is unplugged", UNPLUG, 5, 2, ERROR),
        ("more than what is left", PLUG, 10, 5, NACK),
        ("one from the middle", UNPLUG, 3, 1, ACK),
        ("that one again", UNPLUG, 3, 1, ERROR),
        ("across the gap", UNPLUG, 2, 3, ERROR),
        ("over the gap", PLUG, 2, 3, ERROR),
        ("the gap", PLUG, 3, 1, ACK),
        ("the region's last", PLUG, 63, 1, ACK),
    ] {
        let answer = memory.answer(kind, memory.block(index), count);
        check!(
            answer == Some(expected),
            "request {kind}: {what} ({answer:?})"
        );
    }
    for (index, count, expected) in [
        (2, 4, PLUGGED),
        (0, 2, UNPLUGGED),
        (1, 2, MIXED),
        (0, 64, MIXED),
        (63, 1, PLUGGED),
    ] {
        let state = memory.state(memory.block(index), count);
        check!(
            state == Some(expected),
            "the state of {count} blocks at {index} ({state:?})"
        );
    }
    check!(
        memory.field(PLUGGED_SIZE) == 5 * BLOCK,
        "five blocks are plugged"
    );
    use_it(memory);
    // What is over the region's end is not a device's either.
    let end = memory.start + memory.size;
    let beyond = Device::find(RNG).map(|device| {
        let [mut queue] = device.start(OTHER_RINGS);
        queue.request((0, 0), (end - 32, 64))
    });
    check!(
        beyond == Some(None),
        "a buffer across the region's end ({beyond:?})"
    );
    let gone = memory.answer(UNPLUG_ALL, 0, 0);
    let again = memory.answer(UNPLUG_ALL, u64::MAX, 99);
    check!(
        (gone, again) == (Some(ACK), Some(ACK)) && memory.field(PLUGGED_SIZE) == 0,
        "all of it goes ({gone:?} {again:?})"
    );
}

/// What is plugged is memory, for the processor and for devices, and comes back empty.
fn use_it(memory: &mut Memory) {
    let at = memory.block(5);
    let before = read_pluggable(at + 8);
    write_pluggable(at + 8, u64::MAX);
    let filled = Device::find(RNG).and_then(|device| {
        let [mut queue] = device.start(OTHER_RINGS);
        queue.request((0, 0), (at + 4096, 64))
    });
    check!(
        before == 0 && filled == Some(64) && read_pluggable(at + 8) == u64::MAX,
        "what is plugged can be used ({before:#x}, {filled:?})"
    );
    let away = memory.answer(UNPLUG, at, 1);
    let back = memory.answer(PLUG, at, 1);
    let (own, devices) = (read_pluggable(at + 8), read_pluggable(at + 4096));
    check!(
        (away, back, own, devices) == (Some(ACK), Some(ACK), 0, 0),
        "it comes back empty ({away:?} {back:?} {own:#x} {devices:#x})"
    );
}
