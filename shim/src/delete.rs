//! `delete`: clears away after a shim that has gone, or one container of a shim that lives.
//!
//! containerd calls it when it has lost the shim or a start went wrong, and believes what it prints. So it works from what is on disk
//! alone, in any half-made state, any number of times, and within [`LIMIT`].

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest};
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use tokio::net::UnixStream;
use tracing::warn;
use ttrpc::asynchronous::transport::Socket;

use crate::args::Args;
use crate::bootstrap;
use crate::cgroup;
use crate::cleanup;
use crate::config::Config;
use crate::group::Group;
use crate::hooks::Subject;
use crate::pod::Keeper;
use crate::socket;
use crate::spec::BundleSpec;
use crate::state::{self, PodDir, PodState, ProcessId};

/// All of it together; containerd waits 5 s.
const LIMIT: Duration = Duration::from_millis(4500);
/// How long a living shim may take to give a container up.
const SHIM_LIMIT: Duration = Duration::from_secs(2);
/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(1);
/// How long a cgroup may take to go: until the last thread of the killed VMM has left it, which on a stalled machine has taken more than
/// half a second.
const CGROUP_LIMIT: Duration = Duration::from_millis(1500);
/// What an exit by SIGKILL looks like.
const KILLED: u32 = 128 + 9;

/// Runs `delete` and prints the answer.
///
/// # Errors
/// Only when the answer cannot be printed; what could not be cleared away is a line on standard error, which containerd logs.
pub fn delete(args: &Args) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let bundle = bootstrap::bundle(args).ok();
    let pod = find_pod(args, bundle.as_deref());
    let mut pid = 0;
    if let Some(pod) = &pod {
        let state = pod.load().unwrap_or_default();
        pid = state
            .vmm
            .or(state.shim)
            .map_or(0, |process| process.pid.unsigned_abs());
        let shim_alive = state.shim.is_some_and(|shim| shim.is_alive());
        let is_sandbox = pod.sandbox_id() == args.id;
        let goes_on = shim_alive && (!is_sandbox || has_others(args, &state));
        let given_up = goes_on.then(|| ask_shim(&state, &args.id, !is_sandbox));
        if let Some(Err(error)) = &given_up {
            eprintln!(
                "the pod's shim did not give up container {}: {error:#}",
                args.id
            );
        }
        // A shim that does not answer takes its pod along.
        if given_up.is_some_and(|answer| answer.is_ok() || !is_sandbox) {
            let _ = pod.update(|state| {
                state.containers.remove(&args.id);
            });
        } else {
            let patience = deadline
                .saturating_duration_since(Instant::now())
                .min(Duration::from_secs(1));
            // A start that hangs must not keep a dead pod alive: go on without the lock.
            let lock = pod.lock_namespace(patience);
            for problem in clear_pod(pod) {
                eprintln!("{problem}");
            }
            drop(lock);
            if let Some(bundle) = &bundle {
                run_hooks(&state, bundle, deadline);
            }
        }
    }
    if let Some(bundle) = &bundle
        && let Err(e) = cleanup::unmount_below(&bundle.join("rootfs"))
    {
        eprintln!("{e}");
    }
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..Default::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?)?;
    Ok(())
}

