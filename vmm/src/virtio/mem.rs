//! virtio-mem (virtio 1.2, 5.15): memory that a running guest gets, and may give back.
//!
//! The device offers a region above RAM, in blocks, none of which is there at first. The host says how much of it should be
//! ([`MemHandle::request`]), and the driver plugs blocks until that much is, adding them to the kernel's memory as it goes. Blocks
//! that are not plugged cannot be touched ([`region`]), so that a guest never has more of the host's memory than it was allowed.

mod blocks;
mod region;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use self::blocks::{BLOCK, Blocks, Response, State};
pub use self::region::Region;
use super::queue::{Chain, DeviceQueue};
use super::worker::{Fault, Handler, Poll, Worker, drain};
use super::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use crate::jail::seccomp::Kind;

const DEVICE_ID: u32 = 24;
const QUEUE_SIZE: u16 = 64;

/// Memory that is not plugged must not be read either.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

// Request types of `struct virtio_mem_req`.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Bytes of `struct virtio_mem_req`: type, address and number of blocks, each padded to eight.
const REQUEST_LEN: usize = 24;
/// Bytes of `struct virtio_mem_resp`: type, padded to eight, and state.
const RESPONSE_LEN: usize = 10;
/// More than a request and its response have.
const MAX_BYTES: u32 = 4096;

/// What the device and its handle share.
struct Shared {
    region: Region,
    blocks: Mutex<Blocks>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    /// Signalled when the guest has what was last requested.
    reached: EventFd,
    /// That is still to be signalled. Changes under the lock of `blocks`.
    is_awaited: AtomicBool,
}

impl Shared {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        lock(&self.blocks)
    }

    /// Tells the host, once a request, that the guest has got there.
    fn tell_if_reached(&self, blocks: &Blocks) {
        let is_there = blocks.plugged() == blocks.requested();
        if is_there && self.is_awaited.swap(false, Ordering::Relaxed) {
            // EAGAIN: the counter is full, so it is readable anyway.
            let _ = self.reached.write(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says how much memory the guest is to plug.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Asks the guest to have `bytes` plugged, rounded up to whole blocks. It does so in its own time.
    pub fn request(&self, bytes: u64) {
        {
            let mut blocks = self.shared.blocks();
            blocks.request(bytes);
            self.shared.is_awaited.store(true, Ordering::Relaxed);
            self.shared.tell_if_reached(&blocks);
        }
        if let Some(interrupt) = lock(&self.shared.interrupt).as_ref() {
            interrupt.signal_config();
        }
    }

    /// Bytes that are plugged.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        self.shared.blocks().plugged()
    }

    /// Readable when the guest has plugged what was last asked for; [`Self::take_reached`] takes the signal off.
    #[must_use]
    pub fn reached(&self) -> BorrowedFd<'_> {
        self.shared.reached.as_fd()
    }

    /// Takes the signal off; false if there was none.
    #[must_use]
    pub fn take_reached(&self) -> bool {
        self.shared.reached.read().is_ok()
    }
}

/// The virtio-mem device.
pub struct Mem {
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Mem {
    /// A device for `region`, and the handle that steers it.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn new(region: Region) -> io::Result<(Self, MemHandle)> {
        let shared = Arc::new(Shared {
            blocks: Mutex::new(Blocks::new(region.start(), region.bytes())),
            region,
            interrupt: Mutex::new(None),
            reached: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            is_awaited: AtomicBool::new(false),
        });
        let handle = MemHandle {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            shared,
            worker: None,
        };
        Ok((device, handle))
    }
}

