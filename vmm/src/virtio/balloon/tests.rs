use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{Guest, NEXT, WRITE};

const FULL: [u8; 4096] = [0xab; 4096];

fn pfns(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|p| p.to_le_bytes()).collect()
}

fn started() -> (Guest, BalloonHandle) {
    let memory = crate::virtio::testing::memory();
    let (balloon, handle) = Balloon::new(&GuestMemory::new(memory.clone()));
    let guest = Guest::with_memory(Box::new(balloon), 64, memory);
    (guest, handle)
}

fn fill(guest: &Guest, page: u32) {
    let addr = GuestAddress(u64::from(page) << PAGE_SHIFT);
    guest.memory.write_slice(&FULL, addr).unwrap();
}

fn page(guest: &Guest, page: u32) -> [u8; 4096] {
    let mut data = [0; 4096];
    let addr = GuestAddress(u64::from(page) << PAGE_SHIFT);
    guest.memory.read_slice(&mut data, addr).unwrap();
    data
}

fn inflate_pages(guest: &mut Guest, pages: &[u32]) {
    guest.add(INFLATE.into(), &[&pfns(pages)], &[]).unwrap();
    guest.kick(INFLATE.into());
    guest.next(INFLATE.into());
}

#[test]
fn inflating_drops_exactly_the_named_pages() {
    let (mut guest, _) = started();
    // 4096 is the first page of the second region, 8191 the last before the gap.
    let named = [5000, 5001, 5003, 5010, 5009, 5008, 4096, 4095, 8191];
    let kept = [4999, 5002, 5004, 5007, 5011, 8190];
    for page in named.iter().chain(&kept) {
        fill(&guest, *page);
    }
    inflate_pages(&mut guest, &named);
    for number in named {
        assert_eq!(page(&guest, number), [0; 4096], "{number}");
    }
    for number in kept {
        assert_eq!(page(&guest, number), FULL, "{number}");
    }
}

#[test]
fn page_numbers_outside_memory_are_ignored_and_their_neighbours_are_not() {
    let (mut guest, _) = started();
    fill(&guest, 8191);
    fill(&guest, 16384);
    // 8192 to 16383 is the gap; the run 8191, 8192 crosses into it.
    inflate_pages(
        &mut guest,
        &[8191, 8192, 8193, u32::MAX, 0x0fff_ffff, 16384],
    );
    assert_eq!(page(&guest, 8191), [0; 4096]);
    assert_eq!(page(&guest, 16384), [0; 4096]);
    assert_eq!(guest.status(), 15);
    // Deflating names pages too; nothing needs doing.
    guest
        .add(DEFLATE.into(), &[&pfns(&[8191, u32::MAX])], &[])
        .unwrap();
    guest.kick(DEFLATE.into());
    guest.next(DEFLATE.into());
}

#[test]
fn free_pages_that_are_reported_are_dropped() {
    let (mut guest, _) = started();
    let at = 6 << 20;
    for number in 0..4 {
        fill(&guest, (at >> PAGE_SHIFT) + number);
    }
    let queue = &mut guest.queues[usize::from(REPORTING)];
    let descriptor = Descriptor::new(at.into(), 3 * 4096, 2, 0);
    queue.descriptor(&guest.memory, 63, descriptor);
    queue.publish(&guest.memory, 63);
    guest.kick(REPORTING.into());
    guest.wait_interrupt();
    for number in 0..3 {
        assert_eq!(page(&guest, (at >> PAGE_SHIFT) + number), [0; 4096]);
    }
    assert_eq!(page(&guest, (at >> PAGE_SHIFT) + 3), FULL);
}

/// The host refuses to give up a page that is locked: the guest keeps it, and what else it has given up goes.
#[test]
fn a_discard_that_is_refused_changes_nothing() {
    let (mut guest, _) = started();
    let (locked, others) = (6000, [6002, 6010, 5990]);
    for number in others.into_iter().chain([locked]) {
        fill(&guest, number);
    }
    lock(&guest, locked);
    inflate_pages(&mut guest, &[5990, locked, 6002, 6010]);
    assert_eq!(page(&guest, locked), FULL);
    for number in others {
        assert_eq!(page(&guest, number), [0; 4096], "{number}");
    }
    fill(&guest, locked);
    assert_eq!(guest.status(), 15);
    assert_eq!(guest.ending.cause(), None);
}

#[test]
fn a_report_that_is_refused_changes_nothing() {
    let (mut guest, _) = started();
    let (locked, other) = (6000, 6010);
    fill(&guest, locked);
    fill(&guest, other);
    lock(&guest, locked);
    let queue = &mut guest.queues[usize::from(REPORTING)];
    for (index, page, flags) in [(62, locked, WRITE | NEXT), (63, other, WRITE)] {
        let at = u64::from(page) << PAGE_SHIFT;
        queue.descriptor(&guest.memory, index, Descriptor::new(at, 4096, flags, 63));
    }
    queue.publish(&guest.memory, 62);
    guest.kick(REPORTING.into());
    guest.wait_interrupt();
    assert_eq!(page(&guest, locked), FULL);
    assert_eq!(page(&guest, other), [0; 4096]);
    assert_eq!(guest.status(), 15);
}

/// Locks a page of the guest's in the host's memory: MADV_DONTNEED is refused there (madvise(2)).
#[allow(unsafe_code, reason = "mlock(2)")]
fn lock(guest: &Guest, page: u32) {
    let at = GuestAddress(u64::from(page) << PAGE_SHIFT);
    let host = guest.memory.get_host_address(at).unwrap();
    // SAFETY: the page is mapped as long as the guest's memory is; to lock it changes nothing of what it holds.
    assert_eq!(unsafe { libc::mlock(host.cast(), 4096) }, 0);
}

#[test]
fn the_target_is_bounded_and_the_driver_reports_what_it_holds() {
    let (mut guest, handle) = started();
    handle.set_target_pages(1000);
    guest.wait_interrupt();
    assert_eq!(guest.read32(0x100), 1000);
    handle.set_target_pages(u32::MAX);
    assert_eq!(guest.read32(0x100), 36 * 256);
    guest.write32(0x104, 77);
    assert_eq!(handle.held_pages(), 77);
    guest.write32(0x104, u32::MAX);
    assert_eq!(handle.held_pages(), 36 * 256);
    // The target is the host's.
    guest.write32(0x100, 5);
    assert_eq!(guest.read32(0x100), 36 * 256);
    guest.write32(0x70, 0);
    assert_eq!(handle.held_pages(), 0);
}
