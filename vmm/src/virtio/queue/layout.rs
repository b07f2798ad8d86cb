//! The arithmetic of a split queue (virtio 1.2, 2.7): where its parts lie in guest memory, and how its 16-bit indices wrap.
//!
//! None of it can overflow: a queue has at most 32768 descriptors, and an index is taken modulo the queue's size.

/// Size of a descriptor (2.7.5), in bytes.
pub const DESCRIPTOR_SIZE: u32 = 16;

/// Where the used ring has its index, behind two bytes of flags (2.7.8).
pub const USED_INDEX: u64 = 2;

/// Where the parts of a queue of `size` descriptors lie, whose descriptor table, available ring and used ring begin at `starts`: start
/// and length in bytes of each.
pub fn areas(size: u16, starts: [u64; 3]) -> [(u64, usize); 3] {
    let size = usize::from(size);
    let [desc, avail, used] = starts;
    // Flags, index and an event word around 2 or 8 bytes an entry.
    let ring = |entry: usize| size.saturating_mul(entry).saturating_add(6);
    [
        (desc, size.saturating_mul(DESCRIPTOR_SIZE as usize)),
        (avail, ring(2)),
        (used, ring(8)),
    ]
}

/// Where in the used ring of a queue of `size` descriptors the entry number `index` goes: behind flags and index, two bytes each, and
/// eight bytes an entry (2.7.8).
pub fn used_entry(index: u16, size: u16) -> u64 {
    // No queue is without descriptors.
    let slot = index.checked_rem(size).unwrap_or(0);
    u64::from(slot).saturating_mul(8).saturating_add(4)
}

/// Where in the available ring of a queue of `size` descriptors the driver says of which use it wishes to hear (`used_event`): behind
/// flags and index, and two bytes an entry (2.7.6).
pub fn used_event(size: u16) -> u64 {
    u64::from(size).saturating_mul(2).saturating_add(4)
}

/// True if `index` is one of the `count` before `next`, all modulo 2^16.
pub fn is_among_last(index: u16, next: u16, count: u16) -> bool {
    next.wrapping_sub(index).wrapping_sub(1) < count
}
