use proptest::prelude::*;

use super::*;

/// What is said of a change for the worse.
type Cases<T, const N: usize> = [(&'static str, fn(&mut T)); N];

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn interface() -> agent::Interface {
    agent::Interface {
        device: 1,
        name: "eth0".into(),
        mac: MAC.to_vec(),
        ..Default::default()
    }
}

fn route() -> agent::Route {
    agent::Route {
        destination: vec![10, 0, 0, 0],
        prefix_len: 8,
        hops: vec![hop()],
        kind: libc::RTN_UNICAST.into(),
        ..Default::default()
    }
}

fn hop() -> agent::NextHop {
    agent::NextHop {
        interface: "eth0".into(),
        weight: 1,
        ..Default::default()
    }
}

fn said(refused: Result<Config, AgentError>) -> String {
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), ttrpc::Code::INVALID_ARGUMENT);
    refused.to_string()
}

fn with_interface(change: impl FnOnce(&mut agent::Interface)) -> Result<Config, AgentError> {
    let mut interface = interface();
    change(&mut interface);
    Config::new(agent::Network {
        interfaces: vec![interface],
        ..Default::default()
    })
}

fn with_route(change: impl FnOnce(&mut agent::Route)) -> Result<Config, AgentError> {
    let mut route = route();
    change(&mut route);
    Config::new(agent::Network {
        routes: vec![route],
        ..Default::default()
    })
}

