//! A pod that takes all that it can get, beside a neighbour and the host, who go on.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use husk_tests::host;

use crate::{
    Test,
    context::{Context, Detached},
    husk_test,
};

pub const TESTS: &[Test] = &[
    husk_test("the_whole_pod_is_in_its_cgroup", cgroup),
    husk_test("a_neighbour_and_the_host_go_on", neighbour),
];

/// Each goes on until its container is removed.
const STORMS: [(&str, &str); 6] = [
    (
        "CPU",
        "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    ),
    // The kernel ends one after the other.
    (
        "memory",
        "while :; do sh -c 'x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done'; done",
    ),
    ("pids", "b() { b | b & }; b; while :; do sleep 1000; done"),
    (
        "disk",
        "while :; do dd if=/dev/zero of=/file bs=1M count=32 conv=fsync; done",
    ),
    ("exits", "while :; do (exit 1); done"),
    ("output", "yes"),
];

fn neighbour(suite: &Context) -> Result<()> {
    let neighbour = suite.detached(&[], &["sleep", "1000000"])?;
    for (what, storm) in STORMS {
        let pod = suite.detached(&["--memory-limit", "134217728"], &["sh", "-c", storm])?;
        let is_spared = || -> Result<()> {
            let before = cpu_ticks(&pod)?;
            for _ in 0..3 {
                let out = neighbour.exec(&["echo", "here"])?.ok()?;
                ensure!(out.text() == "here", "{out:?}");
                suite.containerd.version()?;
            }
            ensure!(pod.state()? == "RUNNING", "the storm is over");
            ensure!(cpu_ticks(&pod)? > before, "there is no storm");
            Ok(())
        };
        is_spared().with_context(|| format!("beside a storm of {what}"))?;
    }
    // And there is room for another one.
    ensure!(suite.sh("echo fresh")?.ok()?.text() == "fresh");
    Ok(())
}

/// What a pod's VMM has had of the processors (proc_pid_stat(5): utime and stime, the 14th and 15th field).
fn cpu_ticks(pod: &Detached<'_>) -> Result<u64> {
    let vmm = vmm_of(pod)?;
    let stat = fs::read_to_string(format!("/proc/{vmm}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in it")?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    ticks.map(|n| Ok(n.parse::<u64>()?)).sum()
}

fn vmm_of(pod: &Detached<'_>) -> Result<u32> {
    let shim = host::shim_of(&pod.id).context("it has no shim")?;
    Ok(host::vmm_of(&shim).context("it has no VMM")?.pid)
}

fn cgroup(suite: &Context) -> Result<()> {
    let pod = suite.detached(&["--memory-limit", "134217728"], &["sleep", "1000000"])?;
    let shim = host::shim_of(&pod.id).context("it has no shim")?.pid;
    let vmm = vmm_of(&pod)?;
    let cgroup_of = |pid: u32| -> Result<String> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = text.trim().strip_prefix("0::").context("not of v2")?;
        Ok(path.to_owned())
    };
    let path = cgroup_of(vmm)?;
    ensure!(path.ends_with(&pod.id), "{path}");
    ensure!(
        cgroup_of(shim)? == path,
        "the shim is in {}",
        cgroup_of(shim)?
    );
    // Whatever they start is in it as well, and nobody else.
    let dir = format!("/sys/fs/cgroup{path}");
    let inside = fs::read_to_string(format!("{dir}/cgroup.procs"))?;
    let mut inside: Vec<u32> = inside.lines().map(str::parse).collect::<Result<_, _>>()?;
    inside.sort_unstable();
    let mut both = vec![shim, vmm];
    both.sort_unstable();
    ensure!(inside == both, "{inside:?}, and the pod's are {both:?}");
    drop(pod);
    ensure!(!fs::exists(&dir)?, "{dir} is left");
    Ok(())
}
