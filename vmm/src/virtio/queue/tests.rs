use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::GuestMemory as _;

use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, REGIONS, WRITE, eventfd, memory};

mod exhaustive;

struct Silent;

impl Interrupt for Silent {
    fn signal_queue(&self, _index: u16) {}
    fn signal_config(&self) {}
    fn signal_failed(&self) {}
    fn host_failed(&self, _sentence: String) {}
}

const SIZE: u16 = 16;

fn device_queue(mock: &MockSplitQueue<'_, GuestMemoryMmap>, max_bytes: u32) -> DeviceQueue {
    let active = ActiveQueue {
        queue: mock.create_queue().unwrap(),
        kick: eventfd(),
    };
    DeviceQueue::new(active, 0, max_bytes, Arc::new(Silent))
}

/// Pops the chain at 0 of a table that holds `descriptors` (address, length, flags, next).
fn pop(descriptors: &[(u64, u32, u16, u16)], max_bytes: u32) -> Result<(usize, usize), ChainError> {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
        let descriptor = Descriptor::new(*addr, *len, *flags, *next);
        mock.desc_table()
            .store(index as u16, RawDescriptor::from(descriptor))
            .unwrap();
    }
    mock.avail().ring().ref_at(0).unwrap().store(0);
    mock.avail().idx().store(1);
    match device_queue(&mock, max_bytes).pop(&memory) {
        Ok(Some(chain)) => Ok((chain.readable.len(), chain.writable.len())),
        Ok(None) => panic!("nothing popped"),
        Err(QueueError::Chain { source, .. }) => Err(source),
        Err(other) => panic!("{other}"),
    }
}

const A: u64 = 0x10_0000;

#[test]
fn good_chains() {
    assert_eq!(pop(&[(A, 10, 0, 0)], 100), Ok((10, 0)));
    let three = [
        (A, 10, NEXT, 2),
        (0, 0, 0, 0),
        (A + 10, 20, NEXT, 1 + 2),
        (A, 5, WRITE, 0),
    ];
    assert_eq!(pop(&three, 100), Ok((30, 5)));
}

#[test]
fn each_fault_is_an_error_and_no_shorter_chain() {
    let loops = [(A, 1, NEXT, 1), (A, 1, NEXT, 0)];
    assert_eq!(pop(&loops, u32::MAX), Err(ChainError::TooLong));
    assert_eq!(
        pop(&[(A, 1, NEXT, SIZE)], 100),
        Err(ChainError::Index(SIZE))
    );
    assert_eq!(pop(&[(A, 0, 0, 0)], 100), Err(ChainError::Empty(A)));
    let order = [(A, 1, NEXT | WRITE, 1), (A, 1, 0, 0)];
    assert_eq!(pop(&order, 100), Err(ChainError::Order));
    let large = [(A, 60, NEXT, 1), (A, 41, WRITE, 0)];
    assert_eq!(pop(&large, 100), Err(ChainError::TooManyBytes(100)));
    let overflow = [(A, u32::MAX, NEXT, 1), (A, 1, 0, 0)];
    assert!(pop(&overflow, u32::MAX).is_err());
    for (addr, len) in [
        (1 << 40, 1),
        (u64::MAX, 2),
        (REGIONS[1].0 + REGIONS[1].1 as u64 - 1, 2),
    ] {
        assert_eq!(
            pop(&[(A, 1, NEXT, 1), (addr, len, WRITE, 0)], 100),
            Err(ChainError::Bounds { addr, len })
        );
    }
}

#[test]
fn a_buffer_may_cross_adjacent_regions() {
    let start = REGIONS[1].0 - 5;
    assert_eq!(pop(&[(start, 10, WRITE, 0)], 100), Ok((0, 10)));
    let memory = memory();
    let mut buffers = Buffers::default();
    buffers
        .add(&memory, Descriptor::new(start, 10, 0, 0))
        .unwrap();
    assert_eq!(buffers.segments().len(), 2);
    assert_eq!(buffers.segments()[1].addr.0, REGIONS[1].0);
    buffers.write_at(3, b"1234").unwrap();
    let mut back = [0; 4];
    buffers.read_at(3, &mut back).unwrap();
    assert_eq!(&back, b"1234");
    assert_eq!(buffers.write_at(8, b"123"), Err(Short { end: 11 }));
    assert_eq!(
        buffers.read_at(usize::MAX, &mut back),
        Err(Short { end: usize::MAX })
    );
}

