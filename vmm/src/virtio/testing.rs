//! A guest for tests: memory, and a driver that brings a device up through its registers and queues buffers.
//!
//! It does what a real driver does, from the first status write to the used ring, so a test that passes here has
//! taken the whole way from the transport to the device.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::mmio::MmioTransport;
use super::{GuestMemory, VirtioDevice};
use crate::ending::Ending;
use crate::starter::Starter;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Two adjacent regions, so that a buffer may cross from one to the other, and a third behind a gap.
pub const REGIONS: [(u64, usize); 3] = [(0, 16 << 20), (16 << 20, 16 << 20), (64 << 20, 4 << 20)];

/// Longest wait for a device before a test gives up on it.
const PATIENCE_MS: u16 = 60_000;

pub fn memory() -> GuestMemoryMmap {
    let regions: Vec<_> = REGIONS
        .iter()
        .map(|(start, len)| (GuestAddress(*start), *len))
        .collect();
    GuestMemoryMmap::from_ranges(&regions).unwrap()
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()
}

/// The driver's side of one queue.
pub struct DriverQueue {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    free: Vec<u16>,
    avail_idx: u16,
    used_seen: u16,
    in_flight: HashMap<u16, InFlight>,
}

struct InFlight {
    descriptors: Vec<u16>,
    buffers: Vec<(u64, usize)>,
    writable: Vec<(u64, usize)>,
}

/// A chain that the device has given back.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// What the device says it wrote.
    pub data: Vec<u8>,
}

/// A device, its transport, and the driver.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub transport: MmioTransport,
    pub queues: Vec<DriverQueue>,
    pub features: u64,
    /// Features that the driver does not accept from its next start on.
    pub refused: u64,
    irq: EventFd,
    /// The end of the VM that the device may report.
    pub ending: Arc<Ending>,
    heap: u64,
    recycled: HashMap<usize, Vec<u64>>,
    done: HashMap<usize, VecDeque<Used>>,
}

impl Guest {
    /// Brings the device up, accepting every feature, with queues of at most `queue_size` descriptors.
    pub fn start(device: Box<dyn VirtioDevice>, queue_size: u16) -> Self {
        Self::with_memory(device, queue_size, memory())
    }

    /// As [`Self::start`], but without the features `refused`.
    pub fn start_without(refused: u64, device: Box<dyn VirtioDevice>, queue_size: u16) -> Self {
        let mut guest = Self::new(device, memory());
        guest.refused = refused;
        guest.bring_up(queue_size);
        guest
    }

    pub fn with_memory(
        device: Box<dyn VirtioDevice>,
        queue_size: u16,
        memory: GuestMemoryMmap,
    ) -> Self {
        let mut guest = Self::new(device, memory);
        guest.bring_up(queue_size);
        guest
    }

