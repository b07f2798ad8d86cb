//! The guest's clocks, in nanoseconds.

#![allow(
    unsafe_code,
    reason = "the adjtimex system call, which nix does not wrap"
)]

use std::mem;

use husk_protocol::CLOCK_STEP_NS;
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

const SECOND_NS: i64 = 1_000_000_000;

/// Nanoseconds since the Unix epoch.
pub fn realtime_ns() -> u64 {
    now(ClockId::CLOCK_REALTIME)
}

/// Nanoseconds since the kernel began to count, soon after its entry.
pub fn monotonic_ns() -> u64 {
    now(ClockId::CLOCK_MONOTONIC)
}

/// Both clocks always exist; a time before the epoch counts as 0.
fn now(clock: ClockId) -> u64 {
    let Ok(time) = clock_gettime(clock) else {
        return 0;
    };
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

/// Adds `add_ns` to `CLOCK_REALTIME`, at once or, where it is little, gradually. A gradual correction takes the place of an earlier one.
///
/// # Errors
/// The kernel's: without CAP_SYS_TIME, or for a time beyond those it can tell.
pub fn adjust(add_ns: i64) -> nix::Result<()> {
    // SAFETY: plain integers, for which zero is a value.
    let mut request: libc::timex = unsafe { mem::zeroed() };
    if add_ns.unsigned_abs() < CLOCK_STEP_NS {
        request.modes = libc::ADJ_OFFSET_SINGLESHOT;
        // In microseconds.
        request.offset = add_ns / 1000;
    } else {
        request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        // Nanoseconds with ADJ_NANO, and never negative: whole seconds are rounded down.
        request.time.tv_sec = add_ns.div_euclid(SECOND_NS);
        request.time.tv_usec = add_ns.rem_euclid(SECOND_NS);
    }
    // SAFETY: the kernel reads and writes this structure and nothing else.
    Errno::result(unsafe { libc::adjtimex(&raw mut request) }).map(drop)
}
