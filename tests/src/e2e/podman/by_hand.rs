//! husk-oci's own command line, beside crun's.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    ctr::{self, Output},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{CRUN, bundle};
use crate::context::Context;

/// An OCI runtime with a root of its own. Dropped, the containers of the tests are removed.
struct Oci {
    program: String,
    root: String,
}

impl Oci {
    fn both(suite: &Context, name: &str) -> [Self; 2] {
        let husk = suite.bin.join("husk-oci").display().to_string();
        [husk, CRUN.to_owned()].map(|program| Self {
            root: format!(
                "/run/husk-e2e-oci-{name}-{}",
                if program == CRUN { "crun" } else { "husk" }
            ),
            program,
        })
    }

    /// Its output goes to files, not to pipes: what it leaves running has them open.
    fn run(&self, args: &[&str]) -> Result<Output> {
        fs::create_dir_all(&self.root)?;
        let log = Path::new(&self.root).join("said");
        let script =
            r#"log=$1; shift; "$@" >"$log" 2>&1 </dev/null; code=$?; cat "$log" >&2; exit $code"#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(log);
        command
            .args([&*self.program, "--root", &format!("{}/root", self.root)])
            .args(args);
        ctr::output(&mut command)
    }

    fn state(&self, id: &str) -> Result<Value> {
        let state = self.run(&["state", id])?.ok()?;
        Ok(serde_json::from_str(&state.errors())?)
    }
}

impl Drop for Oci {
    fn drop(&mut self) {
        for id in ["c1", "c2", "c3"] {
            let _ = self.run(&["delete", "--force", id]);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

pub fn errors(suite: &Context) -> Result<()> {
    let plain = bundle(suite, "errors", |_| {})?;
    let plain = plain.to_str().context("its name")?;
    let terminal = bundle(suite, "errors-terminal", |spec| {
        spec["process"]["terminal"] = json!(true)
    })?;
    let terminal = terminal.to_str().context("its name")?;
    // What both say, and the rest of the line is each one's own.
    let lines: &[(&[&str], &str)] = &[
        (&["state", "c9"], "No such file or directory"),
        (&["kill", "c9"], "No such file or directory"),
        (&["delete", "c9"], "No such file or directory"),
        (&["delete", "--force", "c9"], ""),
        (&["start", "c9"], "No such file or directory"),
        (&["exec", "c9", "true"], "No such file or directory"),
        (&["pause", "c9"], "No such file or directory"),
        (&["frobnicate"], "unknown command frobnicate"),
        (
            &["list", "--frobnicate"],
            "unrecognized option '--frobnicate'",
        ),
        (&["--log-format", "yaml", "list"], "yaml"),
        (&[], "please specify a command"),
        (&["create"], "please specify a ID for the container"),
        (&["state", "a/b"], "invalid character `/` in the ID `a/b`"),
        (
            &["create", "--bundle", "/nothing", "c1"],
            "chdir `/nothing` failed: No such file or directory",
        ),
        (
            &["create", "--bundle", "/run", "c1"],
            "error loading config.json",
        ),
        (
            &["create", "--bundle", terminal, "c1"],
            "use --console-socket with create when a terminal is used",
        ),
        (
            &[
                "create",
                "--bundle",
                terminal,
                "--console-socket",
                "/nothing",
                "c1",
            ],
            "open console socket: connect socket to `/nothing`: No such file or directory",
        ),
        (&["state", "c1"], "No such file or directory"),
        (&["create", "--bundle", plain, "c1"], ""),
        (
            &["create", "--bundle", plain, "c1"],
            "container `c1` already exists",
        ),
        (&["start", "c1"], ""),
        (&["start", "c1"], ""),
        (
            &["delete", "c1"],
            "the container `c1` is not in `created` or `stopped` state",
        ),
        (&["kill", "c1", "FOO"], "unknown signal `FOO`"),
        (&["kill", "c1", "0"], ""),
        (&["exec", "c1", "sh", "-c", "exit 7"], ""),
        (&["exec", "c1", "nothing"], "nothing"),
        (&["pause", "c1"], ""),
        (&["pause", "c1"], ""),
        (&["resume", "c1"], ""),
        (&["resume", "c1"], ""),
        (&["kill", "c1", "KILL"], ""),
    ];
    let stopped: &[(&[&str], &str)] = &[
        (&["kill", "c1"], "container not running: No such process"),
        (&["kill", "--all", "c1", "KILL"], ""),
        (&["exec", "c1", "true"], "the container `c1` is not running"),
        (&["start", "c1"], "container `c1` is not running"),
        (
            &["pause", "c1"],
            "the container `c1` is not running: No such process",
        ),
        (&["delete", "c1"], ""),
        (&["create", "--bundle", plain, "c2"], ""),
        (&["delete", "c2"], ""),
    ];
    let [husk, crun] = Oci::both(suite, "errors");
    for (args, words) in lines {
        agree(&husk, &crun, args, words)?;
    }
    for oci in [&husk, &crun] {
        wait::until("its end", || {
            (oci.state("c1").ok()?["status"] == "stopped").then_some(())
        })?;
        ensure!(oci.state("c1")?["pid"] == 0);
    }
    for (args, words) in stopped {
        agree(&husk, &crun, args, words)?;
    }
    let log = format!("{}/log", husk.root);
    husk.run(&["--log", &log, "--log-format", "json", "state", "c9"])?
        .exited(1)?;
    let told: Value = serde_json::from_str(&fs::read_to_string(log)?)?;
    ensure!(
        told["level"] == "error" && told["msg"].to_string().contains("c9"),
        "{told}"
    );
    Ok(())
}

/// Both end with the same code, and say these words.
fn agree(husk: &Oci, crun: &Oci, args: &[&str], words: &str) -> Result<()> {
    let (ours, theirs) = (husk.run(args)?, crun.run(args)?);
    ensure!(ours.code == theirs.code, "{ours:?}\nbut\n{theirs:?}");
    for output in [&ours, &theirs] {
        ensure!(
            output.errors().contains(words),
            "without {words:?}: {output:?}"
        );
    }
    Ok(())
}

/// In a cgroup of systemd's notation, with a shim that dies before the end.
pub fn hooks(suite: &Context) -> Result<()> {
    const SCOPE: &str = "machine.slice/husk-e2e.scope";
    let dir = Path::new("/var/lib/husk-e2e-podman/hooks-said");
    let _ = fs::remove_file(dir);
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat) >>{}", dir.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
    };
    let plain = bundle(suite, "hooks", |spec| {
        let kinds = ["prestart", "createRuntime", "poststart", "poststop"];
        spec["hooks"] = kinds
            .map(|kind| (kind.to_owned(), hook(kind)))
            .into_iter()
            .collect();
        spec["linux"]["cgroupsPath"] = json!("machine.slice:husk:e2e");
    })?;
    let [husk, _] = Oci::both(suite, "hooks");
    let plain = plain.to_str().context("its name")?;
    husk.run(&["--systemd-cgroup", "create", "--bundle", plain, "c1"])?
        .ok()?;
    husk.run(&["start", "c1"])?.ok()?;
    let scope = Path::new("/sys/fs/cgroup").join(SCOPE);
    let inside = fs::read_to_string(scope.join("cgroup.procs"))?;
    let pid = husk.state("c1")?["pid"].to_string();
    ensure!(inside.lines().any(|line| line == pid), "{pid}: {inside}");
    for pid in inside.lines() {
        // The end of one ends others.
        let _ = kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL);
    }
    husk.run(&["delete", "--force", "c1"])?.ok()?;
    ensure!(!scope.exists());
    let said = fs::read_to_string(dir)?;
    let kinds: Vec<_> = said
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    ensure!(
        kinds == ["prestart", "createRuntime", "poststart", "poststop"],
        "{said}"
    );
    for (line, status) in said
        .lines()
        .zip(["created", "created", "running", "stopped"])
    {
        let state: Value = serde_json::from_str(line.split_once(' ').context("no state")?.1)?;
        ensure!(state["id"] == "c1" && state["status"] == status, "{line}");
    }
    let refused = bundle(suite, "hooks-refused", |spec| {
        spec["hooks"] = json!({"createContainer": hook("x")})
    })?;
    let refused = husk
        .run(&[
            "create",
            "--bundle",
            refused.to_str().context("its name")?,
            "c2",
        ])?
        .exited(1)?;
    ensure!(refused.errors().contains("createContainer"), "{refused:?}");
    husk.run(&["state", "c2"])?.exited(1)?;
    Ok(())
}

