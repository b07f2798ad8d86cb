//! What a hostile driver gets from any device, the same for all of them: a broken queue costs it that device until the next reset, a reset
//! works at any moment, and neither the VM nor its host is the worse for it.

use std::any::Any;
use std::sync::atomic::AtomicBool;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::balloon::Balloon;
use super::fs::Fs;
use super::mem::{Mem, Region};
use super::net::Net;
use super::rng::Rng;
use super::testing::{Guest, INDIRECT, NEXT, REGIONS, WRITE, memory};
use super::vsock::Vsock;
use super::worker::TURN;
use super::*;
use crate::jail::root::Root;

const SIZE: u16 = 64;
const CID: u64 = 3;
/// Of a vsock packet that belongs to no connection: it is answered with RST.
const STRAY: u64 = CID;
/// Of one that comes from somebody else: it is dropped.
const FOREIGN: u64 = 99;

/// A device, its driver, and a request that it answers at any time.
struct Subject {
    name: &'static str,
    guest: Guest,
    /// The request: its queue, what the device reads, and the lengths of what it writes.
    queue: usize,
    readable: Vec<u8>,
    writable: Vec<usize>,
    /// Queues that the device looks at when they are kicked.
    served: &'static [usize],
    /// What the device works with.
    _keep: Box<dyn Any>,
}

impl Subject {
    fn ask(&mut self) {
        let readable: &[&[u8]] = match self.readable.is_empty() {
            true => &[],
            false => &[&self.readable],
        };
        let head = self.guest.add(self.queue, readable, &self.writable);
        self.guest.kick(self.queue);
        assert_eq!(self.guest.next(self.queue).head, head.unwrap());
    }

    /// Puts the request into the table from descriptor `first` on; its buffers for the answer, and the next free descriptor.
    fn lay(&mut self, first: u16) -> (Vec<(u64, usize)>, u16) {
        let mut buffers = Vec::new();
        if !self.readable.is_empty() {
            let at = self.guest.alloc(self.readable.len());
            let to = GuestAddress(at);
            self.guest.memory.write_slice(&self.readable, to).unwrap();
            buffers.push((at, self.readable.len(), 0));
        }
        for len in &self.writable {
            buffers.push((self.guest.alloc(*len), *len, WRITE));
        }
        let last = buffers.len() - 1;
        for (index, (at, len, write)) in buffers.iter().enumerate() {
            let index = index as u16;
            let next = if usize::from(index) < last { NEXT } else { 0 };
            let at = Descriptor::new(*at, *len as u32, write | next, first + index + 1);
            let queue = &self.guest.queues[self.queue];
            queue.descriptor(&self.guest.memory, first + index, at);
        }
        let answers = buffers.iter().filter(|(.., write)| *write == WRITE);
        let answers = answers.map(|(at, len, _)| (*at, *len)).collect();
        (answers, first + buffers.len() as u16)
    }

    /// After whatever was done to it: the VM goes on, and so does the device once it is reset.
    fn is_well_after_a_reset(&mut self, what: &str) {
        let name = self.name;
        assert_eq!(self.guest.ending.cause(), None, "{name}: {what}");
        self.guest.bring_up(SIZE);
        assert_eq!(self.guest.status(), 15, "{name}: {what}");
        self.ask();
    }
}

fn packet(source: u64) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(source.to_le_bytes());
    packet.extend(2u64.to_le_bytes());
    // Ports 1 and 2, no payload, a stream, RW.
    packet.extend([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 5, 0]);
    packet.resize(44, 0);
    packet
}

