//! Networks that are really there: each test has namespaces, interfaces and frames of its own.

mod frames;
mod names;
pub mod netns;

use std::{net::IpAddr, path::Path};

use husk_protocol::agent;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    LIMIT, Network, NetworkError, fills_new_namespace, has_resolver,
    model::{self, Address, Found, NextHop, Route},
    namespace::Namespace,
    routes,
};
use crate::{error::chain, pod::PodSpec, spec::BundleSpec};

use netns::Netns;

/// The network of a pod whose namespace entry is this; JSON null for none.
fn network_of(entry: Value) -> Result<Network, NetworkError> {
    let namespaces: Vec<Value> = [json!({"type": "pid"}), entry]
        .into_iter()
        .filter(|entry| !entry.is_null())
        .collect();
    let spec = spec(json!({"namespaces": namespaces}));
    Network::of_pod(&spec, "pod", None)
}

fn spec(linux: Value) -> PodSpec {
    let spec = json!({"ociVersion": "1.0.2", "root": {"path": "/r"}, "linux": linux});
    PodSpec::of_spec(&BundleSpec::parse(Path::new("/b"), spec.to_string().as_bytes()).unwrap())
}

fn network_at(netns: &Netns) -> Network {
    network_of(json!({"type": "network", "path": netns.path()})).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn routes(found: &Found) -> Vec<String> {
    let line = |route: &Route| {
        let way = |hop: &NextHop| {
            let via = hop.gateway.map_or("link".into(), |g| g.to_string());
            let onlink = if hop.onlink { " onlink" } else { "" };
            let (name, weight) = (&hop.interface, hop.weight);
            format!("via {via} dev {name} weight {weight}{onlink}")
        };
        let ways: Vec<String> = route.hops.iter().map(way).collect();
        let metrics: Vec<_> = (0..).zip(&route.metrics).filter(|m| *m.1 != 0).collect();
        format!(
            "{}/{} [{}] kind {} scope {} proto {} metric {} metrics {metrics:?} src {:?}",
            route.destination,
            route.prefix_len,
            ways.join(", "),
            route.kind,
            route.scope,
            route.protocol,
            route.metric,
            route.source,
        )
    };
    found.routes.iter().map(line).collect()
}

/// Of the link: the operator's own, and what a kernel makes of the address 02:00:00:00:00:07.
const LINK_LOCAL: [&str; 2] = ["fe80::77", "fe80::ff:fe00:7"];

#[tokio::test]
async fn everything_that_cni_leaves_is_found() {
    let (pod, outside) = Netns::pair();
    outside.ip("link add unused type veth peer name down0");
    pod.take(&outside, "down0");
    for command in [
        "link set eth0 address 02:00:00:00:00:07 mtu 1400",
        "addr add 10.0.1.2/32 dev eth0 scope link",
        "addr add 10.0.2.2/24 broadcast 10.0.2.255 dev eth0",
        "addr add fe80::77/64 dev eth0 nodad",
        "addr add fe80::ff:fe00:7/64 dev eth0 nodad",
        "addr add 10.0.3.2 peer 10.0.4.0/24 dev eth0",
        "route del 10.0.2.0/24 dev eth0",
        "route add default via 10.0.0.1 mtu 1300 initcwnd 20 congctl reno",
        "route add 10.8.0.0/16 nexthop via 10.0.0.1 weight 3 nexthop via 172.16.0.1 dev eth0 onlink",
        "route add 10.8.0.0/16 via 10.0.0.1 dsfield 0x10",
        "-6 route add fd07::/16 dev eth0 proto kernel expires 600",
        "-6 route add fd08::/16 nexthop via fd00::1 nexthop via fd00::3",
        "route add 169.254.1.1/32 dev eth0 scope link",
        "route add 192.168.0.0/16 via 172.16.0.1 dev eth0 onlink metric 50",
        "route add 10.9.0.0/16 dev eth0 src 10.0.2.2",
        "route add blackhole 10.66.0.0/16",
        "route add 10.77.0.0/16 via 10.0.0.1 table 100",
        "-6 route add default via fd00::1",
        "neigh add 10.0.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        "neigh add 10.0.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud reachable",
    ] {
        pod.ip(command);
    }
    let found = network_at(&pod).scan(LIMIT).await.unwrap();

    let [eth0] = &found.interfaces[..] else {
        panic!("{:?}", found.interfaces)
    };
    assert_eq!(
        (eth0.name.as_str(), eth0.kind.as_str(), eth0.mtu),
        ("eth0", "veth", 1400)
    );
    assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 7]);
    let address = |text: &str, prefix_len, broadcast: Option<&str>, scope| Address {
        ip: ip(text),
        prefix_len,
        broadcast: broadcast.map(|b| b.parse().unwrap()),
        scope,
        peer: (text == "10.0.3.2").then(|| ip("10.0.4.0")),
    };
    let mut addresses = eth0.addresses.clone();
    addresses.sort_by_key(|a| a.ip);
    // The one that the kernel has made of the first MAC address may be there already.
    addresses.retain(|a| {
        a.scope == 0 || a.ip.is_ipv4() || LINK_LOCAL.iter().any(|known| ip(known) == a.ip)
    });
    // What a kernel makes of a MAC address is among them, and the operator's own.
    assert_eq!(
        addresses,
        [
            address("10.0.0.2", 24, None, 0),
            address("10.0.1.2", 32, None, 253),
            address("10.0.2.2", 24, Some("10.0.2.255"), 0),
            address("10.0.3.2", 24, None, 0),
            address("fd00::2", 64, None, 0),
            address("fe80::77", 64, None, 253),
            address("fe80::ff:fe00:7", 64, None, 253),
        ]
    );
    let mut lines = routes(&found);
    let needs_others = |line: &String| line.contains("via ") && !line.contains("via link");
    let first_gateway = lines.iter().position(needs_others).unwrap();
    assert!(lines[first_gateway..].iter().all(needs_others));
    lines.sort();
    assert_eq!(
        lines,
        [
            "0.0.0.0/0 [via 10.0.0.1 dev eth0 weight 1] kind 1 scope 0 proto 3 metric 0 metrics [(2, 1300), (11, 20)] src None",
            "10.0.0.0/24 [via link dev eth0 weight 1] kind 1 scope 253 proto 2 metric 0 metrics [] src Some(10.0.0.2)",
            "10.0.4.0/24 [via link dev eth0 weight 1] kind 1 scope 253 proto 2 metric 0 metrics [] src Some(10.0.3.2)",
            "10.66.0.0/16 [] kind 6 scope 0 proto 3 metric 0 metrics [] src None",
            "10.8.0.0/16 [via 10.0.0.1 dev eth0 weight 3, via 172.16.0.1 dev eth0 weight 1 onlink] kind 1 scope 0 proto 3 metric 0 metrics [] src None",
            "10.9.0.0/16 [via link dev eth0 weight 1] kind 1 scope 253 proto 3 metric 0 metrics [] src Some(10.0.2.2)",
            "169.254.1.1/32 [via link dev eth0 weight 1] kind 1 scope 253 proto 3 metric 0 metrics [] src None",
            "192.168.0.0/16 [via 172.16.0.1 dev eth0 weight 1 onlink] kind 1 scope 0 proto 3 metric 50 metrics [] src None",
            "::/0 [via fd00::1 dev eth0 weight 1] kind 1 scope 0 proto 3 metric 1024 metrics [] src None",
            "fd00::/64 [via link dev eth0 weight 1] kind 1 scope 0 proto 2 metric 256 metrics [] src None",
            "fd08::/16 [via fd00::1 dev eth0 weight 1, via fd00::3 dev eth0 weight 1] kind 1 scope 0 proto 3 metric 1024 metrics [] src None",
            "fe80::/64 [via link dev eth0 weight 1] kind 1 scope 0 proto 2 metric 256 metrics [] src None",
        ]
    );
    let neighbours: Vec<_> = found
        .neighbours
        .iter()
        .map(|n| (n.ip, n.mac, n.interface.as_str()))
        .collect();
    assert_eq!(neighbours, [(ip("10.0.0.9"), [2, 0, 0, 0, 0, 9], "eth0")]);
}

