//! What is told of containers: `state`, `list`, `ps`, `events` and `features`; and `update`.

use std::{
    io::{self, Read as _, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::{StatsRequest, UpdateTaskRequest},
    cgroups_v2::metrics::Metrics,
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
};
use husk_client::shim::{self, said, soon};
use serde_json::{Map, Value, json};

use crate::{
    args::{self, Format},
    delete::running,
    spec::{parse, read_json},
    store::{Container, Record, Store},
    task::{self, Status, Task},
};

/// What the shim's Stats answers on a host with cgroup v2, which husk wants.
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

fn print(value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout(), "{text}").context("writing to standard output")
}

/// What every form of a container's state has.
fn common(container: &Container, record: &Record, status: Status) -> Value {
    json!({
        "id": container.id.as_str(),
        "pid": if status == Status::Stopped { 0 } else { record.proxy.pid },
        "status": status,
        "bundle": record.bundle,
        "created": record.created,
        "owner": "root",
    })
}

/// A container's state (OCI runtime specification, "State").
pub(crate) fn state_of(container: &Container, record: &Record, status: Status) -> Value {
    let mut state = common(container, record, status);
    state["ociVersion"] = json!(record.oci_version);
    if !record.annotations.is_empty() {
        state["annotations"] = json!(record.annotations);
    }
    state
}

pub(crate) fn state(store: &Store, args: &args::One) -> Result<()> {
    let container = store.find(&args.id)?;
    let record = container.record()?;
    let status = task::run(task::status(&container, &record))?;
    print(&state_of(&container, &record, status))
}

pub(crate) fn list(store: &Store, args: &args::List) -> Result<()> {
    let mut states = Vec::new();
    for (container, record) in store.all()? {
        // One whose shim does not answer is told of all the same.
        let status = match args.quiet {
            true => Status::Stopped,
            false => task::run(task::status(&container, &record)).unwrap_or(Status::Stopped),
        };
        states.push(common(&container, &record, status));
    }
    let mut out = io::stdout().lock();
    if args.quiet {
        for state in &states {
            writeln!(out, "{}", state["id"].as_str().unwrap_or_default())?;
        }
        return Ok(());
    }
    if args.format == Format::Json {
        drop(out);
        return print(&json!(states));
    }
    let text = |state: &Value, key: &str| match &state[key] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let widest = states.iter().map(|state| text(state, "id").len()).max();
    let width = widest.unwrap_or(0).max(4);
    writeln!(
        out,
        "{:width$} {:9} {:8} {:39} {:30} OWNER",
        "NAME", "PID", "STATUS", "BUNDLE PATH", "CREATED"
    )?;
    for state in &states {
        let [id, pid, status, bundle, created, owner] =
            ["id", "pid", "status", "bundle", "created", "owner"].map(|key| text(state, key));
        writeln!(
            out,
            "{id:width$} {pid:9} {status:8} {bundle:39} {created:30} {owner}"
        )?;
    }
    Ok(())
}

pub(crate) fn ps(store: &Store, args: &args::Ps) -> Result<()> {
    let container = store.find(&args.id)?;
    let record = container.record()?;
    let status = task::run(task::status(&container, &record))?;
    if status == Status::Stopped {
        bail!("the container `{}` is not running", container.id);
    }
    // The others are the guest's alone.
    match args.format {
        Format::Json => print(&json!([record.proxy.pid])),
        Format::Table => Ok(writeln!(io::stdout(), "PID\n{}", record.proxy.pid)?),
    }
}

pub(crate) fn events(store: &Store, args: &args::Events) -> Result<()> {
    let container = store.find(&args.id)?;
    let record = container.record()?;
    task::run(async {
        let task = running(&container, &record).await?;
        loop {
            if task::status(&container, &record).await? == Status::Stopped {
                match args.stats {
                    true => bail!("the container `{}` is not running", container.id),
                    false => return Ok(()),
                }
            }
            let event = json!({"type": "stats", "id": container.id.as_str(), "data": stats(&task, &container).await?});
            writeln!(io::stdout(), "{event}")?;
            if args.stats {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(args.interval)).await;
        }
    })
}

