//! Packets, from the tap to the guest and back.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::host::{IPV4, large_segment};
use super::*;
use crate::virtio::testing::WRITE;

#[test]
fn a_packet_is_sent_however_it_lies_in_its_buffers() {
    let (mut guest, handle, wire) = connected(&[]);
    let sent = frame(EXPERIMENT, &[7; 1000]);
    let packet = [&[0; HEADER_LEN], &sent[..]].concat();
    for cuts in [[12, 26], [5, 13], [1, 1011]] {
        let (a, rest) = packet.split_at(cuts[0]);
        let (b, c) = rest.split_at(cuts[1] - cuts[0]);
        guest.add(TX, &[a, b, c], &[]).unwrap();
        guest.kick(TX);
        guest.next(TX);
        assert_eq!(wire.receive(), sent);
    }
    assert_eq!(handle.link.sent_dropped.count(), 0);
}

#[test]
fn malformed_packets_are_dropped_and_the_next_one_is_not() {
    let (mut guest, handle, wire) = connected(&[]);
    let large = vec![0; MAX_PACKET / 2 + 1];
    let mut wild = [0xff; 200];
    wild[10..].fill(0);
    for readable in [
        // No header, no frame, less than an Ethernet header, offsets far behind the end, and more than a packet has.
        &[&[0; HEADER_LEN - 1][..]][..],
        &[&[0; HEADER_LEN]],
        &[&[0; HEADER_LEN + 13]],
        &[&wild],
        &[&large, &large],
    ] {
        guest.add(TX, readable, &[]).unwrap();
    }
    // A chain without anything to send.
    guest.add(TX, &[], &[100]).unwrap();
    guest.kick(TX);
    for _ in 0..6 {
        guest.next(TX);
    }
    assert_eq!(handle.link.sent_dropped.count(), 6);
    let sent = frame(EXPERIMENT, b"still there");
    transmit(&mut guest, &sent);
    assert_eq!(wire.receive(), sent);
    assert_eq!(guest.status(), 15);
}

#[test]
fn packets_are_received_in_order_one_a_buffer() {
    for refused in [&[][..], &[VIRTIO_NET_F_MRG_RXBUF]] {
        let (mut guest, _, wire) = connected(refused);
        offer(&mut guest, RX, 200);
        for number in 0..150u8 {
            wire.send(&PLAIN, &frame(EXPERIMENT, &[number; 300]));
        }
        for number in 0..150u8 {
            let (header, buffers, frame_) = packet(&mut guest, RX);
            assert_eq!((header, buffers), (PLAIN, 1));
            assert_eq!(frame_, frame(EXPERIMENT, &[number; 300]));
        }
    }
}

#[test]
fn a_large_packet_takes_as_many_buffers_as_it_fills() {
    let (mut guest, _, _) = connected(&[]);
    let wire = Wire::new("tap0", IPV4);
    let payload: Vec<u8> = (0..60_000u32).map(|i| (i / 7) as u8).collect();
    let (header, sent) = large_segment(&payload, 1448);
    for _ in 0..5 {
        let free = guest.free_descriptors(RX);
        offer(&mut guest, RX, free);
        wire.send(&header, &sent);
        let (received_header, buffers, received) = packet(&mut guest, RX);
        assert_eq!(
            usize::from(buffers),
            (HEADER_LEN + sent.len()).div_ceil(BUFFER)
        );
        // As it was sent: the offloads are the guest's.
        assert_eq!(received_header, header);
        assert_eq!(received[54..], sent[54..]);
    }
}

