//! `runtime_type = "oci"`: conmon and husk-oci, called as CRI-O's `internal/oci/runtime_oci.go` does (commit 0002055); crun as control.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Output},
    host::{self, Netns, Traces},
    runtime::Runtime,
    wait,
};
use serde_json::{Value, json};

use super::{Private, Storage};
use crate::context::Context;

/// What there is of one CRI-O: its directories and its runtime.
struct Crio<'a> {
    suite: &'a Context,
    dir: &'a Path,
    runtime: PathBuf,
}

impl Crio<'_> {
    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// `runtimeCmd`.
    fn runtime(&self, args: &[&str], input: &str) -> Result<Output> {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(self.root()).args(args);
        ctr::output_with_input(&mut command, input.as_bytes().to_vec())
    }

    /// conmon, and what it told CRI-O on the pipe that it was given.
    fn conmon(&self, id: &str, args: &[&str]) -> Result<Value> {
        let sync = self.dir.join(format!("{id}.sync"));
        let attach = self.dir.join("attach");
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"exec conmon "$@" 3>"$SYNC""#, "conmon"])
            .args(["-c", id, "-n", id, "--log-level", "info"])
            .arg("--socket-dir-path")
            .arg(&attach)
            .arg("-r")
            .arg(&self.runtime)
            .arg("--runtime-arg")
            .arg(format!("--root={}", self.root().display()))
            .args(args)
            .env("SYNC", &sync)
            .env("_OCI_SYNCPIPE", "3");
        let said = ctr::output(&mut command)?;
        // It goes to the background before it has made the container.
        let told = wait::until("conmon's word", || {
            serde_json::from_str(&fs::read_to_string(&sync).ok()?).ok()
        });
        told.with_context(|| format!("{said:?}"))
    }

    /// `CreateContainer`, and `StartContainer` where that succeeds.
    fn start(&self, container: &Storage) -> Result<Value> {
        let bundle = container.bundle();
        let at = |name: &str| bundle.join(name).display().to_string();
        let exits = self.dir.join("exits").display().to_string();
        let bundle_path = bundle.display().to_string();
        let (log, monitor, pid) = (at("log"), at("conmon-pidfile"), at("pidfile"));
        let id = container.id.as_str();
        let told = self.conmon(
            id,
            &[
                "-b",
                &bundle_path,
                "--exit-dir",
                &exits,
                "-l",
                &log,
                "-P",
                &monitor,
                "-p",
                &pid,
                "--persist-dir",
                &bundle_path,
                "-u",
                id,
            ],
        )?;
        if told["pid"].as_i64().is_some_and(|pid| pid > 0) {
            self.runtime(&["start", id], "")?.ok()?;
        }
        Ok(told)
    }

    fn process(&self, container: &Storage, command: &[&str]) -> Result<String> {
        let path = self.dir.join("exec-process");
        let mut process = container.spec["process"].clone();
        process["args"] = json!(command);
        process["terminal"] = json!(false);
        fs::write(&path, process.to_string())?;
        Ok(path.display().to_string())
    }

    /// `ExecSyncContainer`: the exit code, and the log of both streams.
    fn exec_sync(&self, container: &Storage, command: &[&str]) -> Result<(i64, String)> {
        let process = self.process(container, command)?;
        let [log, pid] =
            ["exec-log", "exec-pid"].map(|name| self.dir.join(name).display().to_string());
        fs::write(&log, "")?;
        let told = self.conmon(
            &container.id,
            &[
                "-p",
                &pid,
                "-e",
                "-l",
                &log,
                "--sync",
                "--exec-process-spec",
                &process,
            ],
        )?;
        let code = told["exit_code"].as_i64();
        let code = code.with_context(|| format!("no exit code: {told}"))?;
        Ok((code, fs::read_to_string(&log)?))
    }

    fn status(&self, id: &str) -> Result<String> {
        let state: Value = serde_json::from_str(&self.runtime(&["state", id], "")?.ok()?.text())?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits for the exit code that conmon writes, and is left with it.
    fn exit_code(&self, id: &str) -> Result<String> {
        let path = self.dir.join("exits").join(id);
        wait::until("the file with the exit code", || {
            fs::read_to_string(&path).ok()
        })
    }
}