fn subjects() -> Vec<Subject> {
    let subject = |name, device: Box<dyn VirtioDevice>, served, request: (usize, _, _)| Subject {
        name,
        guest: Guest::start(device, SIZE),
        queue: request.0,
        readable: request.1,
        writable: request.2,
        served,
        _keep: Box::new(()),
    };
    let (balloon, handle) = Balloon::new(&GuestMemory::new(memory()));
    // A page that is not there.
    let balloon = Subject {
        _keep: Box::new(handle),
        ..subject(
            "balloon",
            Box::new(balloon),
            &[0, 1, 2],
            (0, vec![0xff; 4], vec![]),
        )
    };

    let ram = memory();
    let region = Region::map(&ram, 128).unwrap();
    let all = region.join(&ram).unwrap();
    let (mem, handle) = Mem::new(region).unwrap();
    let mem = Subject {
        name: "mem",
        guest: Guest::with_memory(Box::new(mem), SIZE, all),
        queue: 0,
        // Nothing that it knows.
        readable: vec![0xff; 24],
        writable: vec![10],
        served: &[0],
        _keep: Box::new(handle),
    };

    let directory = tempfile::tempdir().unwrap();
    let root = Root::outside(std::fs::File::open(directory.path()).unwrap().into()).unwrap();
    let fs = Fs::new("share", root, husk_protocol::vm::CachePolicy::Auto, 1).unwrap();
    let mut unknown = vec![0; 40];
    unknown[0] = 40;
    unknown[4] = 200;
    let fs = Subject {
        _keep: Box::new(directory),
        ..subject("fs", Box::new(fs), &[0, 1], (1, unknown, vec![16]))
    };

    let (net, handle) = Net::new([2, 0, 0, 0, 0, 1], 1);
    // There is no link: packets go nowhere, and none come.
    let net = Subject {
        _keep: Box::new(handle),
        ..subject("net", Box::new(net), &[1, 2], (1, vec![0; 80], vec![]))
    };

    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, shim) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let vsock = Subject {
        _keep: Box::new(shim),
        ..subject(
            "vsock",
            Box::new(Vsock::new(CID, ours)),
            // The first when there is something for the guest.
            &[0, 1],
            (1, packet(FOREIGN), vec![]),
        )
    };
    let rng = Box::new(Rng::default());
    let rng = subject("rng", rng, &[0], (0, vec![], vec![64]));
    vec![rng, balloon, mem, fs, net, vsock]
}

fn store(guest: &Guest, at: u64, value: u16) {
    let at = GuestAddress(at);
    guest.memory.store(value, at, Ordering::SeqCst).unwrap();
}

fn load(guest: &Guest, at: u64) -> u16 {
    let at = GuestAddress(at);
    guest.memory.load(at, Ordering::SeqCst).unwrap()
}

/// Writes these descriptors (address, length, flags, next) to the start of the queue's table.
fn table(guest: &Guest, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, (at, len, flags, next)) in descriptors.iter().enumerate() {
        let descriptor = Descriptor::new(*at, *len, *flags, *next);
        guest.queues[queue].descriptor(&guest.memory, index as u16, descriptor);
    }
}

/// A buffer of the guest's, in its memory.
const A: u64 = 8 << 20;
/// A table of descriptors.
const T: u64 = 9 << 20;
const END: u64 = REGIONS[2].0 + REGIONS[2].1 as u64;

type Fault = (&'static str, &'static [(u64, u32, u16, u16)], u16);

/// What may be wrong with a chain: its descriptors, and its head.
const FAULTS: [Fault; 15] = [
    ("a loop", &[(A, 1, NEXT, 1), (A, 1, NEXT, 0)], 0),
    ("a loop of one", &[(A, 1, NEXT, 0)], 0),
    ("no memory", &[(1 << 40, 8, 0, 0)], 0),
    ("across a gap", &[(REGIONS[2].0 - 4, 8, 0, 0)], 0),
    ("over the end", &[(END - 1, 2, WRITE, 0)], 0),
    ("around the end", &[(u64::MAX - 1, 8, WRITE, 0)], 0),
    ("no bytes", &[(A, 0, 0, 0)], 0),
    (
        "order",
        &[
            (A, 64, NEXT | WRITE, 1),
            (A, 64, WRITE | NEXT, 2),
            (A, 1, 0, 0),
        ],
        0,
    ),
    ("a next that is none", &[(A, 1, NEXT, SIZE)], 0),
    ("a head that is none", &[(A, 1, 0, 0)], SIZE),
    ("a head far away", &[(A, 1, 0, 0)], u16::MAX),
    (
        "an indirect table and a next",
        &[(T, 16, INDIRECT | NEXT, 1), (A, 1, 0, 0)],
        0,
    ),
    ("a piece of a table", &[(T, 31, INDIRECT, 0)], 0),
    ("no table", &[(1 << 40, 16, INDIRECT, 0)], 0),
    // What is there is one of these.
    ("a table in a table", &[(T, 16, INDIRECT, 0)], 0),
];

