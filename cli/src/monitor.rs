//! The process that looks after one container, from its start to its end. It holds the container's lock, owns its pipes, writes its log,
//! serves whoever is attached, and clears away behind it. `husk start` makes it; nothing else is left running on the host for a container
//! but this and its shim.

mod hub;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use chrono::Utc;
use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteRequest, StartRequest, WaitRequest},
    protobuf::MessageField,
    shim_async::TaskClient,
    types::mount::Mount,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::Notify, task::JoinHandle, time::timeout};

use crate::{
    NAMESPACE, args,
    container::{Container, State, Status},
    log::{Log, Stream},
    network::{self, Attached},
    pipes::{Pipes, Wanted},
    place::Place,
    shim::{self, Shim, forever, said, soon},
};
use hub::Hub;

/// How long whoever has started it may take to attach.
const ATTACH: Duration = Duration::from_secs(30);
/// How long the rest of the output may take, once the container has ended.
const REST: Duration = Duration::from_secs(10);

/// The socket that one attaches to, in the container's run directory.
pub(crate) const SOCKET: &str = "attach";

/// What a monitor tells whoever has started it, a line each on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Report {
    /// One can attach.
    Listening,
    /// The container runs.
    Started,
    /// It does not.
    Failed {
        /// Why.
        error: String,
        /// What `husk run` ends with.
        code: u8,
    },
}

fn report(report: &Report) {
    // Whoever has started it may be gone; the container is not theirs alone.
    let line = serde_json::to_string(report).unwrap_or_default();
    let _ = writeln!(io::stdout(), "{line}");
}

/// Runs a container to its end.
pub(crate) fn run(place: &Place, args: &args::Monitor) -> Result<()> {
    // What the caller's terminal sends is not meant for it: neither Ctrl-C, nor the terminal's end.
    let own = rustix::process::setsid().context("leaving the caller's session");
    let outcome = own.and_then(|_| start_and_wait(place, args));
    if let Err(error) = &outcome {
        let error = format!("{error:#}");
        let code = exit_code_of(&error);
        report(&Report::Failed { error, code });
    }
    outcome
}

fn start_and_wait(place: &Place, args: &args::Monitor) -> Result<()> {
    let container = place.containers()?.find(&args.id)?;
    let lock = container.try_lock().context("locking the container")?;
    let Some(_lock) = lock else {
        bail!("container {} is running", container.record.name);
    };
    if container.has_held_files() {
        let name = &container.record.name;
        bail!("files of container {name} are being copied still: start it when `husk cp` is done");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting threads")?;
    let monitored = Monitored {
        place,
        container: &container,
        run_dir: container.run_dir(),
        bundle: container.dir.join("bundle"),
    };
    let ended = runtime.block_on(monitored.run(args.attached));
    runtime.shutdown_background();
    monitored.clear_away();
    network::tell_others(place, &container);
    let status = match &ended {
        Ok(code) => Status {
            state: State::Exited,
            exit_code: Some(*code),
            finished: Some(Utc::now().to_rfc3339()),
            started: container.status().ok().and_then(|status| status.started),
            ..Status::default()
        },
        Err(error) => Status {
            state: State::Exited,
            exit_code: Some(exit_code_of(&format!("{error:#}")).into()),
            finished: Some(Utc::now().to_rfc3339()),
            error: Some(format!("{error:#}")),
            ..Status::default()
        },
    };
    if container.record.remove {
        container.remove()?;
    } else {
        container.set_status(&status)?;
    }
    ended.map(drop)
}

/// What docker ends with where a container did not start: 127, there is no such program; 126, it cannot be run; 125, anything else.
pub(crate) fn exit_code_of(error: &str) -> u8 {
    if error.contains("executable file not found") || error.contains("no such file or directory") {
        127
    } else if error.contains("permission denied") || error.contains("exec format error") {
        126
    } else {
        125
    }
}

/// A container with a monitor.
struct Monitored<'a> {
    place: &'a Place,
    container: &'a Container,
    run_dir: PathBuf,
    bundle: PathBuf,
}

