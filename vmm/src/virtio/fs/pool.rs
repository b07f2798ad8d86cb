//! The threads that answer FUSE requests.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::server::Server;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::files::Files;
use super::memory::{BUFFER_LEN, Scratch};
use super::request::{self, FIXED_LEN, HEADER_LEN, REPLY_BYTES, REPLY_LEN};
use crate::virtio::queue::{Chain, DeviceQueue, Short};
use crate::virtio::worker::{Fault, Handler, Poll, TURN, again, drain};
use crate::virtio::{ActivateError, Activation, may_log_about_guest};

/// Threads of one device. An idle one costs about 20 KiB; more than a few requests at once only wait for the same disk.
const THREADS: usize = 4;

/// Largest request: `max_write` of 1 MiB (virtiofsd's choice), headers, and room for a reply as large.
const MAX_BYTES: u32 = 4 << 20;

/// What the threads share.
pub struct Shared {
    server: Server<Files>,
    memory: GuestMemoryMmap,
    queues: Vec<FsQueue>,
}

struct FsQueue {
    queue: Mutex<DeviceQueue>,
    kick: EventFd,
}

impl FsQueue {
    fn lock(&self) -> MutexGuard<'_, DeviceQueue> {
        // Whoever panicked while holding it has left the indices consistent: they are written one by one.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Takes over the queues of an activation.
    ///
    /// # Errors
    /// [`ActivateError`] when one is missing or the host refuses.
    pub fn new(server: Server<Files>, activation: Activation) -> Result<Self, ActivateError> {
        let memory = GuestMemoryMmap::clone(&activation.memory.memory());
        let mut queues = Vec::new();
        for (queue, index) in activation.queues.into_iter().zip(0u16..) {
            let queue = queue.ok_or(ActivateError::MissingQueue(index))?;
            let host = ActivateError::host("taking over the file server's queues");
            let kick = queue.kick.try_clone().map_err(host)?;
            let interrupt = Arc::clone(&activation.interrupt);
            let queue = Mutex::new(DeviceQueue::new(queue, index, MAX_BYTES, interrupt));
            queues.push(FsQueue { queue, kick });
        }
        Ok(Self {
            server,
            memory,
            queues,
        })
    }

    /// Answers one request; the number of bytes written to its writable part.
    fn answer(
        &self,
        scratch: &mut Scratch,
        copy: &mut [u8],
        chain: &Chain<'_>,
    ) -> Result<u32, AnswerError> {
        let request = copy_out(chain, copy)?;
        // Nothing is done for which there could be no answer, and virtiofsd counts on room for its header.
        if request::has_reply(request) && chain.writable.len() < REPLY_LEN {
            return Err(Short { end: REPLY_LEN }.into());
        }
        if let Err(errno) = request::check(request) {
            let reply = request::refusal(request, errno);
            chain.writable.write_at(0, &reply)?;
            return Ok(REPLY_BYTES);
        }
        let (view, prepared) = scratch.prepare(chain, request)?;
        let reader = Reader::new(view, prepared.clone())?;
        let writer = Writer::new(view, prepared)?;
        let written = self
            .server
            .handle_message(reader, writer, None::<&mut ()>)?;
        // Cannot be more than the chain's length, which is a u32.
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }
}

/// Copies what is checked of a request out of the guest's reach, into `copy`.
fn copy_out<'a>(chain: &Chain<'_>, copy: &'a mut [u8]) -> Result<&'a [u8], AnswerError> {
    let len = chain.readable.len();
    let header = copy
        .get_mut(..HEADER_LEN)
        .ok_or(AnswerError::TooLong(HEADER_LEN))?;
    chain.readable.read_at(0, header)?;
    let wanted = if request::has_names(header) {
        len
    } else {
        len.min(FIXED_LEN)
    };
    let request = copy.get_mut(..wanted).ok_or(AnswerError::TooLong(wanted))?;
    chain.readable.read_at(0, request)?;
    Ok(request)
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
enum AnswerError {
    #[error("a request or its reply does not fit its buffers")]
    Short(#[from] Short),
    #[error("a request with names has {0} bytes")]
    TooLong(usize),
    #[error("preparing a request's buffers")]
    Scratch(#[from] io::Error),
    #[error("reading a request's buffers")]
    Buffers(#[from] virtiofsd::descriptor_utils::Error),
    #[error("the guest sent a request that is no FUSE message")]
    Message(#[from] virtiofsd::Error),
}

/// The threads of a device.
///
/// # Errors
/// When a thread's private pages cannot be mapped.
pub fn threads(shared: &Arc<Shared>) -> io::Result<Vec<FsThread>> {
    (0..THREADS)
        .map(|_| {
            Ok(FsThread {
                shared: Arc::clone(shared),
                scratch: Scratch::new(&shared.memory)?,
                copy: vec![0; BUFFER_LEN],
            })
        })
        .collect()
}

/// One thread.
pub struct FsThread {
    shared: Arc<Shared>,
    scratch: Scratch,
    copy: Vec<u8>,
}

impl Handler for FsThread {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (queue, token) in self.shared.queues.iter().zip(0u64..) {
            // Every thread waits for every queue; a kick wakes one that is idle.
            let events = EventSet::IN | EventSet::EXCLUSIVE;
            poll.add(queue.kick.as_raw_fd(), events, token)?;
        }
        Ok(())
    }

    fn enter(&mut self) -> Result<(), Fault> {
        // virtiofsd changes directory around xattr calls and the umask around creations: each thread needs its own.
        own_directory_and_umask().map_err(|source| Fault::Host {
            what: "giving a file server thread its own working directory",
            source,
        })
    }

    fn ready(&mut self, _poll: &Poll, token: u64, _events: EventSet) -> Result<(), Fault> {
        let shared = Arc::clone(&self.shared);
        let Some(fs_queue) = usize::try_from(token)
            .ok()
            .and_then(|index| shared.queues.get(index))
        else {
            return Ok(());
        };
        let memory = &shared.memory;
        drain(&fs_queue.kick);
        let mut queue = fs_queue.lock();
        for _ in 0..TURN {
            let Some(chain) = queue.pop(memory)? else {
                if queue.rearm(memory)? {
                    continue;
                }
                return Ok(());
            };
            // The next request must not wait for this one.
            let more = queue.rearm(memory)?;
            drop(queue);
            if more {
                again(&fs_queue.kick);
            }
            let written = shared
                .answer(&mut self.scratch, &mut self.copy, &chain)
                .unwrap_or_else(|error| {
                    if may_log_about_guest() {
                        tracing::warn!(error = &error as &dyn std::error::Error, "request dropped");
                    }
                    0
                });
            queue = fs_queue.lock();
            queue.push_used(memory, chain.head, written)?;
            queue.notify(memory)?;
        }
        // Any of the threads may go on.
        again(&fs_queue.kick);
        Ok(())
    }
}

#[allow(unsafe_code, reason = "unshare(2) and umask(2)")]
fn own_directory_and_umask() -> io::Result<()> {
    // SAFETY: neither call touches memory.
    unsafe {
        if libc::unshare(libc::CLONE_FS) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The guest's kernel has applied its process's umask already.
        libc::umask(0);
    }
    Ok(())
}
