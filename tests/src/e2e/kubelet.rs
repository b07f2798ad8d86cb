//! A kubelet's day: many mounts, probes without end, statistics.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{container, v1},
    host, wait,
};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    test("two_hundred_mounts", many_mounts),
    test("statistics_of_a_pod", statistics),
    husk_test("probes_do_not_grow_the_shim", probes),
];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn many_mounts(suite: &Context) -> Result<()> {
    const COUNT: usize = 200;
    let cri = suite.cri()?;
    let dir = tempfile::tempdir()?;
    let mut config = container(&SLEEP);
    for number in 0..COUNT {
        let source = dir.path().join(number.to_string());
        fs::create_dir(&source)?;
        fs::write(source.join("number"), number.to_string())?;
        config.mounts.push(v1::Mount {
            host_path: source.to_string_lossy().into_owned(),
            container_path: format!("/many/{number}"),
            readonly: number % 2 == 0,
            ..Default::default()
        });
    }
    let pod = cri.pod()?;
    let main = pod.start(config)?;
    // The shell's own read: a process for each file would take a minute in the testbed.
    let seen = main
        .sh("for n in $(seq 0 199); do read line </many/$n/number; echo $line; done")?
        .ok()?;
    ensure!(
        seen.lines()
            .enumerate()
            .all(|(n, line)| line == n.to_string()),
        "{seen}"
    );
    ensure!(
        main.sh("echo x >/many/4/x")?.code != 0,
        "a read-only mount was written"
    );
    main.sh("echo x >/many/5/x")?.ok()?;
    ensure!(fs::read_to_string(dir.path().join("5/x"))? == "x\n");
    Ok(())
}

fn statistics(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let busy = pod.start(container(&[
        "sh",
        "-c",
        "x=$(head -c 20000000 /dev/zero | tr '\\0' a); while :; do :; done",
    ]))?;
    let stats = wait::until("processor time and memory in the statistics", || {
        let stats = busy.stats().ok()?;
        let cpu = stats.cpu.as_ref()?.usage_core_nano_seconds?.value;
        let memory = stats.memory.as_ref()?.working_set_bytes?.value;
        (cpu > 500_000_000 && memory > 20_000_000).then_some(stats)
    })?;
    let first = stats
        .cpu
        .and_then(|c| c.usage_core_nano_seconds)
        .context("no time")?
        .value;
    wait::until("the time to grow", || {
        let later = busy.stats().ok()?.cpu?.usage_core_nano_seconds?.value;
        (later > first).then_some(())
    })?;
    // What the guest says of itself agrees.
    let inside = busy.sh("cat /sys/fs/cgroup/memory.current")?.ok()?;
    let inside: u64 = inside.parse().with_context(|| format!("{inside:?}"))?;
    let memory = busy
        .stats()?
        .memory
        .and_then(|m| m.usage_bytes)
        .context("no memory")?
        .value;
    ensure!(
        memory.abs_diff(inside) < 16 << 20,
        "{memory} told, {inside} used"
    );
    Ok(())
}

fn probes(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let pod = cri.pod()?;
    let main = pod.start(container(&SLEEP))?;
    let shim = host::shim_of(&pod.id).context("the pod has no shim")?;
    let probe = |count: usize| (0..count).try_for_each(|_| main.exec(&["true"])?.ok().map(drop));
    let memory = || host::smaps(shim.pid, "Pss").context("the shim has gone");
    // The first ones grow what is then kept.
    probe(50)?;
    let before = memory()?;
    probe(150)?;
    let after = memory()?;
    ensure!(
        after < before + 1024,
        "the shim had {before} KiB, after 150 probes {after}"
    );
    let open = fs::read_dir(format!("/proc/{}/fd", shim.pid))?.count();
    ensure!(open < 64, "the shim has {open} open files");
    Ok(())
}
