//! The VM's size: what is asked for is what the guest has.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[
    husk_test("vcpus", vcpus),
    husk_test("memory_below_and_beyond_the_32_bit_gap", memory),
    husk_test("limits_size_the_vm", limits_size_the_vm),
];

/// CPUs and MiB that a guest of this configuration counts.
fn guest(suite: &Context, config: &str, flags: &[&str]) -> Result<(u64, u64)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("config.toml");
    fs::write(&path, config)?;
    let path = path.to_string_lossy();
    let flags = [&["--runtime-config-path", &*path], flags].concat();
    let script = "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo";
    let out = suite.run(&flags, &["sh", "-c", script])?.ok()?.text();
    let (cpus, mib) = out.split_once('\n').context("two lines")?;
    Ok((cpus.parse()?, mib.parse()?))
}

fn vcpus(suite: &Context) -> Result<()> {
    // husk-vmm's own suite goes to 32.
    for wanted in [1, 3] {
        let config = format!("max_vcpus = 4\ndefault_vcpus = {wanted}\n");
        let (cpus, _) = guest(suite, &config, &[])?;
        ensure!(cpus == wanted, "{cpus} vCPUs, not {wanted}");
    }
    Ok(())
}

fn memory(suite: &Context) -> Result<()> {
    for wanted in [128, 4400] {
        let config = format!("max_memory_mib = 8192\ndefault_memory_mib = {wanted}\n");
        let (_, mib) = guest(suite, &config, &[])?;
        // The kernel keeps its own image and its page structs (1/64) for itself.
        let least = wanted - wanted / 20 - 40;
        ensure!((least..=wanted).contains(&mib), "{mib} MiB of {wanted}");
    }
    Ok(())
}

fn limits_size_the_vm(suite: &Context) -> Result<()> {
    // A container that may use 700 MiB finds a guest in which it can.
    let limit = (700_u64 << 20).to_string();
    let (_, mib) = guest(
        suite,
        "default_memory_mib = 128\n",
        &["--memory-limit", &limit],
    )?;
    ensure!(mib >= 700, "the guest has {mib} MiB");
    let (cpus, _) = guest(
        suite,
        "default_vcpus = 1\nmax_vcpus = 4\n",
        &["--cpus", "3"],
    )?;
    ensure!(cpus == 3, "the guest has {cpus} CPUs");
    Ok(())
}
