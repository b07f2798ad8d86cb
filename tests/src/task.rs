//! The Task API of one shim, asked without containerd between: for the calls that `ctr` has no command for.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{
    Client, TaskClient,
    protobuf::well_known_types::any::Any,
    ttrpc::{self, context},
};

use crate::{
    containerd::{Containerd, NAMESPACE},
    wait,
};

/// What containerd's Update carries (its typeurl of the runtime spec's type).
const LINUX_RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A connection to the shim of the container with this id, which containerd has started.
///
/// # Errors
/// There is no such shim, or it does not listen.
pub fn of(containerd: &Containerd, id: &str) -> Result<TaskClient> {
    let bundle = containerd
        .dir()
        .join("state/io.containerd.runtime.v2.task")
        .join(NAMESPACE)
        .join(id);
    connect(
        &fs::read_to_string(bundle.join("address")).with_context(|| {
            format!(
                "reading the shim's address from its bundle {}",
                bundle.display()
            )
        })?,
    )
}

/// A connection to the shim at this address, as its `start` prints it.
///
/// # Errors
/// Nobody listens there.
pub fn connect(address: &str) -> Result<TaskClient> {
    let client = Client::connect(address.trim())
        .with_context(|| format!("connecting to the shim at {address}"))?;
    Ok(TaskClient::new(client))
}

/// A call's context, with a bound that only a hang reaches.
pub fn context() -> context::Context {
    context::with_duration(wait::HANG)
}

/// Resources in the form in which Update takes them.
pub fn resources(spec: &serde_json::Value) -> Any {
    Any {
        type_url: LINUX_RESOURCES.into(),
        value: spec.to_string().into_bytes(),
        ..Any::default()
    }
}

/// The answer is this refusal.
///
/// # Errors
/// It is another, or none.
pub fn refused<T>(answer: ttrpc::Result<T>, wanted: ttrpc::Code) -> Result<String> {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => {
            ensure!(
                status.code() == wanted,
                "{wanted:?} was expected: {status:?}"
            );
            Ok(status.message().to_owned())
        }
        Err(other) => bail!("{wanted:?} was expected: {other}"),
        Ok(_) => bail!("{wanted:?} was expected, and the call went through"),
    }
}

/// A shim that a test starts as containerd does, on a bundle of the test's own. Dropped, it is deleted.
pub struct Shim {
    program: PathBuf,
    id: String,
    bundle: tempfile::TempDir,
}

impl Shim {
    /// Writes the bundle: `config.json`, and an empty `rootfs` if asked for.
    ///
    /// # Errors
    /// The bundle could not be written.
    pub fn new(bin: &Path, id: String, config: &str, rootfs: bool) -> Result<Self> {
        let bundle = tempfile::tempdir()?;
        fs::write(bundle.path().join("config.json"), config)?;
        if rootfs {
            fs::create_dir(bundle.path().join("rootfs"))?;
        }
        Ok(Self {
            program: bin.join("containerd-shim-husk-v2"),
            id,
            bundle,
        })
    }

    /// The bundle's directory.
    pub fn bundle(&self) -> &Path {
        self.bundle.path()
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", NAMESPACE, "-id", &self.id])
            .args(["-address", "", "-publish-binary", "/bin/true"])
            .arg("-bundle")
            .arg(self.bundle.path())
            .arg(action)
            .current_dir(self.bundle.path())
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null());
        command
    }

    /// `start`: the address it serves at.
    ///
    /// # Errors
    /// It said no; with its words.
    pub fn start(&self) -> Result<String> {
        let output = self
            .command("start")
            .output()
            .context("starting the shim")?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // What a delete leaves, the leak checks find.
        let _ = self.command("delete").stdout(Stdio::null()).status();
    }
}
