//! The one shape of a device's thread: an epoll loop over kicks, a stop event and whatever else the device waits for.
//!
//! A device gives a [`Handler`]; [`Worker`] runs it on a named thread with a small stack until the worker is dropped. A handler
//! that fails ends all of its device's threads. If it was the guest that broke a queue, the device is marked `DEVICE_NEEDS_RESET` and the
//! VM goes on; if the host refused something, the VM ends and says so.
//!
//! A handler serves at most [`TURN`] chains of a queue, or a number of its own, before it lets go. So a driver that never stops asking cannot
//! keep a thread from what else it waits for, its end among it: a reset waits for a turn at most.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
#[cfg(not(feature = "fuzzing"))]
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[cfg(feature = "fuzzing")]
use self::fuzzing::{JoinHandle, start};
use super::queue::QueueError;
use super::{ActivateError, Interrupt, may_log_about_guest};
use crate::jail::seccomp::{Kind, SeccompError};
use crate::sentence;

/// Device threads call neither deep nor recursively; untouched stack costs nothing but address space.
#[cfg(not(feature = "fuzzing"))]
const STACK_SIZE: usize = 512 * 1024;

/// The stop event's token; handlers count theirs from 0.
const STOP: u64 = u64::MAX;

/// Chains of one queue that are served before whatever else has happened is looked at.
pub const TURN: usize = 64;

/// Events taken from the kernel at once.
const BATCH: usize = 64;

/// Why a device's thread ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest broke the rules of a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The thread has no filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// What a thread waits for.
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Waits for `events` on `fd` from now on; they come back with `token`.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn add(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Waits for `events` instead of what was asked before.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn modify(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Waits for `fd` no more.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// What a device does on its thread.
pub trait Handler: Send + 'static {
    /// Says what to wait for; called before the thread starts.
    ///
    /// # Errors
    /// The device is not activated.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;

    /// Prepares the thread itself; called on it, first.
    ///
    /// # Errors
    /// The thread ends.
    fn enter(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    /// Something that was waited for has happened.
    ///
    /// # Errors
    /// The thread ends, and with it the device or the VM (see the module's head).
    fn ready(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), Fault>;

    /// Called once after all events that had happened together.
    ///
    /// # Errors
    /// The thread ends, and with it the device or the VM (see the module's head).
    fn settle(&mut self, _poll: &Poll) -> Result<(), Fault> {
        Ok(())
    }
}

/// The running threads of a device. Dropping it stops them and waits until they have ended.
pub struct Worker {
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Starts one thread for each handler, all of this kind.
    ///
    /// # Errors
    /// [`ActivateError::Host`]; no thread is left running then.
    pub fn spawn<H: Handler>(
        kind: Kind,
        interrupt: &Arc<dyn Interrupt>,
        handlers: Vec<H>,
    ) -> Result<Self, ActivateError> {
        let name = kind.name();
        let failed = |source| ActivateError::Host {
            what: format!("starting the {name} thread"),
            source,
        };
        let mut worker = Self {
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?,
            threads: Vec::with_capacity(handlers.len()),
        };
        for mut handler in handlers {
            let poll = Poll {
                epoll: Epoll::new().map_err(failed)?,
            };
            poll.add(worker.stop.as_raw_fd(), EventSet::IN, STOP)
                .map_err(failed)?;
            handler.register(&poll).map_err(failed)?;
            let stop = worker.stop.try_clone().map_err(failed)?;
            let thread = start(kind, handler, poll, stop, Arc::clone(interrupt));
            worker.threads.push(thread.map_err(failed)?);
        }
        Ok(worker)
    }
}

#[cfg(not(feature = "fuzzing"))]
fn start(
    kind: Kind,
    mut handler: impl Handler,
    poll: Poll,
    stop: EventFd,
    interrupt: Arc<dyn Interrupt>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(kind.name().to_owned())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            let confined = kind.confine().map_err(Fault::Seccomp);
            if let Err(fault) = confined.and_then(|()| run(&mut handler, &poll)) {
                end(&fault, kind.name(), &stop, &*interrupt);
            }
        })
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The event is never read, so that each thread sees it. Writing 1 to a fresh eventfd cannot block.
        let _ = self.stop.write(1);
        for thread in self.threads.drain(..) {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// What follows from the end of one of a device's threads.
fn end(fault: &Fault, device: &str, stop: &EventFd, interrupt: &dyn Interrupt) {
    // The device is what stops, not this share of it. It cannot block: nobody writes often.
    let _ = stop.write(1);
    tell(fault, device, interrupt);
}

/// Tells whoever has to know that a device's thread has ended.
fn tell(fault: &Fault, device: &str, interrupt: &dyn Interrupt) {
    let error = fault as &dyn std::error::Error;
    match fault {
        Fault::Queue(_) => {
            if may_log_about_guest() {
                tracing::error!(device, error, "device stopped");
            }
            interrupt.signal_failed();
        }
        Fault::Host { .. } | Fault::Seccomp(_) => {
            tracing::error!(device, error, "device stopped");
            let cause = sentence(error);
            interrupt.host_failed(format!("the {device} device stopped: {cause}"));
        }
    }
}

#[cfg(not(feature = "fuzzing"))]
fn run(handler: &mut impl Handler, poll: &Poll) -> Result<(), Fault> {
    handler.enter()?;
    while turn(handler, poll, -1)? != Turn::Stop {}
    Ok(())
}

/// What there was in one look at the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing within the time.
    Nothing,
    /// Something, and the handler has had it.
    Done,
    /// The stop event.
    Stop,
}

/// Waits for events, at most so many milliseconds (without end: -1), and has the handler do what follows from them.
fn turn<H: Handler + ?Sized>(
    handler: &mut H,
    poll: &Poll,
    milliseconds: i32,
) -> Result<Turn, Fault> {
    let mut events = [EpollEvent::default(); BATCH];
    let count = match poll.epoll.wait(milliseconds, &mut events) {
        Ok(0) => return Ok(Turn::Nothing),
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Turn::Nothing),
        Err(source) => {
            return Err(Fault::Host {
                what: "waiting for events",
                source,
            });
        }
    };
    for event in events.iter().take(count) {
        if event.data() == STOP {
            return Ok(Turn::Stop);
        }
        let set = EventSet::from_bits_truncate(event.events());
        handler.ready(poll, event.data(), set)?;
    }
    handler.settle(poll)?;
    Ok(Turn::Done)
}

