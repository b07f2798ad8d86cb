//! The life of a task as `ctr` sees it, and that nothing of it stays on the host.

use std::thread;

use anyhow::{Result, bail, ensure};
use husk_tests::{ctr::Running, events::Events, host::Traces, wait};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("pause_and_resume", pause_and_resume),
    test("metrics_and_processes", metrics_and_processes),
    test("attach_again_after_the_client_has_gone", attach_again),
    test("create_then_start", create_then_start),
    test("events_in_order", events_in_order),
    husk_test("a_debian_root_file_system", debian),
];

/// Those that look at all of the host.
pub const ALONE: &[Test] = &[
    husk_test("ten_at_once", ten_at_once),
    husk_test("thirty_cycles_leave_nothing", thirty_cycles),
];

fn pause_and_resume(suite: &Context) -> Result<()> {
    let container = suite.detached(
        &[],
        &[
            "sh",
            "-c",
            "i=0; while :; do i=$((i+1)); echo $i > /tmp/i; sleep 0.05; done",
        ],
    )?;
    let value = || -> Result<u64> {
        Ok(container
            .exec(&["cat", "/tmp/i"])?
            .ok()?
            .text()
            .parse()
            .unwrap_or(0))
    };
    wait::until("it to count", || (value().ok()? > 3).then_some(()))?;
    container.task(&["pause"])?.ok()?;
    ensure!(container.state()? == "PAUSED");
    container.task(&["resume"])?.ok()?;
    ensure!(container.state()? == "RUNNING");
    let before = value()?;
    wait::until("it to count on", || (value().ok()? > before).then_some(()))?;
    Ok(())
}

fn metrics_and_processes(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let metrics = container.task(&["metrics"])?.ok()?;
    ensure!(
        metrics.text().contains("memory.usage_in_bytes") || metrics.text().contains("memory.usage"),
        "{metrics:?}"
    );
    let processes = container.task(&["ps"])?.ok()?;
    let pid: u32 = processes
        .text()
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    ensure!(
        pid > 1 && std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "{processes:?}"
    );
    Ok(())
}

fn attach_again(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("attach");
    let script = "read a; echo first-$a; read b; echo second-$b; exit 9";
    let mut command = suite
        .containerd
        .run_command(suite.runtime, &id, &[], &["sh", "-c", script]);
    let client = Running::start(&mut command, true)?;
    suite.containerd.running(&id)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(client.pid().cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    drop(client.finish());
    let mut again = suite.containerd.start_ctr(&["task", "attach", &id], true)?;
    again.feed(b"one\ntwo\n".to_vec());
    let out = again.finish()?.exited(9)?;
    ensure!(
        out.text().contains("first-one") && out.text().contains("second-two"),
        "{out:?}"
    );
    suite.containerd.remove(&id)
}

fn create_then_start(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("two-step");
    let mut create = vec!["container", "create"];
    create.extend(&suite.runtime.ctr_flags()[..2]);
    create.extend([husk_tests::containerd::BUSYBOX, &id, "echo", "step two"]);
    suite.containerd.run_ctr(&create)?.ok()?;
    let out = suite.containerd.run_ctr(&["task", "start", &id])?.ok()?;
    ensure!(out.text() == "step two", "{out:?}");
    // Deleting the task needs it stopped, which it is.
    suite.containerd.remove(&id)
}

fn events_in_order(suite: &Context) -> Result<()> {
    let events = Events::listen(&suite.containerd)?;
    let container = suite.detached(&[], &["sh", "-c", "read x"])?;
    let id = container.id.clone();
    container.exec(&["true"])?.ok()?;
    container.task(&["kill", "--signal", "SIGKILL"])?.ok()?;
    wait::until("the task to stop", || {
        (container.state().ok()? == "STOPPED").then_some(())
    })?;
    drop(container);
    let told = events.until_removed(&id)?;
    let seen: Vec<&str> = told
        .iter()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("/tasks/"))
        })
        .collect();
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(seen == wanted, "{seen:?} in {told:#?}");
    Ok(())
}

fn ten_at_once(suite: &Context) -> Result<()> {
    let before = Traces::now();
    let running: Vec<_> = (0..10)
        .map(|_| suite.detached(&[], &["sleep", "1000"]))
        .collect::<Result<_>>()?;
    for container in &running {
        let out = container.exec(&["echo", &container.id])?.ok()?;
        ensure!(out.text() == container.id, "{out:?}");
    }
    drop(running);
    before.restored()
}

fn thirty_cycles(suite: &Context) -> Result<()> {
    let before = Traces::now();
    // Three at a time: it is their number that finds a leak.
    thread::scope(|scope| {
        let rows: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| (0..10).try_for_each(|_| suite.run(&[], &["true"])?.ok().map(drop)))
            })
            .collect();
        rows.into_iter()
            .try_for_each(|row| row.join().unwrap_or_else(|_| bail!("a cycle panicked")))
    })?;
    before.restored()
}

fn debian(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("debian");
    let script = "set -e; export PATH=/usr/bin:/bin:/usr/sbin:/sbin; . /etc/os-release; echo $ID; dpkg -l gcc | tail -n 1; apt-cache policy gcc | head -n 1; \
        python3 -c 'import hashlib, json, threading; print(json.dumps({\"py\": sum(range(10))}))'; \
        cd /tmp; printf '#include <stdio.h>\\nint main(void){puts(\"compiled\");return 3;}\\n' > a.c; gcc -O1 -o a a.c; ./a || echo code $?";
    let mut command = suite.containerd.ctr();
    command.arg("run").args(suite.runtime.ctr_flags()).args([
        "--rm",
        "--rootfs",
        "/srv/debian-rootfs",
        &id,
        "/bin/sh",
        "-c",
        script,
    ]);
    let out = husk_tests::ctr::output(&mut command)?.ok()?;
    for part in ["debian", "gcc:", "{\"py\": 45}", "compiled", "code 3"] {
        ensure!(out.text().contains(part), "no {part:?} in {out:?}");
    }
    Ok(())
}
