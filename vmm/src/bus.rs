//! An address bus: finds the device behind a port or an MMIO address.
//!
//! The map is built once, before the guest runs, and only read afterwards: a lookup takes no lock, and
//! each device has its own. What no device answers reads as all ones and swallows writes, as on a PC.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

use std::sync::{Arc, Mutex, PoisonError};

/// A device behind a range of ports or addresses. Offsets are relative to the start of its range.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset`; `data` comes filled with ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on the bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Taken already.
    #[error("range {base:#x}+{len:#x} is empty, wraps, or overlaps another device's")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Slot {
    base: u64,
    /// First address behind it.
    end: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A bus; sorted by address.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// Puts `device` at `base`.
    ///
    /// # Errors
    /// The range is empty, wraps around, or overlaps another one.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let bad = BusError::BadRange { base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else {
            return Err(bad);
        };
        let at = self.slots.partition_point(|slot| slot.base < base);
        let fits_before = at
            .checked_sub(1)
            .and_then(|i| self.slots.get(i))
            .is_none_or(|slot| slot.end <= base);
        let fits_after = self.slots.get(at).is_none_or(|slot| end <= slot.base);
        if !(fits_before && fits_after) {
            return Err(bad);
        }
        self.slots.insert(at, Slot { base, end, device });
        Ok(())
    }

    /// Reads; an access that no device covers as a whole, or of an odd size, reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, offset)) = self.find(address, data.len()) {
            let mut device = slot.device.lock().unwrap_or_else(PoisonError::into_inner);
            device.read(offset, data);
        }
    }

    /// Writes; an access that no device covers as a whole, or of an odd size, is dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.find(address, data.len()) {
            let mut device = slot.device.lock().unwrap_or_else(PoisonError::into_inner);
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Slot, u64)> {
        if !matches!(len, 1 | 2 | 4 | 8) {
            return None;
        }
        let at = self.slots.partition_point(|slot| slot.base <= address);
        let slot = self.slots.get(at.checked_sub(1)?)?;
        let offset = address.checked_sub(slot.base)?;
        let end = address.checked_add(len as u64)?;
        (end <= slot.end).then_some((slot, offset))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        tag: u8,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.tag.wrapping_add(offset as u8));
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    fn recorder(tag: u8) -> Arc<Mutex<Recorder>> {
        Arc::new(Mutex::new(Recorder {
            tag,
            written: Vec::new(),
        }))
    }

    #[test]
    fn an_access_reaches_its_device() {
        let (mut bus, a, b) = (Bus::default(), recorder(0x10), recorder(0x40));
        bus.insert(0x2000, 0x100, b.clone()).unwrap();
        bus.insert(0x1000, 8, a.clone()).unwrap();
        let mut one = [0];
        bus.read(0x1003, &mut one);
        assert_eq!(one, [0x13]);
        bus.write(0x20fc, &[1, 2, 3, 4]);
        assert_eq!(b.lock().unwrap().written, [(0xfc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn what_nobody_answers_reads_as_ones() {
        let (mut bus, a) = (Bus::default(), recorder(0));
        bus.insert(0x1000, 8, a.clone()).unwrap();
        for (address, len) in [
            (0xfff, 1),
            (0x1008, 1),
            (0x1006, 4),
            (0x1000, 3),
            (0x1000, 0),
            (u64::MAX, 8),
        ] {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            assert_eq!(data, vec![0xff; len]);
            bus.write(address, &data);
        }
        assert!(a.lock().unwrap().written.is_empty());
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(ranges in prop::collection::vec((0u64..64, 0u64..16), 0..12)) {
            let mut bus = Bus::default();
            let mut taken = [false; 80];
            for (base, len) in ranges {
                let cells = base as usize..(base + len) as usize;
                let free = len > 0 && taken[cells.clone()].iter().all(|t| !t);
                prop_assert_eq!(bus.insert(base, len, recorder(0)).is_ok(), free);
                if free {
                    taken[cells].fill(true);
                }
            }
        }
    }
}
