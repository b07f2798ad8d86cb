//! virtio-balloon (virtio 1.2, 5.5): guest memory that goes back to the host.
//!
//! Two ways lead there. The shim sets a target and the driver inflates towards it, page by page, giving up what
//! it would rather keep (`DEFLATE_ON_OOM`: it takes pages back before it kills a process). And on its own account the driver
//! reports runs of pages that lie free (`REPORTING`), which the host may drop as long as the guest does not
//! touch them. Either way a page that was given back reads as zero when it is next touched.

mod discard;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

use self::discard::discard;
use super::queue::{Chain, DeviceQueue};
use super::worker::{Fault, Handler, Poll, Worker, drain};
use super::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use crate::jail::seccomp::Kind;

const DEVICE_ID: u32 = 5;

/// Queue indices. A driver skips the queues of features it does not have, so that reporting follows deflate
/// directly: Linux and QEMU do so, against the letter of 5.5.2.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORTING: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 128];

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// The balloon counts in pages of 4 KiB whatever the guest's page size is.
const PAGE_SHIFT: u32 = 12;

/// Page numbers of one request, in bytes: Linux sends 256 of four bytes.
const MAX_PFN_BYTES: u32 = 64 * 1024;

/// Target and holdings, shared between the device and whoever steers it.
#[derive(Default)]
struct Shared {
    target: AtomicU32,
    held: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// Steers a balloon.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    total: u32,
}

impl BalloonHandle {
    /// Asks the guest to give up `pages` of 4 KiB in all, at most what it has. It answers in its own time, and may
    /// keep more than asked: see [`Self::held_pages`].
    pub fn set_target_pages(&self, pages: u32) {
        self.shared
            .target
            .store(pages.min(self.total), Ordering::SeqCst);
        let interrupt = self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupt.as_ref() {
            interrupt.signal_config();
        }
    }

    /// Pages of 4 KiB that the guest says are in the balloon, at most what it has.
    pub fn held_pages(&self) -> u32 {
        self.shared.held.load(Ordering::SeqCst).min(self.total)
    }
}

/// The balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Balloon {
    /// A balloon for a guest with this memory, and the handle that steers it.
    pub fn new(memory: &GuestMemory) -> (Self, BalloonHandle) {
        let bytes: u64 = memory.memory().iter().map(GuestMemoryRegion::len).sum();
        let shared = Arc::new(Shared::default());
        let handle = BalloonHandle {
            shared: Arc::clone(&shared),
            total: u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX),
        };
        let balloon = Self {
            shared,
            worker: None,
        };
        (balloon, handle)
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // num_pages and actual, little-endian (5.5.4); what follows belongs to features not offered.
        let [t0, t1, t2, t3] = self.shared.target.load(Ordering::SeqCst).to_le_bytes();
        let [h0, h1, h2, h3] = self.shared.held.load(Ordering::SeqCst).to_le_bytes();
        super::read_bytes(&[t0, t1, t2, t3, h0, h1, h2, h3], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual` is the driver's, and it writes it whole.
        if let (4, Ok(held)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared
                .held
                .store(u32::from_le_bytes(held), Ordering::SeqCst);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt;
        let reporting = activation.features & F_REPORTING != 0;
        let mut queues = Vec::new();
        for (queue, index) in activation.queues.into_iter().zip(0u16..) {
            // A report names whole runs of pages, megabytes each; the others carry page numbers.
            let max_bytes = if index == REPORTING {
                u32::MAX
            } else {
                MAX_PFN_BYTES
            };
            match queue {
                Some(queue) => {
                    queues.push(DeviceQueue::new(queue, index, max_bytes, interrupt.clone()));
                }
                None if index == REPORTING && !reporting => {}
                None => return Err(ActivateError::MissingQueue(index)),
            }
        }
        let handler = BalloonHandler {
            memory: activation.memory,
            queues,
        };
        self.worker = Some(Worker::spawn(Kind::Balloon, &interrupt, vec![handler])?);
        self.shared.set_interrupt(Some(interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        self.worker = None;
        self.shared.held.store(0, Ordering::SeqCst);
    }
}

struct BalloonHandler {
    memory: GuestMemory,
    queues: Vec<DeviceQueue>,
}

impl Handler for BalloonHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (queue, token) in self.queues.iter().zip(0u64..) {
            poll.add(queue.kick().as_raw_fd(), EventSet::IN, token)?;
        }
        Ok(())
    }

    fn ready(&mut self, _poll: &Poll, token: u64, _events: EventSet) -> Result<(), Fault> {
        let Ok(index) = u16::try_from(token) else {
            return Ok(());
        };
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Ok(());
        };
        drain(queue.kick());
        let memory = self.memory.memory();
        queue.serve(&memory, |queue, chain| {
            match index {
                INFLATE => inflate(&memory, &chain),
                // A page taken out of the balloon is backed again when the guest touches it.
                DEFLATE => {}
                _ => report(&memory, &chain),
            }
            Ok(queue.push_used(&memory, chain.head, 0)?)
        })
    }
}

/// Drops the pages whose numbers the driver has written; consecutive ones at once.
fn inflate(memory: &GuestMemoryMmap, chain: &Chain<'_>) {
    let mut run: Option<(u64, u64)> = None;
    let drop_run = |run: Option<(u64, u64)>| {
        if let Some((first, count)) = run {
            discard_pages(memory, first, count);
        }
    };
    // Numbers have 32 bits and there are `MAX_PFN_BYTES` of them, so that none of these sums comes near its end.
    let mut number = [0; 4];
    for offset in (0..chain.readable.len()).step_by(number.len()) {
        // A number cut short at the end is none.
        if chain.readable.read_at(offset, &mut number).is_err() {
            break;
        }
        let page = u64::from(u32::from_le_bytes(number));
        run = match run {
            Some((first, count)) if page == first.saturating_add(count) => {
                Some((first, count.saturating_add(1)))
            }
            // Linux hands out the highest page first.
            Some((first, count)) if page.saturating_add(1) == first => {
                Some((page, count.saturating_add(1)))
            }
            other => {
                drop_run(other);
                Some((page, 1))
            }
        };
    }
    drop_run(run);
}

fn discard_pages(memory: &GuestMemoryMmap, first: u64, count: u64) {
    let (start, len) = (first << PAGE_SHIFT, count << PAGE_SHIFT);
    let within =
        |len| usize::try_from(len).is_ok_and(|len| memory.check_range(GuestAddress(start), len));
    if within(len) {
        discard(memory, GuestAddress(start), len);
    } else if count > 1 {
        // One bad number does not spoil its neighbours.
        for page in first..first.saturating_add(count) {
            discard_pages(memory, page, 1);
        }
    } else {
        tracing::debug!(page = first, "balloon: page outside guest memory ignored");
    }
}

/// Drops the runs of free pages that a report's buffers are.
fn report(memory: &GuestMemoryMmap, chain: &Chain<'_>) {
    for segment in chain.writable.segments() {
        discard(memory, segment.addr, segment.slice.len() as u64);
    }
}

#[cfg(test)]
mod tests;
