//! husk-vmm on its own: its control channel, and guests of every size and end.

pub mod process;

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use husk_tests::wait;
use serde_json::{Value, json};

use crate::{Test, context::Context, husk_test};
use process::{Guest, Vmm};

pub const TESTS: &[Test] = &[
    husk_test("power_off", power_off),
    husk_test("guest_sizes", guest_sizes),
    husk_test("panic_with_its_last_words", panic_with_its_last_words),
    husk_test("pause_and_resume", pause_and_resume),
    husk_test("stop", stop),
    husk_test("shim_hangs_up", shim_hangs_up),
    husk_test("memory_figures_and_balloon", memory_figures_and_balloon),
    husk_test("balloon_gives_memory_back", balloon_gives_memory_back),
    husk_test("free_memory_comes_back", free_memory_comes_back),
    husk_test("refused_launches", refused_launches),
];

/// Looks around, then turns the machine off.
/// The serial port takes what is written when it is ready, and `poweroff -f` does not wait for that: `stty` does (TCSADRAIN).
const REPORT: &str = "$b mkdir /proc; $b mount -t proc proc /proc; echo cpus $($b nproc)
$b grep MemTotal /proc/meminfo; $b stty sane; $b poweroff -f; $b sleep 1000";
/// Keeps a vCPU busy for good.
const BUSY: &str = "echo ready; while :; do :; done";

fn launched(context: &Context, init: &str, vcpus: u8, memory_mib: u64) -> Result<Vmm> {
    let mut vmm = Vmm::start(
        context,
        &Guest {
            init,
            ..Guest::default()
        },
    )?;
    let answer = vmm.ask(json!({ "launch": Vmm::config(vcpus, memory_mib) }))?;
    let time = |phase: &str| answer["launched"][phase].as_u64().unwrap_or(0);
    let phases = ["process_started", "vm_built", "vcpus_running"].map(time);
    ensure!(phases.is_sorted() && phases[0] > 0, "{answer}");
    Ok(vmm)
}

fn power_off(context: &Context) -> Result<()> {
    let mut vmm = launched(context, REPORT, 2, 128)?;
    let lines = vmm.console_until("MemTotal:")?;
    ensure!(lines.contains(&"cpus 2".to_owned()), "{lines:?}");
    ensure!(vmm.exited()? == json!("power-off"));
    ensure!(vmm.exit_code()? == Some(0));
    Ok(())
}

/// The bounds: least memory, memory past the 32-bit gap, most vCPUs.
fn guest_sizes(context: &Context) -> Result<()> {
    for (vcpus, memory_mib) in [(1, 64), (1, 3500), (32, 256)] {
        let mut vmm = launched(context, REPORT, vcpus, memory_mib)?;
        let lines = vmm.console_until("MemTotal:")?;
        ensure!(lines.contains(&format!("cpus {vcpus}")), "{lines:?}");
        let kib: u64 = lines
            .last()
            .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .unwrap_or(0);
        // The kernel takes the rest, and its tables a share of the whole.
        let mib = kib / 1024;
        let least = memory_mib - 40 - memory_mib / 25;
        ensure!(mib < memory_mib && mib > least, "{lines:?}");
        ensure!(vmm.exited()? == json!("power-off"));
    }
    Ok(())
}

fn panic_with_its_last_words(context: &Context) -> Result<()> {
    let mut vmm = launched(context, "exit 3", 1, 128)?;
    let exit = vmm.exited()?;
    let words = exit["guest-panic"]["console"].to_string();
    ensure!(words.contains("Attempted to kill init!"), "{exit}");
    ensure!(vmm.exit_code()? == Some(0));
    Ok(())
}

fn pause_and_resume(context: &Context) -> Result<()> {
    let mut vmm = launched(context, BUSY, 2, 128)?;
    vmm.console_until("ready")?;
    for _ in 0..3 {
        vmm.ask(json!("pause"))?;
        let ticks = vmm.guest_ticks()?;
        thread::sleep(Duration::from_millis(300));
        ensure!(vmm.guest_ticks()? == ticks, "a paused guest ran");
        vmm.ask(json!("resume"))?;
        wait::until("the guest to run on", || {
            (vmm.guest_ticks().ok()? > ticks).then_some(())
        })?;
    }
    vmm.ask(json!("pause"))?;
    vmm.ask(json!("stop"))?;
    ensure!(vmm.exited()? == json!("stopped"), "a paused VM stops too");
    Ok(())
}

fn stop(context: &Context) -> Result<()> {
    let mut vmm = launched(context, BUSY, 2, 128)?;
    vmm.console_until("ready")?;
    vmm.ask(json!("stop"))?;
    ensure!(vmm.exited()? == json!("stopped"));
    ensure!(vmm.exit_code()? == Some(0));
    Ok(())
}

fn shim_hangs_up(context: &Context) -> Result<()> {
    let mut vmm = launched(context, BUSY, 1, 128)?;
    vmm.hang_up()?;
    ensure!(vmm.exit_code()? == Some(0));
    Ok(())
}

const MIB: u64 = 1 << 20;

