//! Networks: what CNI made for the pod on the host is what its containers have.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{Cri, Pod, PodContainer, container, v1},
    host, wait,
};

use sha2::{Digest, Sha256};

use crate::{
    Test,
    context::{Context, hex, sha256},
    husk_test, test,
};

mod tables;
mod vhost;

pub const TESTS: &[Test] = &[
    test("a_pod_has_what_cni_left", as_cni_left_it),
    test("packets_go_everywhere", everywhere),
    test("tcp_both_ways_and_many_at_once", tcp),
    test("udp_both_ways", udp),
    test("a_port_of_the_host", host_port),
    test("two_families_and_large_frames", wide),
    test("point_to_point", tables::point_to_point),
    test("routes_by_hand", tables::by_hand),
    test("macvlan", |suite| branched(suite, "macvlan")),
    test("ipvlan", |suite| branched(suite, "ipvlan")),
    test("without_a_network_there_is_loopback", loopback),
    husk_test("a_network_that_comes_later", late),
    husk_test("the_hosts_network_is_refused", host_network),
];

/// What changes the host's settings or devices.
pub const ALONE: &[Test] = &[
    husk_test("the_hosts_kernel_carries_the_packets", vhost::carried).needs(vhost::DEVICE),
    husk_test("without_vhost_net_the_vmm_does", vhost::missing).needs(vhost::DEVICE),
];

/// What takes minutes in the testbed, and asks nothing of containerd.
pub const BULK: &[Test] = &[test("a_gigabyte_arrives_whole", gigabyte)];

/// The host's end of the bridge.
const GATEWAY: &str = "10.88.0.1";

/// Lets a container run on while others look at it.
const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn pod_on<'a>(cri: &'a Cri, network: &str) -> Result<Pod<'a>> {
    cri.run_pod_on(network, cri.pod_config())
}

fn address(pod: &Pod<'_>) -> Result<String> {
    pod.ips()?
        .into_iter()
        .next()
        .context("a pod without an address")
}

/// A server in the pod, once it listens.
fn serve<'a>(pod: &'a Pod<'_>, script: &str, port: u16) -> Result<PodContainer<'a>> {
    listening(pod.start(container(&["sh", "-c", script]))?, port)
}

fn listening(server: PodContainer<'_>, port: u16) -> Result<PodContainer<'_>> {
    let listens = format!("netstat -ltun | grep -q ':{port} '");
    wait::until("the server to listen", || {
        (server.sh(&listens).ok()?.code == 0).then_some(())
    })?;
    Ok(server)
}

fn as_cni_left_it(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let main = pod.start(container(&SLEEP))?;
    let netns = pod.netns()?;
    let netns = netns.rsplit('/').next().unwrap_or_default();
    let ours = main
        .exec(&["ip", "-o", "addr", "show", "dev", "eth0"])?
        .ok()?;
    ensure!(ours.contains(&format!("{}/16", address(&pod)?)), "{ours}");
    for file in ["address", "mtu"] {
        let path = format!("/sys/class/net/eth0/{file}");
        let seen = main.exec(&["cat", &path])?.ok()?;
        let left = host::run(&["ip", "netns", "exec", netns, "cat", &path])?;
        ensure!(
            seen == left,
            "{file}: {seen:?} in the pod, CNI left {left:?}"
        );
    }
    let routes = main.exec(&["ip", "route"])?.ok()?;
    ensure!(
        routes.contains(&format!("default via {GATEWAY} dev eth0"))
            && routes.contains("10.88.0.0/16 dev eth0"),
        "{routes}"
    );
    // Every container of the pod is in it, also one that comes later.
    let same = pod.sh("ip -o addr show dev eth0")?.ok()?;
    ensure!(same == ours, "{same} is not {ours}");
    Ok(())
}

fn everywhere(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let (a, b) = (cri.pod()?, cri.pod()?);
    let (in_a, in_b) = (a.start(container(&SLEEP))?, b.start(container(&SLEEP))?);
    let (ip_a, ip_b) = (address(&a)?, address(&b)?);
    let ping = |to: &str| ["ping", "-c", "3", "-W", "30", to].map(str::to_owned);
    let from = |container: &PodContainer<'_>, to: &str| {
        let command = ping(to);
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        container.exec(&words)?.ok().map(drop)
    };
    from(&in_a, GATEWAY).context("pod to host")?;
    from(&in_a, &ip_b).context("pod to pod")?;
    from(&in_b, &ip_a).context("and back")?;
    from(&in_a, &ip_a).context("pod to itself")?;
    host::run(&["ping", "-c", "3", "-W", "30", &ip_a]).context("host to pod")?;
    Ok(())
}

