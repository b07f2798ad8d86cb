//! One connection: the socket, what it is in, its credit, and what is owed to the guest.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, sendmsg};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::credit::Credit;
use super::packet::{Header, Op};
use super::socket;
use super::state::{Event, FromGuest, ShutHost, State, Tell};
use crate::virtio::queue::Buffers;

/// What names a connection while the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

/// Most receive buffers filled by one read: 64 KiB with Linux's.
const MAX_BURST: usize = 18;

/// Whether a RST is owed to the guest; the connection itself may be over by then.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing more to do.
    Fine,
    /// The guest must be told RST.
    Reset,
}

impl Outcome {
    fn or(self, other: Self) -> Self {
        if self == Self::Fine { other } else { self }
    }
}

/// Packets without payload that the guest must get, in this order.
#[derive(Debug, Default)]
struct Outbox {
    open: Option<Op>,
    credit: bool,
    shutdown: u32,
}

/// One connection.
pub struct Connection {
    key: Key,
    socket: UnixStream,
    state: State,
    credit: Credit,
    /// From the guest, not yet taken by the socket; credit bounds it.
    backlog: VecDeque<u8>,
    outbox: Outbox,
    /// The socket may have bytes, or its end, to read.
    readable: bool,
    /// The socket's other end sends no more; its last bytes may be unread.
    ending: bool,
    /// The socket's other end is closed.
    hung_up: bool,
    /// How many receive buffers the next read shall have.
    burst: usize,
    /// In the muxer's list of those that have something for the guest.
    pub queued: bool,
}

impl Connection {
    /// The guest dialled, and the shim has the other end of `socket`.
    pub fn from_guest(key: Key, socket: OwnedFd) -> Self {
        let state = State::Open {
            from_guest: FromGuest::Flowing,
            to_guest: true,
        };
        Self::new(key, socket, state, Op::Response)
    }

    /// The shim dials through `socket`.
    pub fn to_guest(key: Key, socket: OwnedFd) -> Self {
        Self::new(key, socket, State::Requested, Op::Request)
    }

    fn new(key: Key, socket: OwnedFd, state: State, open: Op) -> Self {
        Self {
            key,
            socket: UnixStream::from(socket),
            state,
            credit: Credit::default(),
            backlog: VecDeque::new(),
            outbox: Outbox {
                open: Some(open),
                ..Outbox::default()
            },
            readable: false,
            ending: false,
            hung_up: false,
            burst: 1,
            queued: false,
        }
    }

    /// Its name.
    pub fn key(&self) -> Key {
        self.key
    }

    /// What it is in.
    pub fn state(&self) -> State {
        self.state
    }

    /// For waiting.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What to wait for: edges, so that neither an end nor a reader that is slow wakes anyone twice.
    pub fn interest(&self) -> EventSet {
        let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.backlog.is_empty() {
            always
        } else {
            always | EventSet::OUT
        }
    }

    /// True if there is something for the guest, and room for it.
    pub fn has_work(&self) -> bool {
        self.next_control().is_some() || self.room() > 0
    }

    /// Bytes that may be read from the socket for the guest now.
    pub fn room(&self) -> usize {
        if self.readable && self.state.may_send_to_guest() && self.outbox.open.is_none() {
            usize::try_from(self.credit.available()).unwrap_or(usize::MAX)
        } else {
            0
        }
    }

    /// How many receive buffers the next read shall have: one, as long as reads do not fill them.
    pub fn burst(&self) -> usize {
        self.burst
    }

    /// The next packet without payload that the guest must get.
    pub fn next_control(&self) -> Option<(Op, u32)> {
        match &self.outbox {
            Outbox { open: Some(op), .. } => Some((*op, 0)),
            Outbox { credit: true, .. } => Some((Op::CreditUpdate, 0)),
            Outbox { shutdown: 0, .. } => None,
            Outbox { shutdown, .. } => Some((Op::Shutdown, *shutdown)),
        }
    }

    /// That packet has been sent.
    pub fn control_sent(&mut self) {
        if self.outbox.open.take().is_none() {
            if self.outbox.credit {
                self.outbox.credit = false;
            } else {
                self.outbox.shutdown = 0;
            }
        }
        // Each packet carries credit.
        self.outbox.credit = false;
    }

