//! The shim, started and asked as an engine does it: there is no other way to a pod.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use ttrpc::{asynchronous::transport::Socket, context};

/// The namespace of `husk`'s own containers.
const NAMESPACE: &str = "husk";

/// The shim's name (containerd, "Runtime v2", "Runtime binary").
const PROGRAM: &str = "containerd-shim-husk-v2";

/// The longest that a call may take which the guest answers; a Create boots the VM.
const PATIENCE: Duration = Duration::from_secs(120);

/// One container's shim.
#[derive(Debug)]
pub(crate) struct Shim<'a> {
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a Path,
}

impl Shim<'_> {
    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(program());
        command
            .args(["-namespace", NAMESPACE, "-id", self.id, "-address", ""])
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

    /// Starts it; the address that it serves at.
    pub(crate) fn start(&self) -> Result<String> {
        let output = self.command("start").output();
        let output = output.with_context(|| {
            format!("starting {PROGRAM}: it belongs beside husk, or into a directory of PATH")
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

    /// Clears away whatever is left of it, if anything.
    pub(crate) fn delete(&self) {
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

/// Beside this program, or else whatever PATH has.
pub(crate) fn program() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|exe| {
        let path = fs::canonicalize(exe).ok()?.with_file_name(PROGRAM);
        path.exists().then_some(path)
    });
    beside.unwrap_or_else(|| PathBuf::from(PROGRAM))
}

/// Connects to a shim.
pub(crate) async fn connect(address: &str) -> Result<TaskClient> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let stream = tokio::net::UnixStream::connect(path).await;
    let stream = stream.with_context(|| format!("connecting to the container's shim at {path}"))?;
    Ok(TaskClient::new(Client::new(Socket::from(stream))))
}

/// For a call that the guest answers.
pub(crate) fn soon() -> context::Context {
    context::with_duration(PATIENCE)
}

/// For a call that takes as long as the container does.
pub(crate) fn forever() -> context::Context {
    context::with_timeout(0)
}

/// An answer of the shim: its own words, without ttrpc's.
pub(crate) fn said<T>(answer: ttrpc::Result<T>) -> Result<T> {
    match answer {
        Ok(answer) => Ok(answer),
        Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
        Err(error) => Err(error.into()),
    }
}
