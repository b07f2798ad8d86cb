//! The whole device, from the driver's queues to the shim's end of the bridge.

mod driver;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use husk_protocol::ports;
use proptest::prelude::*;

use self::driver::{Driver, End, Name, RX, TX};
use super::Vsock;
use super::credit::BUFFER;
use super::packet::*;
use crate::virtio::testing::Guest;

/// Bytes that tell their place.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

#[test]
fn echo_with_half_close_both_ways() {
    let (mut driver, shim) = Driver::start();
    let name = (1024, 5000);
    let mut socket = driver.open(&shim, name);
    assert_eq!(driver.write(name, b"question"), 8);
    driver.control(name, Op::Shutdown, SHUTDOWN_SEND);
    let mut question = Vec::new();
    socket.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    socket.write_all(b"answer").unwrap();
    drop(socket);
    driver.until(|d| d.end(name).reset);
    assert_eq!(driver.end(name).received, b"answer");
}

#[test]
fn the_host_half_closes_first() {
    let (mut driver, shim) = Driver::start();
    let name = (1024, 5000);
    let mut socket = driver.open(&shim, name);
    socket.write_all(b"all of it").unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    driver.until(|d| d.end(name).shutdown == SHUTDOWN_SEND);
    assert_eq!(driver.end(name).received, b"all of it");
    driver.write(name, b"thanks");
    driver.control(name, Op::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    let mut thanks = Vec::new();
    socket.read_to_end(&mut thanks).unwrap();
    assert_eq!(thanks, b"thanks");
    driver.until(|d| d.end(name).reset);
}

#[test]
fn the_host_dials() {
    let (mut driver, shim) = Driver::start();
    let mut socket = shim.dial(77);
    driver.until(|d| d.ends.values().any(|e| e.requested));
    let name = *driver.ends.keys().next().unwrap();
    assert_eq!(name.1, 77);
    socket.write_all(b"sent before the guest answered").unwrap();
    driver.control(name, Op::Response, 0);
    driver.until(|d| d.end(name).received == b"sent before the guest answered");
    driver.write(name, b"hello");
    let mut hello = [0; 5];
    socket.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
}

#[test]
fn refusals_in_both_directions() {
    let (mut driver, shim) = Driver::start();
    // The shim closes what it does not want.
    driver.dial((9, 1));
    drop(shim.accept());
    driver.until(|d| d.end((9, 1)).reset);
    // The guest answers RST.
    let mut socket = shim.dial(9);
    driver.until(|d| d.ends.values().any(|e| e.requested));
    let name = *driver.ends.iter().find(|(_, e)| e.requested).unwrap().0;
    driver.control(name, Op::Reset, 0);
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    // Without a shim nobody answers.
    drop(shim);
    driver.dial((9, 2));
    driver.until(|d| d.end((9, 2)).reset);
}

#[test]
fn noise_on_the_bridge_does_not_end_it() {
    let (mut driver, shim) = Driver::start();
    let (socket, mut other) = UnixStream::pair().unwrap();
    let fd = socket.as_raw_fd();
    for fds in [&[][..], &[fd; 2], &[fd; 5], &[fd; 253]] {
        shim.send(7, fds);
    }
    drop(socket);
    // None of them is kept.
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    driver.open(&shim, (1, 2));
}

#[test]
fn what_was_sent_before_a_reset_arrives() {
    let (mut driver, shim) = Driver::start();
    let name = (1024, 5000);
    let mut socket = driver.open(&shim, name);
    // More than the socket takes at once, so that some of it is buffered in the device.
    let bytes = pattern(1, BUFFER as usize);
    let mut sent = 0;
    while sent < bytes.len() {
        sent += driver.write(name, &bytes[sent..]);
        driver.poll();
    }
    driver.control(name, Op::Reset, 0);
    let mut received = Vec::new();
    socket.read_to_end(&mut received).unwrap();
    assert!(received == bytes);
}

#[test]
fn packets_that_belong_to_nothing_are_answered_with_rst() {
    let (mut driver, _shim) = Driver::start();
    driver.ends.insert((5, 5), End::default());
    driver.control((5, 5), Op::CreditUpdate, 0);
    driver.until(|d| d.end((5, 5)).reset);
    // Another CID: nobody is there to answer; the next packet is.
    let mut header = driver.header((6, 6), Op::Request);
    header.src_cid = 99;
    driver.send(header, &[]);
    driver.ends.insert((7, 7), End::default());
    let mut header = driver.header((7, 7), Op::Request);
    header.kind = 2;
    driver.send(header, &[]);
    driver.until(|d| d.end((7, 7)).reset);
    assert!(!driver.ends.contains_key(&(6, 6)));
}

#[test]
fn more_than_the_credit_ends_the_connection_alone() {
    let (mut driver, shim) = Driver::start();
    let (bad, good) = ((1, 1), (1, 2));
    let _socket = driver.open(&shim, bad);
    let mut other = driver.open(&shim, good);
    for _ in 0..8 {
        // Straight past the credit: the reader takes nothing, and the socket alone does not hold that much.
        let mut header = driver.header(bad, Op::Data);
        header.len = MAX_PAYLOAD;
        driver.send(header, &vec![7; MAX_PAYLOAD as usize]);
    }
    driver.until(|d| d.end(bad).reset);
    driver.write(good, b"x");
    other.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn a_short_packet_ends_its_connection_and_a_headless_one_the_device() {
    let (mut driver, shim) = Driver::start();
    let name = (1, 1);
    let _socket = driver.open(&shim, name);
    let mut header = driver.header(name, Op::Data);
    header.len = 100;
    driver.send(header, &[1, 2, 3]);
    driver.until(|d| d.end(name).reset);
    driver.guest.add(TX, &[&[0; 10]], &[]).unwrap();
    driver.guest.kick(TX);
    driver.guest.wait_failed();
}

/// Whoever dials the next one, host or guest, is refused, until one ends.
#[test]
fn there_are_so_many_connections_and_no_more() {
    let (mut driver, shim) = Driver::start();
    // `MAX_CONNECTIONS` of `muxer`.
    let mut held: Vec<_> = (0..1024).map(|port| shim.dial(port)).collect();
    let mut refused = shim.dial(5000);
    let patience = Some(Duration::from_secs(60));
    refused.set_read_timeout(patience).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    driver.dial((7, 7));
    driver.until(|d| d.end((7, 7)).reset);
    let of = |d: &Driver, port| d.ends.keys().copied().find(|name| name.1 == port);
    driver.until(|d| of(d, 0).is_some());
    let first = of(&driver, 0).unwrap();
    driver.control(first, Op::Reset, 0);
    let mut ended = held.remove(0);
    ended.set_read_timeout(patience).unwrap();
    assert_eq!(ended.read(&mut [0; 1]).unwrap(), 0);
    let _socket = driver.open(&shim, (8, 8));
}

/// What is owed to a guest that takes nothing is bounded: each RST that it takes makes room for one of its packets.
#[test]
fn a_guest_that_takes_no_rst_is_not_heard_until_it_does() {
    /// `MAX_RESETS` of `muxer`.
    const OWED: usize = 256;
    const MORE: usize = 20;
    let (ours, _shim) = UnixStream::pair().unwrap();
    let mut guest = Guest::start(Box::new(Vsock::new(3, ours.into())), 128);
    let stray = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        len: 0,
        kind: TYPE_STREAM,
        op: Op::CreditUpdate,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    let mut taken = 0;
    for _ in 0..OWED + MORE {
        while guest.add(TX, &[&stray.encode()], &[]).is_none() {
            guest.next(TX);
            taken += 1;
        }
        guest.kick(TX);
    }
    for _ in taken..OWED {
        guest.next(TX);
    }
    for _ in 0..MORE {
        assert_eq!(guest.try_next(TX), None);
        guest.add(RX, &[], &[HEADER_LEN]).unwrap();
        guest.kick(RX);
        guest.next(RX);
        guest.next(TX);
    }
    assert_eq!(guest.status(), 15);
}

/// A guest that takes no answers leaves nothing behind for the connections that it opens and drops. (The muxer's own
/// assertion looks at its line of those that wait for receive buffers.)
#[test]
fn connections_that_were_never_answered_leave_the_line() {
    let (mut driver, shim) = Driver::start();
    driver.deaf = true;
    let drop_one = |driver: &mut Driver, name| {
        driver.control(name, Op::Reset, 0);
        driver.ends.get_mut(&name).unwrap().forgotten = true;
    };
    // As many answers as there are receive buffers, so that one that stays waits at the head of the line.
    for port in 0..128 {
        let _socket = driver.open(&shim, (1, port));
        drop_one(&mut driver, (1, port));
    }
    let stays = (1, 5000);
    driver.dial(stays);
    let (_, mut socket) = shim.accept();
    for port in 128..1000 {
        driver.dial((1, port));
        let (_, _socket) = shim.accept();
        drop_one(&mut driver, (1, port));
    }
    driver.deaf = false;
    driver.refill();
    driver.until(|d| d.end(stays).accepted);
    driver.write(stays, b"x");
    socket.read_exact(&mut [0; 1]).unwrap();
}

/// As a container dials that wants the pod's streams to have no place. What has said something stays, and so do the agent's own.
#[test]
fn those_that_say_nothing_take_no_places() {
    let (mut driver, shim) = Driver::start();
    let open: Vec<_> = [ports::AGENT, ports::LOG, ports::STREAM, ports::STREAM]
        .into_iter()
        .zip(1..)
        .map(|name| (name, driver.open(&shim, name)))
        .collect();
    let silent = (ports::STREAM, 4);
    driver.write((ports::STREAM, 3), b"token");
    // A second one is as any other.
    let again = (ports::AGENT, 5);
    let _again = driver.open(&shim, again);
    let mut dialled = Vec::new();
    for port in 1000..4000 {
        dialled.push(driver.open(&shim, (ports::STREAM + port % 2, port)));
    }
    for gone in [silent, again, (ports::STREAM, 1000)] {
        assert!(driver.end(gone).reset, "{gone:?}");
    }
    for (name, mut socket) in open {
        if name != silent {
            assert!(!driver.end(name).reset, "{name:?}");
            if name.0 == ports::STREAM {
                socket.read_exact(&mut [0; 5]).unwrap();
            }
            driver.write(name, b"on");
            let mut text = [0; 2];
            socket.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"on");
        }
    }
    // The newest one may still say something.
    let newest = (ports::STREAM + 1, 3999);
    driver.write(newest, b"x");
    dialled.pop().unwrap().read_exact(&mut [0; 1]).unwrap();
}

/// FNV-1a, so that equality of 64 MiB is a number.
fn hash(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash
}

#[test]
fn sixty_four_mib_each_way_at_once() {
    const TOTAL: usize = 64 << 20;
    let (mut driver, shim) = Driver::start();
    let name = (1024, 5000);
    let socket = driver.open(&shim, name);
    let block = pattern(3, 1 << 16);
    let mut reader = socket.try_clone().unwrap();
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let (mut sum, mut total) = (0, 0);
        loop {
            let count = reader.read(&mut buffer).unwrap();
            if count == 0 {
                return (sum, total);
            }
            sum = hash(sum, &buffer[..count]);
            total += count;
        }
    });
    let (mut writer, source) = (socket, block.clone());
    let writing = std::thread::spawn(move || {
        let mut sum = 0;
        for _ in 0..TOTAL / source.len() {
            writer.write_all(&source).unwrap();
            sum = hash(sum, &source);
        }
        writer.shutdown(std::net::Shutdown::Write).unwrap();
        sum
    });
    let (mut sent, mut sent_sum, mut got_sum, mut got) = (0, 0, 0, 0);
    while sent < TOTAL || driver.end(name).shutdown == 0 {
        let at = sent % block.len();
        let now = if sent < TOTAL {
            driver.write(name, &block[at..])
        } else {
            0
        };
        sent_sum = hash(sent_sum, &block[at..at + now]);
        sent += now;
        if sent == TOTAL && now > 0 {
            driver.control(name, Op::Shutdown, SHUTDOWN_SEND);
        }
        driver.poll();
        let received = &driver.end(name).received[got..];
        got_sum = hash(got_sum, received);
        got += received.len();
        if now == 0 && received.is_empty() && driver.end(name).shutdown == 0 {
            driver.guest.wait_interrupt();
        }
    }
    assert_eq!(reading.join().unwrap(), (sent_sum, TOTAL));
    assert_eq!((writing.join().unwrap(), TOTAL), (got_sum, got));
}