    /// Header of a packet to the guest; what the guest hears about credit is counted as told.
    pub fn header(&mut self, guest_cid: u64, op: Op, flags: u32, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        Header {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host,
            dst_port: self.key.guest,
            len,
            kind: super::packet::TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Takes note of the credit that a packet from the guest carries.
    pub fn hear(&mut self, header: &Header) {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
    }

    /// A packet from the guest.
    pub fn packet(&mut self, header: &Header, payload: &Buffers<'_>, offset: usize) -> Outcome {
        self.hear(header);
        match header.op {
            Op::Response if self.state == State::Requested => self.apply(Event::Accepted),
            Op::Reset => self.apply(Event::GuestReset),
            Op::Shutdown => self.apply(Event::GuestShutdown {
                sends: header.flags & super::packet::SHUTDOWN_SEND != 0,
                receives: header.flags & super::packet::SHUTDOWN_RECEIVE != 0,
            }),
            Op::Data => self.data(payload, offset, header.len),
            Op::CreditUpdate => Outcome::Fine,
            Op::CreditRequest => {
                self.outbox.credit = true;
                Outcome::Fine
            }
            Op::Request | Op::Response | Op::Unknown(_) => self.apply(Event::Broken),
        }
    }

    fn data(&mut self, payload: &Buffers<'_>, offset: usize, len: u32) -> Outcome {
        match self.state {
            State::Open {
                from_guest: FromGuest::Flowing,
                ..
            } => {}
            // Sent before the guest heard that nobody listens.
            State::Open {
                from_guest: FromGuest::Ended,
                ..
            }
            | State::Closing {
                from_guest: FromGuest::Ended,
            } => return Outcome::Fine,
            _ => return self.apply(Event::Broken),
        }
        if self.credit.receive(len).is_err() {
            return self.apply(Event::Broken);
        }
        let mut slices: Vec<_> = payload.slices(offset, len as usize).collect();
        let mut outcome = Outcome::Fine;
        if self.backlog.is_empty() {
            outcome = self.send_now(&mut slices);
        }
        if self.is_heard() {
            for slice in slices {
                let mut bytes = vec![0; slice.len()];
                slice.copy_to(&mut bytes);
                self.backlog.extend(bytes);
            }
        }
        outcome
    }

    /// Sends what the socket takes, and leaves the rest in `slices`.
    fn send_now(&mut self, slices: &mut Vec<VolatileSlice<'_>>) -> Outcome {
        while !slices.is_empty() {
            match socket::send(self.socket(), slices) {
                Ok(count) => {
                    self.forwarded(count);
                    advance(slices, count);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => break,
                    _ => {
                        slices.clear();
                        return self.apply(Event::HostDeaf);
                    }
                },
            }
        }
        Outcome::Fine
    }

    /// Sends what is buffered, as far as the socket takes it.
    fn flush(&mut self) -> Outcome {
        while !self.backlog.is_empty() {
            let (first, second) = self.backlog.as_slices();
            let iov = [IoSlice::new(first), IoSlice::new(second)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.socket.as_raw_fd(), &iov, &[], flags, None) {
                Ok(count) => {
                    self.backlog.drain(..count.min(self.backlog.len()));
                    self.forwarded(count);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Outcome::Fine,
                Err(_) => return self.apply(Event::HostDeaf),
            }
        }
        // Its memory goes back too: most connections need it once or never.
        self.backlog = VecDeque::new();
        self.apply(Event::Drained)
    }

    fn forwarded(&mut self, count: usize) {
        // Bounded by the credit of 256 KiB.
        self.credit
            .forward(u32::try_from(count).unwrap_or(u32::MAX));
        // Only a guest that still sends wants to know, and one that has forgotten the connection would answer RST.
        if self.credit.is_stale() && self.is_flowing() {
            self.outbox.credit = true;
        }
    }

    /// True while the guest may send.
    fn is_flowing(&self) -> bool {
        matches!(
            self.state,
            State::Open {
                from_guest: FromGuest::Flowing,
                ..
            }
        )
    }

    /// True while bytes from the guest are of use to the host.
    fn is_heard(&self) -> bool {
        !matches!(
            self.state,
            State::Open {
                from_guest: FromGuest::Ended,
                ..
            } | State::Closing {
                from_guest: FromGuest::Ended
            } | State::Closed
        )
    }

    /// Something happened to the socket.
    pub fn socket_event(&mut self, events: EventSet) -> Outcome {
        let end = EventSet::HANG_UP | EventSet::ERROR;
        self.hung_up |= events.intersects(end);
        self.ending |= events.intersects(end | EventSet::READ_HANG_UP);
        self.readable |= self.ending || events.contains(EventSet::IN);
        let mut outcome = Outcome::Fine;
        if events.intersects(EventSet::OUT | end) && !self.backlog.is_empty() {
            outcome = self.flush();
        }
        outcome.or(self.settle())
    }

    /// Reads into `slices`, in order, what the host has sent; the number of bytes, 0 for none now.
    pub fn read(&mut self, slices: &[VolatileSlice<'_>]) -> (usize, Outcome) {
        let wanted: usize = slices.iter().map(VolatileSlice::len).sum();
        match socket::receive(self.socket(), slices) {
            Ok(0) => {
                self.readable = false;
                let event = if self.hung_up {
                    Event::HostGone
                } else {
                    Event::HostEnded
                };
                (0, self.apply(event))
            }
            Ok(count) => {
                self.credit.send(u32::try_from(count).unwrap_or(u32::MAX));
                self.outbox.credit = false;
                if count >= wanted {
                    self.burst = self.burst.saturating_mul(2).min(MAX_BURST);
                } else {
                    // A short read has emptied the socket (epoll(7)); only its end may be left to read.
                    self.burst = 1;
                    self.readable = self.ending;
                }
                (count, Outcome::Fine)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => (0, Outcome::Fine),
                io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    (0, Outcome::Fine)
                }
                _ => {
                    self.readable = false;
                    self.hung_up = true;
                    (0, self.apply(Event::HostGone))
                }
            },
        }
    }

    /// Takes one event through the state machine, and what follows from it at once.
    pub fn apply(&mut self, event: Event) -> Outcome {
        let outcome = self.step(event);
        outcome.or(self.settle())
    }

    fn settle(&mut self) -> Outcome {
        let mut outcome = Outcome::Fine;
        if self.hung_up && !self.state.may_send_to_guest() && self.state != State::Requested {
            outcome = outcome.or(self.step(Event::HostGone));
        }
        if !self.is_heard() {
            self.backlog = VecDeque::new();
        }
        if self.backlog.is_empty() {
            outcome = outcome.or(self.step(Event::Drained));
        }
        outcome
    }

    fn step(&mut self, event: Event) -> Outcome {
        let (state, actions) = self.state.next(event);
        self.state = state;
        if let Some(shut) = actions.shut {
            let how = match shut {
                ShutHost::Reading => Shutdown::Read,
                ShutHost::Writing => Shutdown::Write,
            };
            // It fails if the other end is gone, which is reported as a hang-up.
            let _ = self.socket.shutdown(how);
        }
        if !state.is_named() {
            self.outbox = Outbox::default();
        }
        match actions.tell {
            Some(Tell::Shutdown(flags)) => {
                self.outbox.shutdown |= flags;
                Outcome::Fine
            }
            Some(Tell::Reset) => Outcome::Reset,
            None => Outcome::Fine,
        }
    }
}

/// Cuts `count` bytes off the front.
fn advance(slices: &mut Vec<VolatileSlice<'_>>, mut count: usize) {
    let whole = slices
        .iter()
        .take_while(|slice| {
            let fits = slice.len() <= count;
            if fits {
                count = count.saturating_sub(slice.len());
            }
            fits
        })
        .count();
    slices.drain(..whole);
    if let Some(first) = slices.first_mut()
        && let Ok(rest) = first.offset(count)
    {
        *first = rest;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use nix::sys::socket::{setsockopt, sockopt};

    use super::super::credit::BUFFER;
    use super::*;

    /// What is still on its way to the host after the guest's RST earns no credit: the guest has forgotten the connection.
    #[test]
    fn nothing_is_said_after_a_reset() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // So little that draining takes many steps.
        setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
        let key = Key { host: 1, guest: 2 };
        let mut connection = Connection::from_guest(key, ours.into());
        connection.control_sent();
        connection.credit.receive(BUFFER).unwrap();
        connection.backlog.extend(vec![7; BUFFER as usize]);
        assert_eq!(connection.apply(Event::GuestReset), Outcome::Fine);
        let (mut steps, mut taken) = (0, 0);
        let mut buffer = vec![0; 64 * 1024];
        while connection.state() != State::Closed {
            assert_eq!(connection.state(), State::Draining);
            assert_eq!(connection.socket_event(EventSet::OUT), Outcome::Fine);
            assert!(!connection.has_work());
            taken += theirs.read(&mut buffer).unwrap();
            steps += 1;
        }
        drop(connection);
        taken += theirs.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(taken, BUFFER as usize);
        assert!(steps > 8, "{steps}");
    }
}