/// A route that has a way out of what the guest does not get keeps the others.
#[tokio::test]
async fn a_way_that_the_guest_has_not_is_left_out() {
    let (pod, _outside) = Netns::pair();
    pod.ip("route add 10.8.0.0/16 nexthop via 10.0.0.1 nexthop dev lo");
    pod.ip("route add 10.9.0.0/16 dev lo");
    let found = network_at(&pod).scan(LIMIT).await.unwrap();
    let lines = routes(&found);
    let has = |to: &str| lines.iter().filter(|l| l.starts_with(to)).count();
    assert_eq!(
        (
            has("10.8.0.0/16 [via 10.0.0.1 dev eth0 weight 1]"),
            has("10.9")
        ),
        (1, 0)
    );
}

#[tokio::test]
async fn an_address_of_the_link_alone_is_not_the_pods() {
    let pod = Netns::new();
    pod.ip("link add eth0 up type veth peer peer0");
    let network = network_at(&pod);
    for (address, is_the_pods) in [("fe80::77/64", false), ("169.254.0.7/16", true)] {
        pod.ip(&format!("addr add {address} dev eth0"));
        let found = network.scan(LIMIT).await.unwrap();
        assert_eq!(found.interfaces[0].is_addressed(), is_the_pods, "{found:?}");
    }
}

