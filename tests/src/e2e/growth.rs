//! A running pod's VM grows when its containers are to have more than it has.

use anyhow::{Result, ensure};
use husk_tests::cri::{PodContainer, container, v1};

use crate::{Test, context::Context, husk_test, settings::Settings};

pub const TESTS: &[Test] = &[
    husk_test("an_update_makes_the_vm_grow", update),
    husk_test("a_further_container_makes_the_vm_grow", further_container),
];

/// A machine of the testbed has two CPUs; its VMs may have more.
const SETTINGS: &str = "max_vcpus = 4\nmax_memory_mib = 2048\nenabled_annotations = [\"max_vcpus\", \"max_memory_mib\"]\n";

fn resources(mib: i64, cpus: i64) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        memory_swap_limit_in_bytes: mib << 20,
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        ..Default::default()
    }
}

fn sleeper(mib: i64, cpus: i64) -> v1::ContainerConfig {
    let mut config = container(&["sleep", "1000000"]);
    config.linux.get_or_insert_default().resources = Some(resources(mib, cpus));
    config
}

fn growing(mut config: v1::PodSandboxConfig) -> v1::PodSandboxConfig {
    for (name, value) in [
        ("io.husk.max_vcpus", "3"),
        ("io.husk.max_memory_mib", "1536"),
    ] {
        config.annotations.insert(name.into(), value.into());
    }
    config
}

fn cpus(container: &PodContainer<'_>) -> Result<String> {
    container.sh("nproc")?.ok()
}

fn total_mib(container: &PodContainer<'_>) -> Result<u64> {
    let kib = container.sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?;
    Ok(kib.ok()?.parse::<u64>()? / 1024)
}

/// Has the container use this much memory at once: dd's buffer.
fn use_mib(container: &PodContainer<'_>, mib: u64) -> Result<i32> {
    let script = format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1");
    Ok(container.sh(&script)?.code)
}

fn update(suite: &Context) -> Result<()> {
    let _settings = Settings::set(SETTINGS)?;
    let cri = suite.cri()?;
    let pod = cri.run_pod(growing(cri.pod_config()))?;
    let grown = pod.start(sleeper(256, 1))?;
    ensure!(cpus(&grown)? == "1");
    let before = total_mib(&grown)?;
    ensure!(before <= 512, "{before} MiB");
    ensure!(use_mib(&grown, 700)? != 0, "beyond its limit");
    grown.update(resources(1024, 3))?;
    let limit = grown.sh("cat /sys/fs/cgroup/memory.max")?.ok()?;
    ensure!(limit == (1_u64 << 30).to_string(), "{limit}");
    ensure!(cpus(&grown)? == "3");
    // 1024 MiB, and what the guest needs for itself.
    let after = total_mib(&grown)?;
    ensure!(after > 1024, "{after} MiB");
    ensure!(use_mib(&grown, 700)? == 0);
    // Further than it may: taken, as runc takes a limit beyond the machine.
    grown.update(resources(4096, 8))?;
    ensure!(cpus(&grown)? == "3");
    // It does not shrink, and grows no further without a need.
    grown.update(resources(256, 1))?;
    let last = total_mib(&grown)?;
    ensure!((after..=1536).contains(&last), "{last} MiB");
    Ok(())
}

fn further_container(suite: &Context) -> Result<()> {
    let _settings = Settings::set(SETTINGS)?;
    let cri = suite.cri()?;
    let pod = cri.run_pod(growing(cri.pod_config()))?;
    let first = pod.start(sleeper(256, 1))?;
    let second = pod.start(sleeper(768, 1))?;
    ensure!(cpus(&second)? == "2");
    let total = total_mib(&first)?;
    ensure!(total > 1024, "{total} MiB");
    ensure!(use_mib(&second, 600)? == 0);
    first.exec(&["true"])?.ok()?;
    // A pod that may not grow keeps its size.
    let pod = cri.pod()?;
    let fixed = pod.start(sleeper(64, 1))?;
    fixed.update(resources(1024, 3))?;
    ensure!(cpus(&fixed)? == "1");
    ensure!(total_mib(&fixed)? <= 512);
    Ok(())
}
