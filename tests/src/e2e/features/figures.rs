//! What a kubelet reads of a pod, and what it may do to a running one.

use std::{fs, io::Write as _, net::TcpStream};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{PodContainer, container, security, v1},
    host,
    runtime::Runtime,
    wait,
};

use crate::{cgroup::PodCgroup, context::Context};

const MIB: u64 = 1 << 20;

/// `kubectl debug --target`: one container looks into another, and into no third.
pub fn target(suite: &Context) -> Result<()> {
    let pod = suite.cri()?.pod()?;
    let looked_at = pod.start(container(&["sleep", "111111"]))?;
    let third = pod.start(container(&["sleep", "222222"]))?;
    let mut config = container(&["sleep", "333333"]);
    let options = &mut security(&mut config).namespace_options;
    let options = options.get_or_insert_default();
    options.pid = v1::NamespaceMode::Target.into();
    options.target_id = looked_at.id.clone();
    let debugger = pod.start(config)?;
    let seen = debugger.exec(&["ps", "-o", "pid,args"])?.ok()?;
    let first = seen
        .lines()
        .find(|line| line.trim_start().starts_with("1 "));
    ensure!(
        first.is_some_and(|line| line.ends_with("sleep 111111")),
        "{seen}"
    );
    ensure!(
        seen.contains("sleep 333333") && !seen.contains("sleep 222222"),
        "{seen}"
    );
    // Its files as well, by /proc.
    looked_at.sh("echo theirs >/tmp/note")?.ok()?;
    let mut config = container(&["cat", "/proc/1/root/tmp/note"]);
    let context = security(&mut config);
    let options = context.namespace_options.get_or_insert_default();
    options.pid = v1::NamespaceMode::Target.into();
    options.target_id = looked_at.id.clone();
    context.capabilities = Some(v1::Capability {
        add_capabilities: vec!["SYS_PTRACE".into()],
        ..Default::default()
    });
    ensure!(pod.start(config)?.ended()?.ok()? == "theirs");
    // The one that is looked at takes the others along, and not the third.
    looked_at.stop(0)?;
    ensure!(debugger.ended()?.code == 137);
    third.exec(&["true"])?.ok()?;
    Ok(())
}

/// Holds 24 MiB, and uses the CPU.
const BUSY: &str = "x=$(head -c 8388608 /dev/zero | tr '\\0' a); while :; do :; done";

