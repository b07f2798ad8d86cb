//! The thread of a pair of queues.
//!
//! It waits for the tap only for what it could do something about: for packets while the driver has buffers for them, for room
//! while a packet of the guest waits for it. An event that nobody acts upon would come again and again.
//!
//! Where the host's kernel can carry the packets, the thread lends it both queues and waits for the rest: the control queue, the end of
//! the loan, and a driver that breaks its rings.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vm_memory::GuestAddressSpace as _;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ctrl::Ctrl;
use super::link::{Link, Path};
use super::rx::{self, Rx};
use super::tap::Tap;
use super::tx::{self, Tx};
use super::vhost::Vhost;
use crate::virtio::worker::{Fault, Handler, Poll, again, drain};
use crate::virtio::{GuestMemory, may_log_about_guest};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const CTRL_KICK: u64 = 2;
const WAKE: u64 = 3;
const TAP: u64 = 4;
const BROKEN: u64 = 5;

/// A pair of queues.
pub struct Pair {
    index: usize,
    memory: GuestMemory,
    link: Arc<Link>,
    /// Signalled when [`Link::path`] may have changed.
    wake: EventFd,
    rx: Rx,
    tx: Tx,
    ctrl: Option<Ctrl>,
    path: Option<Path>,
    /// Who has the queues on loan.
    lent: Option<Loan>,
    /// The driver has to offer buffers before a packet can be received.
    starved: bool,
    /// The tap has to become writable before a packet can be sent.
    full: bool,
    /// What is waited for, and of which queue of the tap.
    waiting: Option<(Arc<Tap>, EventSet)>,
}

/// Queues that the host's kernel works on. Dropped, it works on them no more.
struct Loan {
    vhost: Arc<Vhost>,
    /// Signalled when the driver has broken one; kept open to be waited for.
    broken: EventFd,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Err(error) = self.vhost.stop() {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "vhost-net does not let go of a queue");
        }
    }
}

impl Pair {
    /// The pair number `index`; `wake` is what the link wakes it by.
    pub fn new(
        index: usize,
        memory: GuestMemory,
        link: Arc<Link>,
        wake: EventFd,
        rx: Rx,
        tx: Tx,
        ctrl: Option<Ctrl>,
    ) -> Self {
        Self {
            index,
            memory,
            link,
            wake,
            rx,
            tx,
            ctrl,
            path: None,
            lent: None,
            starved: false,
            full: false,
            waiting: None,
        }
    }

    /// Goes by what the link says now.
    fn follow(&mut self, poll: &Poll) -> Result<(), Fault> {
        let path = self.link.path(self.index);
        if let (Some(old), Some(new)) = (&self.path, &path)
            && old.is(new)
        {
            return Ok(());
        }
        self.take_back(poll)?;
        self.path = path;
        self.lend(poll)
    }