/// Runs the hooks that a dead shim owes its containers, which have ended with it: of all the pod's, as nobody knows of the pod any more when the
/// others' turn comes. One that takes longer than there is time is killed.
fn run_hooks(state: &PodState, bundle: &Path, deadline: Instant) {
    let owed = state.hooked.iter().filter_map(|id| {
        let bundle = bundle.with_file_name(id);
        let spec = BundleSpec::load(&bundle).ok()?;
        Some((id, bundle, spec.hooks()))
    });
    let run = async {
        for (id, bundle, hooks) in owed {
            let subject = Subject {
                id,
                bundle: &bundle,
                pid: 0,
            };
            hooks.stopped(subject).await;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let left = deadline.saturating_duration_since(Instant::now());
    let ran = runtime
        .map(|runtime| runtime.block_on(async { tokio::time::timeout(left, run).await.is_ok() }));
    match ran {
        Ok(true) => {}
        Ok(false) => eprintln!("the poststop hooks took too long"),
        Err(error) => eprintln!("cannot run the poststop hooks: {error}"),
    }
}

/// Whether containerd still has other containers of this pod. A pod of the Sandbox API does not wait for them.
///
/// containerd runs `delete` whenever a connection to the shim closes, also after each ordinary Delete of a task. Where all containers of a
/// pod end together, the sandbox container's comes among the others': a shim killed then would owe them their answers, and containerd
/// would announce an exit of its own for each, beside the shim's.
fn has_others(args: &Args, state: &PodState) -> bool {
    let Some(bundle) = &args.bundle else {
        return false;
    };
    if bundle.exists() && Keeper::of_bundle(bundle) == Keeper::SandboxApi {
        return false;
    }
    let mut others = state.containers.iter().filter(|id| **id != args.id);
    others.any(|id| bundle.with_file_name(id).exists())
}

/// The pod of this container: by the bundle's link, by its own id, by the pod that its spec names (a container is made without any `start`
/// in a pod that containerd knows), or by who lists it.
fn find_pod(args: &Args, bundle: Option<&Path>) -> Option<PodDir> {
    if let Some(pod) = bundle.and_then(PodDir::of_bundle) {
        return Some(pod);
    }
    let config = Config::load(None).unwrap_or_default();
    let state_dir = state::find_state_dir(&config.state_dir);
    // Not by the bundle's link, so it may be another containerd's that has the same namespaces.
    let is_own = |pod: &PodDir, state: &PodState| {
        let id = pod.sandbox_id();
        let socket = socket::path(&config.socket_dir, &args.address, &args.namespace, &id);
        args.address.is_empty()
            || state.socket.as_os_str().is_empty()
            || bootstrap::is_own(&state.socket, &socket)
    };
    let own = PodDir::new(&state_dir, &args.namespace, &args.id).ok()?;
    let group = bundle.and_then(|bundle| Group::of_bundle(bundle, &args.id).ok());
    let named = group.and_then(|g| PodDir::new(&state_dir, &args.namespace, &g.id).ok());
    for pod in [Some(own.clone()), named].into_iter().flatten() {
        if pod.path().exists() {
            let is_own = pod.load().is_none_or(|state| is_own(&pod, &state));
            return is_own.then_some(pod);
        }
    }
    own.siblings().into_iter().find(|pod| {
        pod.load()
            .is_some_and(|state| state.containers.contains(&args.id) && is_own(pod, &state))
    })
}

/// Ends a pod: its processes, mounts, cgroup, socket and directory. Returns what did not go, a sentence each (also logged).
pub fn clear_pod(pod: &PodDir) -> Vec<String> {
    let state = pod.load().unwrap_or_default();
    let mut problems = Vec::new();
    let mut check = |result: std::io::Result<()>| {
        if let Err(e) = result {
            warn!(pod = pod.sandbox_id(), "{e}");
            problems.push(e.to_string());
        }
    };
    // The shim first: it would see the VMM go and announce an exit that containerd has made up its mind about.
    check(end(state.shim, "shim"));
    check(end(state.vmm, "VMM"));
    if let Some(cgroup) = state
        .cgroup
        .as_deref()
        .filter(|c| c.starts_with("/sys/fs/cgroup/"))
    {
        // The pod's own shim may be in it.
        check(cgroup::go_home());
        check(cleanup::remove_cgroup(cgroup, CGROUP_LIMIT));
        cgroup::remove_parents(cgroup);
    }
    check(cleanup::unmount_below(pod.path()).map(drop));
    check(pod.remove());
    if !state.socket.as_os_str().is_empty() {
        check(cleanup::remove_file(&state.socket));
    }
    problems
}

fn end(process: Option<ProcessId>, what: &str) -> std::io::Result<()> {
    let Some(process) = process else {
        return Ok(());
    };
    // A pod is never cleared away by its own shim's hand.
    if process.pid == nix::unistd::getpid().as_raw() {
        return Ok(());
    }
    match process.kill(KILL_LIMIT) {
        Ok(true) => Ok(()),
        Ok(false) => Err(std::io::Error::other(format!(
            "the {what} (pid {}) does not end",
            process.pid
        ))),
        Err(e) => Err(std::io::Error::new(
            e.kind(),
            format!("cannot kill the {what} (pid {}): {e}", process.pid),
        )),
    }
}

/// Has a living shim kill and forget one container, and, where it `may_end`, end if that was its last.
fn ask_shim(state: &PodState, id: &str, may_end: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let talk = async {
        let socket = UnixStream::connect(&state.socket).await?;
        let client = TaskClient::new(Client::new(Socket::from(socket)));
        let context = || {
            ttrpc::context::with_timeout(i64::try_from(SHIM_LIMIT.as_nanos()).unwrap_or(i64::MAX))
        };
        let kill = KillRequest {
            id: id.to_owned(),
            signal: 9,
            all: true,
            ..Default::default()
        };
        let _ = client.kill(context(), &kill).await;
        let request = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let deleted = client.delete(context(), &request).await;
        if may_end {
            let last = ShutdownRequest {
                id: id.to_owned(),
                ..Default::default()
            };
            let _ = client.shutdown(context(), &last).await;
        }
        match deleted {
            // It never had the container, or has none any more.
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {
                Ok(())
            }
            other => other.map(drop).map_err(anyhow::Error::from),
        }
    };
    runtime.block_on(async { tokio::time::timeout(SHIM_LIMIT, talk).await })?
}
