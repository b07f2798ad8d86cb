use std::os::unix::process::ExitStatusExt as _;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Guest, WRITE, elsewhere, memory, wait_readable_fd};

const MIB: u64 = 1 << 20;
const ACK: u16 = Response::Ack as u16;
const NACK: u16 = Response::Nack as u16;
const ERROR: u16 = Response::Error as u16;

struct World {
    guest: Guest,
    handle: MemHandle,
    start: u64,
}

/// A guest that may plug 256 MiB.
fn started() -> World {
    let ram = memory();
    let region = Region::map(&ram, 256).unwrap();
    let start = region.start();
    let all = region.join(&ram).unwrap();
    let (device, handle) = Mem::new(region).unwrap();
    let guest = Guest::with_memory(Box::new(device), 16, all);
    World {
        guest,
        handle,
        start,
    }
}

fn request(kind: u16, addr: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST_LEN];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

impl World {
    /// Response and state.
    fn ask(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        let bytes = request(kind, addr, count);
        self.guest.add(0, &[&bytes], &[RESPONSE_LEN]).unwrap();
        self.guest.kick(0);
        let used = self.guest.next(0);
        let word = |at: usize| u16::from_le_bytes([used.data[at], used.data[at + 1]]);
        assert_eq!(used.data.len(), RESPONSE_LEN);
        (word(0), word(8))
    }

    fn plug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(PLUG, self.start + block * BLOCK, count).0
    }

    fn unplug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(UNPLUG, self.start + block * BLOCK, count).0
    }

    fn state(&mut self, block: u64, count: u16) -> (u16, u16) {
        self.ask(STATE, self.start + block * BLOCK, count)
    }

    fn config(&mut self, field: u64) -> u64 {
        let low = self.guest.read32(0x100 + field * 8);
        let high = self.guest.read32(0x104 + field * 8);
        u64::from(high) << 32 | u64::from(low)
    }

    fn block(&self, block: u64) -> GuestAddress {
        GuestAddress(self.start + block * BLOCK)
    }
}

#[test]
fn the_driver_finds_the_region_and_what_is_asked_of_it() {
    let mut w = started();
    assert_ne!(w.guest.features & F_UNPLUGGED_INACCESSIBLE, 0);
    let start = w.start;
    assert_eq!(
        [0, 1, 2, 3, 4, 5, 6].map(|field| w.config(field)),
        [BLOCK, 0, start, 256 * MIB, 256 * MIB, 0, 0]
    );
    w.handle.request(9 * MIB);
    w.guest.wait_interrupt();
    assert_eq!(w.config(6), 10 * MIB, "whole blocks");
    w.handle.request(u64::MAX);
    assert_eq!(w.config(6), 256 * MIB, "at most the region");
}

#[test]
fn memory_is_there_from_plug_to_unplug() {
    let mut w = started();
    w.handle.request(8 * MIB);
    assert_eq!(w.plug(1, 3), ACK);
    assert_eq!(w.config(5), 6 * MIB);
    assert_eq!(w.handle.plugged_bytes(), 6 * MIB);
    for block in [1, 3] {
        let at = w.block(block);
        w.guest.memory.write_obj(7u64, at).unwrap();
        assert_eq!(w.guest.memory.read_obj::<u64>(at).unwrap(), 7);
    }
    let plugged = State::Plugged as u16;
    assert_eq!(w.state(1, 3), (ACK, plugged));
    assert_eq!(w.state(0, 1), (ACK, State::Unplugged as u16));
    assert_eq!(w.state(0, 2), (ACK, State::Mixed as u16));
    assert_eq!(w.unplug(2, 2), ACK);
    assert_eq!(w.state(1, 3), (ACK, State::Mixed as u16));
    assert_eq!(w.plug(3, 1), ACK);
    let at = w.block(3);
    let again: u64 = w.guest.memory.read_obj(at).unwrap();
    assert_eq!(again, 0, "its pages had gone back to the host");
    assert_eq!(w.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(w.config(5), 0);
    assert_eq!(w.ask(UNPLUG_ALL, 0, 0).0, ACK);
}

/// What is not plugged is no memory of the process's.
#[test]
fn unplugged_memory_cannot_be_touched() {
    let mut w = started();
    w.handle.request(4 * MIB);
    assert_eq!(w.plug(0, 2), ACK);
    assert_eq!(w.unplug(1, 1), ACK);
    // A system call on the guest's memory says so instead of ending the test.
    let readable = |block: u64| {
        let at = w.block(block);
        let mut zero = std::fs::File::open("/dev/zero").unwrap();
        w.guest
            .memory
            .read_exact_volatile_from(at, &mut zero, 4096)
            .is_ok()
    };
    assert!(readable(0));
    for block in [1, 2, 127] {
        assert!(!readable(block), "{block}");
    }
}

/// A device that is to work on such memory ends its process, and with it that guest's VM; see the head of `region`.
#[test]
fn a_device_that_works_on_unplugged_memory_ends_its_vm() {
    if let Some(status) = elsewhere() {
        assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status}");
        return;
    }
    let ram = memory();
    let region = Region::map(&ram, 128).unwrap();
    let all = region.join(&ram).unwrap();
    let mut guest = Guest::with_memory(Box::new(Rng::default()), 16, all);
    let descriptor = Descriptor::new(region.start(), 64, WRITE, 0);
    guest.queues[0].descriptor(&guest.memory, 0, descriptor);
    guest.queues[0].publish(&guest.memory, 0);
    guest.kick(0);
    guest.wait_failed();
}