    /// Lends the queues to vhost, if it is there for them. If it cannot work on them, this thread does.
    fn lend(&mut self, poll: &Poll) -> Result<(), Fault> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let Some(vhost) = path.vhost.clone() else {
            return Ok(());
        };
        let broken = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("making an eventfd"))?;
        poll.add(broken.as_raw_fd(), EventSet::IN, BROKEN)
            .map_err(host("waiting for vhost-net"))?;
        let queues = [self.rx.queue(), self.tx.queue()];
        let loan = Loan { vhost, broken };
        let started = loan.vhost.start(&path.tap, queues, &loan.broken);
        for queue in queues {
            poll.remove(queue.kick().as_raw_fd())
                .map_err(host("waiting for the queues no more"))?;
        }
        self.lent = Some(loan);
        let Err(error) = started else {
            return Ok(());
        };
        if may_log_about_guest() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, pair = self.index, "vhost-net is not used");
        }
        self.take_back(poll)
    }

    /// Takes the queues back from vhost, if it has them, and goes on where it has stopped.
    fn take_back(&mut self, poll: &Poll) -> Result<(), Fault> {
        let Some(loan) = self.lent.take() else {
            return Ok(());
        };
        let stopped = loan.vhost.stop().map_err(io::Error::other);
        let [rx, tx] = stopped.map_err(host("taking queues back from vhost-net"))?;
        let memory = self.memory.memory();
        self.rx.queue_mut().resume(&memory, rx)?;
        self.tx.queue_mut().resume(&memory, tx)?;
        (self.starved, self.full) = (false, false);
        // A kick since the loan began is still there to be seen.
        self.wait_for_kicks(poll)
            .map_err(host("waiting for the queues"))
    }

    fn wait_for_kicks(&self, poll: &Poll) -> io::Result<()> {
        poll.add(self.rx.queue().kick().as_raw_fd(), EventSet::IN, RX_KICK)?;
        poll.add(self.tx.queue().kick().as_raw_fd(), EventSet::IN, TX_KICK)
    }

    fn receive(&mut self) -> Result<(), Fault> {
        if self.lent.is_some() {
            return Ok(());
        }
        let Some(path) = self.path.as_mut().filter(|path| path.receives) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let pause = self
            .rx
            .run(&memory, &path.tap, &self.link.received_dropped)?;
        self.starved = pause == rx::Pause::Starved;
        if pause == rx::Pause::Gone {
            // If it is for want of use, the link wakes this thread when it is used again.
            tracing::debug!(pair = self.index, "nothing more comes from the tap");
            path.receives = false;
        }
        // After a turn the tap is readable still, and the event comes again.
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), Fault> {
        if self.lent.is_some() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let tap = self.path.as_ref().map(|path| &*path.tap);
        let pause = self.tx.run(&memory, tap, &self.link.sent_dropped)?;
        self.full = pause == tx::Pause::Full;
        if pause == tx::Pause::Turn {
            again(self.tx.queue().kick());
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), Fault> {
        if let Some(ctrl) = &mut self.ctrl
            && ctrl.run(&self.memory.memory())?
        {
            again(ctrl.queue().kick());
        }
        Ok(())
    }

    /// Waits for what is of use, and for nothing else.
    fn wait(&mut self, poll: &Poll) -> Result<(), Fault> {
        let here = self.path.as_ref().filter(|_| self.lent.is_none());
        let wanted = here.and_then(|path| {
            let mut events = EventSet::empty();
            events.set(EventSet::IN, path.receives && !self.starved);
            events.set(EventSet::OUT, self.full);
            // Errors are told even to those who wait for nothing.
            (!events.is_empty()).then(|| (Arc::clone(&path.tap), events))
        });
        let result = match (&self.waiting, &wanted) {
            (Some((old, was)), Some((new, is))) if Arc::ptr_eq(old, new) => {
                if was == is {
                    return Ok(());
                }
                poll.modify(new.as_raw_fd(), *is, TAP)
            }
            (old, new) => {
                let removed = old
                    .as_ref()
                    .map_or(Ok(()), |(tap, _)| poll.remove(tap.as_raw_fd()));
                removed.and_then(|()| {
                    new.as_ref()
                        .map_or(Ok(()), |(tap, is)| poll.add(tap.as_raw_fd(), *is, TAP))
                })
            }
        };
        self.waiting = wanted;
        result.map_err(host("waiting for the tap"))
    }
}

impl Handler for Pair {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        self.wait_for_kicks(poll)?;
        if let Some(ctrl) = &self.ctrl {
            poll.add(ctrl.queue().kick().as_raw_fd(), EventSet::IN, CTRL_KICK)?;
        }
        poll.add(self.wake.as_raw_fd(), EventSet::IN, WAKE)
    }

    fn ready(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), Fault> {
        match token {
            RX_KICK => {
                drain(self.rx.queue().kick());
                if self.starved {
                    self.receive()?;
                }
            }
            TX_KICK => {
                drain(self.tx.queue().kick());
                if !self.full {
                    self.transmit()?;
                }
            }
            CTRL_KICK => {
                if let Some(ctrl) = &self.ctrl {
                    drain(ctrl.queue().kick());
                }
                self.control()?;
            }
            WAKE => {
                drain(&self.wake);
                self.follow(poll)?;
                self.receive()?;
                self.transmit()?;
            }
            TAP => {
                // An error is found by trying.
                let error = EventSet::ERROR | EventSet::HANG_UP;
                if events.intersects(EventSet::IN | error) && !self.starved {
                    self.receive()?;
                }
                if events.intersects(EventSet::OUT | error) && self.full {
                    self.transmit()?;
                }
            }
            BROKEN if self.lent.is_some() => return Err(self.rx.queue().broken().into()),
            _ => {}
        }
        self.wait(poll)
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Fault {
    move |source| Fault::Host { what, source }
}
