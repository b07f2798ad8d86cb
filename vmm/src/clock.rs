//! The clock that start phases are measured with, the same in shim, VMM and test.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, nanoseconds.
#[must_use]
pub fn monotonic() -> u64 {
    // Always readable on Linux; zero would only spoil a figure.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000
            + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
