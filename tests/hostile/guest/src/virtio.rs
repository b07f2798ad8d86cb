//! A virtio-mmio driver that does what it is told, also what no driver would.

use crate::machine::{self, read_register, ticks, word, write, write_register};

/// First window, and the distance from one to the next.
const WINDOWS: u64 = 0xd000_0000;
const WINDOW: u64 = 0x1000;
const MOST: u64 = 19;

/// Virtio's numbers of the devices.
pub const NET: u32 = 1;
pub const RNG: u32 = 4;
pub const BALLOON: u32 = 5;
pub const VSOCK: u32 = 19;
pub const MEM: u32 = 24;
pub const FS: u32 = 26;

/// Registers (virtio 1.2, 4.2.2).
pub const DEVICE_ID: u64 = 0x08;
pub const DRIVER_FEATURES: u64 = 0x20;
pub const DRIVER_FEATURES_SEL: u64 = 0x24;
pub const QUEUE_SEL: u64 = 0x30;
pub const QUEUE_NUM: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const QUEUE_NOTIFY: u64 = 0x50;
pub const INTERRUPT_ACK: u64 = 0x64;
pub const STATUS: u64 = 0x70;
pub const QUEUE_DESC: u64 = 0x80;
pub const QUEUE_AVAIL: u64 = 0x90;
pub const QUEUE_USED: u64 = 0xa0;
pub const CONFIG: u64 = 0x100;

pub const RUNNING: u32 = 0xf;
pub const NEEDS_RESET: u32 = 0x40;
/// `INDIRECT_DESC` in the lower half of the features.
const INDIRECT: u32 = 1 << 28;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const IN_TABLE: u16 = 4;

/// Descriptors of each queue here.
pub const SIZE: u16 = 64;
/// Memory of a queue's rings.
const RINGS: u64 = 0x2000;

/// How long the VMM may take, in ticks of the processor's clock: some ten seconds.
const PATIENCE: u64 = 20_000_000_000;

/// Looks until something is so; false where it does not come about.
pub fn wait(mut is_so: impl FnMut() -> bool) -> bool {
    let begin = ticks();
    while !is_so() {
        if ticks().wrapping_sub(begin) > PATIENCE {
            return false;
        }
    }
    true
}

/// Ticks since then.
pub fn ticks_passed(since: u64) -> u64 {
    ticks().wrapping_sub(since)
}

/// One device.
#[derive(Clone, Copy)]
pub struct Device {
    window: u64,
}

impl Device {
    /// The first of this kind.
    pub fn find(id: u32) -> Option<Self> {
        (0..MOST)
            .map(|index| Self {
                window: WINDOWS + index * WINDOW,
            })
            .find(|device| device.get(DEVICE_ID) == id)
    }

    /// Every device that there is, and its kind.
    pub fn all() -> impl Iterator<Item = (Self, u32)> {
        (0..MOST)
            .map(|index| Self {
                window: WINDOWS + index * WINDOW,
            })
            .map(|device| (device, device.get(DEVICE_ID)))
            .filter(|(_, id)| ![0, u32::MAX].contains(id))
    }

    pub fn get(self, register: u64) -> u32 {
        read_register(self.window + register)
    }

    pub fn set(self, register: u64, value: u32) {
        write_register(self.window + register, value);
    }

    fn set_long(self, register: u64, value: u64) {
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    pub fn reset(self) {
        self.set(STATUS, 0);
    }

    pub fn needs_reset(self) -> bool {
        self.get(STATUS) & NEEDS_RESET != 0
    }

    /// Resets it and goes as far as to where queues are set up.
    pub fn negotiate(self) {
        self.negotiate_with(0);
    }

    /// The same with features of its own, all in the lower half.
    pub fn negotiate_with(self, features: u32) {
        self.reset();
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for (page, features) in [(0, INDIRECT | features), (1, 1)] {
            self.set(DRIVER_FEATURES_SEL, page);
            self.set(DRIVER_FEATURES, features);
        }
        self.set(STATUS, 0xb);
    }

    /// Resets it and brings it up with so many queues, whose rings lie one after the other from `at`.
    pub fn start<const N: usize>(self, at: u64) -> [Queue; N] {
        self.start_with(at, 0)
    }

    /// The same with features of its own.
    pub fn start_with<const N: usize>(self, at: u64, features: u32) -> [Queue; N] {
        self.negotiate_with(features);
        let mut next = 0;
        let queues = [(); N].map(|()| {
            let queue = Queue::new(self, next, at + u64::from(next) * RINGS);
            next += 1;
            queue.set_up(queue.rings());
            queue
        });
        self.set(STATUS, RUNNING);
        queues
    }
}

/// A queue, and how far its driver has come.
#[derive(Clone, Copy)]
pub struct Queue {
    pub device: Device,
    pub index: u32,
    at: u64,
    available: u16,
    used: u16,
}

impl Queue {
    /// A queue with its rings at this address, all zero.
    pub fn new(device: Device, index: u32, at: u64) -> Self {
        (0..RINGS / 64).for_each(|piece| write(at + piece * 64, &[0; 64]));
        Self {
            device,
            index,
            at,
            available: 0,
            used: 0,
        }
    }

