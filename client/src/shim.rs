//! The shim, started and asked as an engine does it: there is no other way to a pod.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::ExecProcessRequest,
    protobuf::{MessageField, well_known_types::any::Any},
    shim_async::{Client, TaskClient},
};
use ttrpc::{asynchronous::transport::Socket, context};

use crate::pipes::Pipes;

/// What an exec's specification is to containerd: its typeurl of the runtime spec's type.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What an Update's resources are, likewise.
pub const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The shim's name (containerd, "Runtime v2", "Runtime binary").
const PROGRAM: &str = "containerd-shim-husk-v2";

/// An Exec of this process, the runtime spec's as JSON, with these streams.
pub fn exec_request(
    container: &str,
    exec_id: &str,
    terminal: bool,
    pipes: &Pipes,
    process: Vec<u8>,
) -> ExecProcessRequest {
    let [stdin, stdout, stderr] = pipes.names();
    ExecProcessRequest {
        id: container.to_owned(),
        exec_id: exec_id.to_owned(),
        terminal,
        stdin,
        stdout,
        stderr,
        spec: MessageField::some(Any {
            type_url: PROCESS.to_owned(),
            value: process,
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    }
}

/// The longest that a call may take which the guest answers; a Create boots the VM.
const PATIENCE: Duration = Duration::from_secs(120);

/// One container's shim.
#[derive(Debug)]
pub struct Shim<'a> {
    /// containerd's word for a set of ids; each command has its own.
    pub namespace: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// Its bundle, absolute. Bundles of one pod are named by their containers' ids, side by side: the shim looks for the others there.
    pub bundle: &'a Path,
}

impl Shim<'_> {
    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(program());
        command
            .args(["-namespace", self.namespace, "-id", self.id, "-address", ""])
            .args(["-publish-binary", ""])
            .arg("-bundle")
            .arg(self.bundle)
            .arg(action)
            .current_dir(self.bundle)
            // Nobody listens to events.
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null());
        command
    }

    /// Starts it, or finds its pod's: the address that it serves at. Blocks.
    ///
    /// # Errors
    /// The shim's own words.
    pub fn start(&self) -> Result<String> {
        let output = self.command("start").output();
        let output = output.with_context(|| {
            format!(
                "starting {PROGRAM}: it belongs beside this program, or into a directory of PATH"
            )
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{}",
                said.trim().trim_start_matches(&format!("{PROGRAM}: "))
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Clears away whatever is left of it, if anything. Blocks, for 5 s at most.
    pub fn delete(&self) {
        if !self.bundle.exists() {
            return;
        }
        match self.command("delete").output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                tracing::warn!("clearing the shim of {} away: {}", self.id, said.trim());
            }
            Err(error) => tracing::warn!("clearing the shim of {} away: {error}", self.id),
        }
    }
}

/// The shim's program: beside this one, or else whatever PATH has.
#[must_use]
pub fn program() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|exe| {
        let path = fs::canonicalize(exe).ok()?.with_file_name(PROGRAM);
        path.exists().then_some(path)
    });
    beside.unwrap_or_else(|| PathBuf::from(PROGRAM))
}

/// Connects to a shim.
///
/// # Errors
/// Nobody serves there.
pub async fn connect(address: &str) -> Result<TaskClient> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let stream = tokio::net::UnixStream::connect(path).await;
    let stream = stream.with_context(|| format!("connecting to the container's shim at {path}"))?;
    Ok(TaskClient::new(Client::new(Socket::from(stream))))
}

/// For a call that the guest answers.
#[must_use]
pub fn soon() -> context::Context {
    context::with_duration(PATIENCE)
}

/// For a call that takes as long as the container does.
#[must_use]
pub fn forever() -> context::Context {
    context::with_timeout(0)
}

/// An answer of the shim: its own words, without ttrpc's.
///
/// # Errors
/// Those words.
pub fn said<T>(answer: ttrpc::Result<T>) -> Result<T> {
    match answer {
        Ok(answer) => Ok(answer),
        Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
        Err(error) => Err(error.into()),
    }
}
