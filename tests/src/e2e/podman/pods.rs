//! podman's pods: made by hand, by `podman kube play` and by a unit of Quadlet.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use husk_tests::podman::{IMAGE, RUN_ROOT};
use husk_tests::{ctr, runtime::Runtime, wait};

use super::top;
use crate::context::Context;

/// Two containers and what they share; the pod lives again.
pub fn pod(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let ok = |args: &[&str]| podman.run(args)?.ok();
    let dir = podman.dir.join("pod");
    fs::create_dir_all(&dir)?;
    let volume = format!("{}:/v", dir.display());
    let infra = ["--infra-image", IMAGE, "--infra-command", "/bin/sleep 1000"];
    let create = ["pod", "create", "--name", "pod", "-p", "8085:80"];
    ok(&[&create[..], &infra, &["--share", "net,ipc,uts,pid"]].concat())?;
    let serve =
        "hostname >/v/name; uname -r >/v/kernel; echo shared >/dev/shm/x; exec httpd -f -h /v";
    let head = ["run", "-d", "--pod", "pod", "--name", "pod-server", "-v"];
    ok(&[&head[..], &[&volume, IMAGE, "sh", "-c", serve]].concat())?;
    // Only now podman mounts its root file system.
    let ask = "until wget -q -O - http://localhost/name; do sleep 0.2; done; cat /v/kernel /dev/shm/x; hostname; ps";
    let head = ["run", "--rm", "--pod", "pod", "-v", &volume, IMAGE];
    let asked = ok(&[&head[..], &["sh", "-c", ask]].concat())?.text();
    let lines: Vec<_> = asked.lines().collect();
    let kernel = lines.get(1).context("no kernel")?;
    ensure!(
        lines.first() == Some(&"pod") && lines.get(2..4) == Some(&["shared", "pod"]),
        "{asked}"
    );
    ensure!(
        kernel.ends_with("-husk") == (suite.runtime == Runtime::Husk),
        "{asked}"
    );
    // The infra container's, this one's, the other's.
    ensure!(
        asked.contains("sleep 1000") && asked.contains("httpd -f"),
        "{asked}"
    );
    let published = || {
        let mut fetch = Command::new("busybox");
        fetch.args(["wget", "-q", "-O", "-", "http://127.0.0.1:8085/name"]);
        let fetched = ctr::output(&mut fetch).ok()?;
        (fetched.code == 0 && fetched.text() == "pod").then_some(())
    };
    wait::until("the published port", published)?;
    top::shows_pod(&podman, "pod", &["/bin/sleep 1000", "httpd -f -h /v"])?;
    ok(&["pod", "stop", "-t", "0", "pod"])?;
    ensure!(podman.inspect("pod-server", "{{.State.Status}}")? == "exited");
    ok(&["pod", "start", "pod"])?;
    wait::until("the published port again", published)?;
    ok(&["pod", "rm", "-f", "-t", "0", "pod"])?;
    podman
        .run(&["container", "exists", "pod-server"])?
        .exited(1)?;
    Ok(())
}

/// What one VM cannot share apart.
pub fn refused(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let infra = ["--infra-image", IMAGE, "--infra-command", "/bin/sleep 1000"];
    let create = ["pod", "create", "--name", "some", "--network", "none"];
    let share = ["--share", "net"];
    podman.run(&[&create[..], &infra, &share].concat())?.ok()?;
    let member = podman.run(&["run", "--rm", "--pod", "some", IMAGE, "true"]);
    podman.run(&["pod", "rm", "-f", "-t", "0", "some"])?.ok()?;
    let member = member?;
    let is_told = member.errors().contains("--share net,ipc,uts");
    ensure!(member.code != 0 && is_told, "{member:?}");
    Ok(())
}

/// The pod `kube`, with this directory of the host.
pub fn yaml(host: &Path) -> String {
    let text = include_str!("pod.yaml").replace("IMAGE", IMAGE);
    text.replace("HOST", &host.display().to_string())
}

/// A pod of Kubernetes' own notation, with an emptyDir and a directory of the host.
pub fn kube(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let dir = podman.dir.join("kube");
    let host = dir.join("host");
    let _ = fs::remove_dir_all(&host);
    fs::create_dir_all(&dir)?;
    let yaml = dir.join("pod.yaml");
    fs::write(&yaml, self::yaml(&host))?;
    let yaml = yaml.to_str().context("its name")?;
    podman.run(&["kube", "play", yaml])?.ok()?;
    let answered = wait::until("the answer", || {
        let answer = fs::read_to_string(host.join("answer")).ok()?;
        (!answer.is_empty()).then_some(answer)
    });
    let down = podman.run(&["kube", "down", yaml])?.ok();
    let answer = answered?;
    down?;
    ensure!(
        answer.trim_end().ends_with("-husk") == (suite.runtime == Runtime::Husk),
        "{answer}"
    );
    podman.run(&["pod", "exists", "kube"])?.exited(1)?;
    Ok(())
}

/// What Quadlet makes of a container's unit, run by hand: there is no systemd here.
pub fn quadlet(suite: &Context) -> Result<()> {
    const GENERATOR: &str = "/usr/libexec/podman/quadlet";
    let podman = super::podman(suite)?;
    let dir = podman.dir.join("units");
    fs::create_dir_all(&dir)?;
    let storage = format!(
        "--root {} --runroot {RUN_ROOT} --cgroup-manager cgroupfs --events-backend file",
        podman.storage().display()
    );
    let unit = format!(
        "[Container]\nImage={IMAGE}\nContainerName=quadlet\nNetwork=none\nGlobalArgs=--runtime {} {storage}\nExec=sh -c 'uname -r; exec sleep 1000'\n",
        podman.runtime.display()
    );
    fs::write(dir.join("web.container"), unit)?;
    let mut generate = Command::new(GENERATOR);
    generate.arg("-dryrun").env("QUADLET_UNIT_DIRS", &dir);
    let made = ctr::output(&mut generate)?.ok()?.text();
    let start = made
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="));
    // What systemd would fill in; the unit is of the type notify, by conmon, which has nobody to tell.
    let start = start
        .with_context(|| made.clone())?
        .replace("%t", "/run")
        .replace("%N", "web");
    let mut run = Command::new("sh");
    run.args(["-c", &start]);
    ctr::output(&mut run)?.ok()?;
    let logged = wait::until("its first line", || {
        let logs = podman.run(&["logs", "quadlet"]).ok()?;
        (!logs.text().is_empty()).then_some(logs.text())
    });
    podman.run(&["rm", "-f", "-t", "0", "quadlet"])?.ok()?;
    let logged = logged?;
    ensure!(
        logged.ends_with("-husk") == (suite.runtime == Runtime::Husk),
        "{logged}"
    );
    Ok(())
}
