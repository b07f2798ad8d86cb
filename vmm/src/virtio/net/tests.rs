use virtio_bindings::bindings::virtio_net::*;

use self::host::{EXPERIMENT, PLAIN, Wire, frame, namespace, tap};
use super::*;
use crate::virtio::testing::Guest;

mod commands;
mod host;
mod link;
mod packets;

const ADDRESS: [u8; 6] = [2, 1, 2, 3, 4, 5];
const RX: usize = 0;
const TX: usize = 1;
/// The control queue of a device with one pair.
const CTRL: usize = 2;
/// As Linux's buffers for packets of ordinary size.
const BUFFER: usize = 1536;

/// A device whose driver is up, and which has no link.
fn device(pairs: u16) -> (Guest, NicHandle) {
    let (net, handle) = Net::new(ADDRESS, pairs);
    (Guest::start(Box::new(net), QUEUE_SIZE), handle)
}

/// A device whose driver is up, without the features `refused`, connected to a tap in a namespace of its own.
fn connected(refused: &[u32]) -> (Guest, NicHandle, Wire) {
    namespace();
    let refused = refused.iter().fold(0, |all, bit| all | 1u64 << bit);
    let (net, handle) = Net::new(ADDRESS, 1);
    let guest = Guest::start_without(refused, Box::new(net), QUEUE_SIZE);
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    (guest, handle, Wire::new("tap0", EXPERIMENT))
}

fn offer(guest: &mut Guest, queue: usize, count: usize) {
    for _ in 0..count {
        guest.add(queue, &[], &[BUFFER]).unwrap();
    }
    guest.kick(queue);
}

/// The next packet of a receive queue: its header, how many buffers it took, and the frame.
fn packet(guest: &mut Guest, queue: usize) -> ([u8; 10], u16, Vec<u8>) {
    let mut data = guest.next(queue).data;
    let rest = data.split_off(HEADER_LEN);
    let buffers = u16::from_le_bytes([data[10], data[11]]);
    let mut frame = rest;
    for _ in 1..buffers {
        // They came with the first.
        frame.extend(guest.try_next(queue).unwrap().data);
    }
    (data[..10].try_into().unwrap(), buffers, frame)
}

fn transmit(guest: &mut Guest, frame: &[u8]) {
    let packet = [&[0; HEADER_LEN], frame].concat();
    guest.add(TX, &[&packet], &[]).unwrap();
    guest.kick(TX);
}

fn command(guest: &mut Guest, queue: usize, command: &[u8]) -> u8 {
    let (class, data) = command.split_at(2.min(command.len()));
    if data.is_empty() {
        guest.add(queue, &[class], &[1]).unwrap();
    } else {
        guest.add(queue, &[class, data], &[1]).unwrap();
    }
    guest.kick(queue);
    guest.next(queue).data[0]
}

/// Address, status and pairs as configuration space has them.
fn config(guest: &mut Guest) -> ([u8; 6], u16, u16) {
    let mut bytes = [0; 10];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let mut one = [0];
        guest.transport.read(0x100 + at as u64, &mut one);
        *byte = one[0];
    }
    let [m @ .., s0, s1, p0, p1] = bytes;
    (
        m,
        u16::from_le_bytes([s0, s1]),
        u16::from_le_bytes([p0, p1]),
    )
}