/// A table at `A` in guest memory, and the direct descriptor that leads to it.
fn pop_indirect(
    direct: (u64, u32, u16, u16),
    table: &[(u64, u32, u16, u16)],
) -> Result<(usize, usize), ChainError> {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let (addr, len, flags, next) = direct;
    mock.desc_table()
        .store(
            0,
            RawDescriptor::from(Descriptor::new(addr, len, flags, next)),
        )
        .unwrap();
    for (index, (addr, len, flags, next)) in table.iter().enumerate() {
        let descriptor = RawDescriptor::from(Descriptor::new(*addr, *len, *flags, *next));
        memory
            .write_obj(descriptor, GuestAddress(A + 16 * index as u64))
            .unwrap();
    }
    mock.avail().ring().ref_at(0).unwrap().store(0);
    mock.avail().idx().store(1);
    match device_queue(&mock, 1000).pop(&memory) {
        Ok(Some(chain)) => Ok((chain.readable.len(), chain.writable.len())),
        Err(QueueError::Chain { source, .. }) => Err(source),
        other => panic!("{other:?}"),
    }
}

#[test]
fn indirect_tables() {
    let table = [(A, 7, NEXT, 1), (A, 9, WRITE, 0)];
    assert_eq!(pop_indirect((A, 32, INDIRECT, 0), &table), Ok((7, 9)));
    assert_eq!(
        pop_indirect((A, 16, INDIRECT, 0), &table),
        Err(ChainError::Index(1))
    );
    assert_eq!(
        pop_indirect((A, 32, INDIRECT | NEXT, 1), &table),
        Err(ChainError::Indirect)
    );
    assert_eq!(
        pop_indirect((A, 31, INDIRECT, 0), &table),
        Err(ChainError::IndirectLength(31))
    );
    assert_eq!(
        pop_indirect((A, 0, INDIRECT, 0), &table),
        Err(ChainError::IndirectLength(0))
    );
    assert_eq!(
        pop_indirect((1 << 40, 16, INDIRECT, 0), &table),
        Err(ChainError::Table(1 << 40))
    );
    let nested = [(A, 16, INDIRECT, 0)];
    assert_eq!(
        pop_indirect((A, 16, INDIRECT, 0), &nested),
        Err(ChainError::Indirect)
    );
}

#[test]
fn an_index_too_far_ahead_is_an_error() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    mock.avail().idx().store(SIZE + 1);
    let error = device_queue(&mock, 100).pop(&memory).unwrap_err();
    assert!(matches!(error, QueueError::Ring { .. }));
}

#[test]
fn chains_that_were_put_back_come_again() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    for head in 0..3u16 {
        let descriptor = Descriptor::new(A, 1, 0, 0);
        mock.desc_table()
            .store(head, RawDescriptor::from(descriptor))
            .unwrap();
        mock.avail().ring().ref_at(head.into()).unwrap().store(head);
    }
    mock.avail().idx().store(3);
    let mut queue = device_queue(&mock, 100);
    let mut next = || queue.pop(&memory).unwrap().map(|chain| chain.head);
    assert_eq!(
        (next(), next(), next(), next()),
        (Some(0), Some(1), Some(2), None)
    );
    queue.unpop(2);
    let mut next = || queue.pop(&memory).unwrap().map(|chain| chain.head);
    assert_eq!((next(), next(), next()), (Some(1), Some(2), None));
}

#[test]
fn chains_that_are_used_together_are_seen_together() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut queue = device_queue(&mock, 100);
    // Around the end of the ring.
    for head in 0..SIZE - 1 {
        queue.push_used(&memory, head, 0).unwrap();
    }
    let outside = queue.push_used_together(&memory, &[(1, 1), (SIZE, 1)]);
    assert!(matches!(outside, Err(QueueError::Ring { .. })));
    assert_eq!(mock.used().idx().load(), SIZE - 1, "none is seen");
    queue
        .push_used_together(&memory, &[(7, 10), (3, 20), (5, 30)])
        .unwrap();
    assert_eq!(mock.used().idx().load(), SIZE + 2);
    for (slot, (head, len)) in [(SIZE - 1, (7, 10)), (0, (3, 20)), (1, (5, 30))] {
        let entry = mock.used().ring().ref_at(slot.into()).unwrap().load();
        assert_eq!((entry.id(), entry.len()), (head, len));
    }
}

