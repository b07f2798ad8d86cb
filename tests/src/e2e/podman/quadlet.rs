//! What Quadlet makes of units: a container's, a pod's with its members', and one of Kubernetes' notation. There is no systemd here, so their
//! commands are run by hand, with a socket for what they tell it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::podman::{IMAGE, Podman, RUN_ROOT};
use husk_tests::{ctr, runtime::Runtime, wait};

use crate::context::Context;

const GENERATOR: &str = "/usr/libexec/podman/quadlet";

/// The units that Quadlet has made, and systemd's part.
struct Units {
    /// The lines of each, by its name.
    made: BTreeMap<String, Vec<String>>,
    /// `%t`, which holds the socket as well.
    dir: PathBuf,
    socket: UnixDatagram,
}

impl Units {
    /// Of the files in this directory.
    fn generate(dir: &Path) -> Result<Self> {
        let mut generate = Command::new(GENERATOR);
        generate.arg("-dryrun").env("QUADLET_UNIT_DIRS", dir);
        let text = ctr::output(&mut generate)?.ok()?.text();
        let mut made = BTreeMap::<_, Vec<_>>::new();
        let mut name = String::new();
        for line in text.lines() {
            let head = line
                .strip_prefix("---")
                .and_then(|l| l.strip_suffix(".service---"));
            match head {
                Some(head) => head.clone_into(&mut name),
                None => made.entry(name.clone()).or_default().push(line.to_owned()),
            }
        }
        let dir = dir.join("run");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let socket = UnixDatagram::bind(dir.join("notify"))?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { made, dir, socket })
    }

    /// Runs a unit's commands of this key.
    fn run(&self, unit: &str, key: &str) -> Result<()> {
        let lines = self.made.get(unit).with_context(|| unit.to_owned())?;
        let commands = lines
            .iter()
            .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let mut count = 0;
        for line in commands {
            let line = line
                .trim_start_matches('-')
                .replace("%t", &self.dir.display().to_string())
                .replace("%N", unit);
            let mut run = Command::new("sh");
            run.args(["-c", &line])
                .env("NOTIFY_SOCKET", self.dir.join("notify"));
            ctr::output(&mut run)?.ok()?;
            count += 1;
        }
        ensure!(count > 0, "{unit} has no {key}");
        Ok(())
    }

    /// Starts a unit of the type notify: it is ready when the process that systemd is to watch is a conmon.
    fn start(&self, unit: &str) -> Result<()> {
        self.run(unit, "ExecStart")?;
        let (mut pid, mut is_ready) = (None, false);
        while pid.is_none() || !is_ready {
            let mut said = [0; 4096];
            let length = self
                .socket
                .recv(&mut said)
                .context("waiting for its word")?;
            let said = String::from_utf8_lossy(said.get(..length).unwrap_or_default()).into_owned();
            is_ready |= said.lines().any(|line| line == "READY=1");
            let told = said.lines().find_map(|line| line.strip_prefix("MAINPID="));
            pid = pid.or(told.map(str::to_owned));
        }
        is_conmon(&pid.unwrap_or_default())
    }
}

fn is_conmon(pid: &str) -> Result<()> {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.trim()))?;
    ensure!(name.trim() == "conmon", "{pid} is {name}");
    Ok(())
}

/// The directory of the units, empty, and the line by which they name the runtime and the suite's storage.
fn begin(podman: &Podman, name: &str) -> Result<(PathBuf, String)> {
    let dir = podman.dir.join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    let global = format!(
        "GlobalArgs=--runtime {} --root {} --runroot {RUN_ROOT} --cgroup-manager cgroupfs --events-backend file\n",
        podman.runtime.display(),
        podman.storage().display()
    );
    Ok((dir, global))
}

fn logged(podman: &Podman, name: &str) -> Result<String> {
    wait::until("its first line", || {
        let logs = podman.run(&["logs", name]).ok()?;
        (!logs.text().is_empty()).then_some(logs.text())
    })
}

