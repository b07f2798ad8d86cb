//! A split virtqueue and the memory that it is in, as virtio 1.2, 2.7 has them and nothing of husk's: what husk's is held against.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Descriptor flag: another follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: it is a table of others.
pub const INDIRECT: u16 = 4;

/// Most descriptors that husk takes in one chain.
const MOST: usize = 1024;

/// A descriptor as a driver writes it (2.7.5).
pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Memory as it ought to be.
pub struct Model {
    regions: Vec<(u64, Vec<u8>)>,
}

impl Model {
    /// Regions by start and length in bytes, ascending.
    pub fn new(regions: &[(u64, usize)]) -> Self {
        let regions = regions.iter().map(|(start, len)| (*start, vec![0; *len]));
        Self {
            regions: regions.collect(),
        }
    }

    /// Every byte is this one.
    pub fn fill(&mut self, byte: u8) {
        for (_, bytes) in &mut self.regions {
            bytes.fill(byte);
        }
    }

    fn at(&self, address: u64) -> Option<(usize, usize)> {
        let inside = |(start, bytes): &(u64, Vec<u8>)| {
            address
                .checked_sub(*start)
                .is_some_and(|at| at < bytes.len() as u64)
        };
        let region = self.regions.iter().position(inside)?;
        Some((region, (address - self.regions[region].0) as usize))
    }

    /// The pieces of one region each that `len` bytes from `address` on are: region, place in it, length. None if a byte lies in no region.
    fn pieces(&self, address: u64, len: usize) -> Option<Vec<(usize, usize, usize)>> {
        let (mut at, mut left, mut pieces) = (address, len, Vec::new());
        while left > 0 {
            let (region, offset) = self.at(at)?;
            let here = left.min(self.regions[region].1.len() - offset);
            pieces.push((region, offset, here));
            left -= here;
            at = at.checked_add(here as u64)?;
        }
        Some(pieces)
    }

    /// What is there; none if a byte lies in no region.
    pub fn read(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let piece = |(region, offset, len): (usize, usize, usize)| {
            &self.regions[region].1[offset..offset + len]
        };
        let pieces = self.pieces(address, len)?;
        Some(pieces.into_iter().map(piece).collect::<Vec<_>>().concat())
    }

    fn u16(&self, address: u64) -> Option<u16> {
        let bytes = self.read(address, 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// Writes what lies in a region.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        for (byte, at) in bytes.iter().zip(address..) {
            if let Some((region, offset)) = self.at(at) {
                self.regions[region].1[offset] = *byte;
            }
        }
    }

    /// The bytes of several runs.
    pub fn read_runs(&self, runs: &[(u64, usize)]) -> Vec<u8> {
        let read = |(at, len): &(u64, usize)| self.read(*at, *len).unwrap();
        runs.iter().flat_map(read).collect()
    }

    /// Writes to several runs as much as there is.
    pub fn write_runs(&mut self, runs: &[(u64, usize)], bytes: &[u8]) {
        let mut rest = bytes;
        for (at, len) in runs {
            let (now, later) = rest.split_at((*len).min(rest.len()));
            self.write(*at, now);
            rest = later;
        }
    }

    /// Makes memory so.
    pub fn copy_to(&self, memory: &GuestMemoryMmap) {
        for (start, bytes) in &self.regions {
            memory.write_slice(bytes, GuestAddress(*start)).unwrap();
        }
    }

    /// Memory is so.
    pub fn assert_is(&self, memory: &GuestMemoryMmap) {
        self.assert_is_but(memory, &[]);
    }

    /// Memory is so, but for these ranges of start and length in bytes.
    pub fn assert_is_but(&self, memory: &GuestMemoryMmap, but: &[(u64, usize)]) {
        std::sync::atomic::fence(Ordering::SeqCst);
        for (start, expected) in &self.regions {
            let mut found = vec![0; expected.len()];
            memory.read_slice(&mut found, GuestAddress(*start)).unwrap();
            if found == *expected {
                continue;
            }
            for (at, (found, expected)) in (*start..).zip(found.iter().zip(expected)) {
                let allowed = |(from, len): &(u64, usize)| {
                    at.checked_sub(*from).is_some_and(|by| by < *len as u64)
                };
                assert!(
                    found == expected || but.iter().any(allowed),
                    "the byte at {at:#x} is {found:#x}, not {expected:#x}"
                );
            }
        }
    }
}

