//! The requests to the kernel: what each is made of. Layouts and numbers are those of `linux/rtnetlink.h` and its kin.

use std::net::IpAddr;

use super::netlink::{Request, attribute};
use super::request::{Address, Hop, Mac, Neighbour, Route, Target};

/// The gateway is taken to be on the link.
const RTNH_F_ONLINK: u8 = 4;

/// `sizeof(struct rtnexthop)`.
const NEXT_HOP_LEN: usize = 8;

/// Names an interface, which is down.
pub(super) fn name(index: u32, name: &str) -> Request {
    link(index, 0, 0).attribute(libc::IFLA_IFNAME, &[name.as_bytes(), &[0]].concat())
}

/// Gives an interface, which is down, its Ethernet address.
pub(super) fn mac(index: u32, mac: Mac) -> Request {
    link(index, 0, 0).attribute(libc::IFLA_ADDRESS, &mac.0)
}

/// Sets an interface's MTU.
pub(super) fn mtu(index: u32, mtu: u32) -> Request {
    link(index, 0, 0).attribute(libc::IFLA_MTU, &mtu.to_ne_bytes())
}

/// Moves an interface into the network namespace of a process.
pub(super) fn namespace(index: u32, pid: i32) -> Request {
    link(index, 0, 0).attribute(libc::IFLA_NET_NS_PID, &pid.to_ne_bytes())
}

/// Sets an interface up or down.
pub(super) fn up(index: u32, up: bool) -> Request {
    let flag = libc::IFF_UP as u32;
    link(index, if up { flag } else { 0 }, flag)
}

/// `struct ifinfomsg`: `changed` says which flags count.
fn link(index: u32, flags: u32, changed: u32) -> Request {
    Request::new(libc::RTM_SETLINK, libc::NLM_F_ACK)
        .bytes(&[0; 4])
        .bytes(&index.to_ne_bytes())
        .bytes(&flags.to_ne_bytes())
        .bytes(&changed.to_ne_bytes())
}

/// Adds an address to an interface: `struct ifaddrmsg`. `connected`: the kernel makes a route to its network with it.
pub(super) fn address(address: &Address, index: u32, connected: bool) -> Request {
    let ip = octets(&address.prefix.ip);
    let tested = match address.prefix.ip {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => libc::IFA_F_NODAD,
    };
    let alone = if connected {
        0
    } else {
        libc::IFA_F_NOPREFIXROUTE
    };
    let create = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let request = Request::new(libc::RTM_NEWADDR, create)
        .bytes(&[
            family(&address.prefix.ip),
            address.prefix.len,
            0,
            address.scope,
        ])
        .bytes(&index.to_ne_bytes())
        .attribute(libc::IFA_FLAGS, &(tested | alone).to_ne_bytes())
        .attribute(libc::IFA_LOCAL, &ip)
        .attribute(
            libc::IFA_ADDRESS,
            &address.peer.map_or(ip, |peer| octets(&peer)),
        );
    match address.broadcast {
        Some(broadcast) => request.attribute(libc::IFA_BROADCAST, &broadcast.octets()),
        None => request,
    }
}

/// Adds a route, with the indices of the interfaces that its ways lead out of: `struct rtmsg`.
pub(super) fn route(route: &Route, indices: &[u32]) -> Request {
    let destination = &route.destination;
    // IPv4 puts it behind others with this destination and metric; IPv6 does so by itself.
    let behind = if destination.ip.is_ipv4() {
        libc::NLM_F_APPEND
    } else {
        0
    };
    let (kind, source) = match &route.target {
        Target::Out { source, .. } => (libc::RTN_UNICAST, *source),
        Target::Nowhere(kind) => (*kind, None),
    };
    let hops: Vec<_> = indices.iter().copied().zip(route.hops()).collect();
    let flags = match hops.as_slice() {
        [(_, only)] => hop_flags(only),
        _ => 0,
    };
    let mut request = Request::new(
        libc::RTM_NEWROUTE,
        libc::NLM_F_ACK | libc::NLM_F_CREATE | behind,
    )
    .bytes(&[family(&destination.ip), destination.len, 0, 0])
    .bytes(&[libc::RT_TABLE_MAIN, route.protocol, route.scope, kind])
    .bytes(&u32::from(flags).to_ne_bytes());
    if destination.len > 0 {
        request = request.attribute(libc::RTA_DST, &octets(&destination.ip));
    }
    request = match hops.as_slice() {
        [] => request,
        [(index, only)] => request
            .attribute(libc::RTA_OIF, &index.to_ne_bytes())
            .bytes(&gateway(only)),
        several => {
            let several: Vec<u8> = several.iter().flat_map(next_hop).collect();
            request.attribute(libc::RTA_MULTIPATH, &several)
        }
    };
    if let Some(source) = source {
        request = request.attribute(libc::RTA_PREFSRC, &octets(&source));
    }
    if route.metric != 0 {
        request = request.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    let metrics = (0..)
        .zip(&route.metrics)
        .filter(|(_, value)| **value != 0)
        .flat_map(|(kind, value)| attribute(kind, &value.to_ne_bytes()));
    let metrics: Vec<u8> = metrics.collect();
    if !metrics.is_empty() {
        request = request.attribute(libc::RTA_METRICS, &metrics);
    }
    request
}

/// One way of several: `struct rtnexthop`. It is short, so its length fits.
fn next_hop((index, hop): &(u32, &Hop)) -> Vec<u8> {
    let gateway = gateway(hop);
    let length = (NEXT_HOP_LEN + gateway.len()) as u16;
    [
        &length.to_ne_bytes()[..],
        &[hop_flags(hop), hop.extra_weight],
        &index.to_ne_bytes(),
        &gateway,
    ]
    .concat()
}

fn hop_flags(hop: &Hop) -> u8 {
    if hop.onlink { RTNH_F_ONLINK } else { 0 }
}

fn gateway(hop: &Hop) -> Vec<u8> {
    hop.gateway
        .map(|ip| attribute(libc::RTA_GATEWAY, &octets(&ip)))
        .unwrap_or_default()
}

/// Sets a neighbour: `struct ndmsg`.
pub(super) fn neighbour(neighbour: &Neighbour, index: u32) -> Request {
    // What the kernel has learnt gives way.
    let replace = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    Request::new(libc::RTM_NEWNEIGH, replace)
        .bytes(&[family(&neighbour.ip), 0, 0, 0])
        .bytes(&index.to_ne_bytes())
        .bytes(&libc::NUD_PERMANENT.to_ne_bytes())
        .bytes(&[0, libc::RTN_UNICAST])
        .attribute(libc::NDA_DST, &octets(&neighbour.ip))
        .attribute(libc::NDA_LLADDR, &neighbour.mac.0)
}

fn family(ip: &IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