#[test]
fn an_interface_is_checked() {
    with_interface(|_| {}).unwrap();
    with_interface(|i| i.name = "fifteen.bytes-x".into()).unwrap();
    for name in [
        "",
        ".",
        "..",
        "lo",
        "all",
        "default",
        "sixteen-bytes-xx",
        "a/b",
        "a:b",
        "a b",
        "eth%d",
        "a\0",
    ] {
        let said = said(with_interface(|i| i.name = name.into()));
        assert!(said.contains("name"), "{said}");
    }
    let cases: Cases<agent::Interface, 5> = [
        ("a VM has at most 8", |i| i.device = 8),
        ("a VM has at most 8", |i| i.device = 257),
        ("six bytes", |i| i.mac = vec![2; 5]),
        ("of a station", |i| i.mac = vec![1, 0, 0, 0, 0, 1]),
        ("of a station", |i| i.mac = vec![0; 6]),
    ];
    for (words, change) in cases {
        let said = said(with_interface(change));
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn an_address_is_checked() {
    let with = |ip: &[u8], prefix_len, broadcast: &[u8], scope| {
        with_interface(|i| {
            i.addresses.push(agent::Address {
                ip: ip.to_vec(),
                prefix_len,
                broadcast: broadcast.to_vec(),
                scope,
                ..Default::default()
            });
        })
    };
    with(&[10, 0, 0, 1], 32, &[10, 0, 0, 255], 255).unwrap();
    with(&[1; 16], 128, &[], 0).unwrap();
    let peer = with_interface(|i| {
        i.addresses.push(agent::Address {
            ip: vec![10, 0, 0, 1],
            peer: vec![1; 16],
            ..Default::default()
        });
    });
    assert!(said(peer).contains("mixes IPv4 and IPv6"));
    for (refused, words) in [
        (with(&[], 0, &[], 0), "four bytes or sixteen"),
        (with(&[1; 5], 0, &[], 0), "four bytes or sixteen"),
        (with(&[10, 0, 0, 1], 33, &[], 0), "at most 32 bits"),
        (with(&[1; 16], 129, &[], 0), "at most 128 bits"),
        (with(&[10, 0, 0, 1], 8, &[1; 16], 0), "no broadcast address"),
        (with(&[1; 16], 8, &[1; 4], 0), "no broadcast address"),
        (with(&[10, 0, 0, 1], 8, &[], 256), "not a scope"),
    ] {
        let said = said(refused);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_route_is_checked() {
    with_route(|_| {}).unwrap();
    with_route(|r| {
        r.kind = libc::RTN_BLACKHOLE.into();
        r.hops.clear();
    })
    .unwrap();
    with_route(|r| {
        r.hops = vec![hop(); MOST_HOPS];
        r.hops[1].weight = 256;
        r.metrics = vec![0; 1000];
        r.metrics[RTAX_MAX] = 1;
    })
    .unwrap();
    let cases: Cases<agent::Route, 16> = [
        ("mixes IPv4 and IPv6", |r| r.hops[0].gateway = vec![1; 16]),
        ("mixes IPv4 and IPv6", |r| r.source = vec![1; 16]),
        ("no gateway", |r| r.hops[0].onlink = true),
        ("a kind that is not known: 0", |r| r.kind = 0),
        ("a kind that is not known: 262", |r| r.kind = 262),
        ("leads nowhere", |r| r.kind = libc::RTN_THROW.into()),
        ("has no way", |r| r.hops.clear()),
        ("257 ways", |r| r.hops = vec![hop(); MOST_HOPS + 1]),
        ("the weight 0", |r| r.hops[0].weight = 0),
        ("the weight 257", |r| r.hops[0].weight = 257),
        ("a metric that is not known", |r| r.metrics = vec![1]),
        ("a metric that is not known", |r| {
            r.metrics = vec![1; RTAX_CC_ALGO + 1];
        }),
        ("a metric that is not known", |r| {
            r.metrics = vec![0; RTAX_MAX + 2];
            r.metrics[RTAX_MAX + 1] = 1;
        }),
        ("256 is not a routing protocol", |r| r.protocol = 256),
        ("not the name", |r| r.hops[0].interface = String::new()),
        ("at most 32 bits", |r| r.prefix_len = 256),
    ];
    for (words, change) in cases {
        let said = said(with_route(change));
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn counts_are_bounded_and_names_used_once() {
    let with = |change: fn(&mut agent::Network)| {
        let mut network = agent::Network {
            interfaces: vec![interface()],
            ..Default::default()
        };
        change(&mut network);
        Config::new(network)
    };
    with(|n| n.routes = vec![route(); MOST]).unwrap();
    let cases: Cases<agent::Network, 6> = [
        ("9 interfaces: at most 8", |n| {
            n.interfaces = vec![interface(); 9];
        }),
        ("1025 routes", |n| n.routes = vec![route(); MOST + 1]),
        ("1025 neighbours", |n| {
            n.neighbours = vec![agent::Neighbour::new(); MOST + 1];
        }),
        ("1025 addresses", |n| {
            for interface in &mut n.interfaces {
                interface.addresses = vec![agent::Address::new(); MOST + 1];
            }
        }),
        ("used once", |n| {
            n.interfaces.push(agent::Interface {
                device: 2,
                ..interface()
            });
        }),
        ("used once", |n| {
            n.interfaces.push(agent::Interface {
                name: "eth1".into(),
                ..interface()
            });
        }),
    ];
    for (words, change) in cases {
        let said = said(with(change));
        assert!(said.contains(words), "{said}");
    }
}

proptest! {
    #[test]
    fn a_name_is_one_component_of_a_path(name in "\\PC{0,20}") {
        if let Ok(name) = Name::new(name) {
            let path = std::path::Path::new("/conf").join(name.as_str());
            prop_assert_eq!(path.parent(), Some(std::path::Path::new("/conf")));
            prop_assert_eq!(path.file_name(), Some(name.as_str().as_ref()));
            prop_assert!(name.as_str().len() <= 15);
        }
    }

    #[test]
    fn an_address_is_in_its_network(ip in prop_oneof![any::<[u8; 4]>().prop_map(|ip| ip.to_vec()), any::<[u8; 16]>().prop_map(|ip| ip.to_vec())], len in 0_u32..129) {
        let bits = ip.len() * 8;
        let len = len.min(bits as u32);
        let address = agent::Address { ip: ip.clone(), prefix_len: len, ..Default::default() };
        let network = Address::new(address).unwrap().network();
        let octets = match network.ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
        for at in 0..bits {
            let wanted = if at < len as usize { bit(&ip, at) } else { 0 };
            prop_assert_eq!(bit(&octets, at), wanted);
        }
        prop_assert_eq!(u32::from(network.len), len);
    }

    #[test]
    fn a_prefix_is_what_the_kernel_reads(bytes in prop::collection::vec(any::<u8>(), 0..20), len in 0_u32..300) {
        let bits = bytes.len() as u32 * 8;
        match Prefix::new(&bytes, len) {
            Ok(prefix) => {
                prop_assert!(matches!(bits, 32 | 128) && len <= bits);
                prop_assert_eq!(u32::from(prefix.len), len);
            }
            Err(_) => prop_assert!(!matches!(bits, 32 | 128) || len > bits),
        }
    }
}
