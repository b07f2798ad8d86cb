//! podman's pods, made by hand; and those of `podman kube play`, which a page's commands and a unit of Quadlet run.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::podman::IMAGE;
use husk_tests::{ctr, runtime::Runtime, wait};

use super::top;
use crate::context::Context;

/// Who a pod's root is on the host.
const ROOT: u32 = 100_000;
const USERS: &str = "0:100000:65536";

/// Two containers and what they share, users of the pod's own and its limits among it; the pod lives again.
pub fn pod(suite: &Context) -> Result<()> {
    let podman = super::podman(suite)?;
    let ok = |args: &[&str]| podman.run(args)?.ok();
    let dir = podman.dir.join("pod");
    fs::create_dir_all(&dir)?;
    chown(&dir, Some(ROOT), Some(ROOT))?;
    let volume = format!("{}:/v", dir.display());
    let infra = ["--infra-image", IMAGE, "--infra-command", "/bin/sleep 1000"];
    let create = ["pod", "create", "--name", "pod", "-p", "8085:80"];
    let users = ["--uidmap", USERS, "--gidmap", USERS];
    let limits = ["--memory", "800m", "--cpus", "0.8"];
    let share = ["--share", "net,ipc,uts,pid"];
    ok(&[&create[..], &infra, &users, &limits, &share].concat())?;
    let serve =
        "hostname >/v/name; uname -r >/v/kernel; echo shared >/dev/shm/x; exec httpd -f -h /v";
    let head = ["run", "-d", "--pod", "pod", "--name", "pod-server", "-v"];
    ok(&[&head[..], &[&volume, IMAGE, "sh", "-c", serve]].concat())?;
    // Only now podman mounts its root file system.
    let ask = "until wget -q -O - http://localhost/name; do sleep 0.2; done; cat /v/kernel /dev/shm/x; hostname; \
        echo $(cat /proc/self/uid_map) $(id -u) $(cat /sys/fs/cgroup/memory.max); \
        echo $(cat /proc/sys/net/ipv4/ping_group_range); grep MemTotal /proc/meminfo; touch /v/file; ps";
    let head = ["run", "--rm", "--pod", "pod", "--memory", "700m", "-v"];
    let asked = ok(&[&head[..], &[&volume, IMAGE, "sh", "-c", ask]].concat())?.text();
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
    let limit = 700 << 20;
    ensure!(
        lines.get(4..6) == Some(&[&*format!("0 {ROOT} 65536 0 {limit}"), "0 0"]),
        "{asked}"
    );
    let owner = fs::metadata(dir.join("file"))?;
    ensure!((owner.uid(), owner.gid()) == (ROOT, ROOT), "{owner:?}");
    // The VM is the pod's size, not the default, and leaves the VMM a little of it.
    let memory = lines.get(6).and_then(|line| line.split_whitespace().nth(1));
    let memory: u64 = memory.context("no memory")?.parse()?;
    ensure!(
        (700 << 10..800 << 10).contains(&memory) == (suite.runtime == Runtime::Husk),
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

/// A pod of this name, with this directory of the host.
pub fn yaml(name: &str, host: &Path) -> String {
    let text = include_str!("pod.yaml")
        .replace("IMAGE", IMAGE)
        .replace("NAME", name);
    text.replace("HOST", &host.display().to_string())
}