/// What guest and host do with one of a few connections, in any order.
#[derive(Debug, Clone)]
enum Move {
    GuestWrites(usize, usize),
    GuestShuts(usize, u32),
    GuestResets(usize),
    HostWrites(usize, usize),
    HostReads(usize, usize),
    HostShuts(usize),
    HostCloses(usize),
    Polls,
}

const CONNECTIONS: usize = 3;

/// What is sent, in each direction of each connection.
static STREAMS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    (0..2 * CONNECTIONS as u32)
        .map(|i| pattern(i, 8 << 20))
        .collect()
});

fn a_move() -> impl Strategy<Value = Move> {
    let which = 0..CONNECTIONS;
    prop_oneof![
        4 => (which.clone(), 1..100_000usize).prop_map(|(c, n)| Move::GuestWrites(c, n)),
        4 => (which.clone(), 1..100_000usize).prop_map(|(c, n)| Move::HostWrites(c, n)),
        4 => (which.clone(), 1..200_000usize).prop_map(|(c, n)| Move::HostReads(c, n)),
        1 => (which.clone(), 1..4u32).prop_map(|(c, f)| Move::GuestShuts(c, f)),
        1 => which.clone().prop_map(Move::GuestResets),
        1 => which.clone().prop_map(Move::HostShuts),
        1 => which.prop_map(Move::HostCloses),
        6 => Just(Move::Polls),
    ]
}

