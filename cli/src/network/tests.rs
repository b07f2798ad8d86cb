use super::*;

#[test]
fn ports_are_dockers() {
    let port = |text: &str| text.parse::<Port>().map(|port| port.to_string());
    assert_eq!(port("8080:80").unwrap(), "0.0.0.0:8080->80/tcp");
    assert_eq!(
        port("127.0.0.1:53:5353/udp").unwrap(),
        "127.0.0.1:53->5353/udp"
    );
    assert_eq!(port("[::1]:1:2").unwrap(), "::1:1->2/tcp");
    assert!(port("80").unwrap().ends_with("->80/tcp"));
    assert!(port("127.0.0.1::80").unwrap().starts_with("127.0.0.1:"));
    for text in [
        "", "x", "0:80", "80:0", "1:2:3", "1:2/icmp", "host:1:2", "70000:1", "1:2:3:4",
    ] {
        assert!(port(text).is_err(), "{text}");
    }
}

#[test]
fn networks_are_made_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::new(dir.path());
    let make = |name: &str, subnet: Option<&str>| {
        let (name, subnet) = (name.to_owned(), subnet.map(str::to_owned));
        create(&networks, &args::NetworkCreate { name, subnet })
    };
    make("one", None).unwrap();
    make("two", Some("10.9.0.0/16")).unwrap();
    assert!(make("one", None).is_err());
    for subnet in ["10.9.0.0/16", "10.1.2.3", "x/24", "10.0.0.0/31"] {
        assert!(make("three", Some(subnet)).is_err(), "{subnet}");
    }
    assert!(make("../x", None).is_err() && make("none", None).is_err());
    let of = |name: &str| {
        let list = networks.find(name).unwrap();
        let plugin = &list["plugins"][0];
        let subnet = &plugin["ipam"]["ranges"][0][0]["subnet"];
        (
            plugin["bridge"].as_str().unwrap().to_owned(),
            subnet.as_str().unwrap().to_owned(),
        )
    };
    assert_eq!(of("one"), ("husk1".to_owned(), "10.44.1.0/24".to_owned()));
    assert_eq!(of("two"), ("husk2".to_owned(), "10.9.0.0/16".to_owned()));
    assert_eq!(networks.all().unwrap(), ["bridge", "none", "one", "two"]);
    assert!(
        networks
            .find("three")
            .unwrap_err()
            .to_string()
            .contains("husk network create three")
    );
}
