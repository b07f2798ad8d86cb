//! Flags that ask for a part of the host, and what Docker refuses itself.

use std::{fs, net::UdpSocket, time::Duration};

use anyhow::{Result, ensure};
use husk_tests::{docker::BUSYBOX, runtime::Runtime, wait};

use super::network::published;
use crate::context::Context;

/// Sends each datagram back. Debian's busybox has nothing that serves UDP; the Debian tree has perl, which is
/// started where it lies, as it wants a `/dev`.
const ECHO: &str = r"lib=/debian/usr/lib/x86_64-linux-gnu
exec $lib/ld-linux-x86-64.so.2 --library-path $lib /debian/usr/bin/perl -I $lib/perl-base -MSocket -e '
    socket(S, PF_INET, SOCK_DGRAM, 0); bind(S, sockaddr_in(7, INADDR_ANY)) or die;
    while ($from = recv(S, $data, 99, 0)) { send(S, $data, 0, $from) }'";

/// An init of Docker's, a port of UDP, and devices: one that every kernel has, and the machine's disk.
pub fn init_udp_and_devices(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let container = docker.detached(&[
        "--init",
        "--publish",
        "127.0.0.1::7/udp",
        "--device",
        "/dev/null:/dev/other",
        "--device",
        "/dev/vda",
        "--volume",
        "/srv/debian-rootfs:/debian:ro",
        BUSYBOX,
        "sh",
        "-c",
        ECHO,
    ])?;
    let script = "cat /proc/1/comm; echo x >/dev/other; ls /dev/vda";
    let seen = container.sh(script)?;
    ensure!(
        seen.text().starts_with("docker-init") && !seen.errors().contains("other"),
        "{seen:?}"
    );
    // The guest has no disk.
    let has_disk = seen.text().ends_with("/dev/vda");
    ensure!(has_disk == (suite.runtime != Runtime::Husk), "{seen:?}");

    let port = published(&container, "7/udp")?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 16];
    // A datagram may be lost.
    let length = wait::until("an answer by UDP", || {
        socket.send_to(b"ping", ("127.0.0.1", port)).ok()?;
        socket.recv(&mut answer).ok()
    })?;
    ensure!(answer[..length] == *b"ping", "{answer:?}");

    // As a container's first process it would not hear of it.
    container.ok(&["stop", "--time", "100"])?;
    let code = container.inspect("{{.State.ExitCode}}")?;
    ensure!(code == "143", "{code}");
    Ok(())
}

/// What is the host's with runc, and the guest's here; by a runtime whose options mean nothing.
pub fn privileged(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    fs::write("/dev/shm/husk-of-the-host", "")?;
    let script = "uname -r; hostname; ls /dev/shm; test -e /dev/vda || echo no disk; grep CapEff /proc/self/status
        mount -t tmpfs none /tmp && echo mounted; cat /proc/1/comm; ps | grep -c [d]ockerd
        grep -c ::/. /proc/self/cgroup";
    let flags = [
        "run",
        "--rm",
        "--runtime",
        "husk-odd",
        "--privileged",
        "--pid",
        "host",
        "--ipc",
        "host",
        "--uts",
        "host",
        "--cgroupns",
        "host",
    ];
    let ran = docker.run(&[&flags[..], &[BUSYBOX, "sh", "-c", script]].concat());
    fs::remove_file("/dev/shm/husk-of-the-host")?;
    let text = ran?.text();
    let (kernel, rest) = text.split_once('\n').unwrap_or_default();
    ensure!(
        kernel.ends_with("-husk")
            && rest == "husk\nno disk\nCapEff:\t000001ffffffffff\nmounted\ninit\n0\n1",
        "{text}"
    );
    Ok(())
}

/// It takes no container that runs: the same words and codes whatever the runtime.
pub fn dockers_own(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let name = docker.fresh("idle");
    let container = docker.named(&name);
    docker.ok(&["create", "--name", &name, BUSYBOX, "true"])?;
    for (arguments, code, words) in [
        (
            &["run", "--name", &name, BUSYBOX, "true"][..],
            125,
            "is already in use",
        ),
        (&["kill", &name], 1, "is not running"),
        (&["exec", &name, "true"], 1, "is not running"),
        (&["pause", &name], 1, "is not running"),
        (
            &["run", "--rm", "--runtime", "none-such", BUSYBOX, "true"],
            125,
            "unknown or invalid runtime name: none-such",
        ),
        (
            &["run", "--rm", "--user", "none-such", BUSYBOX, "true"],
            125,
            "unable to find user none-such",
        ),
    ] {
        let out = docker.run(arguments)?.exited(code)?;
        ensure!(out.errors().contains(words), "no {words:?} in {out:?}");
    }
    drop(container);
    Ok(())
}
