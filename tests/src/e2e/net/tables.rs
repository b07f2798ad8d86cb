//! Addresses and routes of the guest are those of the namespace, whatever the kernel would have made of the addresses.

use super::*;

/// What busybox's `ip`, which host and image both have, says of addresses and routes.
fn tables(ip: impl Fn(&[&str]) -> Result<String>) -> Result<Vec<String>> {
    let addresses = ip(&["-o", "addr", "show", "dev", "eth0"])?;
    // What stands before is the interface's number.
    let addresses = addresses.lines().filter_map(|l| l.split_once(" inet"));
    // How the guest came to have an address is its own matter: none is tested for duplicates (IFA_F_NODAD, 02 here), and where the
    // kernel's route had gone, it is not made.
    let plain = |line: &str| line.replace(" flags 02", "").replace(" noprefixroute", "");
    let mut lines: Vec<String> = addresses.map(|(_, rest)| plain(rest)).collect();
    for family in ["-4", "-6"] {
        let routes = ip(&[family, "route"])?;
        lines.extend(routes.lines().map(|line| line.trim().to_owned()));
    }
    lines.sort();
    Ok(lines)
}

fn tables_of(netns: &str) -> Result<Vec<String>> {
    let inside = ["ip", "netns", "exec", netns, "busybox", "ip"];
    tables(|arguments| host::run(&[&inside, arguments].concat()))
}

/// Whoever has ping comes to another pod by the host, although their addresses are of one network.
pub fn point_to_point(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let (a, b) = (pod_on(cri, "ptp")?, pod_on(cri, "ptp")?);
    let (in_a, _in_b) = (a.start(container(&SLEEP))?, b.start(container(&SLEEP))?);
    let netns = a.netns()?;
    let left = tables_of(netns.rsplit('/').next().unwrap_or_default())?;
    let ours = tables(|arguments| in_a.exec(&[&["ip"], arguments].concat())?.ok())?;
    ensure!(ours == left, "{ours:#?}, CNI left {left:#?}");
    let by_the_host = "10.93.0.0/16 via 10.93.0.1 dev eth0";
    ensure!(ours.iter().any(|l| l.starts_with(by_the_host)), "{ours:#?}");
    for ip in b.ips()?.iter().map(String::as_str).chain(["10.93.0.1"]) {
        in_a.exec(&["ping", "-c", "3", "-W", "30", ip])?
            .ok()
            .with_context(|| format!("pod to {ip}"))?;
    }
    for ip in a.ips()? {
        host::run(&["ping", "-c", "3", "-W", "30", &ip])
            .with_context(|| format!("host to {ip}"))?;
    }
    Ok(())
}

/// As Calico does it, and what else a namespace may have.
pub fn by_hand(suite: &Context) -> Result<()> {
    let netns = host::Netns::new("husk-hand")?;
    let n = netns.0;
    for command in [
        "link add husk-hand-h type veth peer name eth0 netns husk-hand",
        "addr add 169.254.1.1/32 dev husk-hand-h",
        "link set husk-hand-h up",
        "route add 10.94.0.2 dev husk-hand-h",
        "-n husk-hand link set lo up",
        "-n husk-hand addr add 10.94.0.2/32 dev eth0",
        "-n husk-hand addr add 10.95.0.2 peer 10.95.0.1/32 dev eth0",
        "-n husk-hand addr add fd00:94::2/64 dev eth0 nodad",
        "-n husk-hand link set eth0 up",
        "-n husk-hand -6 route del fd00:94::/64 dev eth0",
        "-n husk-hand route add 169.254.1.1 dev eth0 scope link",
        "-n husk-hand route add default via 169.254.1.1 dev eth0 mtu 1400",
        "-n husk-hand route add blackhole 10.96.0.0/16",
        "-n husk-hand -6 route add default nexthop via fe80::1 dev eth0 nexthop via fe80::2 dev eth0",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        host::run(&[&["ip"], &words[..]].concat())?;
    }
    // Of its link's making, which takes a moment.
    let left = wait::until("the namespace to have its link-local address", || {
        let tables = tables_of(n).ok()?;
        let is_there = |l: &String| l.contains("fe80::") && l.contains("scope link");
        let is_tested = |l: &String| l.contains("tentative");
        (tables.iter().any(is_there) && !tables.iter().any(is_tested)).then_some(tables)
    })?;
    let id = suite.containerd.fresh_id("hand");
    let path = format!("network:/run/netns/{n}");
    let flags = ["--detach", "--with-ns", &path];
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &flags, &SLEEP);
    husk_tests::ctr::output(&mut command)?.ok()?;
    let running = suite.started(id);
    let ours = tables(|arguments| {
        let said = running.exec(&[&["ip"], arguments].concat())?.ok()?;
        Ok(said.text())
    })?;
    ensure!(ours == left, "{ours:#?} instead of {left:#?}");
    running
        .exec(&["ping", "-c", "3", "-W", "30", "169.254.1.1"])?
        .ok()?;
    host::run(&["ping", "-c", "3", "-W", "30", "10.94.0.2"])?;
    Ok(())
}
