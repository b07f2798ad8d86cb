//! Frames between the outside and the VM's end of a tap, and what the host's own stack makes of them.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::UdpSocket,
    os::fd::AsFd as _,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{LIMIT, netns::Netns, network_at, network_of};
use crate::network::{Network, NetworkError, tap::Queues};
use serde_json::json;

/// `struct virtio_net_hdr` without the number of buffers: what a tap has in front of a frame unless told otherwise.
const VNET_HEADER: usize = 10;

/// Bound of every wait, in milliseconds: reached only by a bug.
const PATIENCE: u16 = 20_000;

/// The guest's end: the queues of a tap.
struct Guest(Vec<File>);

impl Guest {
    fn new(mut taps: Vec<Queues>) -> Self {
        Self(taps.remove(0).taps.into_iter().map(File::from).collect())
    }

    /// The next frame that is the one wanted; the kernel's own IPv6 chatter is not.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let mut fds: Vec<_> = self
                .0
                .iter()
                .map(|q| PollFd::new(q.as_fd(), PollFlags::POLLIN))
                .collect();
            let ready = poll(&mut fds, PollTimeout::from(PATIENCE)).unwrap();
            assert!(ready > 0, "the frame never comes");
            for queue in &mut self.0 {
                let mut buffer = [0; 2048];
                match queue.read(&mut buffer) {
                    Ok(length) if wanted(&buffer[VNET_HEADER..length]) => {
                        return buffer[VNET_HEADER..length].to_vec();
                    }
                    Ok(_) => {}
                    Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
                }
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let packet = [&[0; VNET_HEADER], frame].concat();
        assert_eq!(self.0[0].write(&packet).unwrap(), packet.len());
    }
}

fn is_arp(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x06]
}

/// IPv4 with UDP inside.
fn is_udp(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x00] && frame[23] == 17
}

/// The same UDP datagram on its way back: with both ends swapped at each layer every checksum stays right.
fn returned(frame: &[u8]) -> Vec<u8> {
    let f = frame;
    [
        &f[6..12],
        &f[0..6],
        &f[12..26],
        &f[30..34],
        &f[26..30],
        &f[36..38],
        &f[34..36],
        &f[38..],
    ]
    .concat()
}

async fn udp(netns: &Netns, address: &'static str) -> UdpSocket {
    let socket = netns.inside(move || UdpSocket::bind(address)).await;
    let patience = std::time::Duration::from_millis(PATIENCE.into());
    socket.set_read_timeout(Some(patience)).unwrap();
    socket
}

async fn plug(network: &Network, vcpus: u8) -> Guest {
    let found = network.scan(LIMIT).await.unwrap();
    Guest::new(network.plug(&found, vcpus).await.unwrap())
}

/// Datagrams from outside reach the guest and its answers the sender, and the host's stack is out of it.
async fn both_ways(pod: &Netns, outside: &Netns, guest: &mut Guest) {
    let (host, sender) = (
        udp(pod, "10.0.0.2:7").await,
        udp(outside, "10.0.0.1:0").await,
    );
    host.set_nonblocking(true).unwrap();
    // Who has 10.0.0.2? The guest is asked, and nobody answers in its stead.
    outside.ip("neigh flush dev peer");
    sender.send_to(b"to the guest", "10.0.0.2:7").unwrap();
    guest.receive(is_arp);
    let neighbours = outside.ip("neigh show 10.0.0.2");
    assert!(!neighbours.contains("lladdr"), "{neighbours}");

    let mac = pod.ip("-o link show eth0");
    let mac = mac.split("link/ether ").nth(1).unwrap().split(' ').next();
    let mac = mac.unwrap();
    outside.ip(&format!(
        "neigh replace 10.0.0.2 lladdr {mac} dev peer nud permanent"
    ));
    let frame = guest.receive(is_udp);
    assert!(frame.ends_with(b"to the guest"));
    let mut buffer = [0; 64];
    let seen_by_host = host.recv(&mut buffer).unwrap_err();
    assert_eq!(seen_by_host.kind(), ErrorKind::WouldBlock);

    guest.send(&returned(&frame));
    let (length, from) = sender.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"to the guest");
    assert_eq!(from.to_string(), "10.0.0.2:7");
}

