//! A second processor changes what a device reads while it reads it: descriptors, rings, headers, names.

use core::fmt;

use crate::check;
use crate::fuse::{
    self, GETATTR, HEADER, LOOKUP, REPLY, REPLY_ROOM, REQUEST, ROOT, Request, Session,
};
use crate::second::{self, Place};
use crate::sockets;
use crate::start::Start;
use crate::virtio::{
    Device, FS, IN_TABLE, NEXT, Queue, RNG, VSOCK, WRITE, fill, is_filled, ticks_passed,
};

const RINGS: u64 = 0x110_0000;
const ROUNDS: u32 = 100;
/// Ticks of the processor's clock that a request is waited for, which may be lost: some tens of milliseconds.
const A_WHILE: u64 = 100_000_000;

/// A device's registers.
const REGISTERS: u64 = 0xd000_0000;
/// Where else a buffer may be said to be, and how much of it.
const ELSEWHERE: u64 = 0x1a0_0000;
const LONGEST: u64 = REPLY_ROOM as u64;
/// What lies behind each buffer.
const BEHIND: [u64; 3] = [REQUEST + LONGEST, REPLY + LONGEST, ELSEWHERE + LONGEST];
const GUARD: u64 = 4096;

/// How requests ended whose chain or ring was changed under way.
#[derive(Default)]
struct Ends {
    used: u32,
    stopped: u32,
    lost: u32,
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            used,
            stopped,
            lost,
        } = self;
        write!(f, "used {used}, stopped {stopped}, lost {lost}")
    }
}

impl Ends {
    /// Waits for the end of one.
    fn count(&mut self, queue: &mut Queue) {
        let since = crate::machine::ticks();
        loop {
            if queue.take().is_some() {
                self.used += 1;
                return;
            }
            if queue.device.needs_reset() {
                self.stopped += 1;
                return;
            }
            if ticks_passed(since) > A_WHILE {
                self.lost += 1;
                return;
            }
        }
    }
}

/// Tries all of it, or, where `try` says so, names alone.
pub fn attack(start: &Start) {
    let woken = second::wake();
    check!(woken, "a second processor wakes");
    if !woken {
        return;
    }
    names(start);
    if start.word("try") == "names" {
        return;
    }
    files(start);
    entropy(start);
    packets();
    let served = Device::find(FS).is_some_and(|device| Session::quietly(device).1.is_ok());
    check!(served, "an honest session is served");
    check!(
        second::turns() > u64::from(ROUNDS),
        "memory was changed {} times",
        second::turns()
    );
}

fn put_guards() {
    BEHIND.into_iter().for_each(|at| fill(at, GUARD, 0xa5));
}

fn guards_hold() -> bool {
    BEHIND.into_iter().all(|at| is_filled(at, GUARD, 0xa5))
}

/// A descriptor's address, length, flags and next, for a buffer that is honest at `at` for `len` bytes.
fn descriptor(index: u64, at: u64, len: u64, flags: u16, start: &Start) -> [Place; 4] {
    let table = RINGS + 0x2000 + index * 16;
    let flags = u64::from(flags);
    [
        (table, 8, [at, ELSEWHERE, start.ram - 16, REGISTERS]),
        (table + 8, 4, [len, 16, LONGEST, u64::from(u32::MAX)]),
        (
            table + 12,
            2,
            [flags, flags, u64::from(NEXT | WRITE), u64::from(IN_TABLE)],
        ),
        (table + 14, 2, [index + 1, 1, 0, 60_000]),
    ]
}

/// What is looked up is a name while it is checked, and a path when it is served.
fn names(start: &Start) {
    // Eight bytes each: what leads nowhere but is a path, and a name that ends.
    let path = u64::from_le_bytes(*b"././././");
    let name = u64::from_le_bytes(*b"name\0..\0");
    let Some(device) = Device::find(FS) else {
        check!(false, "no share to attack");
        return;
    };
    let mut session = Session::new(device);
    let Some(volume) = session.volume(start) else {
        return;
    };
    let marker = start.word("marker").as_bytes();
    let body: &[&[u8]] = &[b"././././", marker, &[0]];
    let found = session.call(LOOKUP, volume, body);
    check!(
        found == Err(22),
        "a path that leads to a file is refused ({found:?})"
    );
    // What is checked first is mostly what was written last.
    let harmless: &[&[u8]] = &[b"name\0..\0", marker, &[0]];
    second::race(&[(REQUEST + HEADER, 8, [path, name, path, name])]);
    let mut served = 0;
    for _ in 0..ROUNDS {
        served += u32::from(session.call(LOOKUP, volume, harmless).is_ok());
    }
    second::rest();
    check!(
        served == 0,
        "a path served as a name, in {ROUNDS} rounds {served} times"
    );
    let found = session.lookup(volume, marker).map(|node| node.mode);
    check!(found.is_ok(), "names are looked up as before ({found:?})");
}

