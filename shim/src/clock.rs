//! Keeps the guest's wall clock at the host's.
//!
//! A guest counts time by kvm-clock. That goes on while the VM stands still, so a VM that was stopped for a while has the right time when it
//! runs again; but it counts as the hardware does, and knows nothing of a host's clock that is set, or that NTP holds at the right
//! time. So the two are compared, at once when the host's has been set (the end of a suspend counts as that) and every [`INTERVAL`],
//! as NTP compares clocks: the guest is asked for its time, which it told somewhere between the question and the answer.

#![allow(
    unsafe_code,
    reason = "registering an fd is unsafe because a type could lie about owning it"
)]

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, SystemTime},
};

use husk_protocol::CLOCK_STEP_NS;
use rustix::{
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::agent::Agent;

/// Between two comparisons. Two clocks that are 100 ppm apart, which is much, are then apart by 6 ms.
const INTERVAL: Duration = Duration::from_secs(60);

/// Before the first comparison, and after one that came to nothing because the VM stood still.
const SOON: Duration = Duration::from_secs(1);

/// An answer that takes longer tells too little to be the last word. It also comes where the host is busy, which more questions make
/// busier: each is put off twice as long as the last.
const SLOW: Duration = Duration::from_millis(200);

/// An error that is left alone.
const TOLERANCE: Duration = Duration::from_millis(1);

/// Compares and corrects for as long as it is polled. Must be called within a tokio runtime.
pub async fn follow(agent: Agent) {
    let steps = Steps::watch();
    let mut pauses = Pauses(SOON);
    let mut pause = SOON;
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = steps.next() => {}
        }
        pause = pauses.after(compare(&agent).await);
    }
}

/// How long to wait for the next comparison. Holds the time after one that comes to nothing.
struct Pauses(Duration);

impl Pauses {
    fn after(&mut self, comparison: Option<()>) -> Duration {
        if comparison.is_some() {
            self.0 = SOON;
            return INTERVAL;
        }
        let doubled = (self.0 * 2).min(INTERVAL);
        std::mem::replace(&mut self.0, doubled)
    }
}

/// One comparison, with the correction that follows. `None`: another should follow soon.
async fn compare(agent: &Agent) -> Option<()> {
    let asked = SystemTime::now();
    let answer = agent.adjust_clock(0).await;
    let answered = SystemTime::now();
    let guest_ns = answer
        .inspect_err(|error| debug!(%error, "the guest does not tell its time"))
        .ok()?;
    let seen = Comparison::new(asked, guest_ns, answered)?;
    if let Some(correction) = seen.correction() {
        // One that is made at once, a person may want to know of.
        if correction.unsigned_abs() >= CLOCK_STEP_NS {
            let milliseconds = correction / 1_000_000;
            info!(milliseconds, "correcting the guest's clock");
        }
        agent
            .adjust_clock(correction)
            .await
            .inspect_err(|error| warn!(%error, "the guest's clock cannot be corrected"))
            .ok()?;
    }
    (seen.took <= SLOW).then_some(())
}

/// What a question and its answer tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Comparison {
    /// The guest's clock is ahead of the host's by this many nanoseconds, give or take half of `took`.
    ahead_ns: i128,
    took: Duration,
}

impl Comparison {
    /// `None` where the host's clock was set back in between, or is before 1970.
    fn new(asked: SystemTime, guest_ns: u64, answered: SystemTime) -> Option<Self> {
        let asked = asked.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let answered = answered.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let took = answered.checked_sub(asked)?;
        // A Duration has at most 2^94 nanoseconds.
        let host_ns = (asked + took / 2).as_nanos().cast_signed();
        Some(Self {
            ahead_ns: i128::from(guest_ns) - host_ns,
            took,
        })
    }

    /// What to add to the guest's clock; `None`: nothing that is sure.
    fn correction(&self) -> Option<i64> {
        let unsure = (TOLERANCE + self.took / 2).as_nanos();
        if self.ahead_ns.unsigned_abs() <= unsure {
            return None;
        }
        // Beyond 292 years it is no clock: the guest lies, and to itself alone.
        i64::try_from(-self.ahead_ns).ok()
    }
}

/// Tells when the host's clock has been set.
struct Steps(Option<AsyncFd<OwnedFd>>);

impl Steps {
    fn watch() -> Self {
        let timer = timer_until_set().and_then(|timer| {
            // SAFETY: an OwnedFd is the one owner of its fd and always names the same one.
            let registered = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
            registered.map_err(|e| e.into_parts().1)
        });
        if let Err(error) = &timer {
            warn!(%error, "the guest's clock follows a host's that is set only after {INTERVAL:?}");
        }
        Self(timer.ok())
    }

    /// Resolves when the clock has been set since the last time; never, where that cannot be told.
    async fn next(&self) {
        let Some(timer) = &self.0 else {
            return std::future::pending().await;
        };
        while let Ok(mut ready) = timer.readable().await {
            let mut ticks = [0; 8];
            match ready.try_io(|timer| Ok(rustix::io::read(timer, &mut ticks)?)) {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => {
                    return;
                }
                // It was somebody else's turn, or the end of time.
                Ok(_) | Err(_) => {}
            }
        }
        std::future::pending().await
    }
}

/// A timer that never expires, but is cancelled when the clock is set (timerfd_create(2)).
fn timer_until_set() -> io::Result<OwnedFd> {
    let timer = timerfd_create(
        TimerfdClockId::Realtime,
        TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
    )?;
    let never = Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    };
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: never,
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(&timer, flags, &once)?;
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds)
    }

    fn correction(asked: u64, guest: u64, answered: u64) -> Option<i64> {
        Comparison::new(at(asked), guest * 1_000_000, at(answered))?
            .correction()
            .map(|ns| ns / 1_000_000)
    }

    #[test]
    fn only_what_is_sure_is_corrected() {
        let now = 1_700_000_000_000;
        assert_eq!(correction(now, now, now), None);
        assert_eq!(correction(now, now + 1, now), None);
        assert_eq!(correction(now, now + 2, now), Some(-2));
        assert_eq!(correction(now, now - 3_600_000, now + 10), Some(3_600_005));
        // A slow answer: the guest may have told its time at once, or just now.
        assert_eq!(correction(now, now, now + 1000), None);
        assert_eq!(correction(now, now + 1000, now + 1000), None);
        assert_eq!(correction(now, now + 2000, now + 1000), Some(-1500));
        // The host's clock was set back meanwhile.
        assert_eq!(Comparison::new(at(now), 0, at(now - 1)), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(asked in any::<u32>(), guest in any::<u64>(), took in any::<u32>()) {
            let (asked, took) = (u64::from(asked), u64::from(took));
            if let Some(seen) = Comparison::new(at(asked), guest, at(asked + took)) {
                let _ = seen.correction();
            }
        }
    }

    #[test]
    fn who_is_slow_to_answer_is_asked_ever_less_often() {
        let mut pauses = Pauses(SOON);
        assert_eq!(pauses.after(Some(())), INTERVAL);
        let slow: Vec<_> = (0..8).map(|_| pauses.after(None).as_secs()).collect();
        assert_eq!(slow, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pauses.after(Some(())), INTERVAL);
        assert_eq!(pauses.after(None), SOON);
    }

    /// Setting the clock is not for a unit test: that it tells is seen end to end.
    #[tokio::test]
    async fn nothing_is_told_of_a_clock_that_is_not_set() {
        let steps = Steps::watch();
        assert!(steps.0.is_some());
        let told = tokio::time::timeout(Duration::from_millis(50), steps.next()).await;
        assert!(told.is_err());
    }
}
