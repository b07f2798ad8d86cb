//! What each kind of thread may ask of the kernel.
//!
//! Whoever has taken over a thread has taken over the process, as its threads share their memory; so the filters hold what *no* thread has
//! a use for, and hold most from those that face the guest first. There is no `execve`, no `fork`, no `socket`, no executable
//! memory, no `mount`, no `ptrace`, no keyring, no io_uring, no BPF; ioctls are allowed by their numbers. Threads come from one place, the
//! [starter](crate::starter): its filter is the union of those of the devices' threads, which it starts, and each of those then takes
//! its own. A thread whose filter cannot be had does not run; a call that is not on its list ends the process, and the shim says so.
//!
//! Two calls are refused rather than deadly, as the C library makes them and goes on without: `clone3`, whose flags a filter cannot see,
//! whereupon it takes `clone`; and to open a file, where a thread has no business with files.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

mod lists;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread, once the VM is built: the shim's requests.
    Control,
    /// Starts the other threads, and devices.
    Starter,
    /// Runs a vCPU, and the registers of its devices.
    Vcpu,
    /// Forwards the console's output.
    Console,
    /// Entropy.
    Rng,
    /// Memory taken from the guest.
    Balloon,
    /// Memory given to the guest.
    Mem,
    /// Packets.
    Net,
    /// Connections.
    Vsock,
    /// The file server.
    Fs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Control,
        Self::Starter,
        Self::Vcpu,
        Self::Console,
        Self::Rng,
        Self::Balloon,
        Self::Mem,
        Self::Net,
        Self::Vsock,
        Self::Fs,
    ];

    /// The name of its threads, which a vCPU's number follows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Starter => "starter",
            Self::Vcpu => "vcpu",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Mem => "mem",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
        }
    }

    /// Holds the calling thread to its list from now on, if the process is [armed](arm).
    ///
    /// # Errors
    /// [`SeccompError`]; the thread must not go on then.
    pub fn confine(self) -> Result<(), SeccompError> {
        #[cfg(feature = "weakened")]
        if crate::weakened::Safeguard::Seccomp.is_left_out() {
            return Ok(());
        }
        if !ARMED.load(Ordering::SeqCst) {
            return Ok(());
        }
        let failed = |source| SeccompError {
            thread: self.name(),
            source,
        };
        for program in self.refusals().into_iter().chain([self.program()]) {
            let program = program.map_err(|e| failed(e.into()))?;
            seccompiler::apply_filter(&program).map_err(failed)?;
        }
        Ok(())
    }

    /// What is answered with an error, if anything. Of two filters' answers the stricter counts, which is why [`Self::allowed`] has these too.
    fn refusals(self) -> Option<Result<BpfProgram, BackendError>> {
        let (calls, errno) = self.refused()?;
        let calls: Vec<_> = calls.iter().collect();
        let answer = SeccompAction::Errno(errno.cast_unsigned());
        Some(filter(&calls, SeccompAction::Allow, answer))
    }

    /// Calls that get it an error, and which.
    fn refused(self) -> Option<(&'static [Call], i32)> {
        match self {
            // Inherited by all that it starts.
            Self::Starter => Some((lists::UNSEEN, libc::ENOSYS)),
            Self::Fs => None,
            _ => Some((lists::FILES, libc::EACCES)),
        }
    }

    fn program(self) -> Result<BpfProgram, BackendError> {
        filter(
            &self.allowed(),
            SeccompAction::KillProcess,
            SeccompAction::Allow,
        )
    }

    /// What it may call.
    fn allowed(self) -> Vec<&'static Call> {
        let own: &[&'static [Call]] = match self {
            Self::Control => &[lists::CONTROL, lists::NIC, lists::NIC_IOCTLS],
            Self::Starter => &[
                lists::STARTER,
                lists::START_IOCTLS,
                lists::VCPU_IOCTLS,
                lists::DEVICE,
                lists::NET,
                lists::NIC,
                lists::NIC_IOCTLS,
                lists::VSOCK,
                lists::MODE_IOCTLS,
                lists::FS,
            ],
            Self::Vcpu => &[lists::VCPU, lists::VCPU_IOCTLS],
            Self::Console => &[],
            Self::Rng | Self::Balloon | Self::Mem => &[lists::DEVICE],
            Self::Net => &[lists::DEVICE, lists::NET, lists::NIC, lists::NIC_IOCTLS],
            Self::Vsock => &[lists::DEVICE, lists::VSOCK, lists::MODE_IOCTLS],
            Self::Fs => &[lists::DEVICE, lists::FS],
        };
        own.iter()
            .copied()
            .chain([lists::EVERYBODY])
            .chain(self.refused().map(|(calls, _)| calls))
            .flatten()
            .collect()
    }
}