    /// A device that no driver has touched.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemoryMmap) -> Self {
        let irq = eventfd();
        let ending = Arc::new(Ending::new().unwrap());
        let transport = MmioTransport::new(
            device,
            GuestMemory::new(memory.clone()),
            irq.try_clone().unwrap(),
            Arc::clone(&ending),
            Arc::new(Starter::new().unwrap()),
        )
        .unwrap();
        Self {
            memory,
            transport,
            queues: Vec::new(),
            features: 0,
            refused: 0,
            irq,
            ending,
            heap: 1 << 20,
            recycled: HashMap::new(),
            done: HashMap::new(),
        }
    }

    pub fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.read32(0x70)
    }

    /// The whole initialisation of virtio 1.2, 3.1.1.
    pub fn bring_up(&mut self, queue_size: u16) {
        assert_eq!(self.read32(0), 0x7472_6976);
        assert_eq!(self.read32(4), 2);
        self.write32(0x70, 0);
        self.write32(0x70, 1);
        self.write32(0x70, 3);
        self.features = 0;
        for page in 0..2u32 {
            self.write32(0x14, page);
            let bits = self.read32(0x10) & !((self.refused >> (32 * page)) as u32);
            self.features |= u64::from(bits) << (32 * page);
            self.write32(0x24, page);
            self.write32(0x20, bits);
        }
        self.write32(0x70, 11);
        assert_eq!(self.status(), 11, "features refused");
        self.queues.clear();
        self.done.clear();
        for index in 0.. {
            self.write32(0x30, index);
            let max = self.read32(0x34);
            if max == 0 {
                break;
            }
            assert_eq!(self.read32(0x44), 0);
            let size = queue_size.min(max as u16);
            let base = 0x1000 + u64::from(index) * 0x2_0000;
            let queue = DriverQueue::new(base, size);
            self.memory
                .write_slice(&vec![0; 0x2_0000], GuestAddress(base))
                .unwrap();
            self.write32(0x38, size.into());
            for (register, addr) in [(0x80, queue.desc), (0x90, queue.avail), (0xa0, queue.used)] {
                self.write32(register, addr as u32);
                self.write32(register + 4, (addr >> 32) as u32);
            }
            self.write32(0x44, 1);
            self.queues.push(queue);
        }
        self.write32(0x70, 15);
    }

    pub fn alloc(&mut self, len: usize) -> u64 {
        let size = len.next_multiple_of(4096);
        if let Some(addr) = self.recycled.get_mut(&size).and_then(Vec::pop) {
            return addr;
        }
        let addr = self.heap;
        self.heap += size as u64;
        assert!(self.heap <= 32 << 20, "the test guest is out of memory");
        addr
    }

    fn recycle(&mut self, addr: u64, len: usize) {
        let size = len.next_multiple_of(4096);
        self.recycled.entry(size).or_default().push(addr);
    }

    /// Makes a chain available: `readable` buffers with these bytes, `writable` ones of these lengths. `None`: no
    /// descriptors left.
    pub fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Option<u16> {
        let needed = readable.len() + writable.len();
        if self.queues[queue].free.len() < needed {
            return None;
        }
        let mut buffers = Vec::new();
        for bytes in readable {
            let addr = self.alloc(bytes.len());
            self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
            buffers.push((addr, bytes.len()));
        }
        let split = buffers.len();
        for len in writable {
            buffers.push((self.alloc(*len), *len));
        }
        let descriptors: Vec<(u64, u32, bool)> = buffers
            .iter()
            .enumerate()
            .map(|(i, (addr, len))| (*addr, *len as u32, i >= split))
            .collect();
        Some(self.queues[queue].add(&self.memory, &descriptors, buffers, split))
    }

    pub fn kick(&mut self, queue: usize) {
        self.write32(0x50, queue as u32);
    }

    /// Takes what the device has given back by now.
    pub fn collect(&mut self, queue: usize) {
        for (head, len) in self.queues[queue].used(&self.memory) {
            let chain = self.queues[queue]
                .in_flight
                .remove(&head)
                .expect("the device used a chain that it does not have");
            let mut data = vec![0; len as usize];
            let mut rest = &mut data[..];
            for (addr, size) in chain.writable {
                let (now, later) = rest.split_at_mut(size.min(rest.len()));
                self.memory.read_slice(now, GuestAddress(addr)).unwrap();
                rest = later;
            }
            assert!(rest.is_empty(), "more written than there was room for");
            self.queues[queue].free.extend(chain.descriptors);
            for (addr, size) in chain.buffers {
                self.recycle(addr, size);
            }
            self.done
                .entry(queue)
                .or_default()
                .push_back(Used { head, data });
        }
    }

    pub fn try_next(&mut self, queue: usize) -> Option<Used> {
        self.collect(queue);
        self.done.get_mut(&queue)?.pop_front()
    }

    /// Waits for the next chain that the device gives back.
    pub fn next(&mut self, queue: usize) -> Used {
        loop {
            if let Some(used) = self.try_next(queue) {
                return used;
            }
            self.wait_interrupt();
        }
    }

    pub fn wait_interrupt(&mut self) {
        wait_readable(&self.irq);
        let _ = self.irq.read();
        let status = self.read32(0x60);
        self.write32(0x64, status);
    }

    /// Waits until the device asks for a reset.
    pub fn wait_failed(&mut self) {
        while self.status() & 0x40 == 0 {
            self.wait_interrupt();
        }
    }

    pub fn free_descriptors(&self, queue: usize) -> usize {
        self.queues[queue].free.len()
    }
}

