//! A network that can be asked of the kernel: what a request says, checked once and turned into types.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_protocol::agent;
use husk_protocol::vm::MAX_NICS;

use crate::error::AgentError;

/// Most addresses of one interface, routes, or neighbours of one request: what keeps a request bounded, far from what a pod has.
const MOST: usize = 1024;

/// Most ways of one route, for the same reason; they fit one attribute.
const MOST_HOPS: usize = 256;

/// The highest number of a route's metric (`RTAX_MAX` of `linux/rtnetlink.h`), and the one that is no number but a name.
const RTAX_MAX: usize = 17;
const RTAX_CC_ALGO: usize = 16;

/// The metric of an IPv6 route that the kernel makes with an address (`net/ip6_route.h`).
const IP6_RT_PRIO_ADDRCONF: u32 = 256;

/// Longest name of an interface in bytes (`IFNAMSIZ` less the zero).
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// A network whose parts are each well formed, and fit each other.
#[derive(Debug)]
pub struct Config {
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

/// What a device of the guest is to become.
#[derive(Debug)]
pub(super) struct Interface {
    pub(super) device: u8,
    pub(super) name: Name,
    pub(super) mac: Mac,
    /// `None`: the device's own.
    pub(super) mtu: Option<u32>,
    pub(super) addresses: Vec<Address>,
}

/// An interface's address.
#[derive(Debug)]
pub(super) struct Address {
    pub(super) prefix: Prefix,
    pub(super) broadcast: Option<Ipv4Addr>,
    pub(super) scope: u8,
    /// The address at the other end, of which the prefix's length speaks then.
    pub(super) peer: Option<IpAddr>,
}

/// A route of the main table.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) destination: Prefix,
    pub(super) target: Target,
    pub(super) scope: u8,
    /// `RTPROT_*`: who has made it.
    pub(super) protocol: u8,
    /// Zero: none.
    pub(super) metric: u32,
    /// `RTAX_n` at place n; zero: none.
    pub(super) metrics: Vec<u32>,
}

/// Where a route leads.
#[derive(Debug)]
pub(super) enum Target {
    /// Out, by at least one way.
    Out {
        hops: Vec<Hop>,
        source: Option<IpAddr>,
    },
    /// Nowhere: `RTN_BLACKHOLE` and its like.
    Nowhere(u8),
}

/// One way of a route.
#[derive(Debug)]
pub(super) struct Hop {
    pub(super) interface: Name,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
    /// Its share, less one.
    pub(super) extra_weight: u8,
}

/// A permanent entry of the neighbour table.
#[derive(Debug)]
pub(super) struct Neighbour {
    pub(super) interface: Name,
    pub(super) ip: IpAddr,
    pub(super) mac: Mac,
}

/// An address and how many of its leading bits count, no more than it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) ip: IpAddr,
    pub(super) len: u8,
}

/// The Ethernet address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

/// The name of an interface: one component of a path, no pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name(String);

impl Config {
    /// Checks a request; looks at nothing else.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] saying what is wrong with which part.
    pub fn new(request: agent::Network) -> Result<Self, AgentError> {
        bounded("interfaces", request.interfaces.len(), MAX_NICS)?;
        bounded("routes", request.routes.len(), MOST)?;
        bounded("neighbours", request.neighbours.len(), MOST)?;
        let mut interfaces: Vec<Interface> = Vec::with_capacity(request.interfaces.len());
        for interface in request.interfaces {
            let new = Interface::new(interface)?;
            if interfaces
                .iter()
                .any(|old| old.device == new.device || old.name == new.name)
            {
                return Err(invalid(format!(
                    "network device {} and the name {} are to be used once",
                    new.device, new.name
                )));
            }
            interfaces.push(new);
        }
        Ok(Self {
            interfaces,
            routes: all(request.routes, Route::new)?,
            neighbours: all(request.neighbours, Neighbour::new)?,
        })
    }

    /// The interfaces that routes and neighbours name.
    pub(super) fn named(&self) -> impl Iterator<Item = &Name> {
        let hops = self.routes.iter().flat_map(|route| route.hops());
        hops.map(|hop| &hop.interface)
            .chain(self.neighbours.iter().map(|n| &n.interface))
    }

