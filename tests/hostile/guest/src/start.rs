//! What the VMM tells at the start (PVH's `struct hvm_start_info`): the command line and how much memory there is.

use crate::machine::{read, word};

const LONGEST: usize = 2048;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u64 = 1;
/// Where RAM of a large VM stops for devices.
const GAP: u64 = 0xc000_0000;

/// What the VMM told.
pub struct Start {
    line: [u8; LONGEST],
    /// First address behind the RAM below the gap.
    pub ram: u64,
}

impl Start {
    /// Reads it at this address.
    pub fn read(info: u64) -> Self {
        let mut line = [0; LONGEST];
        read(word::<8>(info + 24), &mut line);
        let (map, entries) = (word::<8>(info + 40), word::<4>(info + 48));
        let ram = (0..entries)
            .map(|index| map + index * 24)
            .filter(|entry| word::<4>(entry + 16) == RAM)
            .map(|entry| word::<8>(entry) + word::<8>(entry + 8))
            .filter(|end| *end <= GAP)
            .max()
            .unwrap_or(0);
        Self { line, ram }
    }

    /// The value of `name=VALUE` on the command line, empty where there is none.
    pub fn word(&self, name: &str) -> &str {
        let end = self.line.iter().position(|byte| *byte == 0);
        let line = self.line.get(..end.unwrap_or(0)).unwrap_or_default();
        let line = core::str::from_utf8(line).unwrap_or_default();
        line.split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_default()
    }
}