/// Runs the calling test once more in a process of its own, and says how that ended; `None` in that process itself.
pub fn elsewhere() -> Option<ExitStatus> {
    const CHILD: &str = "HUSK_TEST_ELSEWHERE";
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name])
        .env(CHILD, "1")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        !output.status.success() || said.contains("1 passed"),
        "{said}"
    );
    Some(output.status)
}

#[allow(unsafe_code, reason = "EventFd offers no AsFd")]
pub fn wait_readable(event: &EventFd) {
    // SAFETY: the fd is open as long as `event` is borrowed.
    wait_readable_fd(unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) });
}

pub fn wait_readable_fd(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let count = poll(&mut fds, PollTimeout::from(PATIENCE_MS)).unwrap();
    assert!(count > 0, "the device does not answer");
}

impl DriverQueue {
    pub fn new(base: u64, size: u16) -> Self {
        Self {
            size,
            desc: base,
            avail: base + 0x8000,
            used: base + 0x1_0000,
            free: (0..size).rev().collect(),
            avail_idx: 0,
            used_seen: 0,
            in_flight: HashMap::new(),
        }
    }

    /// Writes one descriptor, whatever it says.
    pub fn descriptor(&self, memory: &GuestMemoryMmap, index: u16, descriptor: Descriptor) {
        memory
            .write_obj(
                RawDescriptor::from(descriptor),
                GuestAddress(self.desc + 16 * u64::from(index)),
            )
            .unwrap();
    }

    /// Makes whatever is at `head` available.
    pub fn publish(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        memory
            .write_obj(head, GuestAddress(self.avail + 4 + 2 * slot))
            .unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory
            .store(
                self.avail_idx,
                GuestAddress(self.avail + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    fn add(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &[(u64, u32, bool)],
        buffers: Vec<(u64, usize)>,
        split: usize,
    ) -> u16 {
        let at = self.free.len() - chain.len();
        let descriptors = self.free.split_off(at);
        for (i, (addr, len, write)) in chain.iter().enumerate() {
            let next = descriptors.get(i + 1);
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let descriptor = Descriptor::new(*addr, *len, flags, next.copied().unwrap_or(0));
            self.descriptor(memory, descriptors[i], descriptor);
        }
        let head = descriptors[0];
        let writable = buffers[split..].to_vec();
        self.in_flight.insert(
            head,
            InFlight {
                descriptors,
                buffers,
                writable,
            },
        );
        self.publish(memory, head);
        head
    }

    /// Takes new entries off the used ring and asks for an interrupt at the next one.
    fn used(&mut self, memory: &GuestMemoryMmap) -> Vec<(u16, u32)> {
        let mut out = Vec::new();
        loop {
            let idx: u16 = memory
                .load(GuestAddress(self.used + 2), Ordering::SeqCst)
                .unwrap();
            while self.used_seen != idx {
                let slot = u64::from(self.used_seen % self.size);
                let entry: [u32; 2] = memory
                    .read_obj(GuestAddress(self.used + 4 + 8 * slot))
                    .unwrap();
                out.push((entry[0] as u16, entry[1]));
                self.used_seen = self.used_seen.wrapping_add(1);
            }
            let event = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
            memory
                .store(self.used_seen, event, Ordering::SeqCst)
                .unwrap();
            std::sync::atomic::fence(Ordering::SeqCst);
            let again: u16 = memory
                .load(GuestAddress(self.used + 2), Ordering::SeqCst)
                .unwrap();
            if again == self.used_seen {
                return out;
            }
        }
    }
}