/// A driver that has another request for each one that is answered.
#[test]
fn a_turn_ends_and_comes_again() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut active = mock.create_queue::<Queue>().unwrap();
    // The mock's rings overlap.
    active.set_used_ring_address(Some(A as u32), None);
    let descriptor = Descriptor::new(2 * A, 1, 0, 0);
    mock.desc_table()
        .store(0, RawDescriptor::from(descriptor))
        .unwrap();
    mock.avail().idx().store(1);
    let kick = eventfd();
    let active = ActiveQueue {
        queue: active,
        kick: kick.try_clone().unwrap(),
    };
    let mut queue = DeviceQueue::new(active, 0, 100, Arc::new(Silent));
    let mut served = 0u16;
    let mut more = true;
    for (turn, kicks) in [(TURN, true), (TURN + 5, false)] {
        let done = queue.serve(&memory, |queue, chain| {
            queue.push_used(&memory, chain.head, 0)?;
            served += 1;
            if more || usize::from(served) < turn {
                mock.avail().idx().store(served + 1);
            }
            Ok(())
        });
        done.unwrap();
        more = false;
        assert_eq!(usize::from(served), turn);
        assert_eq!(kick.read().is_ok(), kicks, "what is left is not forgotten");
    }
}

/// Counts notifications.
#[derive(Default)]
struct Counter(std::sync::atomic::AtomicU32);

impl Interrupt for Counter {
    fn signal_queue(&self, _index: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn signal_config(&self) {}
    fn signal_failed(&self) {}
    fn host_failed(&self, _sentence: String) {}
}

/// How often a driver that wishes to hear of the use of entry `wish` is notified when the ring starts at `start` and
/// `batches` of so many entries are used.
fn notifications(event_idx: bool, start: u16, wish: u16, batches: &[u16]) -> u32 {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut active = mock.create_queue::<Queue>().unwrap();
    // The mock's rings overlap.
    active.set_used_ring_address(Some(A as u32), None);
    active.set_event_idx(event_idx);
    active.set_next_used(start);
    let wish_at = GuestAddress(active.avail_ring() + 4 + 2 * u64::from(SIZE));
    memory.write_obj(wish.to_le(), wish_at).unwrap();
    let active = ActiveQueue {
        queue: active,
        kick: eventfd(),
    };
    let counter = Arc::new(Counter::default());
    let mut queue = DeviceQueue::new(active, 0, 100, Arc::clone(&counter) as Arc<dyn Interrupt>);
    for batch in batches {
        let used = vec![(0, 0); usize::from(*batch)];
        queue.push_used_together(&memory, &used).unwrap();
        queue.notify(&memory).unwrap();
        queue.notify(&memory).unwrap();
    }
    counter.0.load(Ordering::SeqCst)
}

#[test]
fn the_driver_is_notified_of_what_it_wishes_to_hear_of() {
    assert_eq!(notifications(false, 0, 0, &[1, 3, 1]), 3);
    // It was in the first batch, in the second, in none.
    assert_eq!(notifications(true, 0, 2, &[3, 3]), 1);
    assert_eq!(notifications(true, 0, 3, &[3, 3]), 1);
    assert_eq!(notifications(true, 0, 6, &[3, 3]), 0);
    assert_eq!(notifications(true, u16::MAX - 1, 0, &[1, 1, 1, 1]), 1);
    assert_eq!(notifications(true, u16::MAX - 1, 0, &[2]), 0);
}

#[test]
fn a_queue_goes_on_where_somebody_else_has_stopped() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut active = mock.create_queue::<Queue>().unwrap();
    // The mock's rings overlap.
    active.set_used_ring_address(Some(A as u32), None);
    for head in 0..3u16 {
        let descriptor = RawDescriptor::from(Descriptor::new(2 * A, 10, 0, 0));
        mock.desc_table().store(head, descriptor).unwrap();
        mock.avail().ring().ref_at(head.into()).unwrap().store(head);
    }
    mock.avail().idx().store(3);
    let active = ActiveQueue {
        queue: active,
        kick: eventfd(),
    };
    let counter = Arc::new(Counter::default());
    let mut queue = DeviceQueue::new(active, 0, 100, Arc::clone(&counter) as Arc<dyn Interrupt>);
    // Of which the other has taken two and given one back.
    let used_index = GuestAddress(A + 2);
    memory.write_obj(1u16.to_le(), used_index).unwrap();
    queue.resume(&memory, 2).unwrap();
    assert_eq!(counter.0.load(Ordering::SeqCst), 1, "in case it was not");
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.head, 2);
    assert!(queue.pop(&memory).unwrap().is_none());
    queue.push_used(&memory, 2, 0).unwrap();
    let entry: [u32; 2] = memory.read_obj(GuestAddress(A + 4 + 8)).unwrap();
    assert_eq!(entry, [2, 0], "behind the other's");
    assert_eq!(memory.read_obj::<u16>(used_index).unwrap(), 2);
}

