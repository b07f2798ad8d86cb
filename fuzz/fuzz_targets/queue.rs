//! Descriptor chains, direct and indirect, beside a model of virtio 1.2, 2.7 that knows nothing of the code: both take the same chains, see the
//! same bytes in them, and leave the same bytes in memory.
#![no_main]

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use husk_fuzz::model::{self, Model, Ring};
use husk_vmm::virtio::{
    ActiveQueue, Interrupt,
    queue::{Chain, DeviceQueue},
};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    /// Size of the queue, as a power of two.
    size: u8,
    event_idx: bool,
    max_bytes: Bound,
    table: Vec<Descriptor>,
    indirect: Vec<Descriptor>,
    heads: Vec<u8>,
    /// How many heads more, or fewer, the available index says there are.
    lie: i8,
    used_event: u8,
    /// Where both counters start.
    start: Start,
    rings: Rings,
    steps: Vec<Step>,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Bound {
    None,
    Page,
    Some(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Start {
    Zero,
    Wraps(u8),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Rings {
    Apart,
    /// Two areas in one place.
    Over(u8),
    /// The descriptor table over the end of a region.
    Across,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Descriptor {
    address: Address,
    length: Length,
    flags: Flags,
    next: Next,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Address {
    Buffer(u8),
    /// Near the end of the first region, which another follows.
    Seam(i8),
    /// Near the end of the second, which a gap follows.
    Gap(i8),
    Table(u8),
    Indirect(u8),
    Last(u8),
    Any(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Length {
    Small(u8),
    Descriptors(u8),
    Any(u32),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Flags {
    Read,
    ReadNext,
    Write,
    WriteNext,
    Indirect,
    Any(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Next {
    Following,
    Some(u8),
    Any(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    /// Takes a chain, writes so many bytes into it, and gives it back.
    Serve(u16),
    /// Takes one and puts it back.
    Look,
    Rearm,
    Notify,
    /// Takes one for good.
    Keep,
}

/// Two adjacent regions and a third behind a gap.
const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x4000), (0x2_0000, 0x2000)];
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x2800;
const INDIRECT: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

#[derive(Default)]
struct Counter(AtomicU32);

impl Interrupt for Counter {
    fn signal_queue(&self, index: u16) {
        assert_eq!(index, 3);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn signal_config(&self) {
        panic!("a queue has no configuration");
    }
    fn signal_failed(&self) {
        panic!("that is the device's to say");
    }
    fn host_failed(&self, sentence: String) {
        panic!("{sentence}");
    }
}

impl Descriptor {
    fn bytes(&self, index: u16) -> [u8; 16] {
        let address = match self.address {
            Address::Buffer(at) => BUFFERS + 16 * u64::from(at),
            Address::Seam(by) => 0x8000_u64.wrapping_add_signed(by.into()),
            Address::Gap(by) => 0xc000_u64.wrapping_add_signed(by.into()),
            Address::Table(at) => TABLE + u64::from(at),
            Address::Indirect(at) => INDIRECT + 16 * u64::from(at % 16),
            Address::Last(by) => u64::MAX - u64::from(by),
            Address::Any(address) => address,
        };
        let length = match self.length {
            Length::Small(len) => len.into(),
            Length::Descriptors(count) => 16 * u32::from(count),
            Length::Any(len) => len,
        };
        let flags = match self.flags {
            Flags::Read => 0,
            Flags::ReadNext => model::NEXT,
            Flags::Write => model::WRITE,
            Flags::WriteNext => model::WRITE | model::NEXT,
            Flags::Indirect => model::INDIRECT,
            Flags::Any(flags) => flags,
        };
        let next = match self.next {
            Next::Following => index.wrapping_add(1),
            Next::Some(next) => next.into(),
            Next::Any(next) => next,
        };
        model::descriptor(address, length, flags, next)
    }
}

thread_local! {
    static MEMORY: GuestMemoryMmap = GuestMemoryMmap::from_ranges(
        &REGIONS.map(|(start, len)| (GuestAddress(start), len)),
    )
    .unwrap();
    static MODEL: RefCell<Model> = RefCell::new(Model::new(&REGIONS));
}

fuzz_target!(|input: Input| {
    MEMORY.with(|memory| MODEL.with_borrow_mut(|model| run(&input, memory, model)));
});

fn run(input: &Input, memory: &GuestMemoryMmap, model: &mut Model) {
    let size = 1 << (input.size % 9);
    let mut ring = Ring {
        size,
        table: TABLE,
        avail: AVAIL,
        used: USED,
        max_bytes: match input.max_bytes {
            Bound::None => u32::MAX,
            Bound::Page => 4096,
            Bound::Some(bytes) => bytes.into(),
        },
        event_idx: input.event_idx,
        next_avail: 0,
        next_used: 0,
        last: Default::default(),
    };
    match input.rings {
        Rings::Apart => {}
        Rings::Over(by) => ring.used = AVAIL + 4 * u64::from(by),
        Rings::Across => ring.table = 0x8000 - 16,
    }
    if let Start::Wraps(by) = input.start {
        let start = 0_u16.wrapping_sub(by.into());
        (ring.next_avail, ring.next_used) = (start, start);
    }
    model.fill(0xa5);
    for (base, table) in [(ring.table, &input.table), (INDIRECT, &input.indirect)] {
        for (descriptor, index) in table.iter().zip(0u16..256) {
            model.write(base + 16 * u64::from(index), &descriptor.bytes(index));
        }
    }
    for (head, index) in input.heads.iter().zip(0u16..256) {
        let slot = ring.next_avail.wrapping_add(index) % size;
        model.write(
            ring.avail + 4 + 2 * u64::from(slot),
            &u16::from(*head).to_le_bytes(),
        );
    }
    let count = (input.heads.len().min(256) as u16).wrapping_add_signed(input.lie.into());
    let avail_idx = ring.next_avail.wrapping_add(count);
    model.write(ring.avail + 2, &avail_idx.to_le_bytes());
    let wish = ring.next_used.wrapping_add(input.used_event.into());
    model.write(ring.avail + 4 + 2 * u64::from(size), &wish.to_le_bytes());
    model.copy_to(memory);

    let mut queue = Queue::new(256).unwrap();
    queue.set_size(size);
    let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    let (low, high) = halves(ring.table);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(ring.avail);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(ring.used);
    queue.set_used_ring_address(low, high);
    queue.set_next_avail(ring.next_avail);
    queue.set_next_used(ring.next_used);
    queue.set_event_idx(ring.event_idx);
    queue.set_ready(true);
    let counter = Arc::new(Counter::default());
    let active = ActiveQueue {
        queue,
        kick: EventFd::new(0).unwrap(),
    };
    let mut device = DeviceQueue::new(active, 3, ring.max_bytes, counter.clone());

    let mut unannounced = 0_u16;
    for step in input.steps.iter().take(600) {
        match step {
            Step::Serve(..) | Step::Look | Step::Keep => {
                let Some(chain) = pop(&mut device, memory, &mut ring, model) else {
                    break;
                };
                let Some(chain) = chain else {
                    continue;
                };
                match step {
                    Step::Look => {
                        device.unpop(1);
                        ring.next_avail = ring.next_avail.wrapping_sub(1);
                    }
                    Step::Serve(wanted) => {
                        let bytes: Vec<u8> = (0..*wanted).map(|byte| byte as u8).collect();
                        let fits = bytes.len() <= chain.writable.len();
                        assert_eq!(chain.writable.write_at(0, &bytes).is_ok(), fits);
                        let len = if fits {
                            model.write_runs(&ring.last.1, &bytes);
                            u32::from(*wanted)
                        } else {
                            0
                        };
                        device.push_used(memory, chain.head, len).unwrap();
                        ring.push_used(model, chain.head, len);
                        unannounced += 1;
                    }
                    _ => {}
                }
            }
            Step::Rearm => {
                let more = device.rearm(memory).unwrap();
                assert_eq!(more, ring.rearm(model));
            }
            Step::Notify => {
                let before = counter.0.load(Ordering::Relaxed);
                device.notify(memory).unwrap();
                let told = counter.0.load(Ordering::Relaxed) - before;
                assert_eq!(told == 1, ring.wants_interrupt(model, unannounced));
                unannounced = 0;
            }
        }
    }
    model.assert_is(memory);
}

/// The next chain, of the same bytes for both; none where the queue is broken, for both.
fn pop<'m>(
    device: &mut DeviceQueue,
    memory: &'m GuestMemoryMmap,
    ring: &mut Ring,
    model: &Model,
) -> Option<Option<Chain<'m>>> {
    let expected = ring.pop(model);
    let chain = match (device.pop(memory), expected) {
        (Err(error), Err(_)) => {
            let _ = husk_vmm::sentence(&error);
            return None;
        }
        (Ok(None), Ok(None)) => return Some(None),
        (Ok(Some(chain)), Ok(Some(head))) => {
            assert_eq!(chain.head, head);
            chain
        }
        (found, expected) => panic!("{found:?}, where the model has {expected:?}"),
    };
    let (readable, writable) = &ring.last;
    for (part, runs) in [(&chain.readable, readable), (&chain.writable, writable)] {
        let len: usize = runs.iter().map(|(_, len)| len).sum();
        assert_eq!(part.len(), len);
        let mut bytes = vec![0; len];
        part.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, model.read_runs(runs));
        assert!(part.read_at(1, &mut bytes).is_err());
    }
    Some(Some(chain))
}