/// Makes the device look at the queue.
fn provoke(subject: &mut Subject, queue: usize) {
    if (subject.name, queue) == ("vsock", 0) {
        let stray = packet(STRAY);
        subject.guest.add(1, &[&stray], &[]).unwrap();
        subject.guest.kick(1);
    }
    subject.guest.kick(queue);
}

#[test]
fn a_malformed_chain_costs_the_driver_its_device_until_a_reset() {
    for mut subject in subjects() {
        for queue in subject.served {
            for (what, descriptors, head) in FAULTS {
                let nested = RawDescriptor::from(Descriptor::new(T, 16, INDIRECT, 0));
                let guest = &mut subject.guest;
                guest.memory.write_obj(nested, GuestAddress(T)).unwrap();
                table(guest, *queue, descriptors);
                guest.queues[*queue].publish(&guest.memory, head);
                provoke(&mut subject, *queue);
                subject.guest.wait_failed();
                subject.is_well_after_a_reset(what);
            }
        }
    }
}

/// What a device takes at once, to the byte. (The others have no such bound: they look at the first few, or at packets.)
#[test]
fn a_request_has_no_more_bytes_than_its_device_takes() {
    let most = |name| match name {
        "balloon" => Some(64 << 10),
        "mem" => Some(4096),
        "fs" => Some(4 << 20),
        "vsock" => Some(128 << 10),
        _ => None,
    };
    for mut subject in subjects() {
        let Some(most) = most(subject.name) else {
            continue;
        };
        let request = subject.readable.clone();
        let answer: usize = subject.writable.iter().sum();
        let last = *request.last().unwrap();
        subject.readable.resize(most - answer, last);
        subject.ask();
        assert_eq!(subject.guest.status(), 15, "{}", subject.name);
        subject.readable.push(last);
        subject.lay(0);
        let guest = &mut subject.guest;
        guest.queues[subject.queue].publish(&guest.memory, 0);
        guest.kick(subject.queue);
        guest.wait_failed();
        subject.readable = request;
        subject.is_well_after_a_reset("too many bytes");
    }
}

#[test]
fn lines_in_the_log_are_counted() {
    let left = AtomicU32::new(3);
    let lines = (0..1000).filter(|_| takes_one(&left)).count();
    assert_eq!(lines, 3);
}

#[test]
fn an_available_index_that_jumps_costs_the_driver_its_device_until_a_reset() {
    for mut subject in subjects() {
        for queue in subject.served {
            for jump in [SIZE + 1, SIZE + 2, 0x8000, u16::MAX - 1, u16::MAX] {
                let at = subject.guest.queues[*queue].avail + 2;
                let index = load(&subject.guest, at);
                store(&subject.guest, at, index.wrapping_add(jump));
                provoke(&mut subject, *queue);
                subject.guest.wait_failed();
                subject.is_well_after_a_reset("a jump");
            }
        }
    }
}

/// Once the reset has been heard, nothing of what was under way is written to any more.
#[test]
fn a_reset_works_while_requests_are_under_way() {
    for mut subject in subjects() {
        for round in 0..24 {
            let (mut answers, mut first) = (Vec::new(), 0);
            for _ in 0..round.min(SIZE / 3) {
                let (buffers, next) = subject.lay(first);
                answers.extend(buffers);
                let guest = &mut subject.guest;
                guest.queues[subject.queue].publish(&guest.memory, first);
                guest.kick(subject.queue);
                first = next;
            }
            subject.guest.write32(0x70, 0);
            assert_eq!(subject.guest.status(), 0, "{}", subject.name);
            for (at, len) in &answers {
                let to = GuestAddress(*at);
                subject
                    .guest
                    .memory
                    .write_slice(&vec![0xaa; *len], to)
                    .unwrap();
            }
            // Again, and of a device that does not run.
            subject.guest.write32(0x70, 0);
            subject.guest.kick(subject.queue);
            subject.is_well_after_a_reset("a reset");
            for (at, len) in answers {
                let mut bytes = vec![0; len];
                let from = GuestAddress(at);
                subject.guest.memory.read_slice(&mut bytes, from).unwrap();
                assert_eq!(bytes, vec![0xaa; len], "{}", subject.name);
            }
        }
    }
}

