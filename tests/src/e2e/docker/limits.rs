//! What a container may use, how that changes, and what Docker shows of it.

use anyhow::{Result, ensure};
use husk_tests::{docker::BUSYBOX, wait};
use serde_json::Value;

use crate::context::Context;

pub fn limits(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let container = docker.detached(&[
        "--memory",
        "64m",
        "--memory-swap",
        "64m",
        "--cpus",
        "0.5",
        "--pids-limit",
        "77",
        BUSYBOX,
        "sleep",
        "1000000",
    ])?;
    let figures = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    let at_first = container.sh(figures)?.ok()?.text();
    ensure!(at_first == "67108864\n50000 100000\n77", "{at_first}");
    // What does not fit is killed, and the container is not.
    container
        .sh("dd if=/dev/zero of=/dev/null bs=100M count=1")?
        .exited(137)?;
    container.ok(&[
        "update",
        "--memory",
        "96m",
        "--memory-swap",
        "96m",
        "--cpus",
        "0.25",
        "--pids-limit",
        "55",
    ])?;
    let then = container.sh(figures)?.ok()?.text();
    ensure!(then == "100663296\n25000 100000\n55", "{then}");

    let stats = container.ok(&["stats", "--no-stream", "--format", "json"])?;
    let stats: Value = serde_json::from_str(&stats)?;
    let says = |key: &str, wanted: &str| stats[key].as_str().is_some_and(|s| s.ends_with(wanted));
    ensure!(says("MemUsage", "/ 96MiB") && says("PIDs", "1"), "{stats}");
    // Whatever stands for it on the host.
    let top = container.ok(&["top"])?;
    ensure!(top.lines().count() == 2, "{top}");

    container
        .sh("(while :; do date +%s >/n; sleep 0.1; done) >/dev/null 2>&1 &")?
        .ok()?;
    wait::until("it to count", || {
        (container.sh("test -s /n").ok()?.code == 0).then_some(())
    })?;
    container.ok(&["pause"])?;
    let state = container.inspect("{{.State.Status}}")?;
    ensure!(state == "paused", "{state}");
    let refused = container.sh("true")?;
    ensure!(
        refused.code == 1 && refused.errors().contains("paused"),
        "{refused:?}"
    );
    container.ok(&["unpause"])?;
    let before = container.sh("cat /n")?.ok()?.text();
    wait::until("it to go on", || {
        (container.sh("cat /n").ok()?.text() != before).then_some(())
    })?;
    Ok(())
}
