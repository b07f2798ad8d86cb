//! The guest kernel's command line.

use crate::layout::CMDLINE_MAX;

/// Always there.
///
/// * `panic=-1`: a panic ends the VM at once, through ACPI's reset register.
/// * `random.trust_cpu=on`: RDRAND seeds the pool, nothing waits for entropy at boot.
/// * `tsc=reliable`, `no_timer_check`: the hypervisor's clock needs no second clock to watch it.
/// * `percpu_alloc=page`: units of 2 MiB (the default) make the memory controller's map of each chunk 4 MiB large
///   (mm/percpu.c, `obj_exts`).
/// * `vm.percpu_pagelist_high_fraction`: without a bound a vCPU's list keeps some 8 MiB of what the boot has freed, which the
///   balloon can then not report. A 500th is 1 MiB of the default size.
/// * `vm.compaction_proactiveness`: compaction waits until somebody wants a large page. Looking for work ahead of that wakes an idle guest
///   twice a second, and the tick after it (mm/compaction.c, `kcompactd`).
const BASE: &str = "panic=-1 random.trust_cpu=on tsc=reliable no_timer_check percpu_alloc=page \
    sysctl.vm.percpu_pagelist_high_fraction=500 sysctl.vm.compaction_proactiveness=0";
/// Only emergencies reach the console: every character is an exit.
const QUIET: &str = "console=ttyS0 quiet loglevel=1";
/// The whole boot on the console.
const DEBUG: &str = "console=ttyS0 earlyprintk=serial,ttyS0,115200 ignore_loglevel";

/// Why a command line was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// Longer than the kernel reads.
    #[error(
        "the kernel command line is {0} bytes long, the kernel reads at most {most}: shorten kernel_params",
        most = CMDLINE_MAX - 1
    )]
    TooLong(usize),
    /// A NUL would cut it short.
    #[error("kernel_params contains a NUL byte")]
    Nul,
}

/// The command line: ours, then the user's `extra`, which wins where both set something. With `boot_cpus` the guest boots with
/// that many of its CPUs and leaves the others to be brought online later.
#[must_use]
pub fn compose(extra: &str, debug_console: bool, boot_cpus: Option<u8>) -> String {
    let console = if debug_console { DEBUG } else { QUIET };
    let cpus = boot_cpus.map_or_else(String::new, |cpus| format!(" maxcpus={cpus}"));
    let extra = extra.trim();
    let space = if extra.is_empty() { "" } else { " " };
    format!("{BASE} {console}{cpus}{space}{extra}")
}

/// The bytes for guest memory.
///
/// # Errors
/// Too long, or with a NUL inside.
pub fn terminated(cmdline: &str) -> Result<Vec<u8>, CmdlineError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(CmdlineError::TooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(CmdlineError::Nul);
    }
    Ok([cmdline.as_bytes(), &[0]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_parameters_come_last() {
        assert!(compose(" loglevel=7\n", false, None).ends_with("quiet loglevel=1 loglevel=7"));
        assert!(compose("", true, None).ends_with("ignore_loglevel"));
        assert!(!compose("", true, None).contains("quiet"));
    }

    #[test]
    fn cpus_for_later_stay_offline_at_boot() {
        assert!(compose("x", false, Some(2)).ends_with(" maxcpus=2 x"));
        assert!(!compose("x", false, None).contains("maxcpus"));
    }

    #[test]
    fn the_kernels_bound_holds() {
        assert_eq!(terminated(&"x".repeat(2047)).unwrap().len(), CMDLINE_MAX);
        assert_eq!(
            terminated(&"x".repeat(2048)),
            Err(CmdlineError::TooLong(2048))
        );
        assert_eq!(terminated("a\0b"), Err(CmdlineError::Nul));
    }
}