/// Set once, before the first thread starts. The devices' own tests run under their lists: what they do must be on them.
static ARMED: AtomicBool = AtomicBool::new(cfg!(test));

/// From now on [`Kind::confine`] does so.
pub fn arm() {
    ARMED.store(true, Ordering::SeqCst);
}

/// A thread whose filter cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine a thread ({thread}) to its system calls: the kernel must have CONFIG_SECCOMP_FILTER"
)]
pub struct SeccompError {
    thread: &'static str,
    #[source]
    source: seccompiler::Error,
}

/// A system call, and which of its arguments are allowed: any of these combinations, or all where there is none.
struct Call {
    number: c_long,
    when: &'static [&'static [Argument]],
}

/// One argument, by its index.
struct Argument(u8, Test);

/// What an argument, of which the lower 32 bits count, has to be.
enum Test {
    /// This.
    Is(u32),
    /// Anything that has none of these bits.
    Without(u32),
}

const fn any(number: c_long) -> Call {
    Call { number, when: &[] }
}

const fn when(number: c_long, when: &'static [&'static [Argument]]) -> Call {
    Call { number, when }
}

fn filter(
    calls: &[&'static Call],
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    let mut always = Vec::new();
    for call in calls {
        let entry = rules.entry(call.number).or_default();
        if call.when.is_empty() {
            always.push(call.number);
        }
        for arguments in call.when {
            entry.push(rule(arguments)?);
        }
    }
    // Without a rule, a call matches whatever its arguments.
    for number in always {
        rules.insert(number, Vec::new());
    }
    SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64)?.try_into()
}

fn rule(arguments: &[Argument]) -> Result<SeccompRule, BackendError> {
    let conditions = arguments
        .iter()
        .map(|Argument(index, test)| {
            let (comparison, value) = match *test {
                Test::Is(value) => (SeccompCmpOp::Eq, value),
                Test::Without(bits) => (SeccompCmpOp::MaskedEq(bits.into()), 0),
            };
            SeccompCondition::new(*index, SeccompCmpArgLen::Dword, comparison, value.into())
        })
        .collect::<Result<_, _>>()?;
    SeccompRule::new(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_filter_that_the_kernel_takes() {
        for kind in Kind::ALL {
            let program = kind.program().unwrap();
            // BPF_MAXINSNS (linux/bpf_common.h).
            assert!(program.len() < 4096, "{kind:?}: {}", program.len());
            kind.refusals().transpose().unwrap();
        }
    }

    /// Nobody is given by one list what the module's head denies.
    #[test]
    fn no_list_has_what_nobody_may() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
            libc::SYS_pidfd_getfd,
        ];
        for kind in Kind::ALL {
            for call in kind.allowed() {
                assert!(!never.contains(&call.number), "{kind:?}: {}", call.number);
                let checked = [
                    libc::SYS_ioctl,
                    libc::SYS_clone,
                    libc::SYS_unshare,
                    libc::SYS_prctl,
                    libc::SYS_seccomp,
                    libc::SYS_mmap,
                    libc::SYS_mprotect,
                    libc::SYS_socketpair,
                    libc::SYS_tgkill,
                ];
                assert!(
                    !checked.contains(&call.number) || !call.when.is_empty(),
                    "{kind:?}: {} whatever its arguments",
                    call.number
                );
            }
        }
    }

    /// linux/vhost.h: `VHOST_SET_LOG_BASE`, `VHOST_SET_LOG_FD` (CVE-2019-14835, CVE-2026-99686). `FEATURES` is among the ioctls, so that they
    /// would be found.
    #[test]
    fn nobody_has_vhost_write_a_log() {
        const FEATURES: u32 = 0x4008_af00;
        const LOG: [u32; 2] = [0x4008_af04, 0x4004_af07];
        let ioctls: Vec<u32> = Kind::ALL
            .into_iter()
            .flat_map(Kind::allowed)
            .filter(|call| call.number == libc::SYS_ioctl)
            .flat_map(|call| call.when.iter().copied().flatten())
            .filter_map(|Argument(index, test)| match test {
                Test::Is(number) if *index == 1 => Some(*number),
                _ => None,
            })
            .collect();
        assert!(ioctls.contains(&FEATURES));
        assert!(!ioctls.iter().any(|number| LOG.contains(number)));
    }

    /// Those who start no threads must not make processes either.
    #[test]
    fn only_the_starter_starts_threads() {
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Starter) {
            for call in kind.allowed() {
                let number = call.number;
                assert!(
                    ![libc::SYS_clone, libc::SYS_clone3, libc::SYS_seccomp].contains(&number),
                    "{kind:?}: {number}"
                );
            }
        }
    }
}
