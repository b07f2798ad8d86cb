//! A second processor, which changes memory for as long as it is told to, while devices read it.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::entry::{WAKE_AT, place_second};
use crate::machine::{put, write_register};
use crate::virtio::wait;

/// Local APIC: spurious vector with the switch that turns it on, and the two halves of the interrupt command.
const SPURIOUS: u64 = 0xfee0_00f0;
const COMMAND: u64 = 0xfee0_0300;
const TARGET: u64 = 0xfee0_0310;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// Most places that it changes at a time, and values of each.
const PLACES: usize = 16;
const VALUES: usize = 4;

/// What it is to do; it does nothing where that is `REST`.
static ORDER: AtomicU64 = AtomicU64::new(REST);
/// What it was last seen to do.
static DOES: AtomicU64 = AtomicU64::new(ASLEEP);
/// Changes that it has made.
static TURNS: AtomicU64 = AtomicU64::new(0);
/// Address, width in bytes, and values of each place.
static TABLE: [[AtomicU64; 2 + VALUES]; PLACES] =
    [const { [const { AtomicU64::new(0) }; 2 + VALUES] }; PLACES];

const ASLEEP: u64 = u64::MAX;
const REST: u64 = 0;

/// A place in memory: its address, its width in bytes, and what it is to hold in turn.
pub type Place = (u64, u8, [u64; VALUES]);

/// What the second processor runs. An order is a number of places.
pub fn main() -> ! {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    loop {
        let order = ORDER.load(Ordering::Acquire);
        DOES.store(order, Ordering::Release);
        if order == REST {
            spin_loop();
            continue;
        }
        // Xorshift.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let [address, width, values @ ..] = &TABLE[(random >> 8) as usize % order as usize];
        let value = &values[(random >> 40) as usize % VALUES];
        let [address, width, value] = [address, width, value].map(|v| v.load(Ordering::Relaxed));
        put(address, width as u8, value);
        TURNS.fetch_add(1, Ordering::Relaxed);
    }
}

/// Wakes it; false where it does not come.
pub fn wake() -> bool {
    place_second();
    write_register(SPURIOUS, 0x1ff);
    write_register(TARGET, 1 << 24);
    write_register(COMMAND, INIT);
    write_register(TARGET, 1 << 24);
    write_register(COMMAND, STARTUP | (WAKE_AT >> 12) as u32);
    wait(|| DOES.load(Ordering::Acquire) == REST)
}

/// Has it change these places until it is to rest.
pub fn race(places: &[Place]) {
    rest();
    for (place, (address, width, values)) in TABLE.iter().zip(places) {
        let fields = [*address, u64::from(*width)].into_iter().chain(*values);
        for (field, value) in place.iter().zip(fields) {
            field.store(value, Ordering::Relaxed);
        }
    }
    ORDER.store(places.len() as u64, Ordering::Release);
}

/// Has it rest, and waits until it does.
pub fn rest() {
    ORDER.store(REST, Ordering::Release);
    while DOES.load(Ordering::Acquire) != REST {
        spin_loop();
    }
}

/// Changes that it has made so far.
pub fn turns() -> u64 {
    TURNS.load(Ordering::Relaxed)
}
