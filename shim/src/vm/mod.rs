//! The pod's virtual machine, as the rest of the shim sees it.
//!
//! A [`Driver`] spawns a VMM process, a [`Machine`] is that process. The real pair is [`process`]: husk-vmm with inherited fds, driven
//! over a control channel ([`control`]) and joined to the guest's vsock by a bridge ([`bridge`]). Tests bring their own, so that
//! everything above this line is tested without a VM.

pub mod bridge;
pub mod console;
pub mod control;
pub mod preflight;
pub mod process;
pub mod seqpacket;

use std::{os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use husk_protocol::vm::{LaunchTimes, NicConfig, VmExit};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
};

use crate::{
    network::{NetworkError, tap::Queues},
    sizing::Size,
};

/// What a VM is started with, beyond what the node's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// The pod's id, for logs.
    pub id: String,
    /// vCPUs and memory.
    pub size: Size,
    /// How far the VM may grow; the same as [`Self::size`]: not at all.
    pub max: Size,
    /// Appended to the guest kernel's command line.
    pub kernel_params: String,
    /// The guest logs its boot.
    pub debug_console: bool,
    /// Network devices; their taps come with [`Machine::attach_nic`].
    pub nics: Vec<NicConfig>,
}

/// A vsock connection that the guest has dialled.
#[derive(Debug)]
pub struct GuestConnection {
    /// The host port it asked for.
    pub port: u32,
    /// The connection.
    pub stream: UnixStream,
}

/// Starts VMM processes.
pub trait Driver: Send + Sync {
    /// Starts a VMM that serves `share_root` to its guest, as a user of the namespace `users` if there is one; the guest does not run yet.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`VmError`], a sentence that says what to do about it.
    fn spawn(&self, share_root: OwnedFd, users: Option<OwnedFd>) -> Result<Spawned, VmError>;
}

/// A VMM process and what its guest dials.
pub struct Spawned {
    /// The process.
    pub machine: Arc<dyn Machine>,
    /// Connections of the guest, in the order it dialled.
    pub connections: mpsc::Receiver<GuestConnection>,
}

/// A VMM process.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Its pid on this host.
    fn pid(&self) -> u32;

    /// Builds the VM and runs it; returns when the vCPUs run.
    ///
    /// # Errors
    /// [`VmError`] with the VMM's own reason.
    async fn launch(&self, plan: LaunchPlan) -> Result<LaunchTimes, VmError>;

    /// Gives a network device of the running VM its tap, and what carries its packets: its link comes up.
    ///
    /// # Errors
    /// [`VmError`] with the VMM's own reason.
    async fn attach_nic(&self, nic: u8, queues: Queues) -> Result<(), VmError>;

    /// Gives the guest memory, from `from_mib` MiB in all to `to_mib`; returns when it has plugged it.
    ///
    /// # Errors
    /// [`VmError`]: the host has too little, or the guest does not take it in time. It may still do so later.
    async fn set_memory(&self, from_mib: u64, to_mib: u64) -> Result<(), VmError>;

    /// Ends it now, whatever state it is in. Returns at once; [`Machine::ended`] tells when it is over.
    fn kill(&self);

    /// Why the VM ended, once the process has been reaped.
    fn ended(&self) -> watch::Receiver<Option<Arc<VmEnd>>>;

    /// The guest's last console lines, oldest first.
    fn console_tail(&self) -> Vec<String>;
}

/// The end of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEnd {
    /// A sentence.
    pub reason: String,
    /// The guest's last console lines, where the end was no orderly one.
    pub console: Vec<String>,
}

impl VmEnd {
    /// From what the VMM reported, or else from how its process ended.
    pub fn new(reported: Option<VmExit>, process: String, tail: Vec<String>) -> Self {
        let last_lines = |console: Vec<String>| {
            if console.is_empty() {
                tail.clone()
            } else {
                console
            }
        };
        match reported {
            Some(VmExit::PowerOff) => Self::orderly("the guest powered itself off"),
            Some(VmExit::Stopped) => Self::orderly("the VM was stopped"),
            Some(VmExit::GuestPanic { console }) => Self {
                reason: "the guest kernel panicked".into(),
                console: last_lines(console),
            },
            Some(VmExit::KvmError { detail, console }) => Self {
                reason: format!("KVM could not run the guest: {detail}"),
                console: last_lines(console),
            },
            Some(VmExit::Failed { detail }) => Self {
                reason: format!("husk-vmm failed: {detail}"),
                console: tail,
            },
            None => Self {
                reason: process,
                console: tail,
            },
        }
    }

