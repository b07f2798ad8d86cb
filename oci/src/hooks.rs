//! Programs of the host that a spec wants run as its container comes and goes (OCI runtime specification, "POSIX-platform Hooks").

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How often a program with a time limit is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A spec's; `startContainer` hooks are the guest's to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    create_container: Vec<Hook>,
    /// Once the container's process has begun.
    pub(crate) poststart: Vec<Hook>,
    /// Once the container has been deleted.
    pub(crate) poststop: Vec<Hook>,
}

/// One program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    /// Seconds.
    timeout: Option<u64>,
}

impl Hooks {
    /// Reads a spec's `hooks`, which may be absent.
    pub(crate) fn of(value: &Value) -> Result<Self> {
        if value.is_null() {
            return Ok(Self::default());
        }
        let hooks: Self = serde_json::from_value(value.clone()).context("reading the hooks")?;
        if let Some(hook) = hooks.create_container.first() {
            bail!(
                "the createContainer hook {} wants the container's namespaces, and those are in a VM: a createRuntime hook is run on the host",
                hook.path.display()
            );
        }
        Ok(hooks)
    }

    /// While the container is made.
    pub(crate) fn on_create(&self) -> impl Iterator<Item = &Hook> {
        self.prestart.iter().chain(&self.create_runtime)
    }
}

impl Hook {
    /// Runs it, with the container's state as its input.
    pub(crate) fn run(&self, state: &Value) -> Result<()> {
        let path = self.path.display();
        if !self.path.is_absolute() {
            bail!("the hook {path} is not an absolute path");
        }
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        command.env_clear();
        command.envs(self.env.iter().filter_map(|line| line.split_once('=')));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("running the hook {path}"))?;
        if let Some(mut input) = child.stdin.take() {
            // One that does not read it does not want it. A pipe holds more than a state.
            let _ = input.write_all(state.to_string().as_bytes());
        }
        let begun = Instant::now();
        let limit = self.timeout.map(Duration::from_secs);
        loop {
            if let Some(status) = child.try_wait()? {
                return match status.success() {
                    true => Ok(()),
                    false => bail!("error executing hook `{path}` ({status})"),
                };
            }
            if limit.is_some_and(|limit| begun.elapsed() >= limit) {
                child.kill()?;
                child.wait()?;
                bail!("error executing hook `{path}`: it has not ended within its timeout");
            }
            thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sh(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["A=b".to_owned()],
            timeout: None,
        }
    }

    #[test]
    fn a_hook_gets_the_state_and_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        sh(&format!("{{ /bin/cat; echo $A$HOME; }} >{}", out.display()))
            .run(&json!({"id": "c"}))
            .unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        assert_eq!(text, "{\"id\":\"c\"}b\n");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_told() {
        let told = |hook: &Hook| hook.run(&json!({})).unwrap_err().to_string();
        assert!(told(&sh("exit 3")).contains("exit status: 3"));
        let hangs = Hook {
            timeout: Some(0),
            ..sh("exec sleep 1000")
        };
        assert!(told(&hangs).contains("timeout"));
        let none = Hook {
            path: "sh".into(),
            ..Hook::default()
        };
        assert!(told(&none).contains("absolute"));
    }

    #[test]
    fn hooks_in_the_container_are_refused() {
        let hooks = json!({"createContainer": [{"path": "/h"}]});
        let error = Hooks::of(&hooks).unwrap_err().to_string();
        assert!(error.contains("createContainer hook /h"), "{error}");
        let hooks = json!({"prestart": [{"path": "/a"}], "createRuntime": [{"path": "/b"}], "startContainer": [{"path": "/c"}]});
        let hooks = Hooks::of(&hooks).unwrap();
        let paths: Vec<_> = hooks
            .on_create()
            .map(|hook| hook.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a", "/b"]);
        assert!(Hooks::of(&json!(7)).is_err());
        assert_eq!(Hooks::of(&Value::Null).unwrap(), Hooks::default());
    }
}
