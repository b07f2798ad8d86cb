//! The processes of a pod die.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use husk_tests::{
    containerd::Containerd,
    cri::{Cri, NAMESPACE, Pod, container, security, v1},
    events::{Events, init_exits},
    host::{self, Process, Traces},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::SLEEP;
use crate::context::Context;

/// 128 + SIGKILL.
const KILLED: i32 = 137;

/// CRI's exit code where it waits for a task whose shim has gone: nobody is there to tell it another (unknownExitCode).
const UNKNOWN: i32 = 255;

fn end(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL)
        .with_context(|| format!("killing {} {}", process.name, process.pid))
}

/// The shim of a pod and its VMM.
fn processes(pod: &Pod<'_>) -> Result<(Process, Process)> {
    let shim = host::shim_of(&pod.id).context("the pod has no shim")?;
    let vmm = host::vmm_of(&shim).context("the shim has no VMM")?;
    Ok((shim, vmm))
}

/// A pod in which a container may crash the guest's kernel.
fn privileged_pod(cri: &Cri) -> Result<Pod<'_>> {
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    cri.run_pod(config)
}

pub fn each(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    // A pod's bridge stays.
    drop(cri.pod()?);
    let before = Traces::now();
    let (killed, unknown) = (&[KILLED][..], &[KILLED, UNKNOWN][..]);
    dies(containerd, cri, "the shim", unknown, |pod| {
        end(&processes(pod)?.0)
    })?;
    dies(containerd, cri, "the VMM", killed, |pod| {
        end(&processes(pod)?.1)
    })?;
    dies(containerd, cri, "the guest's kernel", killed, |pod| {
        let mut config = container(&["sh", "-c", "echo c >/proc/sysrq-trigger"]);
        security(&mut config).privileged = true;
        let crash = pod.create(config)?;
        // It may be over before the start is answered.
        let _ = crash.start();
        Ok(())
    })?;
    before.restored()?;
    ensure!(cri.pod()?.sh("echo again")?.ok()? == "again");
    Ok(())
}

/// Has something of a pod die: its containers are seen to end with one of these codes, containerd is told of their ends by SIGKILL, of
/// each once, and the pod goes as any other.
fn dies(
    containerd: &Containerd,
    cri: &Cri,
    what: &str,
    codes: &[i32],
    death: impl FnOnce(&Pod<'_>) -> Result<()>,
) -> Result<()> {
    let events = Events::listen(containerd)?;
    let pod = privileged_pod(cri)?;
    let (a, b) = (pod.start(container(&SLEEP))?, pod.start(container(&SLEEP))?);
    death(&pod)?;
    for each in [&a, &b] {
        let ended = each.ended().with_context(|| format!("{what} died"))?;
        ensure!(codes.contains(&ended.code), "{what} died: {ended:?}");
    }
    wait::until("the pod to be seen as not ready", || {
        (pod.status().ok()?.state() == v1::PodSandboxState::SandboxNotready).then_some(())
    })
    .with_context(|| format!("{what} died"))?;
    let ids = [a.id.clone(), b.id.clone(), pod.id.clone()];
    drop(pod);
    for id in ids {
        let told = events.until_removed(&id)?;
        let exits = init_exits(&told, &id);
        ensure!(
            exits.len() == 1 && exits.iter().all(|e| e.contains("\"exit_status\":137")),
            "{what} died: one exit with {KILLED} among {told:#?}"
        );
    }
    Ok(())
}

pub fn power_cut(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    drop(cri.pod()?);
    let before = Traces::now();
    // containerd finds the bundles of one when it comes back; of the other it has lost them, as /run is lost.
    let (found, lost) = (cri.pod()?, cri.pod()?);
    let (a, b) = (
        found.start(container(&SLEEP))?,
        lost.start(container(&SLEEP))?,
    );
    let own: Vec<Process> = [processes(&found)?, processes(&lost)?]
        .into_iter()
        .flat_map(|(shim, vmm)| [shim, vmm])
        .collect();
    containerd.kill();
    own.iter().try_for_each(end)?;
    wait::until("all of them to be gone", || {
        let left = host::processes();
        (!own.iter().any(|o| left.iter().any(|l| l.pid == o.pid))).then_some(())
    })?;
    for id in [&lost.id, &b.id] {
        lose_bundle(containerd, id)?;
    }
    containerd.relaunch()?;
    cri.ready()?;
    for pod in [&found, &lost] {
        wait::until("the pod to be seen as not ready", || {
            (pod.status().ok()?.state() == v1::PodSandboxState::SandboxNotready).then_some(())
        })?;
    }
    for each in [&a, &b] {
        ensure!(each.ended()?.code != 0);
    }
    let state = |pod: &Pod<'_>| Path::new("/run/husk").join(NAMESPACE).join(&pod.id);
    wait::until("what containerd still knows to be cleared away", || {
        (!state(&found).exists()).then_some(())
    })?;
    ensure!(
        state(&lost).exists(),
        "containerd had lost this one: nobody could clear it away yet"
    );
    // The next start does.
    let next = cri.pod()?;
    ensure!(!state(&lost).exists(), "the start left the dead pod");
    ensure!(next.sh("echo next")?.ok()? == "next");
    drop((found, lost, next));
    before.restored()
}

/// Takes a task's bundle away, with what is mounted in it.
fn lose_bundle(containerd: &Containerd, id: &str) -> Result<()> {
    let tasks = containerd.dir().join("state/io.containerd.runtime.v2.task");
    let bundle = tasks.join(NAMESPACE).join(id);
    if !bundle.exists() {
        bail!("{} is no bundle", bundle.display());
    }
    // Where there is no mount, there is nothing to do.
    let _ = host::run(&["umount", "-R", &bundle.join("rootfs").to_string_lossy()]);
    fs::remove_dir_all(&bundle).with_context(|| format!("removing {}", bundle.display()))
}
