//! Reads a network namespace: what the guest must have so that it is the pod.
//!
//! What the guest's kernel makes by itself from the same interfaces and addresses is left out: routes to connected networks,
//! link-local IPv6 addresses, and what router advertisements bring, which the guest hears itself.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol},
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteNextHopFlags, RouteProtocol, RouteType,
        },
    },
};
use tracing::{debug, warn};

use super::{
    NetworkError,
    model::{Address, Found, Interface, Neighbour, Route, order},
    netlink, tap,
};

/// Names of the interfaces that the guest gets, by their index on the host.
type Names = BTreeMap<u32, String>;

/// Reads the namespace in which this socket was opened.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub async fn scan(handle: &Handle) -> Result<Found, NetworkError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list the interfaces"))?;
    let mut interfaces: Vec<Interface> = links.iter().filter_map(interface).collect();
    if interfaces.is_empty() {
        return Ok(Found::default());
    }
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list the addresses"))?;
    for interface in &mut interfaces {
        let own = addresses
            .iter()
            .filter(|message| message.header.index == interface.index);
        interface.addresses = own.filter_map(|m| address(m, interface.mac)).collect();
    }
    let names: Names = interfaces
        .iter()
        .map(|interface| (interface.index, interface.name.clone()))
        .collect();
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        let messages: Vec<RouteMessage> = handle
            .route()
            .get(wanted)
            .execute()
            .try_collect()
            .await
            .map_err(netlink("list the routes"))?;
        routes.extend(messages.iter().filter_map(|m| route(m, &names)));
    }
    order(&mut routes);
    let neighbours: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list the neighbours"))?;
    Ok(Found {
        interfaces,
        routes,
        neighbours: neighbours
            .iter()
            .filter_map(|m| neighbour(m, &names))
            .collect(),
    })
}

/// An interface that the guest gets: one that is up. The kernel puts tunnel devices that nobody asked for into every namespace, down.
fn interface(message: &LinkMessage) -> Option<Interface> {
    let header = &message.header;
    if header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut found = Interface {
        index: header.index,
        name: String::new(),
        kind: String::new(),
        mac: [0; 6],
        mtu: 0,
        addresses: Vec::new(),
    };
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Address(address) => mac = address.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                found.kind = kind.unwrap_or_default();
            }
            _ => {}
        }
    }
    if tap::is_ours(&found) {
        return None;
    }
    if !header.flags.contains(LinkFlags::Up) {
        debug!(interface = found.name, "is down, the guest does not get it");
        return None;
    }
    match mac.filter(|_| header.link_layer_type == LinkLayerType::Ether) {
        Some(mac) => Some(Interface { mac, ..found }),
        None => {
            warn!(
                interface = found.name,
                kind = found.kind,
                "is no Ethernet interface, the guest does not get it"
            );
            None
        }
    }
}

fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Address> {
    // For a point-to-point address IFA_ADDRESS is the peer's.
    let (mut local, mut other, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let mut is_kernels = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(by) => {
                is_kernels = matches!(
                    by,
                    AddressProtocol::LinkLocal | AddressProtocol::RouterAnnouncement
                );
            }
            _ => {}
        }
    }
    let ip = local.or(other)?;
    if let IpAddr::V6(ip) = ip {
        // Kernels before 5.18 do not say which addresses are theirs; the usual link-local one shows by itself.
        let is_temporary = !flags.contains(AddressFlags::Permanent);
        if is_kernels || is_temporary || ip == link_local(mac) {
            return None;
        }
    }
    Some(Address {
        ip,
        prefix_len: message.header.prefix_len,
        broadcast,
        scope: message.header.scope.into(),
    })
}

/// The link-local address that a kernel makes of a MAC address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

fn route(message: &RouteMessage, names: &Names) -> Option<Route> {
    let header = &message.header;
    let leads_nowhere = match header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            true
        }
        // The local table's: the guest's kernel makes them of its addresses.
        _ => return None,
    };
    let is_kernels = matches!(
        header.protocol,
        RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    if is_kernels || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut table = u32::from(header.table);
    let mut output = None;
    let mut found = Route {
        destination: match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        },
        prefix_len: header.destination_prefix_length,
        gateway: None,
        interface: String::new(),
        source: None,
        scope: header.scope.into(),
        kind: header.kind.into(),
        metric: 0,
        mtu: 0,
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(to) => found.destination = ip(to)?,
            RouteAttribute::Gateway(via) => found.gateway = ip(via),
            RouteAttribute::PrefSource(from) => found.source = ip(from),
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Priority(metric) => found.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                found.mtu = mtu.unwrap_or(0);
            }
            RouteAttribute::MultiPath(hops) => {
                let hop = hops.first()?;
                warn!(
                    to = %found.destination, ways = hops.len(),
                    "a route with several ways: the guest gets the first"
                );
                output = Some(hop.interface_index);
                found.onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
                found.gateway = hop.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Gateway(via) => ip(via),
                    _ => None,
                });
            }
            RouteAttribute::Via(_) | RouteAttribute::EncapType(_) => {
                warn!(to = %found.destination, "a route via another protocol: the guest does not get it");
                return None;
            }
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    if !leads_nowhere {
        found.interface.clone_from(names.get(&output?)?);
    }
    Some(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, names: &Names) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = names.get(&message.header.ifindex)?.clone();
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                ip = Some((*v4).into());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                ip = Some((*v6).into());
            }
            NeighbourAttribute::LinkLayerAddress(address) => {
                mac = address.as_slice().try_into().ok();
            }
            _ => {}
        }
    }
    Some(Neighbour {
        interface,
        ip: ip?,
        mac: mac?,
    })
}