/// Why a queue is broken.
#[derive(Debug)]
pub struct Broken(pub &'static str);

/// Start and length in bytes of the runs that a chain's readable and writable part are.
pub type Runs = Vec<(u64, usize)>;

/// A queue, from the device's side.
pub struct Ring {
    /// Descriptors.
    pub size: u16,
    /// The descriptor table.
    pub table: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// Most bytes of a chain that the device takes.
    pub max_bytes: u32,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// Chains taken.
    pub next_avail: u16,
    /// Chains given back.
    pub next_used: u16,
    /// The readable and the writable part of the chain that was taken last.
    pub last: (Runs, Runs),
}

impl Ring {
    /// The head of the next chain, if there is one.
    ///
    /// # Errors
    /// Ring or chain are not what they must be.
    pub fn pop(&mut self, memory: &Model) -> Result<Option<u16>, Broken> {
        let index = memory.u16(self.avail + 2).ok_or(Broken("no ring"))?;
        let there = index.wrapping_sub(self.next_avail);
        if there > self.size {
            return Err(Broken("more chains than descriptors"));
        }
        if there == 0 {
            return Ok(None);
        }
        let slot = self.next_avail % self.size;
        self.next_avail = self.next_avail.wrapping_add(1);
        let head = memory
            .u16(self.avail + 4 + 2 * u64::from(slot))
            .ok_or(Broken("no ring"))?;
        self.last = self.chain(memory, head)?;
        Ok(Some(head))
    }

    fn chain(&self, memory: &Model, head: u16) -> Result<(Runs, Runs), Broken> {
        let (mut readable, mut writable) = (Runs::new(), Runs::new());
        let (mut table, mut count, mut index) = (self.table, u32::from(self.size), head);
        let (mut is_indirect, mut bytes, mut pieces) = (false, 0_u64, 0);
        loop {
            if u32::from(index) >= count {
                return Err(Broken("an index outside of its table"));
            }
            let raw = table
                .checked_add(16 * u64::from(index))
                .and_then(|at| memory.read(at, 16))
                .ok_or(Broken("a table outside of memory"))?;
            let address = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let len = u32::from_le_bytes(raw[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(raw[12..14].try_into().unwrap());
            if flags & INDIRECT != 0 {
                // 2.7.5.3.1: not both flags, and no table in a table. husk wants it to be the last of its chain's, as Linux has it.
                if is_indirect || flags & NEXT != 0 || len == 0 || len % 16 != 0 {
                    return Err(Broken("an indirect table where none may be"));
                }
                (table, count, index, is_indirect) = (address, len / 16, 0, true);
                continue;
            }
            bytes += u64::from(len);
            if len == 0 || bytes > self.max_bytes.into() {
                return Err(Broken("no bytes, or too many"));
            }
            let len = len as usize;
            pieces += memory
                .pieces(address, len)
                .ok_or(Broken("a buffer outside of memory"))?
                .len();
            if pieces > MOST {
                return Err(Broken("a loop"));
            }
            if flags & WRITE != 0 {
                writable.push((address, len));
            } else if writable.is_empty() {
                readable.push((address, len));
            } else {
                return Err(Broken("readable behind writable"));
            }
            if flags & NEXT == 0 {
                return Ok((readable, writable));
            }
            index = u16::from_le_bytes([raw[14], raw[15]]);
        }
    }

    /// Gives a chain back.
    pub fn push_used(&mut self, memory: &mut Model, head: u16, len: u32) {
        let slot = u64::from(self.next_used % self.size);
        let entry = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
        memory.write(self.used + 4 + 8 * slot, &entry);
        self.next_used = self.next_used.wrapping_add(1);
        memory.write(self.used + 2, &self.next_used.to_le_bytes());
    }

    /// Asks for a kick; whether there is a chain already.
    pub fn rearm(&self, memory: &mut Model) -> bool {
        if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            memory.write(at, &self.next_avail.to_le_bytes());
        } else {
            memory.write(self.used, &[0, 0]);
        }
        memory.u16(self.avail + 2) != Some(self.next_avail)
    }

    /// Whether the driver wants to hear of the last `count` chains given back (2.7.7.2).
    pub fn wants_interrupt(&self, memory: &Model, count: u16) -> bool {
        if count == 0 || !self.event_idx {
            return count > 0;
        }
        let wish = memory
            .u16(self.avail + 4 + 2 * u64::from(self.size))
            .unwrap();
        let last = self.next_used.wrapping_sub(count);
        (0..count).any(|by| last.wrapping_add(by) == wish)
    }
}