impl Monitored<'_> {
    fn shim(&self) -> Shim<'_> {
        Shim {
            namespace: NAMESPACE,
            id: &self.container.record.id,
            bundle: &self.bundle,
        }
    }

    /// Nothing of it is left running or mounted, and it can be started again.
    fn clear_away(&self) {
        self.shim().delete();
        network::detach(self.container);
        // It may never have come to be.
        let _ = fs::remove_dir_all(&self.run_dir);
    }

    /// Starts it and waits for its end: its exit code.
    async fn run(&self, attached: bool) -> Result<u32> {
        let id = &self.container.record.id;
        // What a monitor that was killed has left.
        self.clear_away();
        let pipes = self.make_pipes()?;
        let listener = UnixListener::bind(self.run_dir.join(SOCKET))
            .context("making the socket to attach to")?;
        let network = network::attach(self.place.root(), self.container)?;
        self.write_bundle(network.as_ref())?;
        let log = Log::open(&self.container.dir).context("opening the container's log")?;
        let hub = Arc::new(Hub::new(log, self.container.record.stdin_once));
        let came = Arc::new(Notify::new());
        tokio::spawn(hub::accept(listener, Arc::clone(&hub), Arc::clone(&came)));
        if attached {
            report(&Report::Listening);
            let waited = timeout(ATTACH, came.notified()).await;
            waited.context("nobody has attached who wanted to")?;
        }
        let address = self.shim().start()?;
        let tasks = shim::connect(&address).await?;
        said(tasks.create(soon(), &self.create_request(&pipes)).await)?;
        // From here on the shim holds the other ends.
        let outputs: Vec<JoinHandle<()>> = pipes
            .outputs()?
            .into_iter()
            .zip([Stream::Stdout, Stream::Stderr])
            .filter_map(|(pipe, stream)| {
                Some(tokio::spawn(hub::output(pipe?, Arc::clone(&hub), stream)))
            })
            .collect();
        hub.connect(tasks.clone(), id.clone(), pipes.input()?).await;
        let start = StartRequest {
            id: id.clone(),
            ..StartRequest::default()
        };
        let started = said(tasks.start(soon(), &start).await)?;
        self.container.set_status(&Status {
            state: State::Running,
            pid: Some(started.pid),
            address: Some(address),
            started: Some(Utc::now().to_rfc3339()),
            ..Status::default()
        })?;
        network::tell_others(self.place, self.container);
        hub.started().await;
        report(&Report::Started);
        let code = wait_for_end(&tasks, id).await?;
        for output in outputs {
            // A process that has left the container cannot be; a shim that does not let go can.
            let _ = timeout(REST, output).await;
        }
        hub.end(code).await;
        Ok(code)
    }

    fn make_pipes(&self) -> Result<Pipes> {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&self.run_dir);
        made.with_context(|| format!("making {}", self.run_dir.display()))?;
        let record = &self.container.record;
        let wanted = Wanted {
            stdin: record.stdin,
            stdout: true,
            stderr: !record.terminal,
        };
        Pipes::make(&self.run_dir, wanted)
    }

    /// The specification, with what only this host and this start know.
    fn write_bundle(&self, network: Option<&Attached>) -> Result<()> {
        let record = &self.container.record;
        let mut spec = record.spec.clone();
        let name = spec["hostname"].as_str().unwrap_or_default().to_owned();
        if let Some(network) = network {
            for namespace in spec["linux"]["namespaces"]
                .as_array_mut()
                .into_iter()
                .flatten()
            {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(network.namespace());
                }
            }
        }
        let all = self.place.containers()?.all()?;
        let files = [
            ("hostname", format!("{name}\n")),
            ("hosts", network::hosts(&all, self.container)),
            ("resolv.conf", network::resolv_conf()),
        ];
        let has = |mounts: &Value, target: &str| {
            let mounts = mounts.as_array();
            mounts.is_some_and(|mounts| mounts.iter().any(|mount| mount["destination"] == target))
        };
        for (file, text) in files {
            let (path, target) = (self.container.dir.join(file), format!("/etc/{file}"));
            // One of the user's own goes before it.
            if has(&spec["mounts"], &target) {
                continue;
            }
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(json!({
                    "destination": target, "type": "bind", "source": path, "options": ["rbind", "rprivate"],
                }));
            }
        }
        let path = self.bundle.join("config.json");
        let text = serde_json::to_vec(&spec)?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    fn create_request(&self, pipes: &Pipes) -> CreateTaskRequest {
        let record = &self.container.record;
        let lower: Vec<String> = record
            .layers
            .iter()
            .map(|l| l.display().to_string())
            .collect();
        let rootfs = Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: self.container.overlay_options(&lower).to_vec(),
            ..Mount::default()
        };
        let [stdin, stdout, stderr] = pipes.names();
        CreateTaskRequest {
            id: record.id.clone(),
            bundle: self.bundle.display().to_string(),
            rootfs: vec![rootfs],
            terminal: record.terminal,
            stdin,
            stdout,
            stderr,
            options: MessageField::none(),
            ..CreateTaskRequest::default()
        }
    }
}

/// Waits for the container's end and takes it from the shim: its exit code.
async fn wait_for_end(tasks: &TaskClient, id: &str) -> Result<u32> {
    let wait = WaitRequest {
        id: id.to_owned(),
        ..WaitRequest::default()
    };
    let ended =
        said(tasks.wait(forever(), &wait).await).context("waiting for the container's end")?;
    let delete = DeleteRequest {
        id: id.to_owned(),
        ..DeleteRequest::default()
    };
    // The shim's `delete` does it otherwise.
    if let Err(error) = said(tasks.delete(soon(), &delete).await) {
        tracing::warn!("deleting the container's task: {error:#}");
    }
    Ok(ended.exit_status)
}

/// Its log of its own, for what nobody sees otherwise.
pub(crate) fn own_log(container: &Container) -> Result<File> {
    let path = container.dir.join("monitor.log");
    let file = File::options().create(true).append(true).open(&path);
    file.with_context(|| format!("opening {}", path.display()))
}
