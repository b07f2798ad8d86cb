//! The arithmetic of small queues, gone through: every index, and every chain that a table of up to four descriptors can hold, each kind of
//! buffer standing for all of its kind. What is to come of a chain says [`Model`], which is written from the specification
//! (virtio 1.2, 2.7.5) and not from the code.

use super::super::layout::{is_among_last, used_entry, used_event};
use super::*;

/// Where indices wrap, and their signs would.
const EDGES: [u16; 7] = [0, 1, 2, 0x7fff, 0x8000, 0xfffe, 0xffff];

#[test]
fn every_entry_lies_within_its_ring_and_has_a_place_of_its_own() {
    for bits in 0..16 {
        let size = 1u16 << bits;
        let [(_, table), (_, avail), (_, used)] = areas(size, [0, 0, 0]);
        assert_eq!(table, 16 * usize::from(size));
        assert_eq!(avail, 6 + 2 * usize::from(size));
        assert_eq!(used, 6 + 8 * usize::from(size));
        // The word behind the last entry, and the end of the ring behind that.
        assert_eq!(used_event(size) + 2, avail as u64);
        for index in 0..=u16::MAX {
            let at = used_entry(index, size);
            assert_eq!(at, 4 + 8 * u64::from(index % size), "{size} {index}");
            assert!(at + 8 + 2 <= used as u64, "{size} {index}");
        }
    }
    // Which no queue has.
    assert_eq!(used_entry(7, 0), 4);
}

#[test]
fn an_index_is_among_the_last_or_it_is_not() {
    let is = |index: u16, next: u16, count: u16| {
        let behind = next.wrapping_sub(index);
        (1..=count).contains(&behind)
    };
    for next in 0..=u16::MAX {
        for count in EDGES {
            for behind in [0, 1, 2, count.wrapping_sub(1), count, count.wrapping_add(1)] {
                let index = next.wrapping_sub(behind);
                let expected = is(index, next, count);
                assert_eq!(
                    is_among_last(index, next, count),
                    expected,
                    "{index} {next} {count}"
                );
            }
        }
    }
    for index in 0..=u16::MAX {
        for count in EDGES {
            assert_eq!(
                is_among_last(index, 5, count),
                is(index, 5, count),
                "{index} {count}"
            );
        }
    }
}

/// A queue in a memory of one page, of `size` descriptors, whose next available entry is number `next`. Nothing lies around its parts but
/// [`GUARD`].
struct Small {
    memory: GuestMemoryMmap,
    queue: DeviceQueue,
    size: u16,
}

const TABLE: u64 = 0x100;
const AVAIL: u64 = 0x300;
const USED: u64 = 0x500;
const BUFFER: u64 = 0x700;
const INDIRECT_TABLE: u64 = 0x800;
const PAGE: u64 = 0x1000;
const GUARD: u8 = 0xc9;

