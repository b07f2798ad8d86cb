//! All connections of a guest, between its queues and their sockets, on one thread.
//!
//! A connection with something for the guest stands in `ready`; it is served in turn, a burst at a time, as long as the
//! guest offers receive buffers. RSTs owed to the guest for what is no connection any more wait in `resets`; when too many do, no
//! packet is taken from the guest until it has taken some. So nothing here grows with what the guest
//! does, but the connections themselves, which are counted.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::bridge::{Bridge, Incoming};
use super::connection::{Connection, Key, Outcome};
use super::packet::{HEADER_BYTES, HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use super::silent::Silent;
use super::state::{Event, State};
use crate::virtio::queue::{Chain, DeviceQueue};
use crate::virtio::worker::{Fault, Handler, Poll, again, drain};
use crate::virtio::{ActivateError, Activation, GuestMemory, may_log_about_guest};

/// Most connections at once; with their buffers full they take 256 MiB, which takes a hostile guest and readers on the host that
/// have all stopped. Ordinarily their buffers are empty.
const MAX_CONNECTIONS: usize = 1024;

/// Most RSTs that wait for receive buffers.
const MAX_RESETS: usize = 256;

/// Packets taken from the guest before connections are served again.
const TRANSMIT_TURN: usize = 256;

/// RSTs sent, and connections served, before packets are taken from the guest again.
const RECEIVE_TURNS: usize = 256;

/// Bytes read from one socket before the next connection has its turn.
const RECEIVE_TURN: usize = 64 * 1024;

/// Largest chain: payload and header, and what a driver may want to leave unused of a receive buffer.
const MAX_CHAIN: u32 = 2 * MAX_PAYLOAD;

/// First host port for connections that the host dials: well above those that mean something.
const FIRST_HOST_PORT: u32 = 1 << 30;

const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;
const TOKEN_BRIDGE: u64 = 2;
/// Tokens from here on are connections.
const FIRST_CONNECTION: u64 = 16;

/// Why packets from the guest are no longer taken for now.
#[derive(PartialEq, Eq)]
enum Transmit {
    /// There are none.
    Done,
    /// Others must have their turn.
    Turn,
    /// Too many RSTs are owed.
    Owing,
}

/// See the module's head.
pub struct Muxer {
    guest_cid: u64,
    memory: GuestMemory,
    rx: DeviceQueue,
    tx: DeviceQueue,
    /// The guest's end of the event queue, on which nothing is ever said.
    _events: DeviceQueue,
    /// Gone when the shim is.
    bridge: Option<Bridge>,
    connections: HashMap<u64, Connection>,
    names: HashMap<Key, u64>,
    silent: Silent,
    ready: VecDeque<u64>,
    resets: VecDeque<(Key, u16)>,
    next_id: u64,
    next_port: u32,
}

impl Muxer {
    /// Takes over an activation's queues.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`].
    pub fn new(
        guest_cid: u64,
        bridge: OwnedFd,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let interrupt = activation.interrupt;
        let mut queues = activation.queues.into_iter();
        let mut take = |index| {
            let queue = queues
                .next()
                .flatten()
                .ok_or(ActivateError::MissingQueue(index))?;
            Ok(DeviceQueue::new(queue, index, MAX_CHAIN, interrupt.clone()))
        };
        Ok(Self {
            guest_cid,
            memory: activation.memory,
            rx: take(0)?,
            tx: take(1)?,
            _events: take(2)?,
            bridge: Some(Bridge::new(bridge)),
            connections: HashMap::new(),
            names: HashMap::new(),
            silent: Silent::default(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: FIRST_CONNECTION,
            next_port: FIRST_HOST_PORT,
        })
    }

    // --- from the guest ---

    fn transmit(&mut self, memory: &GuestMemoryMmap, poll: &Poll) -> Result<Transmit, Fault> {
        let mut turn = 0..TRANSMIT_TURN;
        let result = loop {
            if self.resets.len() >= MAX_RESETS {
                break Transmit::Owing;
            }
            if turn.is_empty() {
                break Transmit::Turn;
            }
            match self.tx.pop(memory)? {
                Some(chain) => {
                    self.packet(&chain, poll)?;
                    self.tx.push_used(memory, chain.head, 0)?;
                    turn.next();
                }
                None if self.tx.rearm(memory)? => {}
                None => break Transmit::Done,
            }
        };
        self.tx.notify(memory)?;
        Ok(result)
    }

    fn packet(&mut self, chain: &Chain<'_>, poll: &Poll) -> Result<(), Fault> {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read_at(0, &mut bytes).is_err() {
            return Err(self.tx.layout(chain.head, "a packet's header").into());
        }
        let header = Header::decode(&bytes);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            tracing::debug!(?header, "vsock packet from or to nobody dropped");
            return Ok(());
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let id = self.names.get(&key).copied();
        let payload = chain.readable.len().saturating_sub(HEADER_LEN);
        let complete = payload >= header.len as usize;
        let sound = header.kind == TYPE_STREAM && complete && header.len <= MAX_PAYLOAD;
        match (header.op, id) {
            (Op::Reset, None) => {}
            (Op::Request, None) if sound => self.dial_from_guest(key, &header, poll),
            (_, None) => self.resets.push_back((key, header.kind)),
            (_, Some(id)) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    let had_backlog = connection.interest();
                    let outcome = if sound {
                        connection.packet(&header, &chain.readable, HEADER_LEN)
                    } else {
                        connection.apply(Event::Broken)
                    };
                    if header.op == Op::Data && header.len > 0 {
                        self.silent.forget(id);
                    }
                    self.after(id, outcome, had_backlog, poll);
                }
            }
        }
        Ok(())
    }

    /// Ends a connection that has had its time to say something.
    fn reset(&mut self, id: u64, poll: &Poll) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let interest = connection.interest();
            let outcome = connection.apply(Event::Broken);
            self.after(id, outcome, interest, poll);
        }
    }

    fn dial_from_guest(&mut self, key: Key, header: &Header, poll: &Poll) {
        if self.connections.len() >= MAX_CONNECTIONS
            && let Some(oldest) = self.silent.oldest()
        {
            self.reset(oldest, poll);
        }
        let offer = match &self.bridge {
            Some(bridge) if self.connections.len() < MAX_CONNECTIONS => bridge.offer(key.host),
            Some(_) => Err(io::Error::other("too many connections")),
            None => Err(io::Error::other("the shim is gone")),
        };
        let opened = offer.and_then(|socket| {
            let mut connection = Connection::from_guest(key, socket);
            // The dial carries the guest's credit.
            connection.hear(header);
            self.insert(connection, poll)
        });
        match opened {
            Ok(id) => {
                if let Some(oldest) = self.silent.opened(key.host, id) {
                    self.reset(oldest, poll);
                }
            }
            Err(error) => {
                if may_log_about_guest() {
                    tracing::warn!(port = key.host, %error, "vsock connection from the guest refused");
                }
                self.resets.push_back((key, TYPE_STREAM));
            }
        }
    }

    // --- from the host ---

    fn dials_from_host(&mut self, poll: &Poll) {
        while let Some(bridge) = &self.bridge {
            match bridge.take() {
                Ok(Incoming::Dial { port, socket }) => self.dial_from_host(port, socket, poll),
                Ok(Incoming::Noise) => tracing::warn!("malformed packet on the vsock bridge"),
                Ok(Incoming::Nothing) => return,
                Ok(Incoming::End) => self.drop_bridge(poll),
                Err(error) => {
                    tracing::warn!(%error, "the vsock bridge failed");
                    self.drop_bridge(poll);
                }
            }
        }
    }

    fn drop_bridge(&mut self, poll: &Poll) {
        if let Some(bridge) = self.bridge.take() {
            // Closing would not do: the device holds a duplicate for its next activation.
            let _ = poll.remove(bridge.as_fd().as_raw_fd());
        }
    }

    /// A dial that cannot be made is dropped: its socket closes, which the shim sees.
    fn dial_from_host(&mut self, guest: u32, socket: OwnedFd, poll: &Poll) {
        if self.connections.len() >= MAX_CONNECTIONS {
            tracing::warn!(
                port = guest,
                "vsock connection to the guest refused: too many"
            );
            return;
        }
        // As many ports are free as there are more ports than connections.
        let mut key = Key {
            host: self.next_port,
            guest,
        };
        while self.names.contains_key(&key) {
            key.host = key.host.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        self.next_port = key.host.wrapping_add(1).max(FIRST_HOST_PORT);
        if let Err(error) = self.insert(Connection::to_guest(key, socket), poll) {
            tracing::warn!(port = guest, %error, "vsock connection to the guest refused");
        }
    }

    // --- to the guest ---

    /// Serves connections until there is nothing to say or no buffer to say it in; true if others must have their turn first.
    fn receive(&mut self, memory: &GuestMemoryMmap, poll: &Poll) -> Result<bool, Fault> {
        let mut more = true;
        for _ in 0..RECEIVE_TURNS {
            let served = if let Some((key, kind)) = self.resets.front().copied() {
                let served = self.send_reset(memory, key, kind)?;
                if served {
                    self.resets.pop_front();
                }
                served
            } else if let Some(id) = self.ready.pop_front() {
                let served = self.serve(memory, id, poll)?;
                if served {
                    self.requeue(id);
                } else {
                    self.ready.push_front(id);
                }
                served
            } else {
                more = false;
                break;
            };
            if !served && !self.rx.rearm(memory)? {
                more = false;
                break;
            }
        }
        self.rx.notify(memory)?;
        Ok(more)
    }

    fn send_reset(&mut self, memory: &GuestMemoryMmap, key: Key, kind: u16) -> Result<bool, Fault> {
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host,
            dst_port: key.guest,
            len: 0,
            kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        };
        match self.rx.pop(memory)? {
            Some(chain) => {
                put(&mut self.rx, memory, &chain, &header)?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Gives one connection its turn; false when the guest has no buffers left.
    fn serve(&mut self, memory: &GuestMemoryMmap, id: u64, poll: &Poll) -> Result<bool, Fault> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(true);
        };
        while let Some((op, flags)) = connection.next_control() {
            let Some(chain) = self.rx.pop(memory)? else {
                return Ok(false);
            };
            let header = connection.header(self.guest_cid, op, flags, 0);
            put(&mut self.rx, memory, &chain, &header)?;
            connection.control_sent();
        }
        let mut left = RECEIVE_TURN;
        while connection.room() > 0 && left > 0 {
            let room = connection.room().min(left);
            let chains = take_chains(&mut self.rx, memory, connection.burst(), room)?;
            if chains.is_empty() {
                return Ok(false);
            }
            let mut budget = room;
            let mut slices = Vec::new();
            for (chain, capacity) in &chains {
                let here = budget.min(*capacity);
                slices.extend(chain.writable.slices(HEADER_LEN, here));
                budget = budget.saturating_sub(here);
            }
            let before = connection.interest();
            let (count, outcome) = connection.read(&slices);
            let mut rest = count;
            let mut unused = 0u16;
            for (chain, capacity) in &chains {
                let here = rest.min(*capacity);
                rest = rest.saturating_sub(here);
                match u32::try_from(here) {
                    Ok(len) if len > 0 => {
                        let header = connection.header(self.guest_cid, Op::Data, 0, len);
                        put(&mut self.rx, memory, chain, &header)?;
                    }
                    _ => unused = unused.saturating_add(1),
                }
            }
            self.rx.unpop(unused);
            left = left.saturating_sub(count);
            if count == 0 {
                self.after(id, outcome, before, poll);
                break;
            }
        }
        Ok(true)
    }

    // --- bookkeeping ---

    fn insert(&mut self, connection: Connection, poll: &Poll) -> io::Result<u64> {
        let id = self.next_id;
        poll.add(connection.fd(), connection.interest(), id)?;
        // There is no end to 64 bits.
        self.next_id = self.next_id.wrapping_add(1);
        self.names.insert(connection.key(), id);
        self.connections.insert(id, connection);
        self.requeue(id);
        Ok(id)
    }

    /// Puts the connection in line if it has something for the guest.
    fn requeue(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.queued = connection.has_work();
            if connection.queued {
                self.ready.push_back(id);
            }
        }
    }

    /// What follows from something that happened to a connection: a RST, another interest in its socket, its end.
    fn after(&mut self, id: u64, outcome: Outcome, interest: EventSet, poll: &Poll) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let key = connection.key();
        if outcome == Outcome::Reset {
            self.resets.push_back((key, TYPE_STREAM));
        }
        if !connection.state().is_named() && self.names.get(&key) == Some(&id) {
            self.names.remove(&key);
        }
        if connection.state() == State::Closed {
            // A guest without receive buffers would else make the line longer with every connection.
            if connection.queued {
                self.ready.retain(|ready| *ready != id);
            }
            self.silent.forget(id);
            // Closing the socket takes it out of the epoll set.
            self.connections.remove(&id);
            return;
        }
        let now = connection.interest();
        if now != interest
            && let Err(error) = poll.modify(connection.fd(), now, id)
        {
            tracing::error!(%error, "waiting for a vsock connection's socket");
        }
        if !connection.queued {
            self.requeue(id);
        }
    }

    fn socket_event(&mut self, id: u64, events: EventSet, poll: &Poll) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let before = connection.interest();
            let outcome = connection.socket_event(events);
            self.after(id, outcome, before, poll);
        }
    }
}

