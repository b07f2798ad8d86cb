//! Requests, in short.

use std::net::IpAddr;

use husk_agent::error::AgentError;
use husk_agent::net::{Config, configure};
use husk_protocol::agent::{Address, Interface, Neighbour, Network, NextHop, Route};
use husk_protocol::vm::nic_mac;

pub fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub fn interface(device: u8, name: &str, prefixes: &[&str]) -> Interface {
    Interface {
        device: device.into(),
        name: name.into(),
        mac: nic_mac(device).to_vec(),
        addresses: prefixes.iter().map(|prefix| address(prefix)).collect(),
        ..Default::default()
    }
}

pub fn address(prefix: &str) -> Address {
    let (ip, len) = prefix.split_once('/').unwrap();
    Address {
        ip: bytes(ip),
        prefix_len: len.parse().unwrap(),
        ..Default::default()
    }
}

pub fn route(prefix: &str, gateway: &str, interface: &str) -> Route {
    let to = address(prefix);
    Route {
        destination: to.ip,
        prefix_len: to.prefix_len,
        hops: vec![hop(gateway, interface)],
        kind: libc::RTN_UNICAST.into(),
        protocol: libc::RTPROT_BOOT.into(),
        ..Default::default()
    }
}

/// A way via a gateway; an empty one is on the link.
pub fn hop(gateway: &str, interface: &str) -> NextHop {
    NextHop {
        gateway: match gateway {
            "" => Vec::new(),
            gateway => bytes(gateway),
        },
        interface: interface.into(),
        weight: 1,
        ..Default::default()
    }
}

/// The route that a kernel makes with an address; `source` is empty for IPv6.
pub fn connected(prefix: &str, interface: &str, source: &str) -> Route {
    let mut route = route(prefix, "", interface);
    route.protocol = libc::RTPROT_KERNEL.into();
    if source.is_empty() {
        // IP6_RT_PRIO_ADDRCONF
        route.metric = 256;
    } else {
        route.source = bytes(source);
        route.scope = libc::RT_SCOPE_LINK.into();
    }
    route
}

pub fn leads_nowhere(prefix: &str, kind: u8) -> Route {
    Route {
        kind: kind.into(),
        hops: Vec::new(),
        ..route(prefix, "", "")
    }
}

pub fn network(interfaces: Vec<Interface>, routes: Vec<Route>) -> Network {
    Network {
        interfaces,
        routes,
        ..Default::default()
    }
}

pub fn apply(network: &Network) -> Result<(), AgentError> {
    configure(&Config::new(network.clone())?)
}

/// What a pod may well have, all of it.
pub fn everything_asked() -> Network {
    let mut eth0 = interface(0, "eth0", &["10.244.1.5/24", "fd00::5/64", "fe80::1234/64"]);
    eth0.mtu = 9000;
    eth0.addresses[0].broadcast = vec![10, 244, 1, 255];
    eth0.addresses[2].scope = libc::RT_SCOPE_LINK.into();
    let mut default = route("0.0.0.0/0", "10.244.1.1", "eth0");
    // RTAX_MTU
    default.metrics = vec![0, 0, 1400];
    let mut second = route("0.0.0.0/0", "10.244.1.2", "eth0");
    second.metric = 50;
    let mut onlink = route("10.96.0.0/12", "169.254.1.1", "eth0");
    onlink.hops[0].onlink = true;
    onlink.source = bytes("10.244.1.5");
    let mut six = route("::/0", "fe80::1", "eth0");
    six.metric = 100;
    six.source = bytes("fd00::5");
    let mut network = network(
        vec![eth0],
        vec![
            connected("10.244.1.0/24", "eth0", "10.244.1.5"),
            default,
            second,
            onlink,
            leads_nowhere("10.1.0.0/16", libc::RTN_BLACKHOLE),
            leads_nowhere("10.2.0.0/16", libc::RTN_UNREACHABLE),
            leads_nowhere("10.3.0.0/16", libc::RTN_PROHIBIT),
            leads_nowhere("10.4.0.0/16", libc::RTN_THROW),
            connected("fd00::/64", "eth0", ""),
            connected("fe80::/64", "eth0", ""),
            six,
            leads_nowhere("fd01::/48", libc::RTN_BLACKHOLE),
        ],
    );
    for (ip, last) in [("169.254.1.1", 1), ("fe80::1", 2)] {
        network.neighbours.push(Neighbour {
            interface: "eth0".into(),
            ip: bytes(ip),
            mac: vec![2, 0, 0, 0, 1, last],
            ..Default::default()
        });
    }
    network
}