    /// Whether there is the route that the kernel makes with an address, to its network, if it makes one: whoever made the pod's network may have taken
    /// it away, or put another in its place.
    pub(super) fn connects(&self, interface: &Name, address: &Address) -> bool {
        let network = address.network();
        if network.ip.is_ipv4() && network.len == 32 && address.peer.is_none() {
            // The kernel makes none.
            return true;
        }
        let metric = if network.ip.is_ipv4() {
            0
        } else {
            IP6_RT_PRIO_ADDRCONF
        };
        self.routes.iter().any(|route| {
            let on_link = |hop: &Hop| hop.gateway.is_none() && hop.interface == *interface;
            (route.destination, route.protocol) == (network, libc::RTPROT_KERNEL)
                && route.metric == metric
                && route.metrics.iter().all(|value| *value == 0)
                && route.hops().iter().all(on_link)
        })
    }
}

impl Interface {
    fn new(interface: agent::Interface) -> Result<Self, AgentError> {
        let name = Name::new(interface.name)?;
        if name.as_str() == "lo" {
            return Err(invalid("lo is the loopback interface's name"));
        }
        let device = u8::try_from(interface.device)
            .ok()
            .filter(|&device| usize::from(device) < MAX_NICS)
            .ok_or_else(|| {
                invalid(format!(
                    "{name} is to be network device {}: a VM has at most {MAX_NICS}, from 0",
                    interface.device
                ))
            })?;
        bounded("addresses of an interface", interface.addresses.len(), MOST)?;
        Ok(Self {
            device,
            mac: Mac::new(&interface.mac)?,
            mtu: (interface.mtu != 0).then_some(interface.mtu),
            addresses: all(interface.addresses, Address::new)?,
            name,
        })
    }
}

impl Address {
    fn new(address: agent::Address) -> Result<Self, AgentError> {
        let prefix = Prefix::new(&address.ip, address.prefix_len)?;
        let broadcast = match (prefix.ip, optional_ip(&address.broadcast)?) {
            (_, None) => None,
            (IpAddr::V4(_), Some(IpAddr::V4(broadcast))) => Some(broadcast),
            (_, Some(broadcast)) => {
                return Err(invalid(format!(
                    "{broadcast} is no broadcast address for {prefix}"
                )));
            }
        };
        let peer = optional_ip(&address.peer)?;
        if peer.is_some_and(|peer| peer.is_ipv4() != prefix.ip.is_ipv4()) {
            return Err(invalid(format!("{prefix} mixes IPv4 and IPv6")));
        }
        Ok(Self {
            prefix,
            broadcast,
            scope: byte("scope", address.scope)?,
            peer,
        })
    }

    /// The network that it is in.
    pub(super) fn network(&self) -> Prefix {
        let Prefix { ip, len } = self.prefix;
        let ip = match self.peer.unwrap_or(ip) {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
                Ipv4Addr::from_bits(ip.to_bits() & mask).into()
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
                Ipv6Addr::from_bits(ip.to_bits() & mask).into()
            }
        };
        Prefix { ip, len }
    }

    /// Whether this is an IPv6 address of the link (`fe80::/10`).
    pub(super) fn is_ipv6_link_local(&self) -> bool {
        matches!(self.prefix.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }
}

impl Route {
    fn new(route: agent::Route) -> Result<Self, AgentError> {
        let destination = Prefix::new(&route.destination, route.prefix_len)?;
        let wrong = |what: &str| invalid(format!("the route to {destination} {what}"));
        bounded("ways of a route", route.hops.len(), MOST_HOPS)?;
        let hops = all(route.hops, Hop::new)?;
        let source = optional_ip(&route.source)?;
        let gateways = hops.iter().filter_map(|hop| hop.gateway);
        if gateways
            .chain(source)
            .any(|ip| ip.is_ipv4() != destination.ip.is_ipv4())
        {
            return Err(wrong("mixes IPv4 and IPv6"));
        }
        let target = match (u8::try_from(route.kind), hops.is_empty()) {
            (Ok(libc::RTN_UNICAST), true) => return Err(wrong("has no way")),
            (Ok(libc::RTN_UNICAST), false) => Target::Out { hops, source },
            (
                Ok(
                    kind @ (libc::RTN_BLACKHOLE
                    | libc::RTN_UNREACHABLE
                    | libc::RTN_PROHIBIT
                    | libc::RTN_THROW),
                ),
                leads_nowhere,
            ) => {
                if !leads_nowhere || source.is_some() {
                    return Err(wrong("leads nowhere, and yet somewhere"));
                }
                Target::Nowhere(kind)
            }
            _ => {
                return Err(wrong(&format!(
                    "is of a kind that is not known: {}",
                    route.kind
                )));
            }
        };
        let is_number = |(place, value): (usize, &u32)| {
            *value == 0 || matches!(place, 1..=RTAX_MAX) && place != RTAX_CC_ALGO
        };
        if !route.metrics.iter().enumerate().all(is_number) {
            return Err(wrong("has a metric that is not known"));
        }
        Ok(Self {
            destination,
            target,
            scope: byte("scope", route.scope)?,
            protocol: byte("routing protocol", route.protocol)?,
            metric: route.metric,
            metrics: route.metrics,
        })
    }