fn is_kernel_of(suite: &Context, kernel: &str) -> Result<()> {
    let is = kernel.trim_end().ends_with("-husk") == (suite.runtime == Runtime::Husk);
    ensure!(is, "{kernel}");
    Ok(())
}

/// A container by itself.
pub fn container(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let (dir, global) = begin(&podman, "units-container")?;
    let unit = format!(
        "[Container]\nImage={IMAGE}\nContainerName=quadlet\nNetwork=none\n{global}Exec=sh -c 'uname -r; exec sleep 1000'\n"
    );
    fs::write(dir.join("web.container"), unit)?;
    let units = Units::generate(&dir)?;
    units.start("web")?;
    let logged = logged(&podman, "quadlet");
    podman.run(&["rm", "-f", "-t", "0", "quadlet"])?.ok()?;
    is_kernel_of(suite, &logged?)
}

/// A pod, which ends with the last of its members.
pub fn pod(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let (dir, global) = begin(&podman, "units-pod")?;
    let pod = format!("[Pod]\nPodName=quadlet-pod\nNetwork=none\n{global}");
    fs::write(dir.join("two.pod"), pod)?;
    for name in ["one", "other"] {
        let script = format!("echo {name} >/dev/shm/{name}; uname -r; exec sleep 1000");
        let unit = format!(
            "[Container]\nImage={IMAGE}\nContainerName=quadlet-{name}\nPod=two.pod\nPodmanArgs=--stop-signal KILL\n{global}Exec=sh -c '{script}'\n"
        );
        fs::write(dir.join(format!("{name}.container")), unit)?;
    }
    let units = Units::generate(&dir)?;
    units.run("two-pod", "ExecStartPre")?;
    units.run("two-pod", "ExecStart")?;
    is_conmon(&fs::read_to_string(units.dir.join("two-pod.pid"))?)?;
    units.start("one")?;
    units.start("other")?;
    let shared = ["sh", "-c", "until [ -e /dev/shm/one ]; do sleep 0.1; done"];
    let exec = ["exec", "quadlet-other"];
    podman.run(&[&exec[..], &shared].concat())?.ok()?;
    is_kernel_of(suite, &logged(&podman, "quadlet-one")?)?;
    units.run("one", "ExecStop")?;
    ensure!(podman.inspect("quadlet-other", "{{.State.Status}}")? == "running");
    units.run("other", "ExecStop")?;
    wait::until("the pod's end", || {
        let state = ["pod", "inspect", "quadlet-pod", "--format", "{{.State}}"];
        (podman.run(&state).ok()?.text() == "Exited").then_some(())
    })?;
    units.run("two-pod", "ExecStop")?;
    units.run("two-pod", "ExecStopPost")?;
    podman.run(&["pod", "exists", "quadlet-pod"])?.exited(1)?;
    Ok(())
}

/// Its service container, which systemd watches, is one beside the pod.
pub fn kube(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let (dir, global) = begin(&podman, "units-kube")?;
    let host = dir.join("host");
    fs::write(dir.join("pod.yaml"), super::pods::yaml("of-kube", &host))?;
    let unit = format!(
        "[Kube]\nYaml={}\nNetwork=none\n{global}",
        dir.join("pod.yaml").display()
    );
    fs::write(dir.join("of.kube"), unit)?;
    let units = Units::generate(&dir)?;
    units.start("of")?;
    let answered = wait::until("the answer", || {
        let answer = fs::read_to_string(host.join("answer")).ok()?;
        (!answer.is_empty()).then_some(answer)
    });
    let all = podman.run(&["ps", "--format", "{{.Names}}"])?.ok()?;
    units.run("of", "ExecStopPost")?;
    is_kernel_of(suite, &answered?)?;
    let service = all.text();
    let service = service.lines().find(|name| name.ends_with("-service"));
    let service = service.with_context(|| format!("{all:?}"))?;
    podman.run(&["pod", "exists", "of-kube"])?.exited(1)?;
    podman.run(&["container", "exists", service])?.exited(1)?;
    Ok(())
}
