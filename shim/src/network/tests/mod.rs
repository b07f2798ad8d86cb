//! Networks that are really there: each test has namespaces, interfaces and frames of its own.

mod frames;
pub mod netns;

use std::{net::IpAddr, path::Path};

use husk_protocol::agent;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    LIMIT, Network, NetworkError, fills_new_namespace,
    model::{self, Address, Found, Route},
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
        let via = route.gateway.map_or("link".into(), |g| g.to_string());
        let (to, len, name) = (route.destination, route.prefix_len, &route.interface);
        let onlink = if route.onlink { " onlink" } else { "" };
        format!(
            "{to}/{len} via {via} dev {name:?} kind {} scope {} metric {} mtu {} src {:?}{onlink}",
            route.kind, route.scope, route.metric, route.mtu, route.source
        )
    };
    found.routes.iter().map(line).collect()
}

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
        "route add default via 10.0.0.1 mtu 1300",
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
    };
    let mut addresses = eth0.addresses.clone();
    addresses.sort_by_key(|a| a.ip);
    // The link-local address that the kernel has made of the MAC is not among them; the operator's own is.
    assert_eq!(
        addresses,
        [
            address("10.0.0.2", 24, None, 0),
            address("10.0.1.2", 32, None, 253),
            address("10.0.2.2", 24, Some("10.0.2.255"), 0),
            address("fd00::2", 64, None, 0),
            address("fe80::77", 64, None, 253),
        ]
    );
    let mut lines = routes(&found);
    let first_gateway = lines.iter().position(|l| !l.contains("via link")).unwrap();
    assert!(
        lines[first_gateway..]
            .iter()
            .all(|l| !l.contains("via link"))
    );
    lines.sort();
    assert_eq!(
        lines,
        [
            r#"0.0.0.0/0 via 10.0.0.1 dev "eth0" kind 1 scope 0 metric 0 mtu 1300 src None"#,
            r#"10.66.0.0/16 via link dev "" kind 6 scope 0 metric 0 mtu 0 src None"#,
            r#"10.9.0.0/16 via link dev "eth0" kind 1 scope 253 metric 0 mtu 0 src Some(10.0.2.2)"#,
            r#"169.254.1.1/32 via link dev "eth0" kind 1 scope 253 metric 0 mtu 0 src None"#,
            r#"192.168.0.0/16 via 172.16.0.1 dev "eth0" kind 1 scope 0 metric 50 mtu 0 src None onlink"#,
            r#"::/0 via fd00::1 dev "eth0" kind 1 scope 0 metric 1024 mtu 0 src None"#,
        ]
    );
    let neighbours: Vec<_> = found
        .neighbours
        .iter()
        .map(|n| (n.ip, n.mac, n.interface.as_str()))
        .collect();
    assert_eq!(neighbours, [(ip("10.0.0.9"), [2, 0, 0, 0, 0, 9], "eth0")]);
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

/// Docker: the spec asks for a new one, and the daemon goes to that of the task's pid.
#[tokio::test]
async fn a_new_namespace_that_the_engine_fills_is_the_tasks() {
    assert!(fills_new_namespace("moby") && !fills_new_namespace("k8s.io"));
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
    pod.ip("route add default via 10.0.0.1");
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
    let [default] = &network.routes[..] else {
        panic!("{network}")
    };
    assert_eq!(default.destination, [0; 4]);
    assert_eq!(
        (&default.gateway[..], default.interface.as_str()),
        (&[10, 0, 0, 1][..], "eth0")
    );
    assert_eq!((default.prefix_len, default.kind), (0, 1));
    assert!(default.source.is_empty());
    assert_eq!(network.neighbours[0].ip.len(), 16);
}

fn any_route() -> impl Strategy<Value = Route> {
    let ip = || any::<[u8; 4]>().prop_map(IpAddr::from);
    (ip(), 0u8..33, proptest::option::of(ip()), any::<u32>()).prop_map(
        |(destination, prefix_len, gateway, metric)| Route {
            destination,
            prefix_len,
            gateway,
            interface: "eth0".into(),
            source: None,
            scope: 0,
            kind: 1,
            metric,
            mtu: 0,
            onlink: false,
        },
    )
}

proptest! {
    #[test]
    fn routes_on_the_link_come_first_and_none_is_lost(routes in proptest::collection::vec(any_route(), 0..20)) {
        let mut ordered = routes.clone();
        model::order(&mut ordered);
        let (link, via): (Vec<Route>, Vec<Route>) = routes.into_iter().partition(|r| r.gateway.is_none());
        prop_assert_eq!(ordered, [link, via].concat());
    }
}
