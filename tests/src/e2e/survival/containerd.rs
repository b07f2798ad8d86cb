//! containerd goes and comes back, the same or a newer one.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use husk_tests::{
    containerd::{Containerd, Sandboxer},
    cri::{Cri, PodContainer, container, v1},
    host,
    runtime::Runtime,
};

use super::{SLEEP, shared};
use crate::context::Context;

pub fn killed(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    let pod = cri.pod()?;
    let (main, ends) = (
        pod.start(container(&SLEEP))?,
        pod.start(container(&["sh", "-c", "sleep 3; exit 9"]))?,
    );
    let pid = main.exec(&["pidof", "sleep"])?.ok()?;
    containerd.kill();
    containerd.relaunch()?;
    cri.ready()?;
    // The pod has gone on, what ended meanwhile is told, and everything works as before.
    ensure!(
        main.exec(&["pidof", "sleep"])?.ok()? == pid,
        "another process than before"
    );
    ended_meanwhile(suite, &ends, 9)?;
    ensure!(pod.sh("echo new")?.ok()? == "new");
    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    main.remove()?;
    pod.stop()
}

/// A container that ended while there was no containerd. One of runc's is taken for a leak when containerd comes back, as its shim has no
/// process of it to show: CRI knows no exit code then.
fn ended_meanwhile(suite: &Context, container: &PodContainer<'_>, code: i32) -> Result<()> {
    let ended = container.ended()?;
    let is_lost = suite.runtime == Runtime::Runc && ended.code == 255;
    ensure!(ended.code == code || is_lost, "{ended:?}");
    Ok(())
}

pub fn upgraded(suite: &Context) -> Result<()> {
    let dir = Path::new("/run/husk-e2e-upgrade");
    let containerd = Containerd::start_with_cri(dir, &suite.bin, Sandboxer::Pause)?;
    let cri = Cri::connect(&containerd, suite.runtime)?;
    let version = || containerd.run_ctr(&["version"])?.ok().map(|v| v.text());
    let old = version()?;
    let before = host::Traces::now();

    let pod = cri.pod()?;
    let main = pod.start(container(&[
        "sh",
        "-c",
        "trap 'echo bye; exit 5' TERM; sleep 1000000 & wait",
    ]))?;
    let files = tempfile::tempdir()?;
    let mut config = container(&[
        "sh",
        "-c",
        "until [ -e /shared/go ]; do sleep 0.2; done; exit 9",
    ]);
    config.mounts.push(shared(files.path()));
    let ends = pod.start(config)?;
    let pid = main.exec(&["pidof", "sleep"])?.ok()?;

    containerd.stop()?;
    fs::write(files.path().join("go"), "")?;
    containerd.upgrade()?;
    cri.ready()?;
    let new = version()?;
    ensure!(new != old, "the same containerd as before: {new}");

    ensure!(pod.status()?.state() == v1::PodSandboxState::SandboxReady);
    ensure!(
        main.exec(&["pidof", "sleep"])?.ok()? == pid,
        "another process than before"
    );
    ended_meanwhile(suite, &ends, 9)?;
    let stats = main.stats()?;
    ensure!(stats.cpu.is_some() && stats.memory.is_some(), "{stats:?}");
    ensure!(pod.sh("echo new")?.ok()? == "new");
    main.stop(60)?;
    let ended = main.ended()?;
    ensure!(ended.code == 5 && ended.out == "bye", "{ended:?}");
    main.remove()?;
    ensure!(cri.pod()?.sh("echo newer")?.ok()? == "newer");
    drop(pod);
    before.restored()
}
