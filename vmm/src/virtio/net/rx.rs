//! The receive queue: packets from the tap into the guest's buffers.
//!
//! How long a packet is shows only when it has been read, and what does not fit is lost. So with mergeable buffers
//! (`MRG_RXBUF`) nothing is read until the driver has offered room for the largest packet, or all that its queue can hold; a packet
//! then takes as many of the offered buffers as it fills, and the rest serve the next. Without, a packet has one buffer.

use std::collections::VecDeque;
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::io::MAX_SLICES;
use super::link::Dropped;
use super::tap::{Received, Tap};
use super::{HEADER_LEN, MAX_PACKET, features};
use crate::virtio::queue::{Chain, DeviceQueue};
use crate::virtio::worker::{Fault, TURN};
use crate::virtio::{ActiveQueue, Interrupt};

/// Where `num_buffers` is in a packet's header (5.1.6).
const NUM_BUFFERS: usize = 10;

/// A receive queue.
pub struct Rx {
    queue: DeviceQueue,
    /// A packet may take several buffers.
    mergeable: bool,
}

/// Why no more packets are read for now.
#[derive(Debug, PartialEq, Eq)]
pub enum Pause {
    /// The tap has none.
    Nothing,
    /// Others must have their turn.
    Turn,
    /// The driver has offered too few buffers; it kicks when it offers more.
    Starved,
    /// The tap's queue is out of use, or the interface gone.
    Gone,
}

/// Buffers taken from the queue for the next packets.
#[derive(Default)]
struct Offered<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: usize,
    slices: usize,
}

impl<'m> Offered<'m> {
    fn suffices(&self, mergeable: bool) -> bool {
        let whole = self.bytes >= MAX_PACKET || self.slices >= MAX_SLICES;
        whole || (!mergeable && !self.chains.is_empty())
    }

    fn push(&mut self, chain: Chain<'m>) {
        // No more comes once there is enough for a packet, so that both stay far below their ends.
        self.bytes = self.bytes.saturating_add(chain.writable.len());
        self.slices = self.slices.saturating_add(chain.writable.segments().len());
        self.chains.push_back(chain);
    }

    /// Takes the chains that a packet of `count` bytes fills, and says how many bytes are in each.
    fn fill(&mut self, count: usize) -> Vec<(Chain<'m>, usize)> {
        let mut filled = Vec::new();
        let mut rest = count;
        while rest > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let here = rest.min(chain.writable.len());
            rest = rest.saturating_sub(here);
            self.bytes = self.bytes.saturating_sub(chain.writable.len());
            self.slices = self.slices.saturating_sub(chain.writable.segments().len());
            filled.push((chain, here));
        }
        filled
    }

    /// Room for one packet.
    fn room(&self) -> Vec<VolatileSlice<'m>> {
        let segments = self
            .chains
            .iter()
            .flat_map(|chain| chain.writable.segments());
        segments
            .take(MAX_SLICES)
            .map(|segment| segment.slice)
            .collect()
    }
}

impl Rx {
    /// Takes over the queue `index`, for a driver that has accepted `features`.
    pub fn new(
        queue: ActiveQueue,
        index: u16,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
    ) -> Self {
        Self {
            // A driver may offer buffers as large as it likes.
            queue: DeviceQueue::new(queue, index, u32::MAX, interrupt),
            mergeable: features::has(features, features::MRG_RXBUF),
        }
    }

    /// The queue.
    pub fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// The queue.
    pub fn queue_mut(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }

    /// Carries packets from `tap` until something stands in the way.
    ///
    /// # Errors
    /// The driver broke the queue, or the host the tap.
    pub fn run(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: &Tap,
        dropped: &Dropped,
    ) -> Result<Pause, Fault> {
        let mut offered = Offered::default();
        let mut pause = Pause::Turn;
        for _ in 0..TURN {
            if !self.gather(memory, &mut offered)? {
                pause = Pause::Starved;
                break;
            }
            let room = offered.room();
            let received = tap.receive(&room).map_err(|source| Fault::Host {
                what: "reading from the tap",
                source,
            })?;
            let capacity: usize = room.iter().map(VolatileSlice::len).sum();
            match received {
                Received::Packet(count) if (HEADER_LEN..=capacity).contains(&count) => {
                    self.complete(memory, offered.fill(count))?;
                }
                Received::Packet(_) => dropped.add("it does not fit the guest's buffers"),
                Received::Lost => dropped.add("the tap does not give it"),
                Received::Nothing => {
                    pause = Pause::Nothing;
                    break;
                }
                Received::Gone => {
                    pause = Pause::Gone;
                    break;
                }
            }
        }
        // Each chain has a slice at least, so that they cannot be more than a u16 counts.
        self.queue
            .unpop(u16::try_from(offered.chains.len()).unwrap_or(u16::MAX));
        self.queue.notify(memory)?;
        Ok(pause)
    }

    /// Takes buffers for one packet; false if the driver has offered too few, and will kick.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        offered: &mut Offered<'m>,
    ) -> Result<bool, Fault> {
        while !offered.suffices(self.mergeable) {
            match self.queue.pop(memory)? {
                // 5.1.6.3.1: no buffer is shorter than a header.
                Some(chain) if chain.writable.len() < HEADER_LEN => {
                    return Err(self.queue.layout(chain.head, "room for a header").into());
                }
                Some(chain) => offered.push(chain),
                // The kick is for the next buffer behind those that were taken.
                None if self.queue.rearm(memory)? => {}
                None => return Ok(offered.chains.len() >= self.queue.size().into()),
            }
        }
        Ok(true)
    }

    /// Gives a packet's buffers to the driver.
    fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        filled: Vec<(Chain<'_>, usize)>,
    ) -> Result<(), Fault> {
        let Some((first, _)) = filled.first() else {
            return Ok(());
        };
        // At most `MAX_SLICES`; the tap leaves this field to us.
        let count = u16::try_from(filled.len()).unwrap_or(u16::MAX);
        if first
            .writable
            .write_at(NUM_BUFFERS, &count.to_le_bytes())
            .is_err()
        {
            return Err(self.queue.layout(first.head, "room for a header").into());
        }
        let used: Vec<_> = filled
            .iter()
            // A packet is no longer than 64 KiB and a little.
            .map(|(chain, len)| (chain.head, u32::try_from(*len).unwrap_or(0)))
            .collect();
        self.queue.push_used_together(memory, &used)?;
        Ok(())
    }
}