/// CVE-2026-45782: one head, made available again and again before any of it is used. Each is a packet, or a buffer, of its own.
#[test]
fn a_head_that_is_offered_many_times_is_used_as_often() {
    const TIMES: u16 = 16;
    let (mut guest, _, wire) = connected(&[]);
    let sent = frame(EXPERIMENT, b"once more");
    let packet = [&[0; HEADER_LEN], &sent[..]].concat();
    for (queue, readable, writable) in [
        (TX, &[&packet[..]][..], &[][..]),
        (RX, &[], &[MAX_PACKET + 1]),
    ] {
        let at = GuestAddress(guest.queues[queue].used);
        let head = guest.add(queue, readable, writable).unwrap();
        for _ in 1..TIMES {
            guest.queues[queue].publish(&guest.memory, head);
        }
        guest.kick(queue);
        for _ in 0..TIMES {
            if queue == TX {
                assert_eq!(wire.receive(), sent);
            } else {
                wire.send(&PLAIN, &sent);
            }
        }
        let used = |guest: &Guest| -> u16 {
            let index = guest.memory.load(GuestAddress(at.0 + 2), Ordering::SeqCst);
            index.unwrap()
        };
        let start = Instant::now();
        while used(&guest) < TIMES {
            assert!(start.elapsed() < Duration::from_secs(60), "not used");
            std::thread::yield_now();
        }
        assert_eq!(used(&guest), TIMES);
        for slot in 0..u64::from(TIMES) {
            let entry: [u32; 2] = guest
                .memory
                .read_obj(GuestAddress(at.0 + 4 + 8 * slot))
                .unwrap();
            assert_eq!(entry[0], u32::from(head));
        }
    }
    assert_eq!(guest.status(), 15);
    guest.bring_up(QUEUE_SIZE);
    transmit(&mut guest, &sent);
    assert_eq!(wire.receive(), sent);
}

#[test]
fn a_guest_without_the_offload_gets_segments() {
    let (mut guest, _, _) = connected(&[VIRTIO_NET_F_GUEST_TSO4]);
    let wire = Wire::new("tap0", IPV4);
    let payload = vec![1; 14_480];
    let (header, sent) = large_segment(&payload, 1448);
    offer(&mut guest, RX, 200);
    wire.send(&header, &sent);
    for _ in 0..10 {
        let (header, buffers, frame) = packet(&mut guest, RX);
        assert_eq!((header[1], buffers), (0, 1));
        assert_eq!(frame.len(), 54 + 1448);
    }
}

#[test]
fn offloads_follow_each_negotiation() {
    namespace();
    let (net, handle) = Net::new(ADDRESS, 1);
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    let wire = Wire::new("tap0", IPV4);
    let (header, sent) = large_segment(&[1; 14_480], 1448);
    let mut guest = Guest::start(Box::new(net), QUEUE_SIZE);
    for (refused, gso) in [(0, 1), (1 << VIRTIO_NET_F_GUEST_TSO4, 0), (0, 1)] {
        guest.refused = refused;
        guest.bring_up(QUEUE_SIZE);
        offer(&mut guest, RX, 200);
        wire.send(&header, &sent);
        assert_eq!(packet(&mut guest, RX).0[1], gso);
    }
}

#[test]
fn nothing_is_lost_for_want_of_buffers() {
    let (mut guest, handle, wire) = connected(&[]);
    for number in 0..10 {
        wire.send(&PLAIN, &frame(EXPERIMENT, &[number; 100]));
    }
    // Each kick brings too few for a packet of the largest size, until enough are there.
    for _ in 0..MAX_PACKET / BUFFER {
        offer(&mut guest, RX, 1);
    }
    assert_eq!(guest.try_next(RX), None);
    offer(&mut guest, RX, 10);
    for number in 0..10 {
        assert_eq!(packet(&mut guest, RX).2, frame(EXPERIMENT, &[number; 100]));
    }
    assert_eq!(handle.link.received_dropped.count(), 0);
}

#[test]
fn a_small_queue_that_is_full_serves_what_fits_it() {
    namespace();
    let (net, handle) = Net::new(ADDRESS, 1);
    let mut guest = Guest::start(Box::new(net), 4);
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    let wire = Wire::new("tap0", EXPERIMENT);
    offer(&mut guest, RX, 4);
    for number in 0..10 {
        wire.send(&PLAIN, &frame(EXPERIMENT, &[number; 100]));
        assert_eq!(packet(&mut guest, RX).2, frame(EXPERIMENT, &[number; 100]));
        offer(&mut guest, RX, 1);
    }
}

