//! The requests to the kernel: what each is made of. Layouts and numbers are those of `linux/rtnetlink.h` and its kin.

use std::net::IpAddr;

use super::netlink::{Request, attribute};
use super::request::{Address, Mac, Neighbour, Route, Target};

/// The gateway is taken to be on the link.
const RTNH_F_ONLINK: u32 = 4;

/// The metric that is a path's MTU.
const RTAX_MTU: u16 = 2;

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

/// Adds an address to an interface: `struct ifaddrmsg`.
pub(super) fn address(address: &Address, index: u32) -> Request {
    let ip = octets(&address.prefix.ip);
    let flags = match address.prefix.ip {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => libc::IFA_F_NODAD as u8,
    };
    let create = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let request = Request::new(libc::RTM_NEWADDR, create)
        .bytes(&[
            family(&address.prefix.ip),
            address.prefix.len,
            flags,
            address.scope,
        ])
        .bytes(&index.to_ne_bytes())
        .attribute(libc::IFA_LOCAL, &ip)
        .attribute(libc::IFA_ADDRESS, &ip);
    match address.broadcast {
        Some(broadcast) => request.attribute(libc::IFA_BROADCAST, &broadcast.octets()),
        None => request,
    }
}

/// Adds a route: `struct rtmsg`.
pub(super) fn route(route: &Route, index: Option<u32>) -> Request {
    let destination = &route.destination;
    // IPv4 has one route for a destination and a metric; IPv6 has one for each interface and gateway.
    let once = if destination.ip.is_ipv4() {
        libc::NLM_F_EXCL
    } else {
        0
    };
    let (kind, flags) = match route.target {
        Target::Out { onlink: true, .. } => (libc::RTN_UNICAST, RTNH_F_ONLINK),
        Target::Out { .. } => (libc::RTN_UNICAST, 0),
        Target::Nowhere(kind) => (kind, 0),
    };
    let mut request = Request::new(
        libc::RTM_NEWROUTE,
        libc::NLM_F_ACK | libc::NLM_F_CREATE | once,
    )
    .bytes(&[family(&destination.ip), destination.len, 0, 0])
    .bytes(&[libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, route.scope, kind])
    .bytes(&flags.to_ne_bytes());
    if destination.len > 0 {
        request = request.attribute(libc::RTA_DST, &octets(&destination.ip));
    }
    if let Some(index) = index {
        request = request.attribute(libc::RTA_OIF, &index.to_ne_bytes());
    }
    if let Target::Out {
        gateway, source, ..
    } = &route.target
    {
        for (kind, ip) in [(libc::RTA_GATEWAY, gateway), (libc::RTA_PREFSRC, source)] {
            if let Some(ip) = ip {
                request = request.attribute(kind, &octets(ip));
            }
        }
    }
    if route.metric != 0 {
        request = request.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    if route.mtu != 0 {
        let metrics = attribute(RTAX_MTU, &route.mtu.to_ne_bytes());
        request = request.attribute(libc::RTA_METRICS, &metrics);
    }
    request
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