#[tokio::test]
async fn the_guest_is_at_the_end_of_the_wire_and_the_host_is_not() {
    for vcpus in [1, 2] {
        let (pod, outside) = Netns::pair();
        let (host, sender) = (
            udp(&pod, "10.0.0.2:7").await,
            udp(&outside, "10.0.0.1:0").await,
        );
        sender.send_to(b"before", "10.0.0.2:7").unwrap();
        host.recv(&mut [0; 64]).unwrap();
        drop(host);

        let network = network_at(&pod);
        let mut guest = plug(&network, vcpus).await;
        assert_eq!(guest.0.len(), usize::from(vcpus));
        both_ways(&pod, &outside, &mut guest).await;
    }
}

#[tokio::test]
async fn a_macvlan_is_plugged_as_well() {
    let (pod, outside) = (Netns::new(), Netns::new());
    // The wire: macvlan on one end of a veth, the outside's address on the other.
    for command in [
        "link add peer type veth peer name parent",
        "link set parent up",
        "link add link parent name eth0 type macvlan mode bridge",
    ] {
        outside.ip(command);
    }
    pod.take(&outside, "eth0");
    outside.ip("addr add 10.0.0.1/24 dev peer");
    outside.ip("link set peer up");
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    pod.ip("link set eth0 up");
    let network = network_at(&pod);
    let found = network.scan(LIMIT).await.unwrap();
    assert_eq!(found.interfaces[0].kind, "macvlan");
    let mut guest = Guest::new(network.plug(&found, 1).await.unwrap());
    both_ways(&pod, &outside, &mut guest).await;
}

#[tokio::test]
async fn the_tap_is_like_its_interface_and_silent() {
    let (pod, _outside) = Netns::pair();
    pod.ip("link set eth0 mtu 1300");
    let network = network_at(&pod);
    let _guest = plug(&network, 1).await;
    let tap = pod.ip("link show tap0_husk");
    for part in ["mtu 1300", ",UP", "alias pod"] {
        assert!(tap.contains(part), "{part}: {tap}");
    }
    assert!(!pod.ip("addr show tap0_husk").contains("inet"));
    let found = network.scan(LIMIT).await.unwrap();
    assert_eq!(found.interfaces.len(), 1, "it is no interface of the pod's");
}

#[tokio::test]
async fn what_a_killed_shim_has_left_is_replaced() {
    let (pod, outside) = Netns::pair();
    let network = network_at(&pod);
    // Its VMM has not noticed yet and holds the tap.
    let left = plug(&network, 2).await;
    let mut guest = plug(&network_at(&pod), 1).await;
    both_ways(&pod, &outside, &mut guest).await;
    drop(left);

    // Of another pod, on the other hand, it is no remainder.
    pod.ip("link set tap0_husk alias other");
    let found = network.scan(LIMIT).await.unwrap();
    let error = network.plug(&found, 1).await.unwrap_err();
    assert!(matches!(&error, NetworkError::InUse { pod } if pod == "other"));
}

#[tokio::test]
async fn the_host_has_its_interface_back_in_the_end() {
    let (pod, outside) = Netns::pair();
    let network = network_at(&pod);
    let guest = plug(&network, 1).await;
    assert!(pod.tc("qdisc show dev eth0 ingress").contains("ingress"));
    assert!(pod.tc("filter show dev eth0 ingress").contains("tap0_husk"));
    drop(guest);
    network.release().await;
    assert_eq!(pod.tc("qdisc show dev eth0 ingress"), "");
    assert!(!pod.ip("link show").contains("_husk"));
    let (host, sender) = (
        udp(&pod, "10.0.0.2:7").await,
        udp(&outside, "10.0.0.1:0").await,
    );
    sender.send_to(b"after", "10.0.0.2:7").unwrap();
    host.recv(&mut [0; 64]).unwrap();

    // And once more, in a namespace that has gone.
    drop(plug(&network, 1).await);
    drop((host, pod));
    network.release().await;
    network.release().await;
}

#[tokio::test]
async fn a_plug_that_fails_halfway_is_taken_back() {
    let (pod, _outside) = Netns::pair();
    pod.ip("link add eth1 up type veth peer peer1");
    let network = network_at(&pod);
    let found = network.scan(LIMIT).await.unwrap();
    pod.ip("link del eth1");
    let error = network.plug(&found, 1).await.unwrap_err().to_string();
    assert!(error.contains("eth1"), "{error}");
    assert!(pod.tc("qdisc show dev eth0 ingress").contains("ingress"));
    network.release().await;
    assert_eq!(pod.tc("qdisc show dev eth0 ingress"), "");
    assert!(!pod.ip("link show").contains("_husk"));
    // Nothing to do is no error either.
    let empty = network_of(json!({"type": "network"})).unwrap();
    assert!(empty.plug(&found, 1).await.unwrap().is_empty());
    empty.release().await;
}
