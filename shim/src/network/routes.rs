//! Reads the main routing table of a namespace, and says what else there is that the guest does not get.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, IpVersion,
    packet_core::Nla as _,
    packet_route::{
        AddressFamily,
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteType,
        },
        rule::{RuleAttribute, RuleMessage},
    },
};
use tracing::{debug, warn};

use super::model::{NextHop, Route};

/// Names of the interfaces that the guest gets, by their index on the host.
pub type Names = BTreeMap<u32, String>;

/// What every namespace has: priority and table of `fib_default_rules_init` (Linux, net/ipv4/fib_rules.c and
/// net/ipv6/fib6_rules.c). local, main, default.
const DEFAULT_RULES: [(u32, u32); 3] = [(0, 255), (32766, 254), (32767, 253)];

/// A route that the guest gets: one of the main table whose ways, or some of them, lead out of its interfaces.
pub fn route(message: &RouteMessage, names: &Names) -> Option<Route> {
    let header = &message.header;
    let leads_nowhere = match header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            true
        }
        // The local table's: the guest's kernel makes them of its addresses.
        _ => return None,
    };
    let is_heard = matches!(
        header.protocol,
        RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    if is_heard || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut found = Route {
        destination: match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        },
        prefix_len: header.destination_prefix_length,
        hops: Vec::new(),
        source: None,
        scope: header.scope.into(),
        kind: header.kind.into(),
        protocol: header.protocol.into(),
        metric: 0,
        metrics: Vec::new(),
    };
    let mut table = u32::from(header.table);
    let mut output = None;
    let mut several = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(to) => found.destination = ip(to)?,
            RouteAttribute::PrefSource(from) => found.source = ip(from),
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Priority(metric) => found.metric = *metric,
            RouteAttribute::Metrics(metrics) => found.metrics = by_number(metrics),
            RouteAttribute::MultiPath(hops) => several = Some(hops),
            // To a network that an advertisement told of: the kernel calls it its own.
            RouteAttribute::CacheInfo(info) if info.expires != 0 => return None,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let to = found.destination;
    if header.tos != 0 || header.source_prefix_length != 0 {
        warn!(%to, "a route for one type of service or source: the guest does not get it");
        return None;
    }
    if leads_nowhere {
        return Some(found);
    }
    found.hops = match several {
        Some(hops) => hops
            .iter()
            .filter_map(|hop| one_of(hop, to, names))
            .collect(),
        None => {
            let onlink = header.flags.contains(RouteFlags::Onlink);
            let hop = way(output?, &message.attributes, to, names);
            hop.map(|hop| NextHop { onlink, ..hop })
                .into_iter()
                .collect()
        }
    };
    (!found.hops.is_empty()).then_some(found)
}

/// One of the ways of a route that has several.
fn one_of(hop: &RouteNextHop, to: IpAddr, names: &Names) -> Option<NextHop> {
    Some(NextHop {
        onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
        // The kernel counts from 0.
        weight: u16::from(hop.hops) + 1,
        ..way(hop.interface_index, &hop.attributes, to, names)?
    })
}

/// A way out of this interface, if the guest has it, and what the attributes say of a gateway.
fn way(output: u32, attributes: &[RouteAttribute], to: IpAddr, names: &Names) -> Option<NextHop> {
    let mut gateway = None;
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(via) => gateway = ip(via),
            RouteAttribute::Via(_) | RouteAttribute::EncapType(_) => {
                warn!(%to, "a route via another protocol: the guest does not get it");
                return None;
            }
            _ => {}
        }
    }
    Some(NextHop {
        gateway,
        interface: names.get(&output)?.clone(),
        onlink: false,
        weight: 1,
    })
}

/// Each value at the place of its number, `RTAX_*`. The name of a congestion control is none.
fn by_number(metrics: &[RouteMetric]) -> Vec<u32> {
    let mut values = Vec::new();
    for metric in metrics {
        let mut bytes = [0; 4];
        if matches!(metric, RouteMetric::CcAlgo(_)) || metric.value_len() != bytes.len() {
            debug!(?metric, "the guest's route does not get this");
            continue;
        }
        metric.emit_value(&mut bytes);
        let place = usize::from(metric.kind());
        if values.len() <= place {
            values.resize(place + 1, 0);
        }
        if let Some(value) = values.get_mut(place) {
            *value = u32::from_ne_bytes(bytes);
        }
    }
    values
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Says so where the namespace's routes depend on more than the destination: the guest has none of its rules, and no table but main.
pub async fn warn_of_rules(handle: &Handle) {
    match count_rules(handle).await {
        Ok(0) => {}
        Ok(rules) => warn!(
            rules,
            "the pod's network namespace has policy rules: the guest gets none of them, and of the routing tables only main"
        ),
        // A kernel without them.
        Err(error) => debug!(%error, "the policy rules cannot be read"),
    }
}

/// How many policy rules the namespace has beside those that every one has.
pub async fn count_rules(handle: &Handle) -> Result<usize, rtnetlink::Error> {
    let mut count = 0;
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules: Vec<RuleMessage> = handle.rule().get(version).execute().try_collect().await?;
        count += rules.iter().filter(|rule| !is_default(rule)).count();
    }
    Ok(count)
}

fn is_default(rule: &RuleMessage) -> bool {
    let (mut priority, mut table) = (0, u32::from(rule.header.table));
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    DEFAULT_RULES.contains(&(priority, table))
}
