//! virtio-rng (virtio 1.2, 5.4): random bytes from the host's generator, straight into the guest's buffers.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use rustix::rand::GetRandomFlags;

use super::queue::{Chain, DeviceQueue};
use super::worker::{Fault, Handler, Poll, Worker, drain};
use super::{ActivateError, Activation, GuestMemory, VirtioDevice};
use crate::jail::seccomp::Kind;

const DEVICE_ID: u32 = 4;
const QUEUE_SIZE: u16 = 64;

/// Most bytes given for one request; the driver sees how many and asks again. Linux asks for 64 at a time.
const MAX_BYTES: usize = 4096;

/// A source of entropy.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(0))?;
        let interrupt = activation.interrupt;
        let handler = RngHandler {
            memory: activation.memory,
            queue: DeviceQueue::new(queue, 0, u32::MAX, interrupt.clone()),
        };
        self.worker = Some(Worker::spawn(Kind::Rng, &interrupt, vec![handler])?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct RngHandler {
    memory: GuestMemory,
    queue: DeviceQueue,
}

impl Handler for RngHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick().as_raw_fd(), EventSet::IN, 0)
    }

    fn ready(&mut self, _poll: &Poll, _token: u64, _events: EventSet) -> Result<(), Fault> {
        drain(self.queue.kick());
        let memory = self.memory.memory();
        self.queue.serve(&memory, |queue, chain| {
            let written = fill(&chain).map_err(|source| Fault::Host {
                what: "reading the host's random numbers",
                source,
            })?;
            Ok(queue.push_used(&memory, chain.head, written)?)
        })
    }
}

fn fill(chain: &Chain<'_>) -> io::Result<u32> {
    let mut bytes = [0u8; MAX_BYTES];
    let wanted = bytes.len().min(chain.writable.len());
    let (bytes, _) = bytes.split_at_mut(wanted);
    let mut written = 0;
    while written < bytes.len() {
        let rest = bytes.get_mut(written..).unwrap_or_default();
        let count = rustix::rand::getrandom(rest, GetRandomFlags::empty())?;
        written = written.saturating_add(count);
    }
    // Cannot be short: no more than the chain's length was asked for.
    chain
        .writable
        .write_at(0, bytes)
        .map_err(io::Error::other)?;
    Ok(u32::try_from(wanted).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Guest, WRITE};
    use virtio_queue::desc::split::Descriptor;

    #[test]
    fn fills_buffers_and_bounds_large_ones() {
        let mut guest = Guest::start(Box::new(Rng::default()), 16);
        guest.add(0, &[], &[64]).unwrap();
        guest.add(0, &[], &[10, 3]).unwrap();
        guest.add(0, &[], &[3 * MAX_BYTES]).unwrap();
        guest.kick(0);
        let (first, second, third) = (guest.next(0), guest.next(0), guest.next(0));
        assert_eq!(first.data.len(), 64);
        assert_ne!(first.data, vec![0; 64]);
        assert_eq!(second.data.len(), 13);
        assert_eq!(third.data.len(), MAX_BYTES);
    }

    #[test]
    fn a_broken_chain_stops_it_until_reset() {
        let mut guest = Guest::start(Box::new(Rng::default()), 16);
        let queue = &mut guest.queues[0];
        queue.descriptor(&guest.memory, 0, Descriptor::new(1 << 40, 64, WRITE, 0));
        queue.publish(&guest.memory, 0);
        guest.kick(0);
        guest.wait_failed();
        guest.bring_up(16);
        guest.add(0, &[], &[8]).unwrap();
        guest.kick(0);
        assert_eq!(guest.next(0).data.len(), 8);
    }
}
