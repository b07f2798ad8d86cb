//! Docker's networks.

use std::{
    io::Read as _,
    net::{TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    docker::{BUSYBOX, Container},
    wait,
};

use crate::context::Context;

const SLEEP: [&str; 3] = [BUSYBOX, "sleep", "1000000"];

/// Answers each connection with a line.
const SERVER: &str = "while :; do echo here | nc -l -p 80; done";

/// The host's port for a port of a container's.
pub fn published(container: &Container<'_>, port: &str) -> Result<u16> {
    let format = format!("{{{{(index (index .NetworkSettings.Ports \"{port}\") 0).HostPort}}}}");
    Ok(container.inspect(&format)?.parse()?)
}

pub fn bridge(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let server = docker.detached(&["-p", "127.0.0.1::80", BUSYBOX, "sh", "-c", SERVER])?;
    let address = server.inspect("{{.NetworkSettings.IPAddress}}")?;
    let gateway = server.inspect("{{.NetworkSettings.Gateway}}")?;
    let seen = server
        .sh(&format!("ip -o addr show eth0; ping -c 1 -W 60 {gateway}"))?
        .ok()?;
    ensure!(
        seen.text().contains(&format!("inet {address}/")),
        "{seen:?}"
    );
    let port = published(&server, "80/tcp")?;
    wait::until("the published port to answer", || {
        let mut said = String::new();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.read_to_string(&mut said).ok()?;
        (said == "here\n").then_some(())
    })?;
    Ok(())
}

/// Answers every query by `93.184.216.34`, as a nameserver outside would.
fn nameserver(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        let mut answer = query[..length].to_vec();
        // RFC 1035, section 4.1.1: a response, recursion available, one answer and no more records.
        answer[2..4].copy_from_slice(&[0x81, 0x80]);
        answer[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
        // What follows the question is left out: of it there is a name, a type and a class.
        let end = 12
            + query[12..length]
                .iter()
                .position(|b| *b == 0)
                .unwrap_or_default()
            + 5;
        let is_a = query[end - 3] == 1;
        answer.truncate(end);
        match is_a {
            true => answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 93, 184, 216, 34]),
            false => answer[7] = 0,
        }
        let _ = socket.send_to(&answer, from);
    }
}

pub fn names(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let network = docker.fresh("net");
    docker.ok(&["network", "create", &network])?;
    let gateway = docker.ok(&[
        "network",
        "inspect",
        "--format",
        "{{(index .IPAM.Config 0).Gateway}}",
        &network,
    ])?;
    // A nameserver that is not the host's loopback: Docker asks it from the container's namespace.
    let upstream = UdpSocket::bind((&*gateway, 53)).context("a nameserver on the bridge")?;
    let on = ["--network", &network, "--dns", &gateway];
    let server = docker.detached(
        &[
            &on[..],
            &["--network-alias", "web", BUSYBOX, "sh", "-c", SERVER],
        ]
        .concat(),
    )?;
    let client = docker.detached(&[&on[..], &SLEEP].concat())?;
    let address = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
    let address = server.inspect(&address)?;
    for name in [&server.name, "web"] {
        let said = client.sh(&format!("nslookup -type=a {name}"))?.ok()?;
        ensure!(said.text().contains(&address), "{name}: {said:?}");
    }
    let said = client.sh("nc -w 60 web 80")?.ok()?;
    ensure!(said.text() == "here", "{said:?}");
    thread::spawn(move || nameserver(&upstream));
    let outside = client.sh("nslookup -type=a example.org")?.ok()?;
    ensure!(outside.text().contains("93.184.216.34"), "{outside:?}");
    // By the other transport: a length, and a query for "web" (RFC 1035, section 4.2.2).
    let query = r"\0\025\0\7\1\0\0\1\0\0\0\0\0\0\3web\0\0\1\0\1";
    let answer = client.sh(&format!(
        "printf '{query}' | nc -w 5 127.0.0.11 53 | hexdump -C"
    ))?;
    ensure!(
        answer.text().contains("|.") && answer.text().contains("web"),
        "{answer:?}"
    );
    // Another network, while it runs.
    client.ok(&["network", "connect", "bridge"])?;
    wait::until("the second interface", || {
        let seen = client.sh("ip -o addr show eth1").ok()?;
        seen.text().contains("inet 172.").then_some(())
    })?;
    drop((server, client));
    docker.ok(&["network", "rm", &network])?;
    Ok(())
}

pub fn nameserver_of_its_own(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let network = docker.fresh("net");
    docker.ok(&["network", "create", &network])?;
    let script = "nc -l -p 53 -e cat & sleep 1000";
    let server = docker.detached(&["--network", &network, BUSYBOX, "sh", "-c", script])?;
    wait::until("it to listen", || {
        let out = server.sh("netstat -ltun | grep -c ':53 '").ok()?;
        (out.text() == "1").then_some(())
    })?;
    let said = server.sh("echo mine | nc -w 5 127.0.0.1 53")?;
    ensure!(said.text() == "mine", "{said:?}");
    // And Docker's answers all the same.
    let own = server
        .sh(&format!("nslookup -type=a {}", server.name))?
        .ok()?;
    ensure!(own.text().contains("127.0.0.11"), "{own:?}");
    drop(server);
    docker.ok(&["network", "rm", &network])?;
    Ok(())
}
