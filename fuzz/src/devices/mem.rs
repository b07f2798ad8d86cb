//! virtio-mem: each request has the answer that virtio 1.2, 5.15.6 gives it, and there is never more memory than the host has asked for.

use std::collections::HashMap;

use arbitrary::Arbitrary;
use husk_vmm::virtio::{
    VirtioDevice,
    mem::{Mem, MemHandle, Region},
};

use super::{Manner, Sent, World};
use crate::guest::{Guest, Used, memory};

const BLOCK: u64 = 2 << 20;
/// Blocks of the region.
const BLOCKS: usize = 64;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// A request, mostly about blocks in the region or just beside it.
#[derive(Arbitrary, Debug)]
pub struct Request {
    kind: u8,
    block: u8,
    count: u8,
    odd: u8,
}

impl Request {
    fn kind(&self) -> u16 {
        match self.kind {
            0..=95 => 0,
            96..=143 => 1,
            144..=159 => 2,
            160..=239 => 3,
            other => other.into(),
        }
    }

    fn address(&self, start: u64) -> u64 {
        // From four blocks before to four behind.
        let block = i64::from(self.block % (BLOCKS as u8 + 8)) - 4;
        let address = start.wrapping_add_signed(block * BLOCK as i64);
        match self.odd {
            0..=239 => address,
            240..=247 => address + u64::from(self.odd - 239),
            248..=251 => address - start / 2,
            _ => address | 1 << 63,
        }
    }

    fn count(&self) -> u16 {
        match self.count {
            count @ 0..=191 => u16::from(count % 8),
            // About as many as there are.
            count => u16::from(count) - 192 + 40,
        }
    }
}

/// Which blocks are plugged, as the requests have it.
struct Model {
    start: u64,
    plugged: [bool; BLOCKS],
    requested: usize,
}

impl Model {
    fn count(&self) -> usize {
        self.plugged.iter().filter(|plugged| **plugged).count()
    }

    /// The response, and the state where it means something.
    fn answer(&mut self, request: &[u8]) -> (u16, Option<u16>) {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        let address = u64::from_le_bytes(request[8..16].try_into().unwrap());
        let count = usize::from(u16::from_le_bytes([request[16], request[17]]));
        if kind == 2 {
            self.plugged = [false; BLOCKS];
            return (ACK, None);
        }
        let end = u128::from(self.start) + u128::from(BLOCK) * BLOCKS as u128;
        let is_within =
            address >= self.start && u128::from(address) + count as u128 * u128::from(BLOCK) <= end;
        if kind > 3 || count == 0 || address % BLOCK != 0 || !is_within {
            return (ERROR, None);
        }
        let first = ((address - self.start) / BLOCK) as usize;
        let before = self.count();
        let blocks = &mut self.plugged[first..first + count];
        let plugged = blocks.iter().filter(|plugged| **plugged).count();
        match kind {
            0 if before + count > self.requested => (NACK, None),
            0 if plugged > 0 => (ERROR, None),
            1 if plugged < count => (ERROR, None),
            0 | 1 => {
                blocks.fill(kind == 0);
                (ACK, None)
            }
            _ if plugged == count => (ACK, Some(0)),
            _ if plugged == 0 => (ACK, Some(1)),
            _ => (ACK, Some(2)),
        }
    }
}

/// See the module's head.
pub struct Pluggable {
    handle: MemHandle,
    model: Model,
    /// Requests that have not been answered, by their heads.
    pending: HashMap<u16, Vec<u8>>,
    /// The most bytes that the host has ever asked for.
    most: u64,
}

impl Pluggable {
    /// With its device.
    pub fn new() -> (Box<dyn VirtioDevice>, Self) {
        // The region is not joined to memory: who has a device copy to what is unplugged ends the process, as is meant to be.
        let region = Region::map(&memory(), (BLOCKS as u64 * BLOCK) >> 20).unwrap();
        let start = region.start();
        let (mem, handle) = Mem::new(region).unwrap();
        let world = Self {
            handle,
            model: Model {
                start,
                plugged: [false; BLOCKS],
                requested: 0,
            },
            pending: HashMap::new(),
            most: 0,
        };
        (Box::new(mem), world)
    }
}

impl World for Pluggable {
    type Message = Request;
    /// So many half blocks are to be plugged.
    type Host = u8;

    fn bytes(&self, request: &Request) -> Vec<u8> {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&request.kind().to_le_bytes());
        bytes[8..16].copy_from_slice(&request.address(self.model.start).to_le_bytes());
        bytes[16..18].copy_from_slice(&request.count().to_le_bytes());
        bytes.to_vec()
    }

    fn manner(&self, _: &Guest, _: &Request) -> Manner {
        Manner {
            room: vec![10],
            ..Manner::on(0)
        }
    }

    fn sent(&mut self, _: &mut Guest, sent: &Sent<'_, Request>) {
        self.pending.insert(sent.head, sent.bytes.to_vec());
    }

    fn host(&mut self, _: &mut Guest, halves: &u8) {
        // Mostly some, at times more than there are.
        let bytes = u64::from(*halves % 160) * BLOCK / 2;
        self.model.requested = (bytes.div_ceil(BLOCK) as usize).min(BLOCKS);
        self.most = self.most.max(self.model.requested as u64 * BLOCK);
        self.handle.request(bytes);
    }

    fn brought_up(&mut self) {
        self.pending.clear();
    }

    fn look(&mut self, _: &Guest, _: usize, used: &Used) {
        assert_eq!(used.data.len(), 10);
        let request = self.pending.remove(&used.head).unwrap();
        let (response, state) = self.model.answer(&request);
        let field = |at: usize| u16::from_le_bytes([used.data[at], used.data[at + 1]]);
        assert_eq!(field(0), response, "the answer to {request:?}");
        assert!(state.is_none_or(|state| field(8) == state), "{used:?}");
    }

    fn check(&mut self, guest: &mut Guest) {
        assert!(
            self.handle.plugged_bytes() <= self.most,
            "more memory than the host has ever asked for"
        );
        let [plugged, requested] = [0x28, 0x30].map(|at| u64::from_le_bytes(guest.field(at)));
        assert_eq!(plugged, self.handle.plugged_bytes());
        assert_eq!(requested, self.model.requested as u64 * BLOCK);
        assert!(guest.is_wild || plugged == self.model.count() as u64 * BLOCK);
    }
}
