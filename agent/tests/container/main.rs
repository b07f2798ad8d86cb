//! Real containers: a busybox rootfs, launched through the built agent's `container-init`.
//!
//! The tests run as root, with cgroup v2 mounted somewhere; this process stands in for PID 1 as a subreaper. What needs the
//! memory, cpu and pids controllers of v2 is in `limits`, which says so where they belong to v1.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod cgroups;
mod escapes;
mod filesystem;
mod limits;
mod namespaces;
mod pid1;
mod process;
mod processes;
mod seccomp;
mod support;