pub fn pod(suite: &Context) -> Result<()> {
    let before = Traces::now();
    {
        let dir = tempfile::tempdir_in("/run")?;
        for name in ["storage", "exits", "attach", "namespaces"] {
            fs::create_dir(dir.path().join(name))?;
        }
        let storage = dir.path().join("storage");
        let storage = Private::mount(&storage)?;
        let netns = Netns::new("husk-crio-oci")?;
        netns.wire("husk-oci-h", "10.94.0.1", "eth0", "10.94.0.2")?;
        let crio = Crio {
            suite,
            dir: dir.path(),
            runtime: match suite.runtime {
                Runtime::Husk => suite.bin.join("husk-oci"),
                _ => "/usr/bin/crun".into(),
            },
        };
        whole_life(&crio, storage.0, &netns)?;
    }
    match suite.runtime {
        Runtime::Husk => before.restored(),
        // It is husk's traces that are looked for.
        _ => Ok(()),
    }
}

fn whole_life(crio: &Crio<'_>, storage: &Path, netns: &Netns) -> Result<()> {
    let make = |pod: Option<&str>, command: &[&str], limit| {
        Storage::new(crio.suite, storage, netns, pod, command, limit)
    };
    let sandbox = make(None, &["sleep", "1000000"], 0)?;
    if crio.suite.runtime == Runtime::Husk {
        // Without the sandbox's container (drop_infra_ctr) there is no VM to join.
        let early = make(Some(&sandbox.id), &["true"], 0)?;
        let told = crio.start(&early)?;
        let words = told["message"].as_str().unwrap_or_default();
        ensure!(
            told["pid"] == -1 && words.contains("is not running"),
            "{told}"
        );
    }

    crio.start(&sandbox)?;
    let script =
        "trap 'echo asked; exit 3' TERM; echo here; echo problem >&2; while :; do sleep 0.1; done";
    let main = make(Some(&sandbox.id), &["sh", "-c", script], 64 << 20)?;
    let told = crio.start(&main)?;
    ensure!(told["pid"].as_i64().is_some_and(|pid| pid > 0), "{told}");
    let id = main.id.as_str();
    let log = main.bundle().join("log");
    let is_logged = |line: &str| fs::read_to_string(&log).is_ok_and(|log| log.contains(line));
    wait::until("what it says", || {
        (is_logged(" stdout F here\n") && is_logged(" stderr F problem\n")).then_some(())
    })?;
    ensure!(host::run(&["ping", "-c", "1", "-W", "30", "10.94.0.2"])?.contains("1 received"));
    // One kernel for both.
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let [one, other] = [&sandbox, &main].map(|container| crio.exec_sync(container, &boot));
    let (one, other) = (one?, other?);
    let uuid = |said: &(i64, String)| said.1.split(' ').next_back().map(str::to_owned);
    ensure!(uuid(&one) == uuid(&other), "two VMs: {one:?} {other:?}");

    let (code, said) = crio.exec_sync(&main, &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    let is_said = said.contains(" stdout F out\n") && said.contains(" stderr F err\n");
    ensure!(code == 7 && is_said, "{code}: {said}");
    // ExecContainer.
    let process = crio.process(&main, &["sh", "-c", "cat; touch /new; exit 9"])?;
    let out = crio
        .runtime(&["exec", "--process", &process, id], "words")?
        .exited(9)?;
    ensure!(out.text() == "words", "{out:?}");
    ensure!(main.dir.join("diff/new").exists());

    let resources = json!({ "pids": { "limit": 50 } }).to_string();
    crio.runtime(&["update", "--resources", "-", id], &resources)?
        .ok()?;
    // Without a cgroup namespace crun shows all of the host's.
    let limit = "cd /sys/fs/cgroup; cat pids.max || cat .$(cut -d: -f3 /proc/self/cgroup)/pids.max";
    let (_, said) = crio.exec_sync(&main, &["sh", "-c", limit])?;
    ensure!(said.contains(" 50\n"), "{said}");
    crio.runtime(&["pause", id], "")?.ok()?;
    ensure!(crio.status(id)? == "paused");
    crio.runtime(&["resume", id], "")?.ok()?;
    ensure!(crio.status(id)? == "running");

    crio.runtime(&["kill", id, "TERM"], "")?.ok()?;
    ensure!(crio.exit_code(id)? == "3");
    ensure!(is_logged(" stdout F asked\n"));
    ensure!(crio.status(id)? == "stopped");
    // What CRI-O takes for an end that it has missed (`ErrNotFound`).
    let late = crio.runtime(&["kill", id, "KILL"], "")?;
    ensure!(
        late.code != 0 && late.errors().contains("not running"),
        "{late:?}"
    );
    crio.runtime(&["delete", "--force", id], "")?.ok()?;
    ensure!(
        crio.status(&sandbox.id)? == "running",
        "the pod went with a container"
    );
    crio.runtime(&["kill", &sandbox.id, "KILL"], "")?.ok()?;
    ensure!(crio.exit_code(&sandbox.id)? == "137");
    crio.runtime(&["delete", "--force", &sandbox.id], "")?
        .ok()?;
    Ok(())
}