impl Small {
    fn new(size: u16, next: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE as usize)]).unwrap();
        memory
            .write_slice(&[GUARD; PAGE as usize], GuestAddress(0))
            .unwrap();
        for (at, len) in areas(size, [TABLE, AVAIL, USED]) {
            memory.write_slice(&vec![0; len], GuestAddress(at)).unwrap();
        }
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(TABLE as u32), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_next_avail(next);
        queue.set_next_used(next);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        let active = ActiveQueue {
            queue,
            kick: eventfd(),
        };
        Self {
            queue: DeviceQueue::new(active, 0, u32::MAX, Arc::new(Silent)),
            memory,
            size,
        }
    }

    fn word(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Makes the heads in the ring available up to the index `index`.
    fn available(&self, index: u16) {
        self.word(AVAIL + 2, index);
    }

    fn put(&self, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        let at = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_obj(descriptor, at).unwrap();
    }

    /// Nothing was written but the used ring.
    fn is_unharmed(&self) {
        let mut bytes = vec![0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let areas = areas(self.size, [TABLE, AVAIL, USED]);
        for (at, byte) in bytes.iter().enumerate() {
            let inside = areas
                .iter()
                .any(|(start, len)| (*start as usize..*start as usize + len).contains(&at));
            assert!(inside || *byte == GUARD, "{at:#x}");
        }
    }
}

/// However the indices stand: as many chains as were made available, each from its place in the ring, or none and an error where these are
/// more than the ring can hold.
#[test]
fn every_available_index() {
    for size in [1u16, 2, 4] {
        let mut small = Small::new(size, 0);
        for slot in 0..size {
            small.put(TABLE, slot, (BUFFER, 1, 0, 0));
            // From the last to the first.
            small.word(AVAIL + 4 + 2 * u64::from(slot), size - 1 - slot);
        }
        let mut check = |next: u16, ahead: u16| {
            small.queue.queue.set_next_avail(next);
            small.available(next.wrapping_add(ahead));
            let Small { queue, memory, .. } = &mut small;
            if ahead > size {
                let error = queue.pop(memory).unwrap_err();
                assert!(matches!(error, QueueError::Ring { .. }));
                assert_eq!(queue.state().next_avail(), next);
                return;
            }
            for taken in 0..ahead {
                let slot = next.wrapping_add(taken) % size;
                let chain = queue.pop(memory).unwrap().unwrap();
                assert_eq!(chain.head, size - 1 - slot, "{size} {next} {ahead}");
            }
            assert!(queue.pop(memory).unwrap().is_none());
            queue.unpop(ahead);
            assert_eq!(queue.state().next_avail(), next);
        };
        for next in 0..=u16::MAX {
            for ahead in [0, size, size + 1] {
                check(next, ahead);
            }
        }
        for ahead in 0..=u16::MAX {
            check(0xfffe, ahead);
        }
        for next in EDGES {
            for ahead in (0..=size + 2).chain(EDGES) {
                check(next, ahead);
            }
        }
    }
}

#[test]
fn every_used_index() {
    for size in [1u16, 2, 4] {
        let mut small = Small::new(size, 0);
        for index in 0..=u16::MAX {
            let head = index % size;
            let len = u32::from(index) + 7;
            small.queue.push_used(&small.memory, head, len).unwrap();
            let at = GuestAddress(USED + 4 + 8 * u64::from(index % size));
            let entry: [u32; 2] = small.memory.read_obj(at).unwrap();
            assert_eq!(entry, [head.into(), len]);
            let now: u16 = small.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            assert_eq!(now, index.wrapping_add(1));
        }
        for head in size..=u16::MAX {
            assert!(small.queue.push_used(&small.memory, head, 0).is_err());
        }
        assert_eq!(small.queue.state().next_used(), 0, "it has come around");
        small.is_unharmed();
    }
}

/// Kinds of buffers, and of indirect tables: each stands for all that the code cannot tell apart.
#[derive(Clone, Copy)]
struct Kinds {
    buffers: &'static [(u64, u32)],
    tables: &'static [(u64, u32)],
}

const ALL: Kinds = Kinds {
    buffers: &[
        (BUFFER, 1),
        (BUFFER, 0),
        // The last byte, one more, and nothing at all of it.
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (1 << 40, 16),
        (u64::MAX, 2),
    ],
    tables: &[
        // Of one descriptor, of two, of one and a half, and of none.
        (INDIRECT_TABLE, 16),
        (INDIRECT_TABLE, 32),
        (INDIRECT_TABLE, 24),
        (INDIRECT_TABLE, 0),
        (1 << 40, 16),
        (u64::MAX - 7, 16),
    ],
};

/// Of four descriptors, what is wrong with a buffer need not be tried in each of its ways.
const FEW: Kinds = Kinds {
    buffers: &[(BUFFER, 1), (BUFFER, 0), (1 << 40, 16)],
    tables: &[(INDIRECT_TABLE, 16), (INDIRECT_TABLE, 24)],
};

type Words = (u64, u32, u16, u16);

/// What the specification says of a chain, as far as its descriptors have been chosen.
#[derive(Debug, PartialEq, Eq)]
enum Model {
    /// It goes on at a descriptor that has not been chosen: of the indirect table or not, and which.
    Open(bool, u16),
    /// Bytes to read and to write.
    Good(usize, usize),
    Bad(ChainError),
}

/// Tables whose descriptors have been chosen, or not yet.
#[derive(Clone)]
struct Tables {
    direct: Vec<Option<Words>>,
    indirect: Vec<Option<Words>>,
}

impl Tables {
    fn of(&mut self, indirect: bool) -> &mut Vec<Option<Words>> {
        if indirect {
            &mut self.indirect
        } else {
            &mut self.direct
        }
    }

    fn walk(&mut self, head: u16) -> Model {
        let (mut indirect, mut index, mut tables_end) = (false, head, usize::MAX);
        let (mut read, mut written) = (0, 0);
        // Whatever is wrong with a loop shows when it is gone through for the second time.
        for _ in 0..2 * (self.direct.len() + self.indirect.len() + 1) {
            let table = self.of(indirect);
            if usize::from(index) >= table.len().min(tables_end) {
                return Model::Bad(ChainError::Index(index));
            }
            let Some((addr, len, flags, next)) = table[usize::from(index)] else {
                return Model::Open(indirect, index);
            };
            if flags & INDIRECT != 0 {
                // 2.7.5.3.1: no table in a table, and none with a next.
                if indirect || flags & NEXT != 0 {
                    return Model::Bad(ChainError::Indirect);
                }
                if len == 0 || len % 16 != 0 {
                    return Model::Bad(ChainError::IndirectLength(len));
                }
                if addr != INDIRECT_TABLE {
                    // Long enough, and yet nothing of the kind.
                    return Model::Bad(ChainError::Table(addr));
                }
                (indirect, index, tables_end) = (true, 0, len as usize / 16);
                continue;
            }
            if flags & WRITE == 0 && written > 0 {
                return Model::Bad(ChainError::Order);
            }
            if len == 0 {
                return Model::Bad(ChainError::Empty(addr));
            }
            if addr.checked_add(len.into()).is_none_or(|end| end > PAGE) {
                return Model::Bad(ChainError::Bounds { addr, len });
            }
            *(if flags & WRITE == 0 {
                &mut read
            } else {
                &mut written
            }) += len as usize;
            if flags & NEXT == 0 {
                return Model::Good(read, written);
            }
            index = next;
        }
        Model::Bad(ChainError::TooLong)
    }
}

/// Chooses the descriptors that the chain comes to in every way, and compares each whole chain. Returns how many there were.
fn explore(small: &mut Small, tables: &mut Tables, kinds: Kinds, head: u16) -> u64 {
    let expected = tables.walk(head);
    let Model::Open(indirect, index) = expected else {
        compare(small, head, &expected);
        return 1;
    };
    let len = tables.of(indirect).len() as u16;
    let at = if indirect { INDIRECT_TABLE } else { TABLE };
    let mut chains = 0;
    for flags in 0..8 {
        let places = if flags & INDIRECT == 0 {
            kinds.buffers
        } else {
            kinds.tables
        };
        // Without NEXT nobody looks at it.
        let nexts = if flags & NEXT == 0 { 0..1 } else { 0..len + 1 };
        for (addr, size) in places {
            for next in nexts.clone() {
                let words = (*addr, *size, flags, next);
                tables.of(indirect)[usize::from(index)] = Some(words);
                small.put(at, index, words);
                chains += explore(small, tables, kinds, head);
            }
        }
    }
    tables.of(indirect)[usize::from(index)] = None;
    chains
}

fn compare(small: &mut Small, head: u16, expected: &Model) {
    small.queue.queue.set_next_avail(0);
    small.word(AVAIL + 4, head);
    small.available(1);
    let Small { queue, memory, .. } = small;
    match queue.pop(memory) {
        Ok(chain) => {
            let chain = chain.unwrap();
            let (read, written) = (chain.readable.len(), chain.writable.len());
            assert_eq!(*expected, Model::Good(read, written));
            for buffers in [&chain.readable, &chain.writable] {
                assert!(buffers.segments().len() <= MAX_DESCRIPTORS);
                let total: usize = buffers.segments().iter().map(|s| s.slice.len()).sum();
                assert_eq!(total, buffers.len());
                for segment in buffers.segments() {
                    assert!(memory.check_range(segment.addr, segment.slice.len()));
                }
            }
        }
        Err(QueueError::Chain { source, .. }) => assert_eq!(*expected, Model::Bad(source)),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_chain_of_a_small_table() {
    let mut chains = 0;
    for (size, kinds) in [(1, ALL), (2, ALL), (4, FEW)] {
        let mut small = Small::new(size, 0);
        let mut tables = Tables {
            direct: vec![None; size.into()],
            indirect: vec![None; 2],
        };
        for head in 0..=size {
            chains += explore(&mut small, &mut tables, kinds, head);
        }
    }
    assert!(chains > 30_000, "{chains}");
}

proptest! {
    /// The same for any size and place.
    #[test]
    fn any_available_index(bits in 0..16u32, next: u16, ahead: u16, near in any::<bool>()) {
        let size = 1u16 << bits;
        let ahead = if near { (ahead % 4).wrapping_add(size).wrapping_sub(2) } else { ahead };
        let memory = memory();
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(A as u32), None);
        queue.set_avail_ring_address(Some(2 * A as u32), None);
        queue.set_used_ring_address(Some(3 * A as u32), None);
        queue.set_next_avail(next);
        queue.set_ready(true);
        let slot = |number: u16| GuestAddress(2 * A + 4 + 2 * u64::from(number % size));
        let last = next.wrapping_add(ahead).wrapping_sub(1);
        let head = size / 3;
        memory.write_obj(head, slot(next)).unwrap();
        memory.write_obj(head, slot(last)).unwrap();
        let descriptor = RawDescriptor::from(Descriptor::new(4 * A, 1, 0, 0));
        memory.write_obj(descriptor, GuestAddress(A + 16 * u64::from(head))).unwrap();
        memory.write_obj(next.wrapping_add(ahead), GuestAddress(2 * A + 2)).unwrap();
        let active = ActiveQueue { queue, kick: eventfd() };
        let mut queue = DeviceQueue::new(active, 0, 100, Arc::new(Silent));
        match queue.pop(&memory) {
            Ok(Some(chain)) => {
                prop_assert!(ahead > 0 && ahead <= size);
                prop_assert_eq!(chain.head, head);
                // The last of them, and none behind it.
                queue.queue.set_next_avail(last);
                prop_assert_eq!(queue.pop(&memory).unwrap().unwrap().head, head);
                prop_assert!(queue.pop(&memory).unwrap().is_none());
            }
            Ok(None) => prop_assert_eq!(ahead, 0),
            Err(_) => prop_assert!(ahead > size),
        }
    }
}