#[test]
fn never_more_than_requested() {
    let mut w = started();
    assert_eq!(w.plug(0, 1), NACK);
    w.handle.request(4 * MIB);
    assert_eq!(w.plug(0, 3), NACK);
    assert_eq!(w.plug(0, 2), ACK);
    assert_eq!(w.plug(2, 1), NACK);
    // The host wants some back: what is there stays until the driver gives it.
    w.handle.request(2 * MIB);
    assert_eq!(w.config(5), 4 * MIB);
    assert_eq!(w.unplug(0, 1), ACK);
    assert_eq!(w.plug(0, 1), NACK);
}

#[test]
fn what_is_no_request_changes_nothing() {
    let mut w = started();
    w.handle.request(256 * MIB);
    assert_eq!(w.plug(4, 4), ACK);
    let start = w.start;
    for kind in [PLUG, UNPLUG, STATE] {
        for (addr, count) in [
            (start + 4096, 1),
            (start + 1, 1),
            (start, 0),
            (start - BLOCK, 1),
            (start - BLOCK, 2),
            (start + 256 * MIB, 1),
            (start + 254 * MIB, 2),
            (start, u16::MAX),
            (0, 1),
            (u64::MAX - BLOCK + 1, 1),
            (u64::MAX, u16::MAX),
        ] {
            assert_eq!(
                w.ask(kind, addr, count).0,
                ERROR,
                "{kind} {addr:#x} {count}"
            );
        }
    }
    for kind in [4, u16::MAX] {
        assert_eq!(w.ask(kind, start, 1).0, ERROR);
    }
    // Not all of them in the state to be left.
    assert_eq!(w.plug(3, 2), ERROR);
    assert_eq!(w.unplug(7, 2), ERROR);
    assert_eq!(w.unplug(0, 1), ERROR);
    assert_eq!(w.config(5), 8 * MIB);
    assert_eq!(w.state(4, 4), (ACK, State::Plugged as u16));
}

#[test]
fn a_request_of_a_hostile_length_stops_the_device_until_a_reset() {
    let mut w = started();
    w.handle.request(4 * MIB);
    let whole = request(PLUG, w.start, 1);
    let long = vec![0; MAX_BYTES as usize];
    for (readable, writable) in [
        (&whole[..REQUEST_LEN - 1], RESPONSE_LEN),
        (&whole[..1], RESPONSE_LEN),
        (&whole[..], RESPONSE_LEN - 1),
        (&long[..], RESPONSE_LEN),
    ] {
        w.guest.add(0, &[readable], &[writable]).unwrap();
        w.guest.kick(0);
        w.guest.wait_failed();
        assert_eq!(w.handle.plugged_bytes(), 0);
        w.guest.bring_up(16);
    }
    // In pieces, and with more room than it needs.
    w.guest
        .add(0, &[&whole[..3], &whole[3..]], &[1, 100])
        .unwrap();
    w.guest.kick(0);
    assert_eq!(w.guest.next(0).data[..2], ACK.to_le_bytes());
}

#[test]
fn a_reset_keeps_what_is_plugged() {
    let mut w = started();
    w.handle.request(4 * MIB);
    assert_eq!(w.plug(0, 2), ACK);
    let at = w.block(0);
    w.guest.memory.write_obj(7u64, at).unwrap();
    w.guest.bring_up(16);
    assert_eq!(w.config(5), 4 * MIB);
    assert_eq!(w.guest.memory.read_obj::<u64>(at).unwrap(), 7);
    assert_eq!(w.state(0, 2), (ACK, State::Plugged as u16));
    w.handle.request(0);
    w.guest.wait_interrupt();
    assert_eq!(w.unplug(0, 2), ACK);
}

#[test]
fn the_host_hears_once_that_the_guest_is_there() {
    let mut w = started();
    assert!(!w.handle.take_reached());
    w.handle.request(6 * MIB);
    assert_eq!(w.plug(0, 2), ACK);
    assert!(!w.handle.take_reached());
    assert_eq!(w.plug(2, 1), ACK);
    wait_readable_fd(w.handle.reached());
    assert!(w.handle.take_reached());
    // However often the guest comes back to it.
    for _ in 0..3 {
        assert_eq!(w.unplug(0, 1), ACK);
        assert_eq!(w.plug(0, 1), ACK);
    }
    assert!(!w.handle.take_reached());
    // It is there already.
    w.handle.request(6 * MIB);
    assert!(w.handle.take_reached());
}