pub fn killed_proxy(suite: &Context) -> Result<()> {
    let plain = bundle(suite, "killed", |_| {})?;
    let [husk, _] = Oci::both(suite, "killed");
    let pid_file = format!("{}/pid", husk.root);
    let plain = plain.to_str().context("its name")?;
    husk.run(&["create", "--bundle", plain, "--pid-file", &pid_file, "c1"])?
        .ok()?;
    husk.run(&["start", "c1"])?.ok()?;
    let pid: i32 = fs::read_to_string(&pid_file)?.parse()?;
    let state = husk.state("c1")?;
    ensure!(
        (&state["status"], &state["pid"]) == (&json!("running"), &json!(pid)),
        "{state}"
    );
    // Who goes by the pid finds nothing of the host.
    ensure!(fs::read_dir(format!("/proc/{pid}/root"))?.next().is_none());
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait::until("the container's end", || {
        (husk.state("c1").ok()?["status"] == "stopped").then_some(())
    })?;
    husk.run(&["delete", "c1"])?.ok()?;
    // A signal reaches the guest, and its end is the proxy's.
    husk.run(&["create", "--bundle", plain, "--pid-file", &pid_file, "c2"])?
        .ok()?;
    husk.run(&["start", "c2"])?.ok()?;
    let pid: i32 = fs::read_to_string(&pid_file)?.parse()?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    // sleep as PID 1 has no handler: it goes on, and the proxy with it.
    ensure!(husk.state("c2")?["status"] == "running");
    husk.run(&["kill", "c2", "KILL"])?.ok()?;
    wait::until("the proxy's end", || {
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    })?;
    ensure!(husk.state("c2")?["status"] == "stopped");
    Ok(())
}