    /// Where its descriptors and its two rings are.
    pub fn rings(&self) -> [u64; 3] {
        [self.at, self.at + 0x800, self.at + 0x1000]
    }

    /// Tells the device of rings, those or others.
    pub fn set_up(&self, rings: [u64; 3]) {
        self.device.set(QUEUE_SEL, self.index);
        self.device.set(QUEUE_NUM, u32::from(SIZE));
        for (register, address) in [QUEUE_DESC, QUEUE_AVAIL, QUEUE_USED].into_iter().zip(rings) {
            self.device.set_long(register, address);
        }
        self.device.set(QUEUE_READY, 1);
    }

    /// Writes a descriptor, wherever.
    pub fn descriptor_at(at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        write(at, &address.to_le_bytes());
        write(at + 8, &len.to_le_bytes());
        write(at + 12, &flags.to_le_bytes());
        write(at + 14, &next.to_le_bytes());
    }

    /// Writes a descriptor of the table.
    pub fn descriptor(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        Self::descriptor_at(self.at + u64::from(index) * 16, descriptor);
    }

    /// Makes a head available, without a kick.
    pub fn offer(&mut self, head: u16) {
        let slot = self.rings()[1] + 4 + u64::from(self.available % SIZE) * 2;
        write(slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.show(self.available);
    }

    /// Sets the available ring's index.
    pub fn show(&self, index: u16) {
        write(self.rings()[1] + 2, &index.to_le_bytes());
    }

    pub fn kick(&self) {
        self.device.set(QUEUE_NOTIFY, self.index);
    }

    /// Takes the next used entry, if there is one: head and length.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        let ring = self.rings()[2];
        if word::<2>(ring + 2) as u16 == self.used {
            return None;
        }
        let entry = ring + 4 + u64::from(self.used % SIZE) * 8;
        self.used = self.used.wrapping_add(1);
        self.device.set(INTERRUPT_ACK, 1);
        Some((word::<4>(entry) as u16, word::<4>(entry + 4) as u32))
    }

    /// Waits for the next used entry.
    pub fn taken(&mut self) -> Option<(u16, u32)> {
        let mut used = None;
        wait(|| {
            used = self.take();
            // A register's read lets the VMM run, also where there is one processor for all.
            used.is_some() || self.device.needs_reset()
        });
        used
    }

    /// A chain of these buffers, from the first descriptor on, is used in the end.
    pub fn send(&mut self, buffers: &[(u64, u32, u16)]) -> bool {
        let last = buffers.len() - 1;
        for (index, (address, len, flags)) in (0..).zip(buffers) {
            let next = if usize::from(index) < last { NEXT } else { 0 };
            self.descriptor(index, (*address, *len, flags | next, index + 1));
        }
        self.offer(0);
        self.kick();
        self.taken().is_some()
    }

    /// One request: what is to be read, then what may be written. The length that was written, if it is answered.
    pub fn request(&mut self, read: (u64, u32), written: (u64, u32)) -> Option<u32> {
        let flags = if written.1 > 0 { NEXT } else { 0 };
        match read.1 {
            0 => self.descriptor(0, (written.0, written.1, WRITE, 0)),
            len => {
                self.descriptor(0, (read.0, len, flags, 1));
                self.descriptor(1, (written.0, written.1, WRITE, 0));
            }
        }
        self.offer(0);
        self.kick();
        self.taken().map(|(_, len)| len)
    }
}

/// Fills memory.
pub fn fill(at: u64, len: u64, byte: u8) {
    (0..len).for_each(|offset| write(at + offset, &[byte]));
}

/// Is all of it still this?
pub fn is_filled(at: u64, len: u64, byte: u8) -> bool {
    (0..len).all(|offset| {
        let mut found = [0];
        machine::read(at + offset, &mut found);
        found == [byte]
    })
}
