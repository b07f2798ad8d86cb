//! Hooks: programs that the spec runs at points of a container's life, with its state on their stdin.
//!
//! They always run as children of a `container-init` process, which can wait for them: the agent itself never
//! waits for a single child, its reaper takes them all.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::json;

use super::error::{LaunchError, OsError, Step};

/// How much of a failed hook's stderr its error quotes.
const MAX_QUOTE: u64 = 4096;

/// The container's state as hooks get it (runtime-spec, "State").
pub(crate) fn state_json(spec: &Spec, id: &str, status: &str, pid: i32) -> String {
    let bundle: PathBuf = spec
        .root()
        .as_ref()
        .and_then(|root| root.path().parent())
        .map(PathBuf::from)
        .unwrap_or_default();
    json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
        "annotations": spec.annotations().clone().unwrap_or_default(),
    })
    .to_string()
}

/// A container's state as a file, for each hook's stdin. No pipe: writing to a hook that does not read would wait for it,
/// whatever its timeout.
#[derive(Debug)]
pub(crate) struct State(File);

impl State {
    /// Writes the state down.
    pub(crate) fn new(json: &str) -> Result<Self, LaunchError> {
        let make = || -> io::Result<File> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let mut file = File::from(memfd_create("hook-state", flags)?);
            file.write_all(json.as_bytes())?;
            // One hook must not rewrite it for the next.
            let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
            fcntl_add_seals(&file, seals)?;
            Ok(file)
        };
        make()
            .map(Self)
            .step(|| "writing the state for hooks".to_owned())
    }

    fn stdin(&self) -> io::Result<Stdio> {
        let mut file = self.0.try_clone()?;
        file.rewind()?;
        Ok(file.into())
    }
}

/// Runs hooks one after another. The first failure ends it, unless they are all to be tried.
pub(crate) fn run_all(
    kind: &str,
    hooks: &[Hook],
    state: &State,
    keep_going: bool,
) -> Result<(), LaunchError> {
    let mut first_error = Ok(());
    for (number, hook) in hooks.iter().enumerate() {
        if let Err(reason) = run(hook, state) {
            let error = Err(LaunchError::Internal(format!(
                "error running {kind} hook #{number} {}: {reason}",
                hook.path().display()
            )));
            if !keep_going {
                return error;
            }
            first_error = first_error.and(error);
        }
    }
    first_error
}

fn run(hook: &Hook, state: &State) -> Result<(), String> {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    // The spec gives a hook its environment whole.
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    // A file rather than a pipe: a hook that writes much must not wait for a reader.
    let stderr = memfd_create("hook-stderr", MemfdFlags::CLOEXEC).map_err(|errno| errno.text())?;
    let mut stderr = File::from(stderr);
    let childs_stderr = stderr.try_clone().map_err(|error| error.text())?;
    let mut child = command
        .stdin(state.stdin().map_err(|error| error.text())?)
        .stdout(Stdio::null())
        .stderr(childs_stderr)
        .spawn()
        .map_err(|error| error.text())?;
    let status = wait(&mut child, hook.timeout())?;
    if status.success() {
        return Ok(());
    }
    let mut quote = Vec::new();
    if stderr.rewind().is_ok() {
        // The quote is a courtesy: what cannot be read is left out.
        let _ = stderr.take(MAX_QUOTE).read_to_end(&mut quote);
    }
    Err(format!(
        "{status}, stderr: {}",
        String::from_utf8_lossy(&quote).trim()
    ))
}

fn wait(child: &mut Child, timeout: Option<i64>) -> Result<ExitStatus, String> {
    let Some(seconds) = timeout.and_then(|seconds| u64::try_from(seconds).ok()) else {
        return child.wait().map_err(|error| error.text());
    };
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(status) = child.try_wait().map_err(|error| error.text())? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("timeout after {seconds} s"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        serde_json::from_value(json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"], "timeout": timeout,
        }))
        .unwrap()
    }

    #[test]
    fn state_environment_and_failures() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let write = hook(&format!("cat > {out}; echo $A >> {out}"), None);
        run_all(
            "createRuntime",
            &[write],
            &State::new("state").unwrap(),
            false,
        )
        .unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "stateb\n");
        let fail = hook("echo reason >&2; exit 3", None);
        let error = run_all("poststart", &[fail], &State::new("").unwrap(), false).unwrap_err();
        assert!(error.to_string().contains("poststart hook #0 /bin/sh"));
        assert!(error.to_string().contains("reason"), "{error}");
        let hang = hook("sleep 60", Some(0));
        let error = run_all("prestart", &[hang], &State::new("").unwrap(), false).unwrap_err();
        assert!(error.to_string().contains("timeout"), "{error}");
    }

    #[test]
    fn each_hook_reads_the_state_from_its_start_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        // More than a pipe holds.
        let state = State::new(&"s".repeat(1 << 20)).unwrap();
        let hang = hook("exec sleep 60", Some(0));
        let error = run_all("prestart", &[hang], &state, false).unwrap_err();
        assert!(error.to_string().contains("timeout"), "{error}");
        let count = || hook(&format!("wc -c >> {out}"), None);
        let scribble = hook("echo x >&0", Some(5));
        assert!(run_all("prestart", &[count(), scribble], &state, false).is_err());
        run_all("prestart", &[count()], &state, false).unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "1048576\n1048576\n");
    }

    #[test]
    fn poststop_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let hooks = [hook("exit 1", None), hook(&format!("touch {out}"), None)];
        assert!(run_all("poststop", &hooks, &State::new("").unwrap(), true).is_err());
        assert!(std::fs::exists(&out).unwrap());
    }
}