fn tcp(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let (a, b) = (cri.pod()?, cri.pod()?);
    let ip = address(&a)?;
    let _server = serve(
        &a,
        "mkdir /www && head -c 300000 /dev/urandom >/www/file && sha256sum </www/file >/www/sum && httpd -f -p 80 -h /www",
        80,
    )?;
    let fetch = "test \"$(wget -qO- http://IP/file | sha256sum)\" = \"$(wget -qO- http://IP/sum)\""
        .replace("IP", &ip);
    // From another pod, several at once, and from the host.
    let client = b.start(container(&SLEEP))?;
    let many = format!(
        "for n in 1 2 3 4 5; do ({fetch}) || touch /failed & done; wait; test ! -e /failed"
    );
    client.sh(&many)?.ok().context("pod to pod")?;
    let (mut file, mut sum) = (Vec::new(), Vec::new());
    for (name, into) in [("file", &mut file), ("sum", &mut sum)] {
        let mut connection = TcpStream::connect((ip.as_str(), 80))?;
        connection.set_read_timeout(Some(wait::HANG))?;
        write!(connection, "GET /{name} HTTP/1.0\r\n\r\n")?;
        connection.read_to_end(into)?;
    }
    let body = |answer: &[u8]| {
        let end = answer
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .map(|at| at + 4);
        end.map(|end| answer[end..].to_vec())
            .context("no HTTP answer")
    };
    let sum = String::from_utf8(body(&sum)?)?;
    ensure!(
        sum.starts_with(&sha256(&body(&file)?)),
        "host to pod: {sum}"
    );
    // A port that nobody serves.
    let refused = client.exec(&["nc", "-w", "30", &ip, "81"])?;
    ensure!(refused.err.contains("refused"), "{refused:?}");
    // To the host.
    let listener = TcpListener::bind((GATEWAY, 0))?;
    let port = listener.local_addr()?.port();
    let host = thread::spawn(move || -> Result<String> {
        let (mut connection, _) = listener.accept()?;
        connection.set_read_timeout(Some(wait::HANG))?;
        let mut said = String::new();
        connection.read_to_string(&mut said)?;
        connection.write_all(b"heard")?;
        Ok(said)
    });
    let answer = client
        .sh(&format!("echo hello | nc -w 30 {GATEWAY} {port}"))?
        .ok()?;
    let said = host
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    ensure!(
        said == "hello\n" && answer == "heard",
        "{said:?} {answer:?}"
    );
    Ok(())
}

const UDP_ECHO: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 5353))
while True:
    s.sendto(*s.recvfrom(65536))
";

