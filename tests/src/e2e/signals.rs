//! Every signal that a process can catch reaches the container's PID 1.

use anyhow::{Result, ensure};
use husk_tests::wait;

use crate::{Test, context::Context, test};

pub const TESTS: &[Test] = &[
    test("every_catchable_signal_arrives", every_catchable_signal),
    test("kill_ends_it", kill_ends_it),
    test("kill_all_reaches_children", kill_all),
    test("kill_after_the_end_is_not_found", kill_after_the_end),
];

/// 1 to 31 without KILL and STOP, which nobody catches, and CHLD, which the shell's own children send.
fn catchable() -> impl Iterator<Item = u32> {
    (1..=31).filter(|n| ![9, 17, 19].contains(n))
}

fn every_catchable_signal(suite: &Context) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let uri = format!("file://{}", log.display());
    let traps: String = catchable()
        .map(|n| format!("trap 'echo got-{n}.' {n}; "))
        .collect();
    let script = format!("{traps} echo ready; while :; do sleep 0.1; done");
    let container = suite.detached(&["--log-uri", &uri], &["sh", "-c", &script])?;
    let seen = |what: &str| {
        wait::until(&format!("{what} from the container"), || {
            std::fs::read_to_string(&log)
                .is_ok_and(|text| text.contains(what))
                .then_some(())
        })
    };
    seen("ready")?;
    for n in catchable() {
        container
            .task(&["kill", "--signal", &n.to_string()])?
            .ok()?;
        seen(&format!("got-{n}."))?;
    }
    ensure!(container.state()? == "RUNNING");
    Ok(())
}

fn kill_ends_it(suite: &Context) -> Result<()> {
    let id = suite.containerd.fresh_id("kill");
    let mut command =
        suite
            .containerd
            .run_command(suite.runtime, &id, &["--rm"], &["sleep", "1000"]);
    let running = husk_tests::ctr::Running::start(&mut command, false)?;
    suite.containerd.running(&id)?;
    suite
        .containerd
        .run_ctr(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    running.finish()?.exited(137)?;
    Ok(())
}

fn kill_all(suite: &Context) -> Result<()> {
    let script = "trap : TERM; sleep 1001 & echo $! > /tmp/a; sleep 1002 & echo $! > /tmp/b; while :; do wait; sleep 0.1; done";
    let container = suite.detached(&[], &["sh", "-c", script])?;
    let alive = |file: &str| -> Result<bool> {
        let probe = format!("kill -0 $(cat /tmp/{file})");
        Ok(container.exec(&["sh", "-c", &probe])?.code == 0)
    };
    wait::until("both children", || {
        (alive("a").ok()? && alive("b").ok()?).then_some(())
    })?;
    container
        .task(&["kill", "--all", "--signal", "SIGTERM"])?
        .ok()?;
    wait::until("both children to go", || {
        (!alive("a").ok()? && !alive("b").ok()?).then_some(())
    })?;
    ensure!(
        container.state()? == "RUNNING",
        "init catches TERM and goes on"
    );
    Ok(())
}

fn kill_after_the_end(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["true"])?;
    wait::until("the task to stop", || {
        (container.state().ok()? == "STOPPED").then_some(())
    })?;
    let out = container.task(&["kill", "--signal", "SIGTERM"])?;
    ensure!(out.code != 0, "{out:?}");
    ensure!(
        out.errors().contains("not found") || out.errors().contains("already finished"),
        "{out:?}"
    );
    Ok(())
}
