//! Queues that no driver makes: each costs the driver its device until that is reset, and nobody else anything.

use crate::check;
use crate::machine::{self, write, write_at_end};
use crate::start::Start;
use crate::virtio::{
    BALLOON, CONFIG, Device, FS, IN_TABLE, NEXT, QUEUE_NUM, QUEUE_SEL, Queue, RNG, RUNNING, SIZE,
    STATUS, VSOCK, WRITE, fill, is_filled, wait,
};

const RINGS: u64 = 0x110_0000;
const BUFFER: u64 = 0x120_0000;
const TABLE: u64 = 0x130_0000;
/// A device's registers, which are no memory.
const REGISTERS: u64 = 0xd000_0000;

/// What is wrong, and how to do it to a queue.
type Fault = (&'static str, fn(&mut Queue, &Start));

/// Each breaks the rules, whatever the device.
const FAULTS: &[Fault] = &[
    ("a buffer beyond memory", |queue, start| {
        queue.descriptor(0, (start.ram - 16, 4096, WRITE, 0));
        queue.offer(0);
    }),
    ("a buffer in a device's registers", |queue, _| {
        queue.descriptor(0, (REGISTERS, 256, WRITE, 0));
        queue.offer(0);
    }),
    ("a buffer whose end wraps", |queue, _| {
        queue.descriptor(0, (u64::MAX - 4095, u32::MAX, WRITE, 0));
        queue.offer(0);
    }),
    ("an empty buffer", |queue, _| {
        queue.descriptor(0, (BUFFER, 0, WRITE, 0));
        queue.offer(0);
    }),
    ("a next that is none", |queue, _| {
        queue.descriptor(0, (BUFFER, 64, NEXT | WRITE, 60_000));
        queue.offer(0);
    }),
    ("a loop", |queue, _| {
        queue.descriptor(0, (BUFFER, 64, NEXT | WRITE, 1));
        queue.descriptor(1, (BUFFER, 64, NEXT | WRITE, 0));
        queue.offer(0);
    }),
    ("a head that is none", |queue, _| queue.offer(60_000)),
    ("an index far ahead", |queue, _| queue.show(40_000)),
    ("a readable buffer after a writable", |queue, _| {
        queue.descriptor(0, (BUFFER, 64, NEXT | WRITE, 1));
        queue.descriptor(1, (BUFFER, 64, 0, 0));
        queue.offer(0);
    }),
    ("a table beyond memory", |queue, start| {
        queue.descriptor(0, (start.ram - 8, 64, IN_TABLE, 0));
        queue.offer(0);
    }),
    ("a table of odd length", |queue, _| {
        queue.descriptor(0, (TABLE, 17, IN_TABLE, 0));
        queue.offer(0);
    }),
    ("a table in a table", |queue, _| {
        Queue::descriptor_at(TABLE, (TABLE, 16, IN_TABLE, 0));
        queue.descriptor(0, (TABLE, 16, IN_TABLE, 0));
        queue.offer(0);
    }),
    ("a table without an end", |queue, _| {
        for index in 0..2048 {
            let next = (index + 1) % 2048;
            Queue::descriptor_at(
                TABLE + u64::from(index) * 16,
                (BUFFER, 64, NEXT | WRITE, next),
            );
        }
        queue.descriptor(0, (TABLE, 2048 * 16, IN_TABLE, 0));
        queue.offer(0);
    }),
];

/// Tries all of it.
pub fn attack(start: &Start) {
    for (id, queue) in [
        (RNG, 0),
        (VSOCK, 1),
        (BALLOON, 0),
        (BALLOON, 1),
        (FS, 0),
        (FS, 1),
    ] {
        match Device::find(id) {
            Some(device) => each_fault(device, id, queue, start),
            None => check!(false, "no device of type {id} to attack"),
        }
    }
    rings_elsewhere(start);
    registers_out_of_turn();
    own_rings_as_buffer();
    one_head_many_times();
    resets_at_bad_moments();
    balloon_pages(start);
    lying_configuration();
    // After all this, an honest driver is served.
    let served = Device::find(RNG).is_some_and(|device| entropy(device).is_some());
    check!(served, "an honest request is answered");
}

/// Brings a device up; the queue of this index.
fn queue_of(device: Device, index: usize) -> Queue {
    let queues: [Queue; 3] = device.start(RINGS);
    queues[index.min(2)]
}

fn each_fault(device: Device, id: u32, index: usize, start: &Start) {
    faults(&format_args!("device {id}"), index, start, || {
        queue_of(device, index)
    });
    device.reset();
}

/// Does each of them to a queue that is brought up anew.
pub fn faults(
    device: &dyn core::fmt::Display,
    index: usize,
    start: &Start,
    mut bring_up: impl FnMut() -> Queue,
) {
    const MARK: [u8; 64] = [0x5a; 64];
    for (what, fault) in FAULTS {
        let mut queue = bring_up();
        write_at_end(start.ram, &MARK);
        fill(BUFFER, 64, 0xa5);
        fault(&mut queue, start);
        queue.kick();
        let mut after = [0; 64];
        let stopped = wait(|| queue.device.needs_reset());
        machine::read(start.ram - 64, &mut after);
        let untouched = after == MARK && is_filled(BUFFER, 64, 0xa5);
        let mut answers = queue;
        let unanswered = answers.take().is_none();
        if stopped && untouched && unanswered {
            check!(true, "{device}, queue {index}: {what}");
        } else {
            check!(
                false,
                "{device}, queue {index}: {what} (stopped {stopped}, untouched {untouched}, unanswered {unanswered})"
            );
        }
    }
}

/// 64 bytes of entropy, if the device gives any.
fn entropy(device: Device) -> Option<u32> {
    let [mut queue] = device.start(RINGS);
    fill(BUFFER, 64, 0);
    let len = queue.request((0, 0), (BUFFER, 64))?;
    (!is_filled(BUFFER, 64, 0)).then_some(len)
}

/// A device whose rings are not in memory does not start.
fn rings_elsewhere(start: &Start) {
    let Some(device) = Device::find(RNG) else {
        return;
    };
    let good = Queue::new(device, 0, RINGS).rings();
    for bad in [0, start.ram - 16, REGISTERS, u64::MAX - 15] {
        for which in 0..3 {
            device.negotiate();
            let mut rings = good;
            rings[which] = bad;
            Queue::new(device, 0, RINGS).set_up(rings);
            device.set(STATUS, RUNNING);
            check!(device.needs_reset(), "ring {which} at {bad:#x}");
        }
    }
    device.reset();
}

/// What may only be said while a queue is set up is not heard before nor after.
fn registers_out_of_turn() {
    let Some(device) = Device::find(RNG) else {
        return;
    };
    let [mut queue] = device.start(RINGS);
    for (register, value) in [(QUEUE_NUM, 3), (0x80, 0xd000_0000), (0x84, 7), (0x44, 0)] {
        device.set(QUEUE_SEL, 0);
        device.set(register, value);
    }
    let answered = queue.request((0, 0), (BUFFER, 64));
    check!(
        answered == Some(64),
        "a running queue does not move ({answered:?})"
    );
    for index in [1, 7, u32::MAX] {
        device.set(QUEUE_SEL, index);
        device.set(QUEUE_NUM, 64);
        device.set(0x50, index);
    }
    // Running without a rung of the ladder below it.
    device.reset();
    device.set(STATUS, RUNNING);
    check!(device.get(STATUS) == 0, "no start without negotiation");
    device.reset();
    // A queue of no size, and of one that is no power of two.
    for size in [0, 3, 65_535, u32::MAX] {
        device.negotiate();
        let queue = Queue::new(device, 0, RINGS);
        queue.set_up(queue.rings());
        device.set(QUEUE_NUM, size);
        device.set(STATUS, RUNNING);
    }
    check!(entropy(device).is_some(), "queue sizes of any kind");
}

/// The device writes over the rings that it works on.
fn own_rings_as_buffer() {
    let Some(device) = Device::find(RNG) else {
        return;
    };
    for ring in 0..3 {
        let [mut queue] = device.start(RINGS);
        queue.descriptor(0, (queue.rings()[ring], 2048, WRITE, 0));
        // The same once more, and both at the same place.
        queue.descriptor(1, (BUFFER, 64, WRITE | NEXT, 2));
        queue.descriptor(2, (BUFFER, 64, WRITE, 0));
        queue.offer(1);
        queue.offer(0);
        queue.kick();
        // Whatever it finds there now: it stops or goes on.
        queue.kick();
        check!(
            entropy(device).is_some(),
            "ring {ring} as a buffer, and two buffers in one place"
        );
    }
}

/// One chain is made available many times: each is a request of its own.
fn one_head_many_times() {
    let Some(device) = Device::find(RNG) else {
        return;
    };
    let [mut queue] = device.start(RINGS);
    queue.descriptor(0, (BUFFER, 64, WRITE, 0));
    (0..16).for_each(|_| queue.offer(0));
    queue.kick();
    let answered = (0..16).filter(|_| queue.taken() == Some((0, 64))).count();
    check!(
        answered == 16,
        "one head sixteen times ({answered} answered)"
    );
}

/// The device goes while it works.
fn resets_at_bad_moments() {
    for (id, index) in [(RNG, 0), (BALLOON, 0), (FS, 1), (VSOCK, 1)] {
        let Some(device) = Device::find(id) else {
            continue;
        };
        for _ in 0..10 {
            let mut queue = queue_of(device, index);
            for head in 0..SIZE {
                queue.descriptor(head, (BUFFER + u64::from(head) * 4096, 4096, WRITE, 0));
                queue.offer(head);
            }
            queue.kick();
            device.reset();
            // And memory that it has let go of is not written any more.
            fill(BUFFER, 64, 0xc3);
            queue.kick();
        }
        check!(
            is_filled(BUFFER, 64, 0xc3),
            "device {id} is reset while it works"
        );
    }
}

/// Pages that the guest has not got are put into the balloon, the balloon's own among them.
fn balloon_pages(start: &Start) {
    let Some(device) = Device::find(BALLOON) else {
        return;
    };
    let [mut inflate, mut deflate, mut reports]: [Queue; 3] = device.start(RINGS);
    let beyond = (start.ram >> 12) as u32;
    let pages = [beyond, u32::MAX, 0xd_0000, 0xf_ee00, beyond - 1, beyond - 1];
    for (slot, page) in (0..).zip(pages) {
        write(BUFFER + slot * 4, &page.to_le_bytes());
    }
    let gone = inflate.request((BUFFER, pages.len() as u32 * 4), (0, 0));
    let back = deflate.request((BUFFER, pages.len() as u32 * 4), (0, 0));
    let odd = inflate.request((BUFFER, 3), (0, 0));
    let report = reports.request((0, 0), (BUFFER, 64));
    // It may take what is wrong in them for nothing or for a fault; either way there is a device afterwards.
    let mut inflate = queue_of(device, 0);
    write(BUFFER, &(0x2000u32 + 1).to_le_bytes());
    let honest = inflate.request((BUFFER, 4), (0, 0));
    check!(
        honest.is_some(),
        "pages of nobody in the balloon ({gone:?} {back:?} {odd:?} {report:?})"
    );
    device.reset();
}

/// Every byte of every device's configuration is written, and far beyond it.
pub fn lying_configuration() {
    for (device, id) in Device::all() {
        device.negotiate();
        for offset in (0..64).chain([0xe00, 0xefc]) {
            device.set(CONFIG + (offset & !3), u32::MAX);
        }
        // The window's last word, and a read of everything.
        (0..0x1000).step_by(4).for_each(|register| {
            device.get(register);
        });
        device.reset();
        check!(
            device.get(0) == 0x7472_6976,
            "device {id}: configuration of ones"
        );
    }
}
