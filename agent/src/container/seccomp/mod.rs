//! seccomp: an OCI profile becomes one classic BPF filter.
//!
//! seccompiler, which the VMM uses for itself, fits a jail of one's own and not an OCI profile: a filter of its
//! has one action for what matches and one for the rest, kills every call of another ABI (a 32-bit program in a
//! container works with runc), and its `apply_filter` always sets no_new_privs, which would break
//! setuid programs in containers that may use them. So the profile is compiled here, for x86_64 and the i386
//! ABI, with libseccomp's meaning.

mod compile;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompFilterFlag};

use super::error::{LaunchError, Step};
use super::sys::{BpfInstruction, seccomp_set_filter};

/// A compiled profile.
#[derive(Debug)]
pub(crate) struct Filter {
    program: Vec<BpfInstruction>,
    flags: u64,
}

impl Filter {
    /// Compiles a profile.
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, LaunchError> {
        let flags = profile
            .flags()
            .iter()
            .flatten()
            .map(|flag| match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => {
                    // The process has one thread.
                    0
                }
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // Only for notifying filters, which are refused before.
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            })
            .fold(0, |flags, flag| flags | flag);
        Ok(Self {
            program: compile::compile(profile)?,
            flags,
        })
    }

    /// Puts the filter on this process, for good. Without no_new_privs this needs CAP_SYS_ADMIN.
    pub(crate) fn install(&self) -> Result<(), LaunchError> {
        seccomp_set_filter(&self.program, self.flags)
            .step(|| "installing the seccomp filter".to_owned())
    }
}
