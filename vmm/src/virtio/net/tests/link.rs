//! The link, and the tap that it takes.

use super::host::tun;
use super::*;
use crate::virtio::worker::TURN;

#[test]
fn the_link_comes_up_with_the_tap_and_the_driver_is_told() {
    let (mut guest, handle) = device(1);
    assert_eq!(config(&mut guest), (ADDRESS, 0, 1));
    namespace();
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    guest.wait_interrupt();
    assert_eq!(config(&mut guest), (ADDRESS, 1, 1));
    let again = handle.attach(tap("tap1", 1), vec![]).unwrap_err();
    assert!(matches!(again, AttachError::Attached), "{again}");
}

#[test]
fn the_tap_may_come_before_the_driver_and_stays_over_a_reset() {
    namespace();
    let (net, handle) = Net::new(ADDRESS, 1);
    handle.attach(tap("tap0", 1), vec![]).unwrap();
    let wire = Wire::new("tap0", EXPERIMENT);
    let mut guest = Guest::start(Box::new(net), QUEUE_SIZE);
    for turn in 0..3 {
        assert_eq!(config(&mut guest), (ADDRESS, 1, 1));
        let sent = frame(EXPERIMENT, &[turn; 100]);
        transmit(&mut guest, &sent);
        assert_eq!(wire.receive(), sent);
        offer(&mut guest, RX, 64);
        wire.send(&PLAIN, &sent);
        assert_eq!(packet(&mut guest, RX).2, sent);
        guest.bring_up(QUEUE_SIZE);
    }
}

#[test]
fn a_vhost_that_refuses_the_driver_is_done_without() {
    for driver_first in [true, false] {
        namespace();
        let (net, handle) = Net::new(ADDRESS, 1);
        let null = std::fs::File::open("/dev/null").unwrap();
        let memory = crate::virtio::GuestMemory::new(crate::virtio::testing::memory());
        let vhosts = vec![Vhost::unchecked(null.into(), memory)];
        let mut guest = Guest::new(Box::new(net), crate::virtio::testing::memory());
        if driver_first {
            guest.bring_up(QUEUE_SIZE);
        }
        handle.attach(tap("tap0", 1), vhosts).unwrap();
        if !driver_first {
            guest.bring_up(QUEUE_SIZE);
        }
        let wire = Wire::new("tap0", EXPERIMENT);
        let sent = frame(EXPERIMENT, b"hello");
        transmit(&mut guest, &sent);
        assert_eq!(wire.receive(), sent);
        assert_eq!((guest.status(), guest.ending.cause()), (15, None));
    }
}

#[test]
fn without_a_link_packets_go_nowhere() {
    let (mut guest, handle) = device(1);
    for _ in 0..3 * TURN {
        transmit(&mut guest, &frame(EXPERIMENT, b"hello?"));
    }
    for _ in 0..3 * TURN {
        guest.next(TX);
    }
    assert_eq!(handle.link.sent_dropped.count(), 3 * TURN as u64);
    assert_eq!(guest.status(), 15);
}

#[test]
fn what_is_not_the_devices_tap_is_refused() {
    namespace();
    let (_, handle) = Net::new(ADDRESS, 2);
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let says = |fds: Vec<OwnedFd>, text: &str| {
        let error = handle.attach(fds, vec![]).unwrap_err();
        assert!(crate::sentence(&error).contains(text), "{error}");
    };
    says(vec![], "1 to 2");
    says(vec![null(), null(), null()], "1 to 2");
    says(vec![null()], "is not a tap");
    let unused = std::fs::File::open("/dev/net/tun").unwrap();
    says(vec![unused.into()], "is not a tap");
    let (tap, no_pi, header) = (libc::IFF_TAP, libc::IFF_NO_PI, libc::IFF_VNET_HDR);
    says(vec![tun("a", libc::IFF_TUN | no_pi | header)], "IFF_TAP");
    says(vec![tun("b", libc::IFF_TUN)], "IFF_TAP, IFF_VNET_HDR");
    says(vec![tun("c", tap | no_pi)], "without IFF_VNET_HDR");
    let one = tap | no_pi | header;
    says(vec![tun("d", one), tun("e", one)], "IFF_MULTI_QUEUE");
    let mut fds = host::tap("f", 2);
    fds.truncate(1);
    fds.extend(host::tap("g", 2).pop());
    says(fds, "belong to f and g");
    // None of which has spoilt the device.
    handle.attach(host::tap("h", 2), vec![]).unwrap();
}
