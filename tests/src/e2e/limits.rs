//! Resource limits hold, and what hits them is told.

use anyhow::{Result, ensure};
use husk_tests::{
    ctr::Running,
    events::{Events, topic},
};
use serde_json::json;

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("memory_limit_kills_with_137_and_an_event", memory),
    test("pids_limit_holds", pids),
    test("cpu_and_memory_are_in_the_cgroup", cgroup_files),
    husk_test("a_fork_bomb_is_survived", fork_bomb),
    husk_test("no_limit_means_the_default_size", default_size),
];

/// Fills memory until something stops it.
const HOG: &str = "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done";

fn memory(suite: &Context) -> Result<()> {
    let events = Events::listen(&suite.containerd)?;
    let id = suite.containerd.fresh_id("hog");
    let out = husk_tests::ctr::output(&mut suite.containerd.run_command(
        suite.runtime,
        &id,
        &["--rm", "--memory-limit", "33554432"],
        &["sh", "-c", HOG],
    ))?;
    // busybox's own words when malloc fails would be exit code 1 or 2: the kernel has to end it.
    out.exited(137)?;
    let told = events.until_removed(&id)?;
    ensure!(!topic(&told, "/tasks/oom").is_empty(), "{told:#?}");
    Ok(())
}

fn pids(suite: &Context) -> Result<()> {
    let script = "n=0; for i in $(seq 40); do sleep 1000 & n=$((n + 1)); done; echo $n";
    let mut run = suite.spec(&["sh", "-c", script])?;
    run.spec["linux"]["resources"]["pids"] = json!({ "limit": 20 });
    let out = run.run()?;
    // The shell gives up at the first fork that fails.
    ensure!(out.errors().contains("fork"), "{out:?}");
    run.spec["linux"]["resources"]["pids"] = json!({ "limit": 100 });
    let out = run.run()?.ok()?;
    ensure!(out.text() == "40", "{out:?}");
    Ok(())
}

fn cgroup_files(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&[
        "sh",
        "-c",
        "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max cpu.weight pids.max cpuset.cpus",
    ])?;
    run.spec["linux"]["resources"] = json!({
        "memory": { "limit": 67_108_864, "swap": 67_108_864 },
        "cpu": { "shares": 2048, "quota": 50_000, "period": 100_000, "cpus": "0" },
        "pids": { "limit": 77 },
    });
    run.see_own_cgroup();
    let out = run.run()?.ok()?;
    let lines: Vec<&str> = out
        .stdout
        .split(|b| *b == b'\n')
        .map(|l| std::str::from_utf8(l).unwrap_or("?"))
        .collect();
    ensure!(
        lines.starts_with(&["67108864", "0", "50000 100000"])
            && lines.get(4) == Some(&"77")
            && lines.get(5) == Some(&"0"),
        "{lines:?}"
    );
    Ok(())
}

fn fork_bomb(suite: &Context) -> Result<()> {
    let mut run = suite.spec(&["sh", "-c", "echo armed; b() { b | b & }; b; sleep 1000"])?;
    run.spec["linux"]["resources"]["pids"] = json!({ "limit": 200 });
    let id = suite.containerd.fresh_id("bomb");
    let mut running = Running::start(&mut run.command(&id, &["--rm"])?, false)?;
    suite.containerd.running(&id)?;
    ensure!(!running.has_ended());
    // The agent still answers, and ends it.
    suite.containerd.run_ctr(&["task", "metrics", &id])?.ok()?;
    suite
        .containerd
        .run_ctr(&["task", "kill", "--all", "--signal", "SIGKILL", &id])?
        .ok()?;
    running.finish()?.exited(137)?;
    Ok(())
}

fn default_size(suite: &Context) -> Result<()> {
    let out = suite
        .sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?
        .ok()?;
    let kib: u64 = out.text().parse()?;
    // 512 MiB by default, less what the kernel keeps for itself.
    ensure!(
        (460 * 1024..=512 * 1024).contains(&kib),
        "the guest has {kib} KiB"
    );
    Ok(())
}