/// As runc's `events` has them.
async fn stats(task: &Task<'_>, container: &Container) -> Result<Value> {
    let request = StatsRequest {
        id: container.id.to_string(),
        ..StatsRequest::default()
    };
    let answer = said(task.client.stats(soon(), &request).await)?;
    let stats = answer
        .stats
        .into_option()
        .context("the shim has no figures")?;
    if stats.type_url != METRICS {
        bail!(
            "the shim has figures of the kind {}: the host has no cgroup v2",
            stats.type_url
        );
    }
    let metrics = Metrics::parse_from_bytes(&stats.value)?;
    let nanoseconds = |micros: u64| micros.saturating_mul(1000);
    let cpu = &metrics.cpu;
    Ok(json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(cpu.usage_usec), "kernel": nanoseconds(cpu.system_usec), "user": nanoseconds(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods, "throttledPeriods": cpu.nr_throttled, "throttledTime": nanoseconds(cpu.throttled_usec),
            },
        },
        "memory": {
            "usage": {"usage": metrics.memory.usage, "limit": metrics.memory.usage_limit},
            "swap": {"usage": metrics.memory.swap_usage, "limit": metrics.memory.swap_limit},
        },
        "pids": {"current": metrics.pids.current, "limit": metrics.pids.limit},
    }))
}

pub(crate) fn update(store: &Store, args: &args::Update) -> Result<()> {
    let container = store.find(&args.id)?;
    let _lock = container.lock()?;
    let record = container.record()?;
    let resources = resources(args)?;
    task::run(async {
        if task::status(&container, &record).await? == Status::Stopped {
            bail!("the container `{}` is not running", container.id);
        }
        let task = running(&container, &record).await?;
        let request = UpdateTaskRequest {
            id: container.id.to_string(),
            resources: MessageField::some(Any {
                type_url: shim::RESOURCES.to_owned(),
                value: serde_json::to_vec(&resources)?,
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        said(task.client.update(soon(), &request).await).map(drop)
    })
}

/// A file's, with what the command line says besides.
fn resources(args: &args::Update) -> Result<Value> {
    let mut resources = match args.resources.as_deref() {
        None => json!({}),
        Some(path) if path == Path::new("-") => {
            let mut text = Vec::new();
            // One byte more than is taken.
            let mut bounded = io::stdin().lock().take((16 << 20) + 1);
            bounded.read_to_end(&mut text)?;
            parse(&text).context("reading the resources from standard input")?
        }
        Some(path) => read_json(path)?,
    };
    let Some(all) = resources.as_object_mut() else {
        bail!("the resources are no object");
    };
    let mut set = |group: &str, key: &str, value: Option<Value>| {
        if let Some(value) = value {
            let group = all.entry(group).or_insert_with(|| json!({}));
            if !group.is_object() {
                *group = Value::Object(Map::new());
            }
            group[key] = value;
        }
    };
    set("memory", "limit", args.memory.map(Value::from));
    set(
        "memory",
        "reservation",
        args.memory_reservation.map(Value::from),
    );
    set("memory", "swap", args.memory_swap.map(Value::from));
    set("cpu", "quota", args.cpu_quota.map(Value::from));
    set("cpu", "period", args.cpu_period.map(Value::from));
    set("cpu", "shares", args.cpu_share.map(Value::from));
    set("cpu", "cpus", args.cpuset_cpus.clone().map(Value::from));
    set("pids", "limit", args.pids_limit.map(Value::from));
    if all.is_empty() {
        bail!("update wants a limit, or --resources with a file");
    }
    Ok(resources)
}

/// OCI runtime specification, "Feature Structure".
pub(crate) fn features() -> Result<()> {
    print(&json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev", "nodiratime", "noexec",
            "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "ro", "rprivate", "rslave", "rw", "slave",
            "strictatime", "suid", "sync", "tmpcopyup",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {"io.husk.version": env!("CARGO_PKG_VERSION")},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(line: &str) -> args::Update {
        use clap::Parser as _;
        let all =
            args::Args::try_parse_from(["husk-oci", "update"].into_iter().chain(line.split(' ')));
        match all.unwrap().command {
            args::Command::Update(update) => *update,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limits_go_before_those_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resources");
        std::fs::write(&path, r#"{"memory": {"limit": 1, "swap": 2}, "cpu": null}"#).unwrap();
        let file = format!("--resources {}", path.display());
        let made = resources(&update(&format!(
            "{file} --memory 3 --cpu-shares 4 --pids-limit -1 c"
        )))
        .unwrap();
        assert_eq!(
            made,
            json!({"memory": {"limit": 3, "swap": 2}, "cpu": {"shares": 4}, "pids": {"limit": -1}})
        );
        assert!(resources(&update("c")).is_err());
        std::fs::write(&path, "[]").unwrap();
        assert!(resources(&update(&format!("{file} c"))).is_err());
    }
}
