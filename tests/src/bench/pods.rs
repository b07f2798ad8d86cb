//! Pods as a kubelet makes them, through CRI: starting, removing, probing, many of them, and their network.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use husk_tests::{
    containerd::Containerd,
    cri::{Cri, Pod, PodContainer, container, v1},
    host,
    runtime::Runtime,
    side_by_side::side_by_side,
    wait,
};
use serde_json::Value;

use crate::{Bench, Row, SAMPLES, Table};

/// gVisor's shim of its own is no package: its pods are runc's shim with another binary.
const RUNTIMES: [Runtime; 3] = [Runtime::Husk, Runtime::Runc, Runtime::Runsc];

/// Pods that stand at once in the end.
const MANY: usize = 40;
/// Pods that are started side by side on the way there.
const AT_ONCE: usize = 2;
/// Execs and round trips of one sample.
const CALLS: u32 = 20;
/// Seconds that a stream runs in one sample.
const STREAM_SECONDS: &str = "2";
/// How long pods have been idle when the host's memory is read.
const SETTLE: Duration = Duration::from_secs(5);

const SLEEP: [&str; 2] = ["sleep", "1000000"];

pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let containerd =
        Containerd::start_with_runtimes(Path::new("/run/husk-bench-cri"), &bench.bin, &RUNTIMES)?;
    let mut kubelets = Vec::new();
    for runtime in RUNTIMES {
        let cri = Cri::connect(&containerd, runtime)?;
        // Warms what later pods share.
        match cri.pod().and_then(|pod| pod.sh("true")?.ok()) {
            Ok(_) => kubelets.push((runtime, cri)),
            Err(error) if runtime == Runtime::Runsc => {
                eprintln!("left out {runtime}: {error:#}");
            }
            Err(error) => return Err(error),
        }
    }
    one_by_one(&kubelets, table)?;
    network(&kubelets, table)?;
    many(&kubelets, table)
}

fn one_by_one(kubelets: &[(Runtime, Cri)], table: &mut Table) -> Result<()> {
    let mut run = Row::new("pod_run", "ms");
    let mut exec = Row::new("pod_exec", "ms");
    let mut remove = Row::new("pod_remove", "ms");
    for _ in 0..SAMPLES {
        for (runtime, cri) in kubelets {
            let begin = Instant::now();
            let pod = cri.pod()?;
            let main = pod.start(container(&SLEEP))?;
            run.add(*runtime, ms(begin));
            let begin = Instant::now();
            for _ in 0..CALLS {
                main.exec(&["true"])?.ok()?;
            }
            exec.add(*runtime, ms(begin) / f64::from(CALLS));
            let begin = Instant::now();
            main.remove()?;
            drop(pod);
            remove.add(*runtime, ms(begin));
        }
    }
    for row in [run, exec, remove] {
        table.push(row);
    }
    Ok(())
}

fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

/// The start of a command line of iperf3 from the Debian tree at this place, without chroot: it wants a `/dev`.
fn iperf(debian: &str) -> Vec<String> {
    let libraries = format!("{debian}/usr/lib/x86_64-linux-gnu");
    vec![
        format!("{libraries}/ld-linux-x86-64.so.2"),
        "--library-path".into(),
        libraries,
        format!("{debian}/usr/bin/iperf3"),
    ]
}

/// A pod with iperf3 of the Debian root file system and an echo server, and its address.
fn served<'a>(pod: &'a Pod<'_>) -> Result<([PodContainer<'a>; 2], String)> {
    let server = [iperf("/debian"), vec!["--server".into()]].concat();
    let mut iperf = container(&server.iter().map(String::as_str).collect::<Vec<_>>());
    iperf.mounts = vec![v1::Mount {
        host_path: "/srv/debian-rootfs".into(),
        container_path: "/debian".into(),
        ..Default::default()
    }];
    let servers = [
        pod.start(iperf)?,
        pod.start(container(&["nc", "-ll", "-p", "7", "-e", "cat"]))?,
    ];
    let ip = pod
        .ips()?
        .into_iter()
        .next()
        .context("a pod without an address")?;
    for port in [5201, 7] {
        wait::until("the server to listen", || {
            TcpStream::connect((ip.as_str(), port)).ok()
        })?;
    }
    Ok((servers, ip))
}

fn network(kubelets: &[(Runtime, Cri)], table: &mut Table) -> Result<()> {
    let mut to = Row::new("net_to_pod", "Mbit/s");
    let mut from = Row::new("net_from_pod", "Mbit/s");
    let mut trip = Row::new("net_round_trip", "µs");
    let connected = kubelets.iter().filter(|k| k.0 != Runtime::Runsc);
    for (runtime, cri) in connected {
        let pod = cri.pod()?;
        let (_servers, ip) = served(&pod)?;
        for _ in 0..SAMPLES {
            to.add(*runtime, stream(&ip, &[])?);
            from.add(*runtime, stream(&ip, &["--reverse"])?);
            let mut connection = TcpStream::connect((ip.as_str(), 7))?;
            connection.set_nodelay(true)?;
            connection.set_read_timeout(Some(wait::HANG))?;
            let begin = Instant::now();
            for _ in 0..CALLS {
                connection.write_all(b"x")?;
                connection.read_exact(&mut [0])?;
            }
            trip.add(*runtime, ms(begin) * 1000.0 / f64::from(CALLS));
        }
    }
    for row in [to, from, trip] {
        table.push(row);
    }
    Ok(())
}

/// Mbit/s of one TCP stream between the host and the pod.
fn stream(ip: &str, more: &[&str]) -> Result<f64> {
    let iperf = iperf("/srv/debian-rootfs");
    let mut client: Vec<&str> = iperf.iter().map(String::as_str).collect();
    client.extend(["--json", "--time", STREAM_SECONDS, "--client", ip]);
    client.extend(more);
    let report: Value = serde_json::from_str(&host::run(&client)?)?;
    let rate = report
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64);
    Ok(rate.context("iperf3 tells no rate")? / 1e6)
}

/// Many pods that stand at once: how many come up a minute, and what each takes of the host's memory.
fn many(kubelets: &[(Runtime, Cri)], table: &mut Table) -> Result<()> {
    let mut rate = Row::new("pods_per_minute", "pods");
    let mut memory = Row::new("pod_memory", "KiB");
    for (runtime, cri) in kubelets {
        let before = available()?;
        let begin = Instant::now();
        let pods = side_by_side(MANY, AT_ONCE, |_| {
            let pod = cri.pod()?;
            pod.start(container(&SLEEP))?;
            Ok(pod)
        })?;
        let count = f64::from(u32::try_from(MANY)?);
        rate.add(*runtime, count * 60.0 / begin.elapsed().as_secs_f64());
        thread::sleep(SETTLE);
        memory.add(*runtime, (before - available()?) / count);
        drop(pods);
    }
    table.push(rate);
    table.push(memory);
    Ok(())
}

/// KiB that the host could still give.
fn available() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let kib = host::field_of(&text, "MemAvailable").context("no MemAvailable")?;
    Ok(f64::from(u32::try_from(kib)?))
}