/// A figure of an answer to `info`.
fn figure(info: &Value, name: &str) -> u64 {
    info["info"][name].as_u64().unwrap_or(u64::MAX)
}

fn memory_figures_and_balloon(context: &Context) -> Result<()> {
    let mut vmm = launched(context, "echo ready; $b sleep 100000", 1, 128)?;
    vmm.console_until("ready")?;
    let info = vmm.ask(json!("info"))?;
    ensure!(figure(&info, "memory_bytes") == 128 * MIB, "{info}");
    ensure!(figure(&info, "resident_bytes") < 128 * MIB, "{info}");
    ensure!(figure(&info, "balloon_bytes") == 0, "{info}");

    let refused = vmm.call(json!({ "set-balloon": { "target_mib": 129 } }))?;
    ensure!(refused.is_err_and(|text| text.contains("128 MiB")));
    vmm.ask(json!({ "set-balloon": { "target_mib": 32 } }))?;
    wait::until("the guest to fill its balloon", || {
        let info = vmm.ask(json!("info")).ok()?;
        (figure(&info, "balloon_bytes") == 32 * MIB).then_some(())
    })?;
    vmm.ask(json!({ "set-balloon": { "target_mib": 0 } }))?;
    wait::until("the guest to empty its balloon", || {
        let info = vmm.ask(json!("info")).ok()?;
        (figure(&info, "balloon_bytes") == 0).then_some(())
    })
}

/// Memory of the guest that fills a file and frees it, in MiB.
const FILLED_GUEST: u64 = 256;
/// The file is in memory. While the guest waits, the host can see what it takes.
const FILL_AND_FREE: &str =
    "$b mknod /zero c 1 5 && $b dd if=/zero of=/file bs=1M count=64 && echo filled
$b sleep 3; $b rm /file && echo freed; $b sleep 100000";

/// A guest that has just freed 64 MiB, and the resident memory while it still had them.
fn filled_and_freed(context: &Context) -> Result<(Vmm, u64)> {
    let mut vmm = launched(context, FILL_AND_FREE, 1, FILLED_GUEST)?;
    vmm.console_until("filled")?;
    let info = vmm.ask(json!("info"))?;
    let most = figure(&info, "resident_bytes");
    ensure!((64 * MIB..FILLED_GUEST * MIB).contains(&most), "{info}");
    vmm.console_until("freed")?;
    Ok((vmm, most))
}

/// What the balloon holds is the host's again. Nearly all that is free goes into it, so that much of it had been touched;
/// and as long as the balloon has it, it is not free, which would also give it back.
fn balloon_gives_memory_back(context: &Context) -> Result<()> {
    let (mut vmm, most) = filled_and_freed(context)?;
    vmm.ask(json!({ "set-balloon": { "target_mib": 190 } }))?;
    wait::until("the balloon to give memory back", || {
        let info = vmm.ask(json!("info")).ok()?;
        let full = figure(&info, "balloon_bytes") == 190 * MIB;
        (full && figure(&info, "resident_bytes") + 32 * MIB < most).then_some(())
    })
}

/// A guest reports what lies free, and the host takes it without being asked.
fn free_memory_comes_back(context: &Context) -> Result<()> {
    let (mut vmm, most) = filled_and_freed(context)?;
    wait::until("free memory to come back", || {
        let info = vmm.ask(json!("info")).ok()?;
        (figure(&info, "resident_bytes") + 32 * MIB < most).then_some(())
    })
}

fn refused_launches(context: &Context) -> Result<()> {
    let mut unknown = Vmm::config(1, 128);
    unknown["surprise"] = json!(1);
    let mut newer = unknown.clone();
    newer["version"] = json!(1000);
    let mut closed = Vmm::config(1, 128);
    closed["kernel_fd"] = json!(99);
    let mut wordy = Vmm::config(1, 128);
    wordy["kernel_params"] = json!("x".repeat(3000));
    let cases = [
        (None, Vmm::config(33, 128), "33 vCPUs"),
        (None, Vmm::config(1, 63), "at least 64 MiB"),
        (None, Vmm::config(1, 1 << 30), "this host has"),
        (None, closed, "kernel_fd is fd 99"),
        (None, wordy, "kernel_params"),
        (None, unknown, "unknown field `surprise`"),
        (None, newer, "version 1000"),
        (Some("/bin/sh"), Vmm::config(1, 128), "CONFIG_PVH"),
        (Some("/etc/passwd"), Vmm::config(1, 128), "not an ELF file"),
        (Some("/dev/null"), Vmm::config(1, 128), "empty"),
    ];
    for (kernel, config, says) in cases {
        let guest = Guest {
            kernel,
            ..Guest::default()
        };
        let mut vmm = Vmm::start(context, &guest)?;
        let outcome = vmm.call(json!({ "launch": config }))?;
        ensure!(
            outcome.as_ref().is_err_and(|text| text.contains(says)),
            "{says:?} expected: {outcome:?}"
        );
        ensure!(vmm.exit_code()? == Some(1), "{says:?}: exit code");
    }
    Ok(())
}
