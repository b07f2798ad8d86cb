//! What a pod's network is made of, as found on the host and as the agent gets it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_protocol::agent;

/// The network of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Interfaces that the guest gets, in the kernel's order. The place in this list is the number of the VM's device.
    pub interfaces: Vec<Interface>,
    /// Routes, in an order in which they can be added.
    pub routes: Vec<Route>,
    /// Neighbours that were set by hand.
    pub neighbours: Vec<Neighbour>,
}

/// An Ethernet interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index in the namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What the kernel calls its kind (veth, macvlan, ipvlan, …); empty for a plain device.
    pub kind: String,
    /// MAC address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses, in the order they were added.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Length of its network's prefix, in bits.
    pub prefix_len: u8,
    /// Broadcast address, where one is set.
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The address at the other end, of which `prefix_len` speaks then.
    pub peer: Option<IpAddr>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to; the unspecified address of the family with prefix length 0 is the default route.
    pub destination: IpAddr,
    /// Length of its prefix, in bits.
    pub prefix_len: u8,
    /// Where it leads: several ways share the traffic, none is nowhere (blackhole and the like).
    pub hops: Vec<NextHop>,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTN_*`.
    pub kind: u8,
    /// `RTPROT_*`.
    pub protocol: u8,
    /// Metric; 0 where none is given.
    pub metric: u32,
    /// `RTAX_n` at place n; 0 where nothing is given.
    pub metrics: Vec<u32>,
}

/// One way of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextHop {
    /// Via; `None` is on the link.
    pub gateway: Option<IpAddr>,
    /// Name of the interface.
    pub interface: String,
    /// The gateway counts as reachable without a route to it.
    pub onlink: bool,
    /// Its share beside that of the others, 1 to 256.
    pub weight: u16,
}

/// A neighbour entry that was set by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Name of the interface.
    pub interface: String,
    /// IP address.
    pub ip: IpAddr,
    /// MAC address.
    pub mac: [u8; 6],
}

/// Puts routes into an order in which a kernel takes them: it wants to know how to reach a gateway when it is told of it, and that
/// is what routes on the link say. Otherwise the order stays.
pub fn order(routes: &mut [Route]) {
    routes.sort_by_key(|route| route.hops.iter().any(|hop| hop.gateway.is_some()));
}

impl Interface {
    /// Whether it has an address that somebody has given it: the kernel gives each one of its link.
    pub fn is_addressed(&self) -> bool {
        let is_of_link = |ip| matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip));
        self.addresses.iter().any(|a| !is_of_link(a.ip))
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

impl From<&Found> for agent::Network {
    fn from(found: &Found) -> Self {
        let interfaces = found.interfaces.iter().zip(0..);
        Self {
            interfaces: interfaces
                .map(|(interface, device)| agent::Interface {
                    device,
                    ..interface.into()
                })
                .collect(),
            routes: found.routes.iter().map(Into::into).collect(),
            neighbours: found.neighbours.iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

impl From<&Interface> for agent::Interface {
    fn from(interface: &Interface) -> Self {
        Self {
            name: interface.name.clone(),
            mac: interface.mac.into(),
            mtu: interface.mtu,
            addresses: interface.addresses.iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

impl From<&Address> for agent::Address {
    fn from(address: &Address) -> Self {
        Self {
            ip: octets(address.ip),
            prefix_len: address.prefix_len.into(),
            broadcast: address
                .broadcast
                .map(|ip| ip.octets().into())
                .unwrap_or_default(),
            scope: address.scope.into(),
            peer: address.peer.map(octets).unwrap_or_default(),
            ..Self::default()
        }
    }
}

impl From<&Route> for agent::Route {
    fn from(route: &Route) -> Self {
        Self {
            destination: octets(route.destination),
            prefix_len: route.prefix_len.into(),
            hops: route.hops.iter().map(Into::into).collect(),
            source: route.source.map(octets).unwrap_or_default(),
            scope: route.scope.into(),
            kind: route.kind.into(),
            protocol: route.protocol.into(),
            metric: route.metric,
            metrics: route.metrics.clone(),
            ..Self::default()
        }
    }
}

impl From<&NextHop> for agent::NextHop {
    fn from(hop: &NextHop) -> Self {
        Self {
            gateway: hop.gateway.map(octets).unwrap_or_default(),
            interface: hop.interface.clone(),
            onlink: hop.onlink,
            weight: hop.weight.into(),
            ..Self::default()
        }
    }
}

impl From<&Neighbour> for agent::Neighbour {
    fn from(neighbour: &Neighbour) -> Self {
        Self {
            interface: neighbour.interface.clone(),
            ip: octets(neighbour.ip),
            mac: neighbour.mac.into(),
            ..Self::default()
        }
    }
}