#[tokio::test]
async fn policy_rules_are_counted_to_be_told_of() {
    let pod = Netns::new();
    let handle = Namespace::find(pod.path())
        .unwrap()
        .connect()
        .await
        .unwrap();
    assert_eq!(routes::count_rules(&handle).await.unwrap(), 0);
    pod.ip("rule add from 10.0.0.2 lookup 100");
    pod.ip("-6 rule add fwmark 7 lookup main");
    assert_eq!(routes::count_rules(&handle).await.unwrap(), 2);
}

#[tokio::test]
async fn a_namespace_with_nothing_in_it_may_be_filled_later() {
    let pod = Netns::new();
    let network = network_at(&pod);
    let found = network.scan(LIMIT).await.unwrap();
    assert_eq!(found, Found::default());
    assert!(network.waits(&found));
    assert_eq!(network.nics(&found, 1).len(), 1, "a spare one");

    let network = network_of(json!({"type": "network"})).unwrap();
    let found = network.scan(LIMIT).await.unwrap();
    assert!(!network.waits(&found), "a new one stays empty");
    assert_eq!(network.nics(&found, 1).len(), 0);
}

/// Docker and buildah: the spec asks for a new one, and the engine goes to that of the task's pid.
#[tokio::test]
async fn a_new_namespace_that_the_engine_fills_is_the_tasks() {
    let fills = ["moby", "oci-0123456789ab", "k8s.io"].map(fills_new_namespace);
    assert_eq!(fills, [true, true, false]);
    assert!(has_resolver("moby") && !has_resolver("oci-0123456789ab"));
    let task = Netns::new();
    let new = spec(json!({"namespaces": [{"type": "network"}]}));
    let network = Network::of_pod(&new, "pod", Some(task.path())).unwrap();
    assert!(network.waits(&network.scan(LIMIT).await.unwrap()));
    task.ip("link add eth0 up type veth peer peer0");
    assert_eq!(network.scan(LIMIT).await.unwrap().interfaces.len(), 1);
    // The shim's own is never taken for the task's.
    let host = Network::of_pod(&new, "pod", Some(Path::new("/proc/self/ns/net")));
    assert!(matches!(host.unwrap_err(), NetworkError::HostNetwork));
}

#[tokio::test]
async fn as_many_interfaces_as_a_vm_can_have() {
    let pod = Netns::new();
    for number in 0..=LIMIT {
        // The other end stays down and does not count.
        pod.ip(&format!("link add d{number} up type veth peer p{number}"));
    }
    let network = network_at(&pod);
    let error = network.scan(LIMIT).await.unwrap_err().to_string();
    assert!(
        error.contains("9 interfaces (d0, d1,") && error.contains("can have 8"),
        "{error}"
    );
    pod.ip("link del d8");
    let found = network.scan(LIMIT).await.unwrap();
    let nics = |vcpus| network.nics(&found, vcpus);
    assert_eq!(nics(1).len(), 8);
    let pairs = [1, 2, 4, 32].map(|vcpus| nics(vcpus)[0].queue_pairs);
    assert_eq!(pairs, [1, 2, 4, 4]);
}

