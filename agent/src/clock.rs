//! The guest's clocks, in nanoseconds.

use nix::time::{ClockId, clock_gettime};

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