#[test]
fn what_does_not_fit_is_dropped_and_its_buffer_serves_the_next() {
    let (mut guest, handle, wire) = connected(&[VIRTIO_NET_F_MRG_RXBUF]);
    guest.add(RX, &[], &[HEADER_LEN + 100]).unwrap();
    guest.kick(RX);
    wire.send(&PLAIN, &frame(EXPERIMENT, &[1; 87]));
    let fits = frame(EXPERIMENT, &[2; 86]);
    wire.send(&PLAIN, &fits);
    assert_eq!(packet(&mut guest, RX).2, fits);
    assert_eq!(handle.link.received_dropped.count(), 1);
}

#[test]
fn broken_queues_stop_the_device_until_reset() {
    let (mut guest, _, wire) = connected(&[]);
    type Break = fn(&mut Guest);
    let breaks: [Break; 5] = [
        // A receive buffer shorter than a header.
        |guest| {
            guest.add(RX, &[], &[HEADER_LEN - 1]).unwrap();
            guest.kick(RX);
        },
        // One that is the device's to read.
        |guest| {
            guest.add(RX, &[&[0; BUFFER]], &[]).unwrap();
            guest.kick(RX);
        },
        |guest| outside(guest, RX, WRITE),
        |guest| outside(guest, TX, 0),
        // A command that cannot be answered.
        |guest| {
            guest.add(CTRL, &[&[0, 0, 1]], &[]).unwrap();
            guest.kick(CTRL);
        },
    ];
    for break_it in breaks {
        break_it(&mut guest);
        guest.wait_failed();
        guest.bring_up(QUEUE_SIZE);
        let sent = frame(EXPERIMENT, b"as new");
        transmit(&mut guest, &sent);
        assert_eq!(wire.receive(), sent);
    }
}

/// A chain that lies outside the guest's memory.
fn outside(guest: &mut Guest, queue: usize, flags: u16) {
    let driver = &mut guest.queues[queue];
    driver.descriptor(&guest.memory, 0, Descriptor::new(1 << 40, 64, flags, 0));
    driver.publish(&guest.memory, 0);
    guest.kick(queue);
}

/// A pair of queues in front of a socket that a test can fill up, which a tap hardly ever is.
struct Bare {
    link: Arc<Link>,
    worker: Option<Worker>,
}

impl VirtioDevice for Bare {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt;
        let mut queues = activation.queues.into_iter().flatten();
        let wake = crate::virtio::testing::eventfd();
        wake.write(1).unwrap();
        let pair = Pair::new(
            0,
            activation.memory,
            Arc::clone(&self.link),
            wake,
            Rx::new(queues.next().unwrap(), 0, Arc::clone(&interrupt), 0),
            Tx::new(queues.next().unwrap(), 1, Arc::clone(&interrupt)),
            None,
        );
        self.worker = Some(Worker::spawn(
            crate::jail::seccomp::Kind::Net,
            &interrupt,
            vec![pair],
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[test]
fn a_full_tap_is_waited_for() {
    let (ours, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let link = Arc::new(Link::new(ADDRESS));
    link.attach(Taps::unchecked(tap.into()), vec![]).unwrap();
    let bare = Bare {
        link: Arc::clone(&link),
        worker: None,
    };
    let mut guest = Guest::start(Box::new(bare), QUEUE_SIZE);
    // More than a socket's queue holds (`net.unix.max_dgram_qlen` is ten, and some).
    for number in 0..200u8 {
        transmit(&mut guest, &frame(EXPERIMENT, &[number; 1000]));
    }
    // Receiving goes on meanwhile.
    guest.add(RX, &[], &[BUFFER]).unwrap();
    guest.kick(RX);
    ours.send(&[&[0; HEADER_LEN], &frame(EXPERIMENT, b"in")[..]].concat())
        .unwrap();
    assert_eq!(packet(&mut guest, RX).2, frame(EXPERIMENT, b"in"));
    guest.collect(TX);
    assert!(guest.free_descriptors(TX) < usize::from(QUEUE_SIZE));
    for number in 0..200u8 {
        let mut packet = [0; BUFFER];
        let count = ours.recv(&mut packet).unwrap();
        assert_eq!(
            packet[HEADER_LEN..count],
            frame(EXPERIMENT, &[number; 1000])
        );
        guest.next(TX);
    }
    assert_eq!(link.sent_dropped.count(), 0);
}
