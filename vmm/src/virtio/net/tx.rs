//! The transmit queue: packets of the guest into the tap.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::link::Dropped;
use super::tap::{Sent, Tap};
use super::{HEADER_LEN, MAX_PACKET};
use crate::virtio::queue::{Buffers, DeviceQueue, QueueError};
use crate::virtio::worker::TURN;
use crate::virtio::{ActiveQueue, Interrupt};

/// A transmit queue.
pub struct Tx {
    queue: DeviceQueue,
}

/// Why no more packets are sent for now.
#[derive(Debug, PartialEq, Eq)]
pub enum Pause {
    /// The guest has none; it kicks when it has.
    Nothing,
    /// Others must have their turn.
    Turn,
    /// The tap takes none; it is writable when it does.
    Full,
}

impl Tx {
    /// Takes over the queue `index`.
    pub fn new(queue: ActiveQueue, index: u16, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            // What is too long is no packet, but no broken queue either.
            queue: DeviceQueue::new(queue, index, u32::MAX, interrupt),
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

    /// Carries packets to `tap` until something stands in the way. Without a tap they go nowhere, as on a cable that is not
    /// plugged in.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn run(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: Option<&Tap>,
        dropped: &Dropped,
    ) -> Result<Pause, QueueError> {
        let mut pause = Pause::Turn;
        for _ in 0..TURN {
            let chain = match self.queue.pop(memory)? {
                Some(chain) => chain,
                None if self.queue.rearm(memory)? => continue,
                None => {
                    pause = Pause::Nothing;
                    break;
                }
            };
            match tap.map_or(Sent::Dropped, |tap| send(tap, &chain.readable)) {
                Sent::Taken => {}
                Sent::Dropped => dropped.add("the tap does not take it"),
                Sent::Full => {
                    self.queue.unpop(1);
                    pause = Pause::Full;
                    break;
                }
            }
            self.queue.push_used(memory, chain.head, 0)?;
        }
        self.queue.notify(memory)?;
        Ok(pause)
    }
}

fn send(tap: &Tap, packet: &Buffers<'_>) -> Sent {
    // The kernel checks the header, and what is behind it.
    if !(HEADER_LEN..=MAX_PACKET).contains(&packet.len()) {
        return Sent::Dropped;
    }
    let slices: Vec<_> = packet.segments().iter().map(|s| s.slice).collect();
    tap.send(&slices)
}