pub fn stats(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let mut config = cri.pod_config();
    let cgroup = PodCgroup::new(&config.hostname)?;
    cgroup.set("memory.max", 768 * MIB)?;
    config.linux.get_or_insert_default().cgroup_parent = cgroup.path.clone();
    let pod = cri.run_pod(config)?;
    let busy = pod.start(container(&["sh", "-c", BUSY]))?;
    let server = pod.start(container(&[
        "sh",
        "-c",
        "while :; do nc -l -p 9000 >/dev/null; done",
    ]))?;
    let value = |v: Option<v1::UInt64Value>| v.map_or(0, |v| v.value);
    let cpu = |c: &Option<v1::CpuUsage>| value(c.as_ref().and_then(|c| c.usage_core_nano_seconds));
    let memory = |m: &Option<v1::MemoryUsage>| value(m.as_ref().and_then(|m| m.working_set_bytes));

    // One container by itself, and all of them.
    let used = wait::until("the container to have its memory", || {
        let used = memory(&busy.stats().ok()?.memory);
        (used > 8 * MIB).then_some(used)
    })?;
    let before = cpu(&busy.stats()?.cpu);
    wait::until("its CPU time to grow", || {
        (cpu(&busy.stats().ok()?.cpu) > before + 100_000_000).then_some(())
    })?;
    let all = cri.list_container_stats(&pod.id)?;
    let of = |id: &str| {
        all.iter()
            .find(|s| s.attributes.as_ref().is_some_and(|a| a.id == id))
    };
    let (one, other) = (
        of(&busy.id).context("no busy")?,
        of(&server.id).context("no server")?,
    );
    ensure!(all.len() == 2 && cpu(&one.cpu) > cpu(&other.cpu), "{all:?}");
    ensure!(
        memory(&other.memory) > 0 && memory(&other.memory) < used,
        "{all:?}"
    );

    // The pod: what the host spends on it, the guest's use within.
    let pod_stats = || pod.stats()?.linux.context("no figures of the pod");
    let network = |stats: &v1::LinuxPodSandboxStats| {
        let network = stats.network.clone().unwrap_or_default();
        let eth0 = network.default_interface.unwrap_or_default();
        (value(eth0.rx_bytes), value(eth0.tx_bytes), eth0.name)
    };
    let first = pod_stats()?;
    // Half of it: the container may have given some back since it was asked.
    ensure!(memory(&first.memory) * 2 > used, "{first:?}");
    ensure!(cpu(&first.cpu) > 0, "{first:?}");
    ensure!(network(&first).2 == "eth0", "{first:?}");
    let ip = pod.ips()?.first().cloned().context("no address")?;
    wait::until("the server to take it", || {
        let mut stream = TcpStream::connect((ip.as_str(), 9000)).ok()?;
        stream.write_all(&[0; 300_000]).ok()
    })?;
    let last = wait::until("the traffic in the figures", || {
        let now = pod_stats().ok()?;
        (network(&now).0 >= network(&first).0 + 300_000).then_some(now)
    })?;
    ensure!(
        network(&last).1 > network(&first).1 && cpu(&last.cpu) > cpu(&first.cpu),
        "{last:?}"
    );

    // As the kubelet asks for it. What the containers see of themselves is within.
    let inside = |c: &PodContainer<'_>, script: &str| -> Result<u64> {
        let out = c.sh(script)?.ok()?;
        out.trim().parse().with_context(|| out.clone())
    };
    let cpu_inside = "awk '/^usage_usec/ { print $2 }' /sys/fs/cgroup/cpu.stat";
    let used_cpu = 1000 * (inside(&busy, cpu_inside)? + inside(&server, cpu_inside)?);
    let received = inside(&server, "cat /sys/class/net/eth0/statistics/rx_bytes")?;
    let listed = wait::until("sh, sh and nc to be counted", || {
        let listed = cri.list_pod_stats(&pod.id).ok()?.pop()?.linux?;
        let count = value(listed.process.as_ref()?.process_count);
        (count == 3).then_some(listed)
    })?;
    let of_containers = |figure: &dyn Fn(&v1::ContainerStats) -> u64| -> u64 {
        listed.containers.iter().map(figure).sum()
    };
    ensure!(listed.containers.len() == 2, "{listed:?}");
    // Not to the last tick: two kernels count the time of a VM, at two moments.
    ensure!(
        cpu(&listed.cpu) * 2 > used_cpu && of_containers(&|c| cpu(&c.cpu)) >= used_cpu,
        "{used_cpu} and {listed:?}"
    );
    ensure!(
        memory(&listed.memory) >= of_containers(&|c| memory(&c.memory)),
        "{listed:?}"
    );
    let (seen, _, _) = network(&listed);
    // Interface and VM each count a few frames that the other does not: those of its start.
    ensure!(
        seen.abs_diff(received) < 30_000 && received >= 300_000,
        "{received} and {listed:?}"
    );

    // The pod's cgroup holds what runs it, under its limit. Not by what it has now: some of what was counted may have been given back since.
    let peak = cgroup.number("memory.peak")?;
    ensure!(peak >= used && peak <= 768 * MIB, "{peak}, {used}");
    if suite.runtime == Runtime::Husk {
        let shim = host::shim_of(&pod.id).context("no shim")?;
        let vmm = host::vmm_of(&shim).context("no VMM")?;
        let place = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid))?;
        ensure!(place.contains(&format!("{}/", cgroup.path)), "{place}");
    }

    // Limits of a running container that CRI has no field for, and its CPUs.
    server.update(v1::LinuxContainerResources {
        cpuset_cpus: "0".into(),
        unified: [("pids.max".to_owned(), "33".to_owned())].into(),
        ..Default::default()
    })?;
    let limits = server
        .sh("cd /sys/fs/cgroup; cat pids.max cpuset.cpus")?
        .ok()?;
    ensure!(limits == "33\n0", "{limits}");
    Ok(())
}
