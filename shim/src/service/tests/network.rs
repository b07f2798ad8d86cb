//! A pod with a network: which the guest is told of, whenever it comes.

use std::{sync::Arc, time::Duration};

use husk_protocol::agent;
use serde_json::json;
use tokio::time::timeout;
use ttrpc::Code;

use super::{
    code,
    world::{Fault, LIMIT, World},
};
use crate::network::tests::netns::Netns;

async fn world(fault: Fault, netns: &Netns) -> World {
    World::in_network(Arc::default(), fault, netns.path().to_str().unwrap()).await
}

/// Names of the interfaces of each network that the guest was given.
fn given(w: &World) -> Vec<Vec<String>> {
    let networks = w.guest.networks.lock().unwrap();
    let names = |n: &agent::Network| n.interfaces.iter().map(|i| i.name.clone()).collect();
    networks.iter().map(names).collect()
}

/// The devices that have their taps, with the number of queues.
fn attached(w: &World) -> Vec<(u8, usize)> {
    let taps = w.vmm.taps.lock().unwrap();
    taps.iter().map(|(nic, fds)| (*nic, fds.len())).collect()
}

#[tokio::test]
async fn the_guest_is_given_what_is_there_at_the_start() {
    let (pod, _outside) = Netns::pair();
    let w = world(Fault::None, &pod).await;
    w.create().await.unwrap();
    assert_eq!(given(&w), [["eth0"]]);
    assert_eq!(w.vmm.plan.get().unwrap().nics.len(), 1);
    assert_eq!(attached(&w), [(0, 1)]);
    assert!(pod.tc("filter show dev eth0 ingress").contains("tap0_husk"));
    w.start("").await.unwrap();
    w.guest.end("c", "", 0);
    w.wait("").await.unwrap();
    w.delete("").await.unwrap();
    w.shutdown().await;
    assert_eq!(pod.tc("qdisc show dev eth0 ingress"), "");
    assert_eq!(given(&w).len(), 1);
}

#[tokio::test]
async fn a_pod_without_a_namespace_of_the_host_has_loopback_only() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    assert!(w.vmm.plan.get().unwrap().nics.is_empty());
    assert!(given(&w).is_empty() && attached(&w).is_empty());
}

#[tokio::test]
async fn the_hosts_network_is_refused() {
    let w = World::in_network(Arc::default(), Fault::None, "/proc/self/ns/net").await;
    let (kind, message) = code(w.create().await);
    assert_eq!(kind, Code::UNKNOWN);
    assert!(
        message.contains("hostNetwork is not possible for a container in a VM"),
        "{message}"
    );
}

/// Docker's way: an empty namespace at Create, and the network before Start.
#[tokio::test]
async fn a_network_that_comes_before_start_is_there_when_the_container_runs() {
    let (other, _outside) = Netns::pair();
    let pod = Netns::new();
    let w = world(Fault::None, &pod).await;
    w.create().await.unwrap();
    assert_eq!(w.vmm.plan.get().unwrap().nics.len(), 1, "a spare one");
    assert!(given(&w).is_empty() && attached(&w).is_empty());
    pod.take(&other, "eth0");
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    pod.ip("link set eth0 up");
    w.start("").await.unwrap();
    assert_eq!(given(&w), [["eth0"]]);
    assert_eq!(attached(&w), [(0, 1)]);
    let calls = w.guest.calls.lock().unwrap().clone();
    let at = |call: &str| calls.iter().position(|c| c == call).unwrap();
    assert!(at("update_network") < at("start c"), "{calls:?}");
}

/// Docker 26's way: a hook that is told a pid sets the network up.
#[tokio::test]
async fn hooks_run_on_the_host_before_the_container_is_made_when_it_runs_and_when_it_cannot() {
    let pod = Netns::new();
    let w = world(Fault::None, &pod).await;
    let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    w.set_hooks(json!({
        "prestart": hook("cat >before"), "poststart": hook("cat >started"), "poststop": hook("cat >after"),
    }));
    let pid = w.create().await.unwrap();
    let state = |name: &str| {
        let text = std::fs::read_to_string(w.bundle().join(name)).ok()?;
        serde_json::from_str::<serde_json::Value>(&text).ok()
    };
    assert_eq!(state("before").unwrap()["pid"], pid);
    assert!(state("started").is_none() && state("after").is_none());
    w.start("").await.unwrap();
    assert_eq!(state("started").unwrap()["status"], "running");
    // One that fails is a start that does, and what was made before it is taken back.
    w.set_hooks(json!({ "prestart": hook("echo no >&2; exit 1"), "poststop": hook("cat >after") }));
    let (_, message) = code(w.create_as("d").await);
    assert!(
        message.contains("prestart hook /bin/sh failed"),
        "{message}"
    );
    assert_eq!(state("after").unwrap()["id"], "d");
}

/// The interface was noticed before the engine was done with it.
#[tokio::test]
async fn what_comes_after_the_interface_is_there_as_well_when_the_container_runs() {
    let (other, _outside) = Netns::pair();
    let pod = Netns::new();
    let w = world(Fault::None, &pod).await;
    w.create().await.unwrap();
    pod.take(&other, "eth0");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    w.called("update_network").await;
    pod.ip("route add default via 10.0.0.1");
    w.start("").await.unwrap();
    let networks = w.guest.networks.lock().unwrap().clone();
    assert!(has_default(networks.last()));
    assert_eq!(attached(&w), [(0, 1)], "plugged once");
}

fn has_default(network: Option<&agent::Network>) -> bool {
    network.is_some_and(|network| network.routes.iter().any(|route| route.prefix_len == 0))
}

#[tokio::test]
async fn a_network_that_comes_after_start_is_noticed() {
    let (other, _outside) = Netns::pair();
    let pod = Netns::new();
    let w = world(Fault::None, &pod).await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    pod.take(&other, "eth0");
    pod.ip("link set eth0 up");
    pod.ip("addr add 10.0.0.2/24 dev eth0");
    pod.ip("route add default via 10.0.0.1");
    w.called("update_network").await;
    let has_route = || {
        let networks = w.guest.networks.lock().unwrap();
        has_default(networks.last())
    };
    let told = async {
        while !has_route() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, told).await.unwrap();
    assert_eq!(attached(&w), [(0, 1)]);
}

#[tokio::test]
async fn a_late_network_that_the_vm_has_no_devices_for_fails_the_start() {
    let pod = Netns::new();
    let w = world(Fault::None, &pod).await;
    w.create().await.unwrap();
    for number in 0..2 {
        pod.ip(&format!("link add eth{number} up type veth peer p{number}"));
    }
    let (_, message) = code(w.start("").await);
    assert!(
        message.contains("2 interfaces (eth0, eth1), its VM can have 1"),
        "{message}"
    );
}

#[tokio::test]
async fn a_start_that_fails_gives_the_interfaces_back() {
    let (pod, _outside) = Netns::pair();
    let w = world(Fault::Silent, &pod).await;
    let (_, message) = code(w.create().await);
    assert!(message.contains("did not report"), "{message}");
    assert_eq!(attached(&w), []);
    w.shutdown().await;
    assert_eq!(pod.tc("qdisc show dev eth0 ingress"), "");
    assert!(!pod.ip("link show").contains("_husk"));
}