    /// Its ways; none where it leads nowhere.
    pub(super) fn hops(&self) -> &[Hop] {
        match &self.target {
            Target::Out { hops, .. } => hops,
            Target::Nowhere(_) => &[],
        }
    }
}

impl Hop {
    fn new(hop: agent::NextHop) -> Result<Self, AgentError> {
        let interface = Name::new(hop.interface)?;
        let gateway = optional_ip(&hop.gateway)?;
        if hop.onlink && gateway.is_none() {
            return Err(invalid(format!(
                "a way out of {interface} has no gateway that could be on the link"
            )));
        }
        let extra_weight = hop.weight.checked_sub(1).map(u8::try_from);
        let Some(Ok(extra_weight)) = extra_weight else {
            return Err(invalid(format!(
                "a way out of {interface} has the weight {}: it is 1 to 256",
                hop.weight
            )));
        };
        Ok(Self {
            interface,
            gateway,
            onlink: hop.onlink,
            extra_weight,
        })
    }
}

impl Neighbour {
    fn new(neighbour: agent::Neighbour) -> Result<Self, AgentError> {
        Ok(Self {
            interface: Name::new(neighbour.interface)?,
            ip: ip(&neighbour.ip)?,
            mac: Mac::new(&neighbour.mac)?,
        })
    }
}

impl Prefix {
    fn new(bytes: &[u8], len: u32) -> Result<Self, AgentError> {
        let ip = ip(bytes)?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        match u8::try_from(len) {
            Ok(len) if len <= most => Ok(Self { ip, len }),
            _ => Err(invalid(format!(
                "{ip}/{len}: the prefix has at most {most} bits"
            ))),
        }
    }
}

impl Mac {
    fn new(bytes: &[u8]) -> Result<Self, AgentError> {
        match <[u8; 6]>::try_from(bytes) {
            // The lowest bit of the first byte makes it a group's.
            Ok(mac @ [first, ..]) if first & 1 == 0 && mac != [0; 6] => Ok(Self(mac)),
            _ => Err(invalid(format!(
                "{bytes:02x?} is not the Ethernet address of a station: six bytes are"
            ))),
        }
    }
}

impl Name {
    /// What the kernel takes (`dev_valid_name`, `sysctl_dev_name_is_allowed`), less `%`, which makes a pattern of it.
    fn new(name: String) -> Result<Self, AgentError> {
        let known = matches!(name.as_str(), "" | "." | ".." | "all" | "default");
        let odd =
            |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_ascii_control();
        if known || name.len() > NAME_MAX || name.contains(odd) {
            return Err(invalid(format!(
                "{name:?} is not the name of a network interface"
            )));
        }
        Ok(Self(name))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

fn invalid(what: impl Into<String>) -> AgentError {
    AgentError::Invalid(what.into())
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), AgentError> {
    if count > most {
        return Err(invalid(format!("{count} {what}: at most {most} are taken")));
    }
    Ok(())
}

fn all<T, U>(from: Vec<T>, new: fn(T) -> Result<U, AgentError>) -> Result<Vec<U>, AgentError> {
    from.into_iter().map(new).collect()
}

fn ip(bytes: &[u8]) -> Result<IpAddr, AgentError> {
    if let Ok(ip) = <[u8; 4]>::try_from(bytes) {
        return Ok(ip.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(ip) => Ok(ip.into()),
        Err(_) => Err(invalid(format!(
            "{bytes:02x?} is not an IP address: four bytes or sixteen are"
        ))),
    }
}

fn optional_ip(bytes: &[u8]) -> Result<Option<IpAddr>, AgentError> {
    match bytes {
        [] => Ok(None),
        bytes => ip(bytes).map(Some),
    }
}

fn byte(what: &str, number: u32) -> Result<u8, AgentError> {
    u8::try_from(number).map_err(|_| invalid(format!("{number} is not a {what}: at most 255 is")))
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.len)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// As `ip route` writes it.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Out { hops, .. } => {
                write!(f, "{}", self.destination)?;
                hops.iter().try_for_each(|hop| write!(f, "{hop}"))
            }
            Target::Nowhere(_) => write!(f, "{} to nowhere", self.destination),
        }
    }
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.interface)
    }
}

/// As `ip neigh` writes it.
impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lladdr {} dev {}", self.ip, self.mac, self.interface)
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