/// Takes receive buffers for `room` bytes, at most `count`, each with the bytes it holds behind a header.
fn take_chains<'m>(
    rx: &mut DeviceQueue,
    memory: &'m GuestMemoryMmap,
    count: usize,
    room: usize,
) -> Result<Vec<(Chain<'m>, usize)>, Fault> {
    let mut chains = Vec::with_capacity(count);
    let mut total = 0;
    while chains.len() < count && total < room {
        let Some(chain) = rx.pop(memory)? else {
            break;
        };
        let capacity = match chain.writable.len().checked_sub(HEADER_LEN) {
            Some(capacity) if capacity > 0 => capacity,
            _ => return Err(rx.layout(chain.head, "room for a packet").into()),
        };
        total = capacity.saturating_add(total);
        chains.push((chain, capacity));
    }
    Ok(chains)
}

/// Completes a receive buffer: its payload is there already.
fn put(
    rx: &mut DeviceQueue,
    memory: &GuestMemoryMmap,
    chain: &Chain<'_>,
    header: &Header,
) -> Result<(), Fault> {
    if chain.writable.write_at(0, &header.encode()).is_err() {
        return Err(rx.layout(chain.head, "room for a packet's header").into());
    }
    // A header and at most 64 KiB.
    let len = HEADER_BYTES.saturating_add(header.len);
    rx.push_used(memory, chain.head, len)?;
    Ok(())
}

