//! What is said of a VM that ends because KVM cannot run one of its vCPUs any further.

use kvm_ioctls::VcpuExit;

/// The reason, after an exit that is neither a device's nor of no account.
pub fn unhandled(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "triple fault: the guest kernel failed without a panic".into(),
        VcpuExit::FailEntry(reason, cpu) => format!(
            "the processor refused to enter the guest (hardware reason {reason:#x}, host CPU {cpu})"
        ),
        VcpuExit::MemoryFault { gpa, size, .. } => {
            format!("memory fault at guest-physical {gpa:#x}+{size:#x}")
        }
        other => format!("unexpected exit {other:?}"),
    }
}

/// The reason, after `KVM_EXIT_INTERNAL_ERROR` with this suberror (`linux/kvm.h`).
pub fn internal(suberror: u32) -> String {
    let what = match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        _ => "KVM internal error",
    };
    format!("{what} (suberror {suberror})")
}

/// The reason, after a `KVM_RUN` that failed; `None` where it is to be made again: a kick, or a vCPU that woke up before its start-up call.
pub fn failed(error: kvm_ioctls::Error) -> Option<String> {
    match error.errno() {
        libc::EINTR | libc::EAGAIN => None,
        libc::EFAULT => Some(
            "KVM cannot reach a page of the guest's: memory that the guest has not plugged, or that the host cannot give"
                .into(),
        ),
        _ => Some(format!("KVM_RUN failed: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no guest can be made to do here, or only on some processors.
    #[test]
    fn each_exit_has_a_sentence() {
        for (exit, words) in [
            (VcpuExit::Shutdown, "triple fault"),
            (
                VcpuExit::FailEntry(0x8000_0021, 3),
                "hardware reason 0x80000021, host CPU 3",
            ),
            (
                VcpuExit::MemoryFault {
                    flags: 0,
                    gpa: 0x1000,
                    size: 0x2000,
                },
                "guest-physical 0x1000+0x2000",
            ),
            (VcpuExit::Unknown, "unexpected exit Unknown"),
            (VcpuExit::Nmi, "unexpected exit Nmi"),
            (VcpuExit::Hyperv, "unexpected exit Hyperv"),
            (
                VcpuExit::SystemEvent(1, &[]),
                "unexpected exit SystemEvent(1",
            ),
            (VcpuExit::Unsupported(99), "unexpected exit Unsupported(99)"),
        ] {
            let said = unhandled(&exit);
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn an_internal_error_says_which() {
        for (suberror, words) in [
            (1, "could not emulate an instruction (suberror 1)"),
            (2, "simultaneous exceptions (suberror 2)"),
            (3, "an event could not be delivered (suberror 3)"),
            (4, "KVM internal error (suberror 4)"),
            (u32::MAX, "KVM internal error (suberror 4294967295)"),
        ] {
            assert!(internal(suberror).contains(words), "{suberror}");
        }
    }

    #[test]
    fn a_kick_is_no_failure_and_anything_else_is() {
        for errno in [libc::EINTR, libc::EAGAIN] {
            assert_eq!(failed(kvm_ioctls::Error::new(errno)), None);
        }
        for (errno, words) in [
            (libc::EFAULT, "memory that the guest has not plugged"),
            (libc::EINVAL, "KVM_RUN failed: Invalid argument"),
            (libc::EIO, "KVM_RUN failed: "),
        ] {
            let said = failed(kvm_ioctls::Error::new(errno)).unwrap();
            assert!(said.contains(words), "{said}");
        }
    }
}
