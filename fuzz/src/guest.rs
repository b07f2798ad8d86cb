//! A guest that is hostile on purpose: memory, registers and a driver in front of one device, and what must hold whatever the driver does.
//!
//! It keeps a copy of its memory as it ought to be. A device may change the buffers that it was given to write to and its used rings, and
//! nothing else; that is checked as long as the guest itself knows which those are, that is until it writes noise to where rings are.

use std::{collections::HashMap, sync::Arc};

use husk_vmm::{
    ending::Ending,
    starter::Starter,
    virtio::{GuestMemory, VirtioDevice, mmio::MmioTransport, worker::fuzzing},
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::model::{self, Model, Runs};

/// Two adjacent regions, and a third behind a gap that no buffer lies in.
const REGIONS: [(u64, usize); 3] = [(0, 0x2_0000), (0x2_0000, 0x2_0000), (0x10_0000, 0x4000)];
/// Where the queues' rings are, so many bytes each.
const RINGS: (u64, u64) = (0x1000, 0x2000);
const AVAIL: u64 = 0x800;
const USED: u64 = 0x1000;
/// Indirect tables.
const TABLES: (u64, u64) = (0xc000, 0x1_0000);
/// Buffers.
const BUFFERS: (u64, u64) = (0x1_0000, 0x4_0000);
/// Most descriptors of a queue.
pub const QUEUE_SIZE: u16 = 64;
/// What memory is full of at first.
const FILL: u8 = 0xa5;
/// More turns than any device has something to do in.
const PATIENCE: usize = 100_000;

thread_local! {
    static MEMORY: GuestMemoryMmap = GuestMemoryMmap::from_ranges(
        &REGIONS.map(|(start, len)| (GuestAddress(start), len)),
    )
    .unwrap();
    static STARTER: Arc<Starter> = Arc::new(Starter::new().unwrap());
}

/// The guest's memory, for devices that want to know it before there is a guest.
pub fn memory() -> GuestMemoryMmap {
    MEMORY.with(Clone::clone)
}

/// What a device has given back.
#[derive(Debug)]
pub struct Used {
    /// Which chain.
    pub head: u16,
    /// What it says it has written.
    pub data: Vec<u8>,
}

/// A chain that the device has.
struct Flight {
    /// Descriptors of the queue that it takes, from its head on.
    count: u16,
    readable: Runs,
    writable: Runs,
}

/// The driver's side of a queue.
struct Queue {
    base: u64,
    size: u16,
    next: u16,
    avail_idx: u16,
    used_seen: u16,
    in_flight: HashMap<u16, Flight>,
}

/// See the module's head.
pub struct Guest {
    memory: GuestMemoryMmap,
    transport: MmioTransport,
    irq: EventFd,
    ending: Arc<Ending>,
    queues: Vec<Queue>,
    /// Features that both have.
    pub features: u64,
    shadow: Model,
    writable: Runs,
    /// It no longer knows what a device may write to.
    pub is_wild: bool,
    tables: u64,
    buffers: u64,
}

impl Guest {
    /// Pages of 4 KiB that it has.
    pub const PAGES: u32 = ((REGIONS[0].1 + REGIONS[1].1 + REGIONS[2].1) >> 12) as u32;

    /// Puts a device behind its registers. The driver has done nothing yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory();
        let mut shadow = Model::new(&REGIONS);
        shadow.fill(FILL);
        shadow.copy_to(&memory);
        let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let ending = Arc::new(Ending::new().unwrap());
        let transport = MmioTransport::new(
            device,
            GuestMemory::new(memory.clone()),
            irq.try_clone().unwrap(),
            Arc::clone(&ending),
            STARTER.with(Arc::clone),
        )
        .unwrap();
        Self {
            memory,
            transport,
            irq,
            ending,
            queues: Vec::new(),
            features: 0,
            shadow,
            writable: Runs::new(),
            is_wild: false,
            tables: TABLES.0,
            buffers: BUFFERS.0,
        }
    }

    /// Reads some of the device's window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    /// Reads a register.
    pub fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Reads a field of the device's configuration space, of 1, 2, 4 or 8 bytes.
    pub fn field<const LEN: usize>(&mut self, offset: u64) -> [u8; LEN] {
        let mut data = [0; LEN];
        self.read(0x100 + offset, &mut data);
        data
    }

    /// Writes some of the device's window, whatever that does.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let moves_queues = matches!(offset, 0x38..0x50 | 0x80..0xb0);
        if moves_queues && self.read32(0x70) & 0xf == 0xb {
            self.is_wild = true;
        }
        self.transport.write(offset, data);
        if offset == 0x70 && self.read32(0x70) == 0 {
            self.queues.clear();
        }
    }

    fn write32(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.shadow.write(address, bytes);
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Brings the device up as virtio 1.2, 3.1.1 has it, without the features `refused`, and with queues of so many descriptors.
    pub fn bring_up(&mut self, refused: u64, size: u16) {
        for status in [0, 1, 3] {
            self.write32(0x70, status);
        }
        assert_eq!(self.read32(0x70), 3, "it cannot be reset");
        self.features = 0;
        for page in 0..2_u32 {
            self.write32(0x14, page);
            // Without VIRTIO_F_VERSION_1, bit 32, nothing goes on.
            let refused = (refused & !(1 << 32)) >> (32 * page);
            let bits = self.read32(0x10) & !(refused as u32);
            self.features |= u64::from(bits) << (32 * page);
            self.write32(0x24, page);
            self.write32(0x20, bits);
        }
        self.write32(0x70, 0xb);
        assert_eq!(self.read32(0x70), 0xb, "features refused");
        self.queues.clear();
        for index in 0..5_u32 {
            self.write32(0x30, index);
            let most = self.read32(0x34);
            if most == 0 {
                break;
            }
            let size = size.min(most as u16).min(QUEUE_SIZE);
            let base = RINGS.0 + u64::from(index) * RINGS.1;
            self.put(base, &[0; RINGS.1 as usize]);
            self.write32(0x38, size.into());
            for (register, address) in [(0x80, base), (0x90, base + AVAIL), (0xa0, base + USED)] {
                self.write32(register, address as u32);
                self.write32(register + 4, 0);
            }
            self.write32(0x44, 1);
            let len = 6 + 8 * usize::from(size);
            self.writable.push((base + USED, len));
            self.queues.push(Queue {
                base,
                size,
                next: 0,
                avail_idx: 0,
                used_seen: 0,
                in_flight: HashMap::new(),
            });
        }
        self.write32(0x70, 0xf);
        assert_eq!(self.read32(0x70) & 0xf, 0xf);
    }

    fn flights(&self) -> impl Iterator<Item = &Flight> {
        self.queues
            .iter()
            .flat_map(|queue| queue.in_flight.values())
    }

    /// Whether the device has a buffer that some of these bytes are in.
    pub fn has_given(&self, address: u64, len: u64) -> bool {
        let runs = |flight: &Flight| [flight.readable.clone(), flight.writable.clone()].concat();
        self.flights()
            .flat_map(runs)
            .any(|(start, used)| start < address + len && address < start + used as u64)
    }

    /// Room for a buffer, in none that the device has, nor in those of `more`. Nothing, where all is in use.
    fn alloc(&mut self, len: usize, more: &Runs) -> Option<u64> {
        let len = len.max(1) as u64;
        let in_use = self
            .flights()
            .filter(|_| !self.is_wild)
            .flat_map(|flight| flight.readable.iter().chain(&flight.writable));
        let mut in_use: Vec<_> = in_use.chain(more).copied().collect();
        in_use.sort_unstable();
        for from in [self.buffers, BUFFERS.0] {
            let mut at = from;
            for (start, used) in &in_use {
                if *start < at + len && at < start + *used as u64 {
                    at = start + *used as u64;
                }
            }
            if at + len <= BUFFERS.1 {
                self.buffers = at + len;
                return Some(at);
            }
        }
        None
    }

    /// Whether the device has none of the `count` descriptors from `first` on.
    fn are_free(&self, queue: usize, first: u16, count: u16) -> bool {
        let Queue {
            size, in_flight, ..
        } = &self.queues[queue];
        in_flight.iter().all(|(head, flight)| {
            let from_head = (first + size - head) % size;
            from_head >= flight.count && from_head + count <= *size
        })
    }

    /// Makes a chain available: these bytes to read, and buffers of these lengths to write to. Nothing, where there is no such queue, or no
    /// room for more.
    pub fn add(
        &mut self,
        queue: usize,
        readable: &[&[u8]],
        writable: &[usize],
        is_indirect: bool,
    ) -> Option<u16> {
        let size = self.queues.get(queue)?.size;
        let count = readable.len() + writable.len();
        let most = if is_indirect { 100 } else { usize::from(size) };
        if count == 0 || count > most {
            return None;
        }
        let first = self.queues[queue].next;
        let taken = if is_indirect { 1 } else { count as u16 };
        // Who is wild no longer knows what the device has.
        if !self.is_wild && !self.are_free(queue, first, taken) {
            return None;
        }
        let mut runs = Runs::new();
        for len in readable
            .iter()
            .map(|bytes| bytes.len())
            .chain(writable.iter().copied())
        {
            let len = len.min(0x1_0000);
            runs.push((self.alloc(len, &runs)?, len));
        }
        for (bytes, (at, len)) in readable.iter().zip(&runs) {
            self.put(*at, &bytes[..*len]);
        }
        let split = readable.len();
        let flags = |number: usize| if number < split { 0 } else { model::WRITE };
        let parts: Vec<_> = runs
            .iter()
            .enumerate()
            .map(|(number, (at, len))| (*at, *len, flags(number)))
            .collect();
        let writable = runs.split_off(split);
        self.writable.extend(&writable);
        let place = |number: usize| first.wrapping_add(number as u16) % size;
        let last = count - 1;
        let mut table = Vec::new();
        for (number, (at, len, write)) in parts.iter().enumerate() {
            let next = if number < last { model::NEXT } else { 0 };
            let following = if is_indirect {
                number as u16 + 1
            } else {
                place(number + 1)
            };
            table.push(model::descriptor(*at, *len as u32, write | next, following));
        }
        let base = self.queues[queue].base;
        if is_indirect {
            let bytes = table.concat();
            if self.tables + bytes.len() as u64 > TABLES.1 {
                self.tables = TABLES.0;
                // The device may not have read one that is overwritten from here on.
                self.is_wild |= self.queues.iter().any(|queue| !queue.in_flight.is_empty());
            }
            let at = self.tables;
            self.tables += bytes.len() as u64;
            self.put(at, &bytes);
            let one = model::descriptor(at, bytes.len() as u32, model::INDIRECT, 0);
            self.put(base + 16 * u64::from(first), &one);
        } else {
            for (number, bytes) in table.iter().enumerate() {
                self.put(base + 16 * u64::from(place(number)), bytes);
            }
        }
        let queue = &mut self.queues[queue];
        queue.next = first.wrapping_add(taken) % size;
        let flight = Flight {
            count: taken,
            readable: runs,
            writable,
        };
        queue.in_flight.insert(first, flight);
        self.publish_in(base, size, first);
        Some(first)
    }

    fn publish_in(&mut self, base: u64, size: u16, head: u16) {
        let found = self.queues.iter().position(|queue| queue.base == base);
        let Some(number) = found else {
            return;
        };
        let index = self.queues[number].avail_idx;
        let slot = base + AVAIL + 4 + 2 * u64::from(index % size);
        self.put(slot, &head.to_le_bytes());
        self.queues[number].avail_idx = index.wrapping_add(1);
        self.put(base + AVAIL + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Writes a descriptor as it comes, and makes it available under any name.
    pub fn add_noise(&mut self, queue: usize, index: u16, descriptor: [u8; 16], head: u16) {
        let Some(Queue { base, size, .. }) = self.queues.get(queue) else {
            return;
        };
        let (base, size) = (*base, *size);
        self.is_wild = true;
        self.put(base + 16 * u64::from(index % size), &descriptor);
        self.publish_in(base, size, head);
    }

    /// Says that there are more chains, or fewer, than there are.
    pub fn move_index(&mut self, queue: usize, by: i8) {
        let Some(queue) = self.queues.get_mut(queue) else {
            return;
        };
        queue.avail_idx = queue.avail_idx.wrapping_add_signed(by.into());
        let (at, index) = (queue.base + AVAIL + 2, queue.avail_idx);
        self.is_wild = true;
        self.put(at, &index.to_le_bytes());
    }

    /// Notifies the device.
    pub fn kick(&mut self, queue: u32) {
        self.write32(0x50, queue);
    }

    /// The device may change these bytes, too.
    pub fn allow(&mut self, address: u64, len: usize) {
        self.writable.push((address, len));
    }

    /// Bytes that lie in no region may be named all the same.
    pub fn last_page() -> u32 {
        (REGIONS[2].0 >> 12) as u32 + 3
    }

    /// Lets the device do all that there is to do. It comes to an end, and the VM does not.
    pub fn settle(&mut self) {
        assert!(fuzzing::settle(PATIENCE), "the device is never done");
        assert_eq!(self.ending.cause(), None, "the guest has ended the VM");
        let _ = self.irq.read();
        let status = self.read32(0x60);
        self.write32(0x64, status);
        let status = self.read32(0x70);
        assert!(
            status & !(0xf | 0x40 | 0x80) == 0
                && (status & 0xf).count_ones() == status.trailing_ones().min(4),
            "status {status:#x}"
        );
    }

    /// What the device has given back on this queue since the last call. Nothing, once the guest does not know its own rings.
    pub fn used(&mut self, queue: usize) -> Vec<Used> {
        let mut all = Vec::new();
        if self.is_wild || queue >= self.queues.len() {
            return all;
        }
        let Queue {
            base,
            size,
            used_seen,
            ..
        } = self.queues[queue];
        let index: u16 = self.memory.read_obj(GuestAddress(base + USED + 2)).unwrap();
        assert!(
            index.wrapping_sub(used_seen) <= size,
            "more used than there is"
        );
        for number in 0..index.wrapping_sub(used_seen) {
            let slot = u64::from(used_seen.wrapping_add(number) % size);
            let [head, len]: [u32; 2] = self
                .memory
                .read_obj(GuestAddress(base + USED + 4 + 8 * slot))
                .unwrap();
            let head = u16::try_from(head).unwrap();
            let flight = self.queues[queue].in_flight.remove(&head);
            let flight = flight.expect("it uses a chain that it does not have");
            let mut data = Vec::new();
            let mut rest = len as usize;
            for (at, here) in flight.writable {
                let mut part = vec![0; here.min(rest)];
                rest -= part.len();
                self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
                data.extend(part);
            }
            assert_eq!(
                rest, 0,
                "it says that it has written more than there is room for"
            );
            all.push(Used { head, data });
        }
        self.queues[queue].used_seen = index;
        all
    }

    /// Queues that the driver has set up.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The device is reset, and has left memory alone.
    pub fn end(mut self) {
        self.settle();
        self.write32(0x70, 0);
        assert_eq!(self.read32(0x70), 0, "it cannot be reset");
        assert!(fuzzing::settle(1), "a device that was reset goes on");
        assert_eq!(self.ending.cause(), None, "the guest has ended the VM");
        if !self.is_wild {
            self.shadow.assert_is_but(&self.memory, &self.writable);
        }
    }
}