/// Addresses near what matters: in memory, at the edges of regions, in the gap, and anywhere.
fn address() -> impl Strategy<Value = u64> {
    let edges: Vec<u64> = REGIONS
        .iter()
        .flat_map(|(start, len)| [*start, start + *len as u64])
        .collect();
    prop_oneof![
        0..(32u64 << 20),
        (proptest::sample::select(edges), -64i64..64).prop_map(|(e, d)| e.wrapping_add_signed(d)),
        any::<u64>(),
    ]
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let len = prop_oneof![0..64u32, 0..(1u32 << 20), any::<u32>()];
    (address(), len, 0..8u16, 0..SIZE + 2)
}

proptest! {
    /// Whatever the ring holds: an error, or chains of which every byte can be reached.
    #[test]
    fn hostile_rings(
        table in proptest::collection::vec(descriptor(), SIZE as usize),
        indirect in proptest::collection::vec(descriptor(), 8),
        heads in proptest::collection::vec(0..SIZE + 2, SIZE as usize),
        available: u16,
        max_bytes in prop_oneof![Just(u32::MAX), 0..(1u32 << 21)],
    ) {
        let memory = memory();
        let mock = MockSplitQueue::new(&memory, SIZE);
        for (index, (addr, len, flags, next)) in table.into_iter().enumerate() {
            // Half of the indirect ones lead to a table that exists.
            let (addr, len) = if flags & INDIRECT != 0 && addr % 2 == 0 { (A, 16 * (len % 9)) } else { (addr, len) };
            mock.desc_table().store(index as u16, RawDescriptor::from(Descriptor::new(addr, len, flags, next))).unwrap();
        }
        for (index, (addr, len, flags, next)) in indirect.into_iter().enumerate() {
            let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            memory.write_obj(descriptor, GuestAddress(A + 16 * index as u64)).unwrap();
        }
        for (slot, head) in heads.into_iter().enumerate() {
            mock.avail().ring().ref_at(slot).unwrap().store(head);
        }
        mock.avail().idx().store(available % (SIZE + 4));
        let mut queue = device_queue(&mock, max_bytes);
        while let Ok(Some(chain)) = queue.pop(&memory) {
            prop_assert!(chain.head < SIZE);
            prop_assert!(chain.readable.len() + chain.writable.len() <= max_bytes as usize);
            for buffers in [&chain.readable, &chain.writable] {
                let total: usize = buffers.segments().iter().map(|s| s.slice.len()).sum();
                prop_assert_eq!(total, buffers.len());
                prop_assert!(buffers.segments().len() <= MAX_DESCRIPTORS);
                for segment in buffers.segments() {
                    prop_assert!(memory.check_range(segment.addr, segment.slice.len()));
                }
                if !buffers.is_empty() {
                    let last = buffers.len() - 1;
                    prop_assert!(buffers.read_at(last, &mut [0]).is_ok());
                    prop_assert!(buffers.read_at(last, &mut [0, 0]).is_err());
                }
            }
            queue.push_used(&memory, chain.head, 0).unwrap();
        }
    }

    #[test]
    fn slices_cut_as_one_run(parts in proptest::collection::vec(1..50u32, 1..6), offset in 0..300usize, len in 0..300usize) {
        let memory = memory();
        let mut buffers = Buffers::default();
        let mut at = A;
        for part in &parts {
            buffers.add(&memory, Descriptor::new(at, *part, 0, 0)).unwrap();
            at += u64::from(*part);
        }
        let total: usize = parts.iter().map(|p| *p as usize).sum();
        let bytes: Vec<u8> = (0..total).map(|i| i as u8).collect();
        buffers.write_at(0, &bytes).unwrap();
        let mut out = Vec::new();
        for slice in buffers.slices(offset, len) {
            let mut piece = vec![0; slice.len()];
            slice.copy_to(&mut piece);
            out.extend(piece);
        }
        let start = offset.min(total);
        prop_assert_eq!(out, &bytes[start..total.min(start + len)]);
    }
}
