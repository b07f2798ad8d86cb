//! Reads a network namespace: what the guest must have so that it is the pod.
//!
//! Addresses and routes that the kernel has made are read with the others: somebody may have taken one away, as CNI's ptp plugin does with
//! the route to the address's network, and then the guest must not have it either. What router advertisements bring is left out: it
//! lasts only as long as the host hears them.

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol},
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::RouteMessage,
    },
};
use tracing::{debug, warn};

use super::{
    NetworkError,
    model::{Address, Found, Interface, Neighbour, order},
    netlink,
    routes::{self, Names},
    tap,
};

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
        interface.addresses = own.filter_map(address).collect();
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
        routes.extend(messages.iter().filter_map(|m| routes::route(m, &names)));
    }
    order(&mut routes);
    routes::warn_of_rules(handle).await;
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

fn address(message: &AddressMessage) -> Option<Address> {
    // For a point-to-point address IFA_ADDRESS is the peer's.
    let (mut local, mut other, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let mut is_advertised = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(by) => {
                is_advertised = matches!(by, AddressProtocol::RouterAnnouncement);
            }
            _ => {}
        }
    }
    let ip = local.or(other)?;
    // Kernels before 5.18 do not say whose an address is; those of an advertisement end some day.
    let is_temporary = !flags.contains(AddressFlags::Permanent);
    if ip.is_ipv6() && (is_advertised || is_temporary) {
        return None;
    }
    Some(Address {
        ip,
        prefix_len: message.header.prefix_len,
        broadcast,
        scope: message.header.scope.into(),
        peer: other.filter(|other| *other != ip),
    })
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
