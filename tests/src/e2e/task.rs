//! The Task API itself, asked as containerd asks it, where `ctr` has no command for a call.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, ConnectRequest, CreateTaskRequest, DeleteRequest, KillRequest,
        PidsRequest, StateRequest, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    ttrpc::Code,
};
use husk_tests::{
    host,
    task::{self, context, refused},
};
use serde_json::json;

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("update_changes_limits_at_once", update),
    husk_test("update_refuses_nonsense_and_keeps_what_was", update_refused),
    husk_test("state_pids_stats_and_connect_agree", questions),
    husk_test("refusals_have_the_codes_containerd_looks_at", refusals),
    husk_test(
        "wait_answers_all_who_ask_early_or_late",
        wait_early_and_late,
    ),
];

/// A container that sees its own cgroup's files, with these limits.
fn limited<'a>(
    suite: &'a Context,
    resources: &serde_json::Value,
) -> Result<crate::context::Detached<'a>> {
    let mut run = suite.spec(&["sleep", "1000"])?;
    run.spec["linux"]["resources"] = resources.clone();
    run.see_own_cgroup();
    let id = suite.containerd.fresh_id("task");
    husk_tests::ctr::output(&mut run.command(&id, &["--detach"])?)?.ok()?;
    Ok(suite.started(id))
}

fn update(suite: &Context) -> Result<()> {
    let container = limited(
        suite,
        &json!({ "memory": { "limit": 67_108_864 }, "pids": { "limit": 50 } }),
    )?;
    let files = || -> Result<String> {
        let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";
        Ok(container.exec(&["sh", "-c", script])?.ok()?.text())
    };
    let before = files()?;
    ensure!(before.starts_with("67108864\n50\nmax "), "{before}");
    let tasks = task::of(&suite.containerd, &container.id)?;
    let request = |resources: serde_json::Value| UpdateTaskRequest {
        id: container.id.clone(),
        resources: Some(task::resources(&resources)).into(),
        ..Default::default()
    };
    tasks.update(
        context(),
        &request(json!({
            "memory": { "limit": 100_663_296 }, "pids": { "limit": 60 },
            "cpu": { "quota": 20_000, "period": 100_000, "shares": 2048 },
        })),
    )?;
    let after = files()?;
    // 2048 shares are weight 174 by runc's formula (opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value).
    ensure!(after == "100663296\n60\n20000 100000\n174", "{after}");
    // What an update does not name stays.
    tasks.update(context(), &request(json!({ "pids": { "limit": 70 } })))?;
    let after = files()?;
    ensure!(after == "100663296\n70\n20000 100000\n174", "{after}");
    Ok(())
}

fn update_refused(suite: &Context) -> Result<()> {
    let container = limited(suite, &json!({ "pids": { "limit": 50 } }))?;
    let tasks = task::of(&suite.containerd, &container.id)?;
    let mut request = UpdateTaskRequest {
        id: container.id.clone(),
        resources: Some(task::resources(&json!({ "pids": { "limit": "many" } }))).into(),
        ..Default::default()
    };
    let answer = tasks.update(context(), &request);
    ensure!(answer.is_err(), "a limit of \"many\" went through");
    request.resources = Some(task::resources(
        &json!({ "unified": { "no.such.file": "1" } }),
    ))
    .into();
    match tasks.update(context(), &request) {
        Err(error) => ensure!(error.to_string().contains("no.such.file"), "{error}"),
        Ok(_) => anyhow::bail!("no.such.file went through"),
    }
    let pids = container
        .exec(&["cat", "/sys/fs/cgroup/pids.max"])?
        .ok()?
        .text();
    ensure!(pids == "50", "{pids}");
    Ok(())
}

fn questions(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let tasks = task::of(&suite.containerd, &container.id)?;
    let id = container.id.clone();
    let connected = tasks.connect(
        context(),
        &ConnectRequest {
            id: id.clone(),
            ..Default::default()
        },
    )?;
    let shim = host::shim_of(&id).context("no shim")?;
    ensure!(connected.shim_pid == shim.pid, "{connected:?}");
    ensure!(!connected.version.is_empty(), "{connected:?}");
    let state = tasks.state(
        context(),
        &StateRequest {
            id: id.clone(),
            ..Default::default()
        },
    )?;
    ensure!(
        state.status.enum_value() == Ok(Status::RUNNING)
            && state.id == id
            && state.pid == connected.task_pid
            && state.bundle.ends_with(&id)
            && !state.terminal,
        "{state:?}"
    );
    let pids = tasks.pids(
        context(),
        &PidsRequest {
            id: id.clone(),
            ..Default::default()
        },
    )?;
    ensure!(
        pids.processes.iter().any(|p| p.pid == state.pid),
        "{pids:?} has no {}",
        state.pid
    );
    let stats = tasks.stats(
        context(),
        &StatsRequest {
            id,
            ..Default::default()
        },
    )?;
    ensure!(
        stats.stats.type_url == "io.containerd.cgroups.v2.Metrics",
        "{}",
        stats.stats.type_url
    );
    Ok(())
}

fn refusals(suite: &Context) -> Result<()> {
    let container = suite.detached(&[], &["sleep", "1000"])?;
    let tasks = task::of(&suite.containerd, &container.id)?;
    let id = || container.id.clone();
    let exec_id = || "no-such-exec".to_owned();
    refused(
        tasks.checkpoint(
            context(),
            &CheckpointTaskRequest {
                id: id(),
                ..Default::default()
            },
        ),
        Code::UNIMPLEMENTED,
    )?;
    refused(
        tasks.state(
            context(),
            &StateRequest {
                id: id(),
                exec_id: exec_id(),
                ..Default::default()
            },
        ),
        Code::NOT_FOUND,
    )?;
    refused(
        tasks.kill(
            context(),
            &KillRequest {
                id: "no-such-container".into(),
                signal: 9,
                ..Default::default()
            },
        ),
        Code::NOT_FOUND,
    )?;
    refused(
        tasks.delete(
            context(),
            &DeleteRequest {
                id: id(),
                ..Default::default()
            },
        ),
        Code::FAILED_PRECONDITION,
    )?;
    let state = tasks.state(
        context(),
        &StateRequest {
            id: id(),
            ..Default::default()
        },
    )?;
    refused(
        tasks.create(
            context(),
            &CreateTaskRequest {
                id: id(),
                bundle: state.bundle,
                ..Default::default()
            },
        ),
        Code::ALREADY_EXISTS,
    )?;
    // None of it has harmed the task.
    container.exec(&["true"])?.ok()?;
    Ok(())
}

fn wait_early_and_late(suite: &Context) -> Result<()> {
    let container = suite.detached(
        &[],
        &[
            "sh",
            "-c",
            "trap 'exit 42' TERM; while :; do sleep 0.1; done",
        ],
    )?;
    let tasks = task::of(&suite.containerd, &container.id)?;
    let request = WaitRequest {
        id: container.id.clone(),
        ..Default::default()
    };
    let (early, killed) = std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| tasks.wait(context(), &request)))
            .collect();
        let killed = container.task(&["kill", "--signal", "SIGTERM"]);
        let early: Vec<_> = waiting
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        (early, killed)
    });
    killed?.ok()?;
    let late = tasks.wait(context(), &request)?;
    ensure!(late.exit_status == 42, "{late:?}");
    for answer in early {
        let answer = answer.map_err(|_| anyhow::anyhow!("a waiter panicked"))??;
        ensure!(answer == late, "{answer:?} is not {late:?}");
    }
    Ok(())
}
