//! An init for containers whose program is none (docker's `--init`, tini's job): it takes the orphans of the container's processes, and
//! hands on to the program what signals it gets, which as PID 1 the program would not even notice without a handler.
//!
//! It is no program of its own: the container's process forks at the very end of its set-up, with the identity and the seccomp filter
//! of the program. The child becomes that, the parent stays. It has no descriptors, and as it has not called execve since
//! it was closed to others, the container's processes cannot look into it without CAP_SYS_PTRACE.

use std::io;

use husk_protocol::INIT_ANNOTATION;
use oci_spec::runtime::Spec;
use rustix::process::{WaitOptions, WaitStatus, wait};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::error::{LaunchError, Step};
use super::seccomp::Filter;
use super::sys::{self, Forked};

/// Does the container want an init?
pub(super) fn is_wanted(spec: &Spec) -> Result<bool, LaunchError> {
    let annotations = spec.annotations().as_ref();
    match annotations.and_then(|all| all.get(INIT_ANNOTATION)) {
        None => Ok(false),
        Some(value) => value.trim().parse().map_err(|_| {
            LaunchError::invalid(format!(
                "annotation {INIT_ANNOTATION}: {value:?} is not true or false"
            ))
        }),
    }
}

/// Stays behind as the container's PID 1. Returns in the child, which is to become the program and installs `late_filter` itself.
pub(super) fn stay_behind(late_filter: Option<&Filter>) -> Result<(), LaunchError> {
    let what = || "making the container's init".to_owned();
    sys::block_signals().step(what)?;
    match sys::fork().step(what)? {
        Forked::Parent(program) => attend(program, late_filter),
        Forked::Child => {
            // What is typed at a terminal is the program's, not the init's: it would come twice. Signals are blocked, SIGTTOU among them;
            // without a terminal there is none to take.
            let _ = nix::unistd::setpgid(nix::unistd::Pid::this(), nix::unistd::Pid::this());
            let _ = rustix::termios::tcsetpgrp(io::stdin(), rustix::process::getpid());
            Ok(())
        }
    }
}

/// Looks after the container's processes until the program has ended, and ends as it has. The kernel kills those that are left.
fn attend(program: i32, late_filter: Option<&Filter>) -> ! {
    // The end of the agent's socket tells that execve has succeeded, that of the streams that nobody writes any more.
    sys::close_all();
    // For who lists processes.
    let _ = rustix::thread::set_name(c"husk-init");
    let filtered = late_filter.map_or(Ok(()), Filter::install);
    if give_up_capabilities().is_err() || filtered.is_err() {
        std::process::exit(1);
    }
    loop {
        match sys::next_signal() {
            Ok(libc::SIGCHLD) => {
                if let Some(code) = reap(program) {
                    std::process::exit(code);
                }
            }
            // It may have become another user, or be ending.
            Ok(signal) => drop(sys::kill(program, signal)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => std::process::exit(1),
        }
    }
}

/// Keeps what it takes to send signals to a program that became another user's, if root; execve would have taken the rest from others.
fn give_up_capabilities() -> rustix::io::Result<()> {
    let mut sets = capabilities(None)?;
    let kept = match rustix::process::geteuid().is_root() {
        true => sets.effective & CapabilitySet::KILL,
        false => CapabilitySet::empty(),
    };
    (sets.effective, sets.permitted, sets.inheritable) = (kept, kept, CapabilitySet::empty());
    set_capabilities(None, sets)
}

/// Takes what has ended; the program's exit code, if it is among that.
fn reap(program: i32) -> Option<i32> {
    let mut code = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid.as_raw_pid() == program {
            code = Some(exit_code(status));
        }
    }
    code
}

/// As a shell tells it: 128+n after signal n.
fn exit_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(annotations: serde_json::Value) -> Result<bool, String> {
        let json = serde_json::json!({"ociVersion": "1.2.0", "annotations": annotations});
        let spec: Spec = serde_json::from_value(json).unwrap();
        is_wanted(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn an_init_is_asked_for_by_annotation() {
        assert_eq!(asked(serde_json::json!({})), Ok(false));
        assert_eq!(
            asked(serde_json::json!({INIT_ANNOTATION: "true"})),
            Ok(true)
        );
        assert_eq!(
            asked(serde_json::json!({INIT_ANNOTATION: "false"})),
            Ok(false)
        );
        let error = asked(serde_json::json!({INIT_ANNOTATION: "yes"})).unwrap_err();
        assert!(
            error.contains("io.husk.init") && error.contains("true or false"),
            "{error}"
        );
    }
}