fn udp(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    // busybox speaks no UDP of its own, Debian's Python does.
    let mut config = container(&["chroot", "/debian", "python3", "-c", UDP_ECHO]);
    config.mounts = vec![v1::Mount {
        host_path: "/srv/debian-rootfs".into(),
        container_path: "/debian".into(),
        readonly: true,
        ..Default::default()
    }];
    let _server = listening(pod.start(config)?, 5353)?;
    let socket = UdpSocket::bind((GATEWAY, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect((address(&pod)?.as_str(), 5353))?;
    // The last is cut up on its way.
    for size in [1, 1400, 20_000] {
        let sent = vec![b'x'; size];
        let mut answer = vec![0; 65_536];
        // One may get lost.
        let len = wait::until("the echo", || {
            socket.send(&sent).ok()?;
            socket.recv(&mut answer).ok()
        })?;
        ensure!(
            answer.get(..len) == Some(&sent[..]),
            "{size} bytes went, {len} came back"
        );
    }
    Ok(())
}

/// Each MiB has its number in it, so that the sum tells the order.
fn gigabyte(suite: &Context) -> Result<()> {
    const MIB: u32 = 1 << 20;
    const MIBS: u32 = 1024;
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let receiver = serve(&pod, "nc -l -p 9000 | sha256sum", 9000)?;
    let mut connection = TcpStream::connect((address(&pod)?.as_str(), 9000))?;
    let mut sum = Sha256::new();
    let mut block = vec![0; MIB as usize];
    for number in 0..MIBS {
        block[..4].copy_from_slice(&number.to_le_bytes());
        sum.update(&block);
        connection.write_all(&block)?;
    }
    drop(connection);
    let seen = receiver.ended()?.ok()?;
    ensure!(seen.starts_with(&hex(&sum.finalize())), "{seen}");
    Ok(())
}

fn host_port(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    config.port_mappings = vec![v1::PortMapping {
        protocol: v1::Protocol::Tcp.into(),
        container_port: 80,
        host_port: 18080,
        host_ip: String::new(),
    }];
    let pod = cri.run_pod(config)?;
    let _server = serve(
        &pod,
        "mkdir /www && echo page >/www/index.html && httpd -f -p 80 -h /www",
        80,
    )?;
    let mut connection = TcpStream::connect((GATEWAY, 18080))?;
    connection.set_read_timeout(Some(wait::HANG))?;
    write!(connection, "GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("page\n"), "{answer}");
    Ok(())
}

fn wide(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let (a, b) = (pod_on(cri, "wide")?, pod_on(cri, "wide")?);
    let in_a = a.start(container(&SLEEP))?;
    let _in_b = b.start(container(&SLEEP))?;
    let six = |pod: &Pod<'_>| {
        let ips = pod.ips()?;
        ips.into_iter()
            .find(|ip| ip.contains(':'))
            .context("no v6 address")
    };
    ensure!(in_a.exec(&["cat", "/sys/class/net/eth0/mtu"])?.ok()? == "9000");
    in_a.exec(&["ping6", "-c", "3", "-W", "30", &six(&b)?])?
        .ok()?;
    in_a.exec(&["ping6", "-c", "3", "-W", "30", "fd00:89::1"])?
        .ok()?;
    // 8972 bytes and two headers are one frame of 9000, which nobody may cut up.
    host::run(&[
        "ping",
        "-c",
        "3",
        "-W",
        "30",
        "-M",
        "do",
        "-s",
        "8972",
        &address(&a)?,
    ])?;
    host::run(&[
        "ping",
        "-c",
        "3",
        "-W",
        "30",
        "-M",
        "do",
        "-s",
        "8952",
        &six(&a)?,
    ])?;
    let routes = in_a.exec(&["ip", "-6", "route"])?.ok()?;
    ensure!(
        routes.contains("default via fd00:89::1 dev eth0"),
        "{routes}"
    );
    Ok(())
}

fn branched(suite: &Context, network: &str) -> Result<()> {
    let cri = suite.cri()?;
    let (a, b) = (pod_on(cri, network)?, pod_on(cri, network)?);
    let (in_a, in_b) = (a.start(container(&SLEEP))?, b.start(container(&SLEEP))?);
    for (from, to) in [(&in_a, &b), (&in_b, &a)] {
        from.exec(&["ping", "-c", "3", "-W", "30", &address(to)?])?
            .ok()?;
    }
    Ok(())
}

fn loopback(suite: &Context) -> Result<()> {
    let out = suite.sh("ls /sys/class/net; ping -c 1 127.0.0.1 >/dev/null && echo up; ip route")?;
    let text = out.ok()?.text();
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("eth")).collect();
    ensure!(
        lines.contains(&"lo") && lines.last() == Some(&"up"),
        "{text}"
    );
    Ok(())
}

/// As Docker does since version 26: the namespace is there at the start, what is in it comes when the task runs.
fn late(suite: &Context) -> Result<()> {
    let netns = host::Netns::new("husk-late")?;
    let id = suite.containerd.fresh_id("late");
    let path = format!("network:/run/netns/{}", netns.0);
    let mut command = suite.containerd.run_command(
        suite.runtime,
        &id,
        &["--detach", "--with-ns", &path],
        &["sleep", "1000000"],
    );
    husk_tests::ctr::output(&mut command)?.ok()?;
    let running = suite.started(id);
    netns.wire("husk-late-h", "10.92.0.1", "eth7", "10.92.0.2")?;
    wait::until("the guest to have the interface", || {
        let out = running.exec(&["ip", "route"]).ok()?;
        out.text()
            .contains("default via 10.92.0.1 dev eth7")
            .then_some(())
    })?;
    running
        .exec(&["ping", "-c", "3", "-W", "30", "10.92.0.1"])?
        .ok()?;
    Ok(())
}

fn host_network(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    let options = security.namespace_options.get_or_insert_default();
    options.network = v1::NamespaceMode::Node.into();
    let refused = cri
        .run_pod(config)
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(
        refused.contains("host") && refused.contains("VM"),
        "{refused:?}"
    );
    let id = suite.containerd.fresh_id("hostnet");
    let mut command =
        suite
            .containerd
            .run_command(suite.runtime, &id, &["--rm", "--net-host"], &["true"]);
    let refused = husk_tests::ctr::output(&mut command)?;
    ensure!(
        refused.code != 0 && refused.errors().contains("VM"),
        "{refused:?}"
    );
    Ok(())
}