/// Takes the signals off an eventfd.
pub fn drain(event: &EventFd) {
    // EAGAIN: another thread was faster, or it was spurious.
    let _ = event.read();
}

/// Comes back to a queue after a look at everything else.
pub fn again(kick: &EventFd) {
    // EAGAIN: kicked already.
    let _ = kick.write(1);
}

#[cfg(feature = "fuzzing")]
pub mod fuzzing;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::virtio::queue::QueueError;

    /// What a device said, in the order it said it.
    struct Ear(Sender<String>);

    impl Interrupt for Ear {
        fn signal_queue(&self, _index: u16) {}
        fn signal_config(&self) {}

        fn signal_failed(&self) {
            self.0.send("needs a reset".into()).unwrap();
        }

        fn host_failed(&self, sentence: String) {
            self.0.send(sentence).unwrap();
        }
    }

    /// Fails at once.
    struct Doomed(fn() -> Fault);

    impl Handler for Doomed {
        fn register(&mut self, _poll: &Poll) -> io::Result<()> {
            Ok(())
        }

        fn enter(&mut self) -> Result<(), Fault> {
            Err((self.0)())
        }

        fn ready(&mut self, _: &Poll, _: u64, _: EventSet) -> Result<(), Fault> {
            Ok(())
        }
    }

    fn heard(fault: fn() -> Fault) -> String {
        let (said, heard) = channel();
        let interrupt: Arc<dyn Interrupt> = Arc::new(Ear(said));
        let worker = Worker::spawn(Kind::Rng, &interrupt, vec![Doomed(fault)]).unwrap();
        let first = heard.recv().unwrap();
        drop(worker);
        assert!(heard.try_recv().is_err());
        first
    }

    /// One of two threads: the first breaks, and each says when it has ended.
    struct Half {
        broken: bool,
        ended: Sender<()>,
    }

    impl Handler for Half {
        fn register(&mut self, _poll: &Poll) -> io::Result<()> {
            Ok(())
        }

        fn enter(&mut self) -> Result<(), Fault> {
            let fault = || QueueError::Lent { queue: 0 }.into();
            if self.broken { Err(fault()) } else { Ok(()) }
        }

        fn ready(&mut self, _: &Poll, _: u64, _: EventSet) -> Result<(), Fault> {
            Ok(())
        }
    }

    impl Drop for Half {
        fn drop(&mut self) {
            self.ended.send(()).unwrap();
        }
    }

    #[test]
    fn a_broken_queue_stops_all_of_its_device() {
        let (ended, ends) = channel();
        let (said, heard) = channel();
        let interrupt: Arc<dyn Interrupt> = Arc::new(Ear(said));
        let halves = [true, false].map(|broken| Half {
            broken,
            ended: ended.clone(),
        });
        let worker = Worker::spawn(Kind::Rng, &interrupt, halves.into()).unwrap();
        for _ in 0..2 {
            ends.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        drop(worker);
        assert_eq!(heard.try_recv().unwrap(), "needs a reset");
        assert!(heard.try_recv().is_err());
    }

    #[test]
    fn the_guests_faults_cost_it_the_device_and_the_hosts_the_vm() {
        let guests = || {
            Fault::Queue(QueueError::Layout {
                queue: 0,
                head: 0,
                what: "sense",
            })
        };
        assert_eq!(heard(guests), "needs a reset");
        let hosts = || Fault::Host {
            what: "taking a walk",
            source: io::Error::other("it rains"),
        };
        assert_eq!(
            heard(hosts),
            "the rng device stopped: taking a walk: it rains"
        );
    }
}
