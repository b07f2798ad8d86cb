//! What an idle pod costs the host.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result};
use husk_tests::{ctr, host, runtime::Runtime};

use crate::{Bench, Row, SAMPLES, Table};

/// No mapping of the VMM but the guest's RAM is this large, in KiB.
const GUEST_RAM_KIB: u64 = 100 * 1024;

/// How long a pod has been idle when it is measured: its guest gives back what the start has freed (after two seconds,
/// Linux mm/page_reporting.c).
const SETTLE: Duration = Duration::from_secs(5);

/// PSS of shim and VMM without guest RAM, and the guest RAM that the host has backed. Beside it what the other runtimes'
/// own processes of such a container take: runc's shim, gVisor's shim, sandbox (its kernel) and gofer.
pub fn idle_pod(bench: &Bench, table: &mut Table) -> Result<()> {
    let mut host_pss = Row::new("idle_pod_host_pss", "KiB");
    let mut touched = Row::new("idle_pod_guest_touched", "KiB");
    for _ in 0..SAMPLES {
        for &runtime in &bench.runtimes {
            let id = bench.containerd.fresh_id("idle");
            let mut command =
                bench
                    .containerd
                    .run_command(runtime, &id, &["--detach"], &["sleep", "1000"]);
            ctr::output(&mut command)?.ok()?;
            thread::sleep(SETTLE);
            let pss = match runtime {
                Runtime::Husk => {
                    let (own, guest) = pod(&id)?;
                    touched.add(runtime, kib(guest));
                    own
                }
                _ => named(&id),
            };
            host_pss.add(runtime, kib(pss));
            bench.containerd.remove(&id)?;
        }
    }
    table.push(host_pss);
    table.push(touched);
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "KiB of one process fit")]
const fn kib(value: u64) -> f64 {
    value as f64
}

/// KiB of a pod's shim and VMM, and of its guest's RAM.
fn pod(id: &str) -> Result<(u64, u64)> {
    let shim = host::shim_of(id).context("the pod has no shim")?;
    let vmm = host::vmm_of(&shim).context("the pod has no VMM")?;
    let shim_kib = host::smaps(shim.pid, "Pss").context("reading the shim's memory")?;
    let text = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid))
        .context("reading the VMM's memory")?;
    let (guest, own) = split(&text);
    Ok((shim_kib + own, guest))
}

/// KiB of all processes that have this id among their arguments.
fn named(id: &str) -> u64 {
    host::processes()
        .iter()
        .filter(|p| p.command.iter().any(|argument| argument == id))
        .filter_map(|p| host::smaps(p.pid, "Pss"))
        .sum()
}

/// Sums the PSS (KiB) of a `/proc/PID/smaps`: guest RAM, and everything else.
fn split(smaps: &str) -> (u64, u64) {
    let (mut guest, mut own, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        if let Some(kib) = host::field_of(line, "Size") {
            size = kib;
        } else if let Some(kib) = host::field_of(line, "Pss") {
            let sum = if size >= GUEST_RAM_KIB {
                &mut guest
            } else {
                &mut own
            };
            *sum += kib;
        }
    }
    (guest, own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_by_its_size() {
        let smaps = "1-2 rw-p 0 0 0\nSize:  262144 kB\nRss: 9 kB\nPss:  30000 kB\nPss_Dirty: 5 kB\n\
                     3-4 r-xp 0 0 0 /x\nSize:  2000 kB\nPss:  1500 kB\n";
        assert_eq!(split(smaps), (30_000, 1500));
    }
}