#[test]
fn the_hosts_network_is_refused() {
    for entry in [
        json!(null),
        json!({"type": "network", "path": "/proc/self/ns/net"}),
        json!({"type": "network", "path": format!("/proc/{}/ns/net", std::process::id())}),
    ] {
        let error = network_of(entry).unwrap_err().to_string();
        assert!(
            error.starts_with("hostNetwork is not possible for a container in a VM"),
            "{error}"
        );
    }
    assert!(network_of(json!({"type": "network", "path": ""})).is_ok());
    let none = Network::of_pod(&spec(Value::Null), "pod", None).unwrap_err();
    assert!(matches!(none, NetworkError::HostNetwork));
    let error = chain(&network_of(json!({"type": "network", "path": "/no/ns"})).unwrap_err());
    assert!(
        error.contains("/no/ns") && error.ends_with("(os error 2)"),
        "{error}"
    );
}

#[tokio::test]
async fn a_namespace_that_is_another_one_by_now_is_not_entered() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("ns");
    let (pod, other) = Netns::pair();
    std::os::unix::fs::symlink(pod.path(), &link).unwrap();
    let network = network_of(json!({"type": "network", "path": link})).unwrap();
    assert_eq!(network.scan(LIMIT).await.unwrap().interfaces.len(), 1);
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(other.path(), &link).unwrap();
    let error = chain(&network.scan(LIMIT).await.unwrap_err());
    assert!(error.contains("another one has taken its place"), "{error}");
}

#[tokio::test]
async fn what_the_agent_gets_says_the_same() {
    let (pod, _outside) = Netns::pair();
    pod.ip("route add default nexthop via 10.0.0.1 weight 2 nexthop via 10.0.0.3 onlink dev eth0");
    pod.ip("neigh add fd00::9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    let found = network_at(&pod).scan(LIMIT).await.unwrap();
    let network = agent::Network::from(&found);
    let [eth0] = &network.interfaces[..] else {
        panic!("{network}")
    };
    assert_eq!((eth0.device, eth0.name.as_str()), (0, "eth0"));
    assert_eq!(eth0.mac, found.interfaces[0].mac);
    let v4 = eth0.addresses.iter().find(|a| a.ip.len() == 4).unwrap();
    assert_eq!((&v4.ip[..], v4.prefix_len), (&[10, 0, 0, 2][..], 24));
    let default = network.routes.iter().find(|r| r.prefix_len == 0).unwrap();
    assert_eq!((&default.destination[..], default.kind), (&[0; 4][..], 1));
    let ways: Vec<_> = default
        .hops
        .iter()
        .map(|hop| {
            (
                &hop.gateway[..],
                hop.interface.as_str(),
                hop.weight,
                hop.onlink,
            )
        })
        .collect();
    assert_eq!(
        ways,
        [
            (&[10, 0, 0, 1][..], "eth0", 2, false),
            (&[10, 0, 0, 3][..], "eth0", 1, true)
        ]
    );
    assert!(default.source.is_empty());
    assert_eq!(network.neighbours[0].ip.len(), 16);
}

fn any_route() -> impl Strategy<Value = Route> {
    let ip = || any::<[u8; 4]>().prop_map(IpAddr::from);
    (ip(), 0u8..33, proptest::option::of(ip()), any::<u32>()).prop_map(
        |(destination, prefix_len, gateway, metric)| Route {
            destination,
            prefix_len,
            hops: vec![NextHop {
                gateway,
                interface: "eth0".into(),
                onlink: false,
                weight: 1,
            }],
            source: None,
            scope: 0,
            kind: 1,
            protocol: 3,
            metric,
            metrics: Vec::new(),
        },
    )
}

proptest! {
    #[test]
    fn routes_on_the_link_come_first_and_none_is_lost(routes in proptest::collection::vec(any_route(), 0..20)) {
        let mut ordered = routes.clone();
        model::order(&mut ordered);
        let (link, via): (Vec<Route>, Vec<Route>) = routes.into_iter().partition(|r| r.hops[0].gateway.is_none());
        prop_assert_eq!(ordered, [link, via].concat());
    }
}
