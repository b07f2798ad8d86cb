//! Routes: the guest's table is that of the request.

use husk_protocol::agent::{Interface, NextHop, Route};

use super::request::{apply, bytes, connected, hop, interface, network, route};
use super::{ip, with_devices};

/// What `ip` says of a table, without blanks at the ends of lines.
fn lines(arguments: &str) -> Vec<String> {
    let said = ip(arguments).replace(" linkdown", "");
    said.lines().map(|line| line.trim().to_owned()).collect()
}

/// Twice, as a request may be repeated.
fn ask(interfaces: Vec<Interface>, routes: Vec<Route>) {
    let asked = network(interfaces, routes);
    for _ in 0..2 {
        apply(&asked).unwrap();
    }
}

/// CNI's ptp: the address has a network, and all of it is reached by the gateway.
#[test]
fn the_kernels_route_is_not_there_where_the_request_has_none() {
    with_devices(&["eth0"], || {
        ask(
            vec![interface(0, "eth0", &["10.1.0.2/24", "fd01::2/64"])],
            vec![
                Route {
                    scope: libc::RT_SCOPE_LINK.into(),
                    ..route("10.1.0.1/32", "", "eth0")
                },
                route("fd01::1/128", "", "eth0"),
                route("10.1.0.0/24", "10.1.0.1", "eth0"),
                route("0.0.0.0/0", "10.1.0.1", "eth0"),
                route("fd01::/64", "fd01::1", "eth0"),
            ],
        );
        assert_eq!(
            lines("-4 route"),
            [
                "default via 10.1.0.1 dev eth0",
                "10.1.0.0/24 via 10.1.0.1 dev eth0",
                "10.1.0.1 dev eth0 scope link",
            ]
        );
        assert_eq!(
            lines("-6 route show root fd00::/8"),
            [
                "fd01::1 dev eth0 metric 1024 pref medium",
                "fd01::/64 via fd01::1 dev eth0 metric 1024 pref medium",
            ]
        );
    });
}

#[test]
fn the_kernels_route_may_be_another() {
    with_devices(&["eth0"], || {
        let mut far = connected("10.1.0.0/24", "eth0", "10.1.0.2");
        far.metric = 9;
        let mut narrow = connected("fd01::/64", "eth0", "");
        narrow.metrics = vec![0, 0, 1300];
        let eth0 = interface(0, "eth0", &["10.1.0.2/24", "fd01::2/64"]);
        ask(vec![eth0], vec![far, narrow]);
        let kernels = "10.1.0.0/24 dev eth0 proto kernel scope link src 10.1.0.2 metric 9";
        assert_eq!(lines("-4 route"), [kernels]);
        assert_eq!(
            lines("-6 route show root fd00::/8"),
            ["fd01::/64 dev eth0 proto kernel metric 256 mtu 1300 pref medium"]
        );
    });
}

#[test]
fn routes_to_one_network_stay_beside_each_other() {
    with_devices(&["eth0", "net1"], || {
        ask(
            vec![
                interface(0, "eth0", &["10.1.0.2/24", "fd01::2/64"]),
                interface(1, "net1", &["10.1.0.3/24", "fd01::3/64"]),
            ],
            vec![
                connected("10.1.0.0/24", "eth0", "10.1.0.2"),
                connected("10.1.0.0/24", "net1", "10.1.0.3"),
                connected("fd01::/64", "eth0", ""),
                connected("fd01::/64", "net1", ""),
            ],
        );
        assert_eq!(
            lines("-4 route"),
            [
                "10.1.0.0/24 dev eth0 proto kernel scope link src 10.1.0.2",
                "10.1.0.0/24 dev net1 proto kernel scope link src 10.1.0.3",
            ]
        );
        assert_eq!(
            lines("-6 route show root fd00::/8"),
            [
                "fd01::/64 dev eth0 proto kernel metric 256 pref medium",
                "fd01::/64 dev net1 proto kernel metric 256 pref medium",
            ]
        );
        // As it is where there is nothing to change.
        assert!(!ip("addr").contains("noprefixroute"));
    });
}

/// Calico: a single address, the gateway on the link.
#[test]
fn a_single_address_has_no_network() {
    with_devices(&["eth0"], || {
        let mut gateway = route("169.254.1.1/32", "", "eth0");
        gateway.scope = libc::RT_SCOPE_LINK.into();
        ask(
            vec![interface(0, "eth0", &["10.1.0.2/32"])],
            vec![gateway, route("0.0.0.0/0", "169.254.1.1", "eth0")],
        );
        assert_eq!(
            lines("-4 route"),
            [
                "default via 169.254.1.1 dev eth0",
                "169.254.1.1 dev eth0 scope link",
            ]
        );
        assert!(!ip("addr").contains("noprefixroute"));
    });
}

#[test]
fn a_route_has_its_ways_and_metrics() {
    with_devices(&["eth0"], || {
        let mut shared = route("10.9.0.0/16", "10.1.0.1", "eth0");
        shared.hops.push(NextHop {
            onlink: true,
            weight: 256,
            ..hop("10.7.0.9", "eth0")
        });
        // RTAX_MTU and RTAX_INITCWND.
        shared.metrics = vec![0; 12];
        shared.metrics[2] = 1400;
        shared.metrics[11] = 20;
        let mut six = route("fd09::/16", "fd01::1", "eth0");
        six.hops.push(hop("fd01::9", "eth0"));
        ask(
            vec![interface(0, "eth0", &["10.1.0.2/24", "fd01::2/64"])],
            vec![
                connected("10.1.0.0/24", "eth0", "10.1.0.2"),
                connected("fd01::/64", "eth0", ""),
                shared,
                six,
            ],
        );
        assert_eq!(
            lines("-4 route show 10.9.0.0/16"),
            [
                "10.9.0.0/16 mtu 1400 initcwnd 20",
                "nexthop via 10.1.0.1 dev eth0 weight 1",
                "nexthop via 10.7.0.9 dev eth0 weight 256 onlink",
            ]
        );
        assert_eq!(
            lines("-6 route show fd09::/16"),
            [
                "fd09::/16 metric 1024 pref medium",
                "nexthop via fd01::1 dev eth0 weight 1",
                "nexthop via fd01::9 dev eth0 weight 1",
            ]
        );
    });
}

#[test]
fn an_address_has_its_peer() {
    with_devices(&["eth0"], || {
        let mut eth0 = interface(0, "eth0", &["10.1.0.2/24"]);
        eth0.addresses[0].peer = bytes("10.2.0.7");
        let kernels = connected("10.2.0.0/24", "eth0", "10.1.0.2");
        ask(vec![eth0], vec![kernels]);
        assert!(ip("addr show eth0").contains("inet 10.1.0.2 peer 10.2.0.7/24 scope global"));
        assert_eq!(
            lines("-4 route"),
            ["10.2.0.0/24 dev eth0 proto kernel scope link src 10.1.0.2"]
        );
    });
}