    fn orderly(reason: &str) -> Self {
        Self {
            reason: reason.into(),
            console: Vec::new(),
        }
    }
}

/// A VM that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No `/dev/kvm`.
    #[error(
        "this machine offers no /dev/kvm: load kvm_amd or kvm_intel (modprobe), and enable AMD-V/VT-x in the firmware or nesting in the outer hypervisor"
    )]
    NoKvm,
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: {0}: run containerd as root, or give its user access to /dev/kvm"
    )]
    KvmDenied(std::io::Error),
    /// `/dev/kvm` is kvm_pvm's.
    #[error(
        "/dev/kvm is served by kvm_pvm, which cannot run husk's guests: use a machine with AMD-V/VT-x (kvm_amd or kvm_intel), or husk's testbed (make testbed)"
    )]
    KvmPvm,
    /// A file of husk's is missing or unreadable.
    #[error(
        "cannot open the {what} {path}: {source}: run `make install` in husk's source tree, or set `{key}` in /etc/husk/config.toml"
    )]
    File {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The configuration key that says so.
        key: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The host has too little memory for this size.
    #[error(
        "this host has {available_mib} MiB of memory available, the VM would have {wanted_mib} MiB: free some, or lower the container's limit or default_memory_mib"
    )]
    HostMemory {
        /// The VM's size.
        wanted_mib: u64,
        /// MemAvailable.
        available_mib: u64,
    },
    /// A system call on the way failed.
    #[error("cannot {doing}: {source}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The VMM refused.
    #[error(
        "husk-vmm cannot start the VM with kernel {} and initramfs {}: {reason}",
        kernel.display(),
        initramfs.display()
    )]
    Refused {
        /// The VMM's own words.
        reason: String,
        /// The guest kernel.
        kernel: PathBuf,
        /// The initramfs.
        initramfs: PathBuf,
    },
    /// The VM ended before the agent had dialled.
    #[error("the VM ended during its start: {0}")]
    Ended(String),
    /// The agent did not dial in time.
    #[error(
        "the guest's agent did not report within {limit:?} (start_timeout_ms in husk's config.toml); {console}"
    )]
    Silent {
        /// `start_timeout_ms`.
        limit: Duration,
        /// The last console lines.
        console: String,
    },
    /// The pod's network cannot be had.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The guest does not take the memory that it may have.
    #[error("the guest has not plugged the memory within {0:?}")]
    Unplugged(Duration),
    /// The spec, annotations or agent made the start impossible.
    #[error("{0}")]
    Other(String),
}

/// Console lines of an error at most: what happened, and not the whole boot.
const QUOTED_LINES: usize = 8;

/// Console lines as one sentence part for an error: from the kernel's panic on, where there was one, else the last ones.
pub fn quote_console(lines: &[String]) -> String {
    let panic = lines.iter().position(|l| l.contains("Kernel panic"));
    let (what, from) = match panic {
        Some(line) => ("its console, from the panic", line),
        None => (
            "its last console lines",
            lines.len().saturating_sub(QUOTED_LINES),
        ),
    };
    let quoted: Vec<&str> = lines
        .iter()
        .skip(from)
        .take(QUOTED_LINES)
        .map(String::as_str)
        .collect();
    if quoted.is_empty() {
        return "its console is empty".into();
    }
    format!("{what}: {}", quoted.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_quoted_from_the_panic_or_at_its_end() {
        let lines = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(quote_console(&[]), "its console is empty");
        let many: Vec<String> = (0..20).map(|n| format!("line {n}")).collect();
        let quoted = quote_console(&many);
        assert!(
            quoted.starts_with("its last console lines: line 12 | "),
            "{quoted}"
        );
        assert!(quoted.ends_with("line 19"), "{quoted}");
        // A panic is followed by more lines of stack than are quoted.
        let panic = [lines(&["booting", "Kernel panic - not syncing"]), many].concat();
        let quoted = quote_console(&panic);
        assert!(
            quoted.starts_with("its console, from the panic: Kernel panic - not syncing | line 0"),
            "{quoted}"
        );
        assert!(!quoted.contains("line 7"), "{quoted}");
    }
}