impl Handler for Muxer {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.rx.kick().as_raw_fd(), EventSet::IN, TOKEN_RX)?;
        poll.add(self.tx.kick().as_raw_fd(), EventSet::IN, TOKEN_TX)?;
        match &self.bridge {
            Some(bridge) => poll.add(bridge.as_fd().as_raw_fd(), EventSet::IN, TOKEN_BRIDGE),
            None => Ok(()),
        }
    }

    fn ready(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), Fault> {
        match token {
            TOKEN_RX => drain(self.rx.kick()),
            TOKEN_TX => drain(self.tx.kick()),
            TOKEN_BRIDGE => self.dials_from_host(poll),
            id => self.socket_event(id, events, poll),
        }
        Ok(())
    }

    fn settle(&mut self, poll: &Poll) -> Result<(), Fault> {
        let memory = self.memory.memory();
        let transmit = self.transmit(&memory, poll)?;
        let more = self.receive(&memory, poll)?;
        debug_assert!(self.ready.len() <= self.connections.len());
        let goes_on = match transmit {
            Transmit::Done => more,
            Transmit::Turn => true,
            // If not, the guest has to offer buffers first, and kicks.
            Transmit::Owing => more || self.resets.len() < MAX_RESETS,
        };
        if goes_on {
            again(self.tx.kick());
        }
        Ok(())
    }
}
