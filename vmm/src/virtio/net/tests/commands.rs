//! The control queue, and the pairs of queues that it takes into use.

use super::*;

#[test]
fn commands_are_obeyed_or_refused() {
    let (mut guest, _) = device(1);
    assert_eq!(command(&mut guest, CTRL, &[0, 0, 1]), 0);
    assert_eq!(
        command(&mut guest, CTRL, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        0
    );
    let address = [2, 9, 9, 9, 9, 9];
    assert_eq!(
        command(&mut guest, CTRL, &[&[1, 1], &address[..]].concat()),
        0
    );
    assert_eq!(config(&mut guest).0, address);
    // No pairs to choose among, unknown, cut short, and too long.
    for bytes in [&[4, 0, 1, 0][..], &[9, 9], &[1], &[1, 1, 2], &[0; 100_000]] {
        assert_eq!(command(&mut guest, CTRL, bytes), 1, "{:?}", bytes.first());
    }
    assert_eq!(config(&mut guest).0, address);
    guest.bring_up(QUEUE_SIZE);
    assert_eq!(config(&mut guest).0, ADDRESS);
}

#[test]
fn the_control_queue_follows_the_pairs_that_the_driver_knows_of() {
    let (net, _) = Net::new(ADDRESS, 2);
    let mut guest = Guest::start_without(1 << VIRTIO_NET_F_MQ, Box::new(net), QUEUE_SIZE);
    assert_eq!(command(&mut guest, 2, &[0, 0, 1]), 0);
    assert_eq!(command(&mut guest, 2, &[4, 0, 1, 0]), 1);
    let (mut guest, _) = device(2);
    assert!(features::has(guest.features, features::MQ));
    assert_eq!(config(&mut guest).2, 2);
    assert_eq!(command(&mut guest, 4, &[0, 0, 1]), 0);
}

/// The ethertype of IPv4 (RFC 894).
const IPV4: u16 = 0x0800;

/// A UDP datagram whose flow has this number (RFC 791, section 3.1; RFC 768). Nobody looks at its checksums.
fn datagram(flow: u8) -> Vec<u8> {
    let ip = [
        0x45, 0, 0, 128, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    let udp = [flow, 1, 0, 7, 0, 108, 0, 0];
    frame(IPV4, &[&ip[..], &udp, &[flow; 100]].concat())
}

#[test]
fn packets_come_only_to_pairs_in_use() {
    namespace();
    let (mut guest, handle) = device(2);
    handle.attach(tap("tap0", 2), vec![]).unwrap();
    let (wire, flows) = (Wire::new("tap0", EXPERIMENT), Wire::new("tap0", IPV4));
    let pairs = |guest: &mut Guest, count: u8| command(guest, 4, &[4, 0, count, 0]);
    for refused in [0, 3] {
        assert_eq!(pairs(&mut guest, refused), 1);
    }
    for queue in [0, 2] {
        offer(&mut guest, queue, 120);
    }
    // One pair is in use after the start, then two, one, and so on.
    for count in [1, 2, 1, 2] {
        assert_eq!(pairs(&mut guest, count), 0);
        // A queue is chosen by IP addresses and ports: so many flows use both. Of what is not IP, all is one flow, in one of them.
        let mut seen = [0, 0];
        for flow in 0..32u8 {
            let sent = datagram(flow);
            flows.send(&PLAIN, &sent);
            let (queue, used) = loop {
                if let Some(used) = guest.try_next(0) {
                    break (0, used);
                }
                if let Some(used) = guest.try_next(2) {
                    break (2, used);
                }
                guest.wait_interrupt();
            };
            assert_eq!(used.data[HEADER_LEN..], sent);
            seen[queue / 2] += 1;
            offer(&mut guest, queue, 1);
        }
        assert_eq!(seen[1] > 0, count == 2, "{seen:?}");
        // Either pair may send, whatever is in use: the device is not the one to care.
        for queue in [1, 3] {
            let sent = frame(EXPERIMENT, &[queue as u8; 50]);
            let bytes = [&[0; HEADER_LEN], &sent[..]].concat();
            guest.add(queue, &[&bytes], &[]).unwrap();
            guest.kick(queue);
            assert_eq!(wire.receive(), sent);
        }
    }
    assert_eq!(handle.link.received_dropped.count(), 0);
}

#[test]
fn a_tap_with_fewer_queues_serves_every_pair() {
    namespace();
    let (mut guest, handle) = device(2);
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    let wire = Wire::new("tap0", EXPERIMENT);
    assert_eq!(command(&mut guest, 4, &[4, 0, 2, 0]), 0);
    offer(&mut guest, 0, 100);
    for queue in [1, 3] {
        let sent = frame(EXPERIMENT, &[queue as u8; 50]);
        let bytes = [&[0; HEADER_LEN], &sent[..]].concat();
        guest.add(queue, &[&bytes], &[]).unwrap();
        guest.kick(queue);
        assert_eq!(wire.receive(), sent);
        wire.send(&PLAIN, &sent);
        assert_eq!(packet(&mut guest, 0).2, sent);
    }
}
