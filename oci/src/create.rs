//! `create` and `start`.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use chrono::{SecondsFormat, Utc};
use containerd_shim_protos::{
    api::{ConnectRequest, CreateTaskRequest, StartRequest},
    shim_async::TaskClient,
};
use husk_client::{
    pipes::{Pipes, Wanted},
    shim::{self, said, soon},
};
use rustix::fs::{fstat, major, minor};
use serde_json::Value;

use crate::{
    args::{self, Args, CgroupManager, LogLevel},
    conmon,
    hooks::Hook,
    list,
    pod::Place,
    process::ProcessId,
    proxy,
    spec::Spec,
    store::{Container, Record, Store, write_whole},
    task::{self, Status, Task},
};

/// `/dev/null` on Linux.
const NULL: (u32, u32) = (1, 3);

pub(crate) fn create(all: &Args, args: &args::Create) -> Result<()> {
    no_descriptors(args.preserve_fds)?;
    let spec = Spec::of_bundle(&args.bundle)?;
    if spec.terminal() && args.console_socket.is_none() {
        bail!("use --console-socket with create when a terminal is used");
    }
    let store = Store::open(&all.root)?;
    let place = Place::of(&spec, &store)?;
    let container = store.create(&args.id)?;
    let created = create_in(all, args, &spec, &place, &container);
    if created.is_err() {
        container.shim().delete();
        container.remove()?;
    }
    created
}

/// Descriptors beyond the standard streams do not reach into a VM.
pub(crate) fn no_descriptors(count: u32) -> Result<()> {
    if count > 0 {
        bail!("--preserve-fds {count}: a container in a VM cannot be given open files of the host");
    }
    Ok(())
}

fn create_in(
    all: &Args,
    args: &args::Create,
    spec: &Spec,
    place: &Place,
    container: &Container,
) -> Result<()> {
    let _lock = container.lock()?;
    let hooks = spec.hooks()?;
    let no_cgroup = all.cgroup_manager == Some(CgroupManager::Disabled);
    let made = serde_json::to_vec(&spec.for_shim(&container.id, place, no_cgroup)?)?;
    write_whole(&container.dir.join("config.json"), &made)?;
    if all.debug || all.log_level == LogLevel::Debug {
        // The shim writes to it if it is there.
        let log = container.dir.join("log");
        let log = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log);
        log.context("making the shim's log")?;
    }
    conmon::lead_word_of_oom(&container.dir, spec.bundle());
    let terminal = spec.terminal();
    let pipes = make_pipes(&container.pipes(), terminal)?;
    let address = container.shim().start()?;
    let (shim_pid, task_pid) = task::run(async {
        let client = shim::connect(&address).await?;
        let [stdin, stdout, stderr] = pipes.names();
        let request = CreateTaskRequest {
            id: container.id.to_string(),
            bundle: container.dir.display().to_string(),
            terminal,
            stdin,
            stdout,
            stderr,
            ..CreateTaskRequest::default()
        };
        let created = said(client.create(soon(), &request).await)?;
        Ok((shim_pid(&client).await?, created.pid))
    })?;
    let console_socket = args.console_socket.clone().filter(|_| terminal);
    let mut child = proxy::spawn(
        &all.root,
        &args::Proxy {
            exec_id: String::new(),
            address: address.clone(),
            pipes: container.pipes(),
            console_socket,
            network: match spec.has_new("network") {
                // Made by the shim, for the engine to find by the proxy's pid.
                true => Some(format!("/proc/{task_pid}/ns/net").into()),
                false => spec.namespace("network").map(Path::to_owned),
            },
            spec: Some(container.dir.join("config.json")),
            id: container.id.clone(),
        },
        // In the guest they see each other as well.
        place.processes().and_then(|_| spec.namespace("pid")),
    )?;
    let finish = || {
        let proxy = ProcessId::of(child.id()).context("looking at the container's proxy")?;
        join_cgroup(shim_pid, child.id());
        let record = Record {
            oci_version: spec.oci_version().to_owned(),
            bundle: spec.bundle().to_owned(),
            created: Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true),
            address,
            proxy,
            annotations: spec.annotations(),
            hooks,
            is_infra: *place == Place::Infra,
        };
        container.set_record(&record)?;
        let state = list::state_of(container, &record, Status::Created);
        for hook in record.hooks.on_create() {
            hook.run(&state)?;
        }
        write_pid(args.pid_file.as_deref(), child.id())
    };
    let finished = finish();
    if finished.is_err() {
        proxy::end(&mut child);
    }
    finished
}