/// One connection's model: what was sent each way, and what came.
struct Model {
    socket: Option<UnixStream>,
    guest_sent: usize,
    guest_ended: bool,
    /// The guest has said that it receives no more.
    guest_deaf: bool,
    host_got: Vec<u8>,
    host_sent: usize,
    host_ended: bool,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn bytes_are_neither_lost_nor_reordered(moves in proptest::collection::vec(a_move(), 1..80)) {
        let (mut driver, shim) = Driver::start();
        let names: Vec<Name> = (0..CONNECTIONS as u32).map(|i| (1024, 100 + i)).collect();
        let (to_host, to_guest) = (&STREAMS[..CONNECTIONS], &STREAMS[CONNECTIONS..]);
        let mut models: Vec<Model> = names
            .iter()
            .map(|name| {
                let socket = driver.open(&shim, *name);
                socket.set_nonblocking(true).unwrap();
                Model { socket: Some(socket), guest_sent: 0, guest_ended: false, guest_deaf: false, host_got: Vec::new(), host_sent: 0, host_ended: false }
            })
            .collect();
        for a_move in moves {
            match a_move {
                Move::Polls => driver.poll(),
                Move::GuestWrites(c, n) => {
                    let m = &mut models[c];
                    if !m.guest_ended && !driver.end(names[c]).reset {
                        let at = m.guest_sent;
                        m.guest_sent += driver.write(names[c], &to_host[c][at..at + n]);
                    }
                }
                Move::GuestShuts(c, flags) => {
                    if !driver.end(names[c]).reset {
                        models[c].guest_ended |= flags & SHUTDOWN_SEND != 0;
                        models[c].guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
                        driver.control(names[c], Op::Shutdown, flags);
                    }
                }
                Move::GuestResets(c) => {
                    if !driver.end(names[c]).reset {
                        (models[c].guest_ended, models[c].guest_deaf) = (true, true);
                        driver.control(names[c], Op::Reset, 0);
                        let end = driver.ends.get_mut(&names[c]).unwrap();
                        (end.reset, end.forgotten) = (true, true);
                    }
                }
                Move::HostWrites(c, n) => {
                    let m = &mut models[c];
                    if let (Some(socket), false) = (&mut m.socket, m.host_ended) {
                        let at = m.host_sent;
                        // EAGAIN: full; EPIPE: the guest wants no more.
                        m.host_sent += socket.write(&to_guest[c][at..at + n]).unwrap_or(0);
                    }
                }
                Move::HostReads(c, n) => {
                    let m = &mut models[c];
                    if let Some(socket) = &mut m.socket {
                        let mut buffer = vec![0; n];
                        let count = socket.read(&mut buffer).unwrap_or(0);
                        m.host_got.extend(&buffer[..count]);
                    }
                }
                Move::HostShuts(c) => {
                    let m = &mut models[c];
                    m.host_ended = true;
                    if let Some(socket) = &m.socket {
                        let _ = socket.shutdown(std::net::Shutdown::Write);
                    }
                }
                Move::HostCloses(c) => {
                    models[c].host_ended = true;
                    models[c].socket = None;
                }
            }
            for c in 0..CONNECTIONS {
                let got = &driver.end(names[c]).received;
                prop_assert!(got.len() <= models[c].host_sent);
                prop_assert!(*got == to_guest[c][..got.len()]);
                let got = &models[c].host_got;
                prop_assert!(got.len() <= models[c].guest_sent);
                prop_assert!(*got == to_host[c][..got.len()]);
            }
        }
        for c in 0..CONNECTIONS {
            let (name, m) = (names[c], &mut models[c]);
            // Everything the guest sent reaches a host that is still reading, once the guest is done.
            if !driver.end(name).reset && !m.guest_ended {
                driver.control(name, Op::Shutdown, SHUTDOWN_SEND);
            }
            if let Some(socket) = &mut m.socket {
                socket.set_nonblocking(false).unwrap();
                // An error only means that the other end was closed before it had read everything.
                let _ = socket.read_to_end(&mut m.host_got);
                prop_assert_eq!(m.host_got.len(), m.guest_sent);
                prop_assert!(m.host_got == to_host[c][..m.guest_sent]);
            }
            // And the other way.
            m.socket = None;
            if !m.guest_deaf {
                driver.until(|d| d.end(name).reset);
                let got = &driver.end(name).received;
                prop_assert_eq!(got.len(), m.host_sent);
                prop_assert!(*got == to_guest[c][..m.host_sent]);
            }
        }
        prop_assert_eq!(driver.guest.status(), 15);
    }
}
