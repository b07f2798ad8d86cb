//! The network of a guest, made in a network namespace of the test's own; `ip` says what came of it.
//!
//! Its devices have no permanent address, as a VM's have, so one is known as long as it keeps the address that it begins with.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fmt::Debug;
use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_agent::error::AgentError;
use husk_protocol::agent::Network;
use husk_protocol::vm::nic_mac;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

#[path = "net/request.rs"]
mod request;
#[path = "net/table.rs"]
mod table;

use request::{apply, connected, everything_asked, interface, network, route};

/// Runs a test with devices of these names, numbered as they come. Each is connected to a `farN`, which is up.
fn with_devices(names: &[&str], test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("run as root");
            for (nic, name) in (0_u8..).zip(names) {
                let mac = nic_mac(nic).map(|byte| format!("{byte:02x}")).join(":");
                let far = format!("far{nic}");
                ip(&format!(
                    "link add name {name} address {mac} type veth peer name {far}"
                ));
                ip(&format!("link set {far} addrgenmode none up"));
            }
            test();
        });
    });
}

fn ip(arguments: &str) -> String {
    let done = Command::new("ip")
        .args(arguments.split_ascii_whitespace())
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

fn ip_json(arguments: &str) -> Vec<Value> {
    let text = ip(&format!("-j {arguments}"));
    // Where there is nothing, `ip -j` may say nothing.
    match text.trim() {
        "" => Vec::new(),
        text => serde_json::from_str(text).unwrap(),
    }
}

/// Everything that a request may change. (The local table is the kernel's; a worker of its fills that in for IPv6.)
fn everything() -> [String; 3] {
    [ip("-d addr"), routes(), ip("neigh")]
}

/// What follows the link, of which the kernel's own thread (`linkwatch`) learns.
fn eventually<T: Debug + PartialEq<W>, W: Debug>(wanted: W, mut is: impl FnMut() -> T) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let now = is();
        if now == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?} instead of {wanted:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until an interface that is up has its link.
fn is_running(name: &str) {
    eventually("UP", || link(name)["operstate"].clone());
}

/// The routes of both families, however their interface is.
fn routes() -> String {
    (ip("-4 route") + &ip("-6 route")).replace(" linkdown", "")
}

/// These keys of an object, or of each of several.
fn some(of: &[Value], keys: &[&str]) -> Value {
    of.iter()
        .map(|one| {
            keys.iter()
                .map(|&key| (key.to_owned(), one[key].clone()))
                .collect()
        })
        .map(Value::Object)
        .collect()
}

fn link(name: &str) -> Value {
    ip_json(&format!("addr show dev {name}")).remove(0)
}

/// The addresses that can be used, as `ip` writes them, with their scopes.
fn addresses(name: &str) -> Vec<String> {
    link(name)["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|a| a["tentative"] != true)
        .map(|a| {
            let [local, scope] = ["local", "scope"].map(|key| a[key].as_str().unwrap());
            format!("{local}/{} {scope}", a["prefixlen"])
        })
        .collect()
}

#[test]
fn idle_devices_move_to_the_namespace_of_a_process() {
    with_devices(&["eth0", "eth1"], || {
        ip("link set eth1 up");
        let mut there = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; exec sleep 1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let up = there.stdout.as_mut().unwrap().read(&mut [0]).unwrap();
        assert_eq!(up, 1);
        husk_agent::net::move_devices(there.id().cast_signed()).unwrap();
        let at = format!("--net=/proc/{}/ns/net", there.id());
        let moved = Command::new("nsenter")
            .args([&at, "ip", "-j", "link", "show", "type", "veth"])
            .output()
            .unwrap();
        there.kill().unwrap();
        there.wait().unwrap();
        let moved: Vec<Value> = serde_json::from_slice(&moved.stdout).unwrap();
        assert_eq!(some(&moved, &["ifname"]), json!([{"ifname": "eth0"}]));
        // What is configured is somebody's already.
        is_running("eth1");
    });
}

#[test]
fn an_interface_gets_all_that_it_has_on_the_host() {
    with_devices(&["ens7"], || {
        apply(&everything_asked()).unwrap();
        let eth0 = link("eth0");
        assert_eq!(eth0["mtu"], 9000);
        assert!(eth0["flags"].as_array().unwrap().contains(&json!("UP")));
        assert_eq!(eth0["addr_info"][0]["broadcast"], "10.244.1.255");
        assert_eq!(
            addresses("eth0"),
            [
                "10.244.1.5/24 global",
                "fd00::5/64 global",
                "fe80::1234/64 link"
            ]
        );
        let keys = [
            "type", "dst", "gateway", "dev", "metric", "prefsrc", "flags",
        ];
        assert_eq!(
            some(&ip_json("-4 -d route"), &keys),
            json!([
                {"type": "unicast", "dst": "default", "gateway": "10.244.1.1", "dev": "eth0", "metric": null, "prefsrc": null, "flags": []},
                {"type": "unicast", "dst": "default", "gateway": "10.244.1.2", "dev": "eth0", "metric": 50, "prefsrc": null, "flags": []},
                {"type": "blackhole", "dst": "10.1.0.0/16", "gateway": null, "dev": null, "metric": null, "prefsrc": null, "flags": []},
                {"type": "unreachable", "dst": "10.2.0.0/16", "gateway": null, "dev": null, "metric": null, "prefsrc": null, "flags": []},
                {"type": "prohibit", "dst": "10.3.0.0/16", "gateway": null, "dev": null, "metric": null, "prefsrc": null, "flags": []},
                {"type": "throw", "dst": "10.4.0.0/16", "gateway": null, "dev": null, "metric": null, "prefsrc": null, "flags": []},
                {"type": "unicast", "dst": "10.96.0.0/12", "gateway": "169.254.1.1", "dev": "eth0", "metric": null, "prefsrc": "10.244.1.5", "flags": ["onlink"]},
                {"type": "unicast", "dst": "10.244.1.0/24", "gateway": null, "dev": "eth0", "metric": null, "prefsrc": "10.244.1.5", "flags": []},
            ])
        );
        assert_eq!(
            some(&ip_json("-4 route show default metric 0"), &["metrics"]),
            json!([{"metrics": [{"mtu": 1400}]}])
        );
        assert_eq!(
            some(&ip_json("-6 -d route"), &keys),
            json!([
                {"type": "unicast", "dst": "fd00::/64", "gateway": null, "dev": "eth0", "metric": 256, "prefsrc": null, "flags": []},
                {"type": "blackhole", "dst": "fd01::/48", "gateway": null, "dev": "lo", "metric": 1024, "prefsrc": null, "flags": []},
                {"type": "unicast", "dst": "fe80::/64", "gateway": null, "dev": "eth0", "metric": 256, "prefsrc": null, "flags": []},
                {"type": "unicast", "dst": "default", "gateway": "fe80::1", "dev": "eth0", "metric": 100, "prefsrc": "fd00::5", "flags": []},
            ])
        );
        for (ip, lladdr) in [
            ("169.254.1.1", "02:00:00:00:01:01"),
            ("fe80::1", "02:00:00:00:01:02"),
        ] {
            assert_eq!(
                some(
                    &ip_json(&format!("neigh show to {ip}")),
                    &["dev", "lladdr", "state"]
                ),
                json!([{"dev": "eth0", "lladdr": lladdr, "state": ["PERMANENT"]}])
            );
        }
    });
}

#[test]
fn a_request_can_be_repeated_and_what_is_there_stays() {
    with_devices(&["eth0"], || {
        let asked = everything_asked();
        apply(&asked).unwrap();
        // What somebody in the pod did since.
        ip("addr add 10.244.9.9/32 dev eth0");
        ip("-6 addr add fd09::9/128 dev eth0 nodad");
        ip("route add 10.77.0.0/16 via 10.244.1.7");
        is_running("eth0");
        let before = everything();
        apply(&asked).unwrap();
        assert_eq!(everything(), before);
        // A later request that has only what is new.
        apply(&network(
            vec![interface(0, "eth0", &["10.244.1.6/24"])],
            vec![route("10.78.0.0/16", "10.244.1.7", "eth0")],
        ))
        .unwrap();
        let after = everything();
        for (then, now) in before.iter().zip(&after) {
            for line in then.lines() {
                assert!(now.contains(line), "{line:?} has gone from {now}");
            }
        }
        assert!(after[0].contains("inet 10.244.1.6/24"));
        assert!(after[1].contains("10.78.0.0/16 via 10.244.1.7 dev eth0"));
    });
}

#[test]
fn an_interface_gets_the_hosts_ethernet_address() {
    with_devices(&["eth0"], || {
        // As if it had been up before.
        ip("link set eth0 up");
        let mut eth0 = interface(0, "eth0", &[]);
        eth0.mac = vec![0x0a, 0x58, 10, 244, 1, 5];
        apply(&network(vec![eth0], vec![])).unwrap();
        assert_eq!(link("eth0")["address"], "0a:58:0a:f4:01:05");
        assert!(
            link("eth0")["flags"]
                .as_array()
                .unwrap()
                .contains(&json!("UP"))
        );
    });
}

#[test]
fn names_may_change_hands() {
    let devices = ["eth0", "eth1", "eth2"];
    let index = |name: &str| link(name)["ifindex"].as_u64().unwrap();
    with_devices(&devices, || {
        let [zero, one, two] = ["eth0", "eth1", "eth2"].map(index);
        // Round in a circle, with routes that mean the new names.
        apply(&network(
            vec![
                interface(0, "eth1", &["10.0.0.1/24"]),
                interface(1, "eth2", &["10.0.1.1/24"]),
                interface(2, "eth0", &["10.0.2.1/24"]),
            ],
            vec![
                connected("10.0.2.0/24", "eth0", "10.0.2.1"),
                route("0.0.0.0/0", "10.0.2.2", "eth0"),
            ],
        ))
        .unwrap();
        assert_eq!(["eth1", "eth2", "eth0"].map(index), [zero, one, two]);
        assert_eq!(
            some(&ip_json("route show default"), &["dev"]),
            json!([{"dev": "eth0"}])
        );
        // And two that are up by now.
        apply(&network(
            vec![
                interface(0, "eth2", &["10.0.0.1/24"]),
                interface(1, "eth1", &["10.0.1.1/24"]),
            ],
            vec![],
        ))
        .unwrap();
        assert_eq!(["eth2", "eth1", "eth0"].map(index), [zero, one, two]);
        assert_eq!(addresses("eth2"), ["10.0.0.1/24 global"]);
    });
    with_devices(&devices, || {
        let [zero, one, two] = ["eth0", "eth1", "eth2"].map(index);
        // Two that nobody has asked for yet step aside and are found when their time comes.
        apply(&network(vec![interface(2, "eth0", &[])], vec![])).unwrap();
        apply(&network(vec![interface(0, "eth1", &[])], vec![])).unwrap();
        apply(&network(vec![interface(1, "net1", &[])], vec![])).unwrap();
        assert_eq!(["eth1", "net1", "eth0"].map(index), [zero, one, two]);
    });
}

#[test]
fn ipv6_is_what_was_asked_for_and_works_at_once() {
    let devices = ["eth0", "eth1"];
    with_devices(&devices, || {
        apply(&network(
            vec![
                interface(0, "four", &["10.0.0.1/24"]),
                interface(1, "six", &["fd00::1/64"]),
            ],
            vec![],
        ))
        .unwrap();
        assert_eq!(addresses("four"), ["10.0.0.1/24 global"]);
        // The link-local one is the kernel's, from the Ethernet address.
        eventually(
            ["fd00::1/64 global", "fe80::68:75ff:fe73:6b01/64 link"],
            || addresses("six"),
        );
        for file in [
            "four/accept_ra",
            "four/accept_dad",
            "six/accept_ra",
            "six/accept_dad",
        ] {
            let value = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{file}"));
            assert_eq!(value.unwrap(), "0\n", "{file}");
        }
        // IPv6 that comes later.
        apply(&network(
            vec![interface(0, "four", &["fd01::1/64"])],
            vec![],
        ))
        .unwrap();
        eventually(
            [
                "10.0.0.1/24 global",
                "fd01::1/64 global",
                "fe80::68:75ff:fe73:6b00/64 link",
            ],
            || addresses("four"),
        );
    });
}

#[test]
fn an_interface_need_not_have_a_link_yet() {
    with_devices(&["eth0"], || {
        ip("link set far0 down");
        apply(&everything_asked()).unwrap();
        assert_eq!(link("eth0")["operstate"], "LOWERLAYERDOWN");
        let (routes, held) = (routes(), addresses("eth0"));
        assert!(routes.contains("default via fe80::1"), "{routes}");
        ip("link set far0 up");
        is_running("eth0");
        assert_eq!(self::routes(), routes);
        assert_eq!(addresses("eth0"), held);
    });
}

#[test]
fn a_request_that_does_not_fit_changes_nothing() {
    let devices = ["eth0", "eth1"];
    with_devices(&devices, || {
        ip("link add name taken type bridge");
        ip("link set eth1 addrgenmode none up");
        is_running("eth1");
        let before = everything();
        let good = || interface(0, "net0", &["10.0.0.1/24"]);
        let cases = [
            (
                network(vec![good(), interface(5, "net5", &[])], vec![]),
                "the guest has no network device 5 to become net5",
            ),
            (
                network(vec![interface(0, "taken", &[])], vec![]),
                "the guest has another interface taken already",
            ),
            (
                network(vec![interface(0, "eth1", &[])], vec![]),
                "the guest has another interface eth1 already",
            ),
            (
                network(vec![good()], vec![route("0.0.0.0/0", "10.0.0.2", "net9")]),
                "neither the guest nor the request has an interface net9",
            ),
            (
                network(vec![good()], vec![route("0.0.0.0/0", "10.0.0.2", "eth0")]),
                "neither the guest nor the request has an interface eth0",
            ),
            (
                network(vec![good()], vec![route("10.0.0.0/33", "", "net0")]),
                "10.0.0.0/33: the prefix has at most 32 bits",
            ),
        ];
        for (asked, words) in cases {
            let refused = apply(&asked).unwrap_err();
            assert!(matches!(refused, AgentError::Invalid(_)), "{refused:?}");
            assert_eq!(refused.to_string(), words);
        }
        assert_eq!(everything(), before);
    });
}

#[test]
fn what_fails_is_named() {
    with_devices(&["eth0"], || {
        let eth0 = || interface(0, "eth0", &["10.0.0.1/24"]);
        let failed = |asked: Network| {
            let failed = apply(&asked).unwrap_err();
            assert!(matches!(failed, AgentError::Guest { .. }), "{failed:?}");
            failed.to_string()
        };
        assert_eq!(
            failed(network(
                vec![eth0()],
                vec![route("10.5.0.0/16", "10.9.9.9", "eth0")]
            )),
            "adding the route 10.5.0.0/16 via 10.9.9.9 dev eth0: ENETUNREACH: Network is unreachable (Nexthop has invalid gateway)"
        );
        let mut tiny = eth0();
        tiny.mtu = 1;
        let said = failed(network(vec![tiny], vec![]));
        assert!(
            said.starts_with("giving eth0 an MTU of 1: EINVAL: Invalid argument"),
            "{said}"
        );
        let said = failed(network(vec![interface(0, "eth0", &["ff02::1/64"])], vec![]));
        assert!(said.starts_with("adding ff02::1/64 to eth0: "), "{said}");
    });
}