/// The pipes of a process; none for an input that is empty.
pub(crate) fn make_pipes(dir: &Path, terminal: bool) -> Result<Pipes> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("making {}", dir.display()))?;
    let wanted = Wanted {
        stdin: terminal || !is_null(io::stdin()),
        stdout: true,
        stderr: !terminal,
    };
    Pipes::make(dir, wanted)
}

fn is_null(stream: impl std::os::fd::AsFd) -> bool {
    match fstat(stream.as_fd()) {
        Ok(stat) => (major(stat.st_rdev), minor(stat.st_rdev)) == NULL,
        // It is not even open.
        Err(_) => true,
    }
}

async fn shim_pid(client: &TaskClient) -> Result<u32> {
    let request = ConnectRequest::default();
    Ok(said(client.connect(soon(), &request).await)?.shim_pid)
}

/// Puts a proxy where the shim and its VM are, so that what an engine reads of its cgroup is true of them. Without, the container works all the
/// same.
pub(crate) fn join_cgroup(shim: u32, proxy: u32) {
    let join = || {
        let text = fs::read_to_string(format!("/proc/{shim}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let procs = Path::new("/sys/fs/cgroup").join(path).join("cgroup.procs");
        fs::write(procs, proxy.to_string()).ok()
    };
    let _ = join();
}

/// Without a line's end, as runc does.
pub(crate) fn write_pid(path: Option<&Path>, pid: u32) -> Result<()> {
    match path {
        Some(path) => write_whole(path, pid.to_string().as_bytes()),
        None => Ok(()),
    }
}

pub(crate) fn start(store: &Store, args: &args::One) -> Result<()> {
    let container = store.find(&args.id)?;
    let _lock = container.lock()?;
    let record = container.record()?;
    task::run(async {
        let id = &container.id;
        match task::status(&container, &record).await? {
            Status::Created => {}
            Status::Stopped => bail!("container `{id}` is not running"),
            status => bail!("container `{id}` is {status} already, it was started before"),
        }
        let Some(task) = Task::find(&container, &record).await else {
            bail!("container `{id}` is not running");
        };
        let request = StartRequest {
            id: id.to_string(),
            ..StartRequest::default()
        };
        said(task.client.start(soon(), &request).await).map(drop)
    })?;
    let state = list::state_of(&container, &record, Status::Running);
    warn_of_failed(&record.hooks.poststart, &state);
    Ok(())
}

/// Runs hooks that come too late to stop anything.
pub(crate) fn warn_of_failed(hooks: &[Hook], state: &Value) {
    for hook in hooks {
        if let Err(error) = hook.run(state) {
            // Where nobody reads it, it is lost.
            let _ = writeln!(io::stderr(), "{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_from_null() {
        assert!(is_null(File::open("/dev/null").unwrap()));
        assert!(!is_null(File::open("/dev/zero").unwrap()));
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_null(File::create(dir.path().join("a")).unwrap()));
    }

    #[test]
    fn a_pid_file_holds_the_number_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        write_pid(Some(&path), 17).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "17");
        write_pid(None, 17).unwrap();
        assert!(write_pid(Some(Path::new("/nothing/pid")), 17).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn descriptors_are_refused() {
        no_descriptors(0).unwrap();
        let error = no_descriptors(2).unwrap_err().to_string();
        assert!(error.contains("--preserve-fds 2"), "{error}");
    }
}