/// Another vCPU makes requests available as fast as they are answered, while this one resets the device.
#[test]
fn a_reset_works_however_busy_the_driver_keeps_its_device() {
    let mut all = subjects();
    // The same device once more: it owes a RST for each packet, and has a buffer for each RST.
    let mut owing = subjects().pop().unwrap();
    owing.readable = packet(STRAY);
    all.push(owing);
    for mut subject in all {
        subject.lay(0);
        let receives = subject.readable == packet(STRAY);
        if receives {
            table(&subject.guest, 0, &[(A, 4096, WRITE, 0)]);
        }
        let busy = if receives {
            vec![0, 1]
        } else {
            vec![subject.queue]
        };
        let rings: Vec<_> = busy
            .iter()
            .map(|queue| {
                let kick = subject.guest.transport.queue_kicks()[*queue].try_clone();
                let queue = &subject.guest.queues[*queue];
                (queue.avail + 2, queue.used + 2, kick.unwrap())
            })
            .collect();
        let memory = subject.guest.memory.clone();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    for (avail, used, kick) in &rings {
                        let used: u16 = memory.load(GuestAddress(*used), Ordering::SeqCst).unwrap();
                        let full = used.wrapping_add(SIZE);
                        memory
                            .store(full, GuestAddress(*avail), Ordering::SeqCst)
                            .unwrap();
                        let _ = kick.write(1);
                    }
                }
            });
            let used = subject.guest.queues[subject.queue].used + 2;
            while usize::from(load(&subject.guest, used)) < 4 * TURN {
                std::thread::yield_now();
            }
            subject.guest.write32(0x70, 0);
            over.store(true, Ordering::SeqCst);
            assert_eq!(subject.guest.status(), 0);
        });
        subject.is_well_after_a_reset("a busy driver");
    }
}

/// What a driver may write there is `actual` of the balloon, and that is what it says about itself.
#[test]
fn the_configuration_is_not_the_drivers_to_change() {
    let config = |guest: &mut Guest| {
        let mut bytes = [0; 256];
        for (at, byte) in bytes.iter_mut().enumerate() {
            guest
                .transport
                .read(0x100 + at as u64, std::slice::from_mut(byte));
        }
        bytes
    };
    for mut subject in subjects() {
        let before = config(&mut subject.guest);
        for len in [1usize, 2, 4, 8, 3, 16] {
            for at in (0..256).chain([0xeff, u64::MAX - 0x100]) {
                let data = vec![0xee; len];
                subject
                    .guest
                    .transport
                    .write(0x100u64.wrapping_add(at), &data);
            }
        }
        let mut after = config(&mut subject.guest);
        if subject.name == "balloon" {
            assert_eq!(after[4..8], [0xee; 4]);
            after[4..8].fill(0);
        }
        assert_eq!(before, after, "{}", subject.name);
        subject.ask();
    }
}

/// Brings the device up with all of its queues at these addresses.
fn bring_up_at(guest: &mut Guest, rings: [u64; 3]) {
    for status in [0, 1, 3] {
        guest.write32(0x70, status);
    }
    guest.write32(0x24, 0);
    guest.write32(0x20, guest.features as u32);
    guest.write32(0x24, 1);
    guest.write32(0x20, (guest.features >> 32) as u32);
    guest.write32(0x70, 11);
    for index in 0..guest.queues.len() {
        guest.write32(0x30, index as u32);
        guest.write32(0x38, 8);
        for (register, at) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
            guest.write32(register, at as u32);
            guest.write32(register + 4, (at >> 32) as u32);
        }
        guest.write32(0x44, 1);
    }
    guest.write32(0x70, 15);
}

/// Rings that overlap, one another or another queue's, are the driver's own loss: the device reads what it has itself written.
#[test]
fn rings_that_overlap_hurt_nobody_else() {
    for mut subject in subjects() {
        for rings in [
            [A, A, A],
            [A, A + 0x1000, A],
            [A, A + 2, A + 4],
            [A + 0x10, A, A + 8],
            [T, T + 4, T],
        ] {
            let guest = &mut subject.guest;
            for fill in [0u8, 1, 2, 0xff] {
                guest
                    .memory
                    .write_slice(&[fill; 0x2000], GuestAddress(A))
                    .unwrap();
                bring_up_at(guest, rings);
                assert_eq!(guest.status() & !0x40, 15, "{} {rings:x?}", subject.name);
                for queue in 0..guest.queues.len() {
                    guest.kick(queue);
                }
                guest.write32(0x70, 0);
                assert_eq!(guest.status(), 0);
            }
            subject.is_well_after_a_reset("overlapping rings");
        }
    }
}