/// Requests of the file server in chains that move.
fn files(start: &Start) {
    let Some(device) = Device::find(FS) else {
        return;
    };
    put_guards();
    let size = HEADER + 16;
    let request = descriptor(0, REQUEST, size, NEXT, start);
    let reply = descriptor(1, REPLY, LONGEST, WRITE, start);
    // The request's own length and operation as well.
    let header: [Place; 2] = [
        (REQUEST, 4, [size, 0, 4096, u64::from(u32::MAX)]),
        (
            REQUEST + 4,
            4,
            [GETATTR, LOOKUP, fuse::READLINK, 4095].map(u64::from),
        ),
    ];
    let mut places = [header[0]; 10];
    places[..4].copy_from_slice(&request);
    places[4..8].copy_from_slice(&reply);
    places[8..].copy_from_slice(&header);
    let mut ends = Ends::default();
    let (mut session, mut started) = Session::quietly(device);
    second::race(&places);
    for _ in 0..ROUNDS {
        if device.needs_reset() {
            second::rest();
            (session, started) = Session::quietly(device);
            if started.is_err() {
                break;
            }
            second::race(&places);
        }
        let request = Request {
            op: GETATTR,
            node: ROOT,
            body: &[&[0; 16]],
        };
        session.post(0, &request, None);
        session.queue.kick();
        ends.count(&mut session.queue);
    }
    second::rest();
    let (_, again) = Session::quietly(device);
    check!(
        started.is_ok() && again.is_ok() && guards_hold(),
        "file requests in chains that move ({ends})"
    );
}

/// Buffers of entropy whose chain and rings move.
fn entropy(start: &Start) {
    let Some(device) = Device::find(RNG) else {
        return;
    };
    put_guards();
    let bring_up = || {
        let [queue] = device.start(RINGS + 0x2000);
        queue
    };
    let mut queue = bring_up();
    let rings = queue.rings();
    let mut places = [(0, 8, [0; 4]); 7];
    places[..4].copy_from_slice(&descriptor(0, REPLY, 4096, WRITE, start));
    places[4] = (rings[1] + 2, 2, [1, 2, 3, 40_000]);
    places[5] = (rings[1] + 4, 2, [0, 0, 1, 60_000]);
    places[6] = (rings[2] + 2, 2, [0, 1, 7, 60_000]);
    let mut ends = Ends::default();
    for _ in 0..ROUNDS {
        second::race(&places);
        queue.descriptor(0, (REPLY, 4096, WRITE, 0));
        queue.offer(0);
        queue.kick();
        ends.count(&mut queue);
        second::rest();
        queue = bring_up();
    }
    let filled = queue.request((0, 0), (REPLY, 64));
    check!(
        filled == Some(64) && guards_hold(),
        "entropy in chains and rings that move ({ends}, then {filled:?})"
    );
    device.reset();
}

/// Packets of vsock whose header changes, and whose chain moves.
fn packets() {
    let Some(device) = Device::find(VSOCK) else {
        return;
    };
    let mut socket = sockets::Socket::new(device);
    let at = sockets::PACKET;
    let table = RINGS + 0x2000;
    let places: [Place; 8] = [
        (at, 8, [3, 3, 2, u64::MAX]),
        (at + 8, 8, [2, 2, 3, 1]),
        (at + 20, 4, [1025, 1024, 4000, 0]),
        (at + 24, 4, [0, 64, 65_537, u64::from(u32::MAX)]),
        (at + 28, 2, [1, 1, 2, 0xffff]),
        (at + 30, 2, [1, 5, 4, 3]),
        (at + 32, 4, [0, 6, 0, u64::from(u32::MAX)]),
        (table + 8, 4, [44, 108, 44, 43]),
    ];
    let mut ends = Ends::default();
    second::race(&places);
    for _ in 0..ROUNDS {
        if device.needs_reset() {
            second::rest();
            socket = sockets::Socket::new(device);
            second::race(&places);
        }
        let queue = &mut socket.send;
        queue.descriptor(0, (at, 108, 0, 0));
        queue.offer(0);
        queue.kick();
        ends.count(queue);
        while socket.received().is_some() {}
    }
    second::rest();
    socket = sockets::Socket::new(device);
    let quiet = socket.is_quiet_in_time();
    check!(
        quiet && ends.used > 0,
        "packets whose header changes ({ends})"
    );
    device.reset();
}