impl VirtioDevice for Mem {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let blocks = self.shared.blocks();
        // block_size, node_id (of a feature not offered), addr, region_size, usable_region_size, plugged_size, requested_size (5.15.4).
        let fields = [
            BLOCK,
            0,
            blocks.start(),
            blocks.bytes(),
            blocks.bytes(),
            blocks.plugged(),
            blocks.requested(),
        ];
        let config = fields.map(u64::to_le_bytes);
        super::read_bytes(config.as_flattened(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue(0))?;
        let interrupt = activation.interrupt;
        let handler = MemHandler {
            memory: activation.memory,
            queue: DeviceQueue::new(queue, 0, MAX_BYTES, interrupt.clone()),
            shared: Arc::clone(&self.shared),
        };
        self.worker = Some(Worker::spawn(Kind::Mem, &interrupt, vec![handler])?);
        *lock(&self.shared.interrupt) = Some(interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        *lock(&self.shared.interrupt) = None;
        self.worker = None;
        // What is plugged stays so: it may be in use (5.15.5). A new driver asks for UNPLUG_ALL.
    }
}

struct MemHandler {
    memory: GuestMemory,
    queue: DeviceQueue,
    shared: Arc<Shared>,
}

impl Handler for MemHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick().as_raw_fd(), EventSet::IN, 0)
    }

    fn ready(&mut self, _poll: &Poll, _token: u64, _events: EventSet) -> Result<(), Fault> {
        drain(self.queue.kick());
        let memory = self.memory.memory();
        let shared = &self.shared;
        self.queue.serve(&memory, |queue, chain| {
            let Some(request) = Request::read(&chain) else {
                return Err(queue.layout(chain.head, "a request of virtio-mem").into());
            };
            let (response, state) = shared.answer(&request);
            let [r0, r1] = (response as u16).to_le_bytes();
            let [s0, s1] = (state as u16).to_le_bytes();
            let bytes: [u8; RESPONSE_LEN] = [r0, r1, 0, 0, 0, 0, 0, 0, s0, s1];
            // Cannot be short: `Request::read` has seen to it.
            let written = chain
                .writable
                .write_at(0, &bytes)
                .map_or(0, |()| bytes.len());
            let written = u32::try_from(written).unwrap_or(0);
            Ok(queue.push_used(&memory, chain.head, written)?)
        })
    }
}

impl Shared {
    /// The state means something only with an ACK of a STATE request.
    fn answer(&self, request: &Request) -> (Response, State) {
        let (region, mut blocks) = (&self.region, self.blocks());
        let Request { kind, addr, count } = *request;
        let refused = |what: &'static str| {
            move |error: &io::Error| {
                if super::may_log_about_guest() {
                    tracing::warn!(%error, addr, count, "virtio-mem: cannot {what} blocks, the guest is to try again");
                }
            }
        };
        let open = |range| region.open(range).inspect_err(refused("plug"));
        let close = |range| region.close(range).inspect_err(refused("unplug"));
        let response = match kind {
            PLUG => blocks.plug(addr, count, open),
            UNPLUG => blocks.unplug(addr, count, close),
            UNPLUG_ALL => blocks.unplug_all(close),
            STATE => match blocks.state(addr, count) {
                Some(state) => return (Response::Ack, state),
                None => Response::Error,
            },
            _ => Response::Error,
        };
        self.tell_if_reached(&blocks);
        (response, State::Plugged)
    }
}

/// A request as the guest made it; nothing of it has been checked.
struct Request {
    kind: u16,
    addr: u64,
    count: u16,
}

impl Request {
    /// `None` where request or room for the response are too short.
    fn read(chain: &Chain<'_>) -> Option<Self> {
        if chain.writable.len() < RESPONSE_LEN || chain.readable.len() < REQUEST_LEN {
            return None;
        }
        let (mut kind, mut addr, mut count) = ([0; 2], [0; 8], [0; 2]);
        chain.readable.read_at(0, &mut kind).ok()?;
        chain.readable.read_at(8, &mut addr).ok()?;
        chain.readable.read_at(16, &mut count).ok()?;
        Some(Self {
            kind: u16::from_le_bytes(kind),
            addr: u64::from_le_bytes(addr),
            count: u16::from_le_bytes(count),
        })
    }
}

#[cfg(test)]
mod tests;
