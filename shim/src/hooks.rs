//! Hooks: programs of the host that a spec wants run at points of a container's life, with its state on their stdin (runtime-spec,
//! config.md, "POSIX-platform Hooks").
//!
//! Docker 26 sets a container's network up by one: it is told a pid, and fills that one's network namespace. For a container without a
//! pod that is the VMM's, so the hooks before the start run when there is a VMM, and when its namespace has been found
//! empty: what comes into it later is a [network that comes late](crate::network::late).
//!
//! They run on the host, in the shim's mount namespace, as the runtime's hooks do with runc. Those of the container's own namespaces are the guest's:
//! `startContainer` runs there, `createContainer` does not, as it names a program of the host.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use serde_json::json;
use tokio::{process::Command, task::spawn_blocking, time::timeout};
use tracing::warn;

use crate::{error::chain, state::PodDir};

/// Bytes of a failed hook's stderr that its error quotes.
const MAX_QUOTE: u64 = 4096;

/// For one that names no timeout; whoever asked for the start has given up by then.
const PATIENCE: Duration = Duration::from_secs(240);

/// A hook that did not do what it was for.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("cannot run the {kind} hook {path}: {source}")]
    Run {
        /// When it runs.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It says so.
    #[error("the {kind} hook {path} failed ({status}): {stderr}")]
    Failed {
        /// When it runs.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote, or the beginning of it.
        stderr: String,
    },
    /// It does not end.
    #[error("the {kind} hook {path} did not end within {} s, and was killed", .limit.as_secs())]
    Overdue {
        /// When it runs.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
}

/// Those of a spec that run on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

/// One program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    /// Seconds.
    timeout: Option<u64>,
}

/// Whose hooks they are.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a Path,
    /// The pid that stands for it on the host.
    pub pid: u32,
}

impl Hooks {
    /// Before the container is there, once the pid is. The first that fails ends it.
    ///
    /// # Errors
    /// [`HookError`].
    pub async fn before(&self, subject: Subject<'_>) -> Result<(), HookError> {
        for (kind, hooks) in [
            ("prestart", &self.prestart),
            ("createRuntime", &self.create_runtime),
        ] {
            for hook in hooks {
                hook.run(kind, subject, "creating").await?;
            }
        }
        Ok(())
    }

    /// Notes in the pod's state that those for its end are to be run, or that they have been: a shim that dies leaves them to its `delete`.
    pub async fn owe(&self, pod: &PodDir, id: &str, is_owed: bool) {
        if self.poststop.is_empty() {
            return;
        }
        let (pod, container) = (pod.clone(), id.to_owned());
        let noted = spawn_blocking(move || {
            pod.update(|state| {
                if is_owed {
                    state.hooked.insert(container);
                } else {
                    state.hooked.remove(&container);
                }
            })
        });
        match noted.await {
            Ok(Ok(())) => {}
            outcome => warn!(
                container = id,
                ?outcome,
                "the pod's state file does not tell of the container's hooks"
            ),
        }
    }

    /// When the container's process runs. One that fails is told in the log.
    pub async fn started(&self, subject: Subject<'_>) {
        self.all("poststart", &self.poststart, subject, "running")
            .await;
    }

    /// When the container has gone. One that fails is told in the log.
    pub async fn stopped(&self, subject: Subject<'_>) {
        self.all("poststop", &self.poststop, subject, "stopped")
            .await;
    }

    async fn all(&self, kind: &'static str, hooks: &[Hook], subject: Subject<'_>, status: &str) {
        for hook in hooks {
            if let Err(error) = hook.run(kind, subject, status).await {
                warn!(container = subject.id, error = chain(&error), "goes on");
            }
        }
    }
}

impl Hook {
    async fn run(
        &self,
        kind: &'static str,
        subject: Subject<'_>,
        status: &str,
    ) -> Result<(), HookError> {
        let cannot = |source| HookError::Run {
            kind,
            path: self.path.clone(),
            source,
        };
        let state = json!({
            "ociVersion": "1.0.2",
            "id": subject.id,
            "status": status,
            "pid": subject.pid,
            "bundle": subject.bundle,
        });
        // Files, not pipes: a hook that does not read, or writes much, waits for nobody.
        let stdin = memory("hook-state", state.to_string().as_bytes()).map_err(cannot)?;
        let mut stderr = memory("hook-stderr", b"").map_err(cannot)?;
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        let variables = self.env.iter().filter_map(|pair| pair.split_once('='));
        // The spec gives a hook its environment whole.
        command.env_clear().envs(variables);
        command
            .current_dir(subject.bundle)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(stderr.try_clone().map_err(cannot)?)
            .kill_on_drop(true);
        let limit = self.timeout.map_or(PATIENCE, Duration::from_secs);
        let mut child = command.spawn().map_err(cannot)?;
        let status = match timeout(limit, child.wait()).await {
            Ok(ended) => ended.map_err(cannot)?,
            Err(_) => {
                let _ = child.kill().await;
                return Err(HookError::Overdue {
                    kind,
                    path: self.path.clone(),
                    limit,
                });
            }
        };
        if status.success() {
            return Ok(());
        }
        let mut said = Vec::new();
        stderr
            .rewind()
            .and_then(|()| stderr.take(MAX_QUOTE).read_to_end(&mut said))
            .map_err(cannot)?;
        Err(HookError::Failed {
            kind,
            path: self.path.clone(),
            status,
            stderr: String::from_utf8_lossy(&said).trim().to_owned(),
        })
    }
}

/// A file of nobody's, with this in it.
fn memory(name: &str, content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &serde_json::Value) -> Hooks {
        serde_json::from_value(json.clone()).unwrap()
    }

    fn subject(bundle: &Path) -> Subject<'_> {
        Subject {
            id: "c",
            bundle,
            pid: 77,
        }
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_its_arguments_and_its_environment_alone() {
        let dir = tempfile::tempdir().unwrap();
        let script = "cat >state; echo \"$0 $1 $A\" >said; env >env";
        let hooks = hooks(&json!({ "prestart": [
            { "path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["A=b"] }
        ] }));
        hooks.before(subject(dir.path())).await.unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let state: serde_json::Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!((&state["id"], &state["pid"]), (&json!("c"), &json!(77)));
        assert_eq!(state["bundle"], json!(dir.path()));
        assert_eq!(read("said"), "zero one b\n");
        assert!(!read("env").contains("CARGO"), "{}", read("env"));
    }

    #[tokio::test]
    async fn the_first_that_fails_ends_a_start_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(&json!({
            "prestart": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo no net >&2; exit 3"] }],
            "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "touch ran"] }],
        }));
        let error = hooks.before(subject(dir.path())).await.unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("prestart hook /bin/sh") && error.contains("no net"),
            "{error}"
        );
        assert!(!dir.path().join("ran").exists());
    }

    #[tokio::test]
    async fn those_after_it_all_run() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(&json!({ "poststop": [
            { "path": "/nonexistent/hook" },
            { "path": "/bin/sh", "args": ["sh", "-c", "cat >state"] },
        ] }));
        hooks.stopped(subject(dir.path())).await;
        let state = std::fs::read_to_string(dir.path().join("state")).unwrap();
        assert!(state.contains("stopped"), "{state}");
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(&json!({ "createRuntime": [
            { "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 0 },
        ] }));
        let error = hooks.before(subject(dir.path())).await.unwrap_err();
        assert!(matches!(error, HookError::Overdue { .. }), "{error}");
    }
}
