//! How often something is asked for, and how long after one attempt the next is made.

use std::time::{Duration, SystemTime};

use super::{Failure, Patience, PullError};

/// The attempts at one thing. One that brings something does not count, but for a bound on all of them.
pub(super) struct Attempts {
    patience: Patience,
    vain: u32,
    all: u32,
}

impl Attempts {
    /// The most, with those that bring something.
    const ALL: u32 = 100;

    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            vain: 0,
            all: 0,
        }
    }

    /// One has failed: the pause before the next, and what is to be told of it.
    ///
    /// # Errors
    /// There is no next one.
    pub(super) fn after(
        &mut self,
        failure: Failure,
        has_brought: bool,
    ) -> Result<(Duration, PullError), PullError> {
        self.all += 1;
        self.vain = if has_brought { 1 } else { self.vain + 1 };
        if !failure.passing || self.vain >= self.patience.attempts || self.all >= Self::ALL {
            return Err(failure.error);
        }
        let pause = self.patience.pause * 2_u32.saturating_pow(self.vain.min(16) - 1);
        Ok((pause_before(failure.after, pause), failure.error))
    }
}

/// What Retry-After says (RFC 9110, section 10.2.3): seconds. The date that it may be instead is what no registry sends.
pub(super) fn seconds(value: &str) -> Option<Duration> {
    value.trim().parse().ok().map(Duration::from_secs)
}

/// As long as the registry wants, within reason, or else a time that is not everybody's.
fn pause_before(after: Option<Duration>, pause: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let part = now.map_or(0, |now| now.subsec_nanos() % 500);
    let pause = pause.min(Patience::MOST);
    let spread = pause.mul_f64(0.75 + f64::from(part) / 1000.0);
    match after {
        Some(after) => after.min(2 * Patience::MOST).max(spread),
        None => spread,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_bounded() {
        let second = Duration::from_secs(1);
        for after in [
            None,
            Some(second),
            Some(100 * second),
            seconds("99999999999"),
        ] {
            let wait = pause_before(after, second);
            assert!(
                wait >= second.mul_f64(0.75) && wait <= 2 * Patience::MOST,
                "{wait:?}"
            );
        }
        assert!(pause_before(None, 1000 * second) <= 2 * Patience::MOST);
        assert_eq!(seconds(" 7 "), Some(7 * second));
        assert_eq!(seconds("Wed, 21 Oct 2026 07:28:00 GMT"), None);
    }

    #[test]
    fn attempts_have_an_end() {
        let failure = |passing| Failure {
            error: PullError::NotFound {
                registry: String::new(),
                name: String::new(),
            },
            passing,
            after: None,
        };
        let count = |has_brought| {
            let mut attempts = Attempts::new(Patience::default());
            let more = || attempts.after(failure(true), has_brought).is_ok();
            std::iter::repeat_with(more)
                .take_while(|more| *more)
                .count()
        };
        // The one that is not followed by another is not counted.
        assert_eq!(count(false), Patience::default().attempts as usize - 1);
        assert_eq!(count(true), Attempts::ALL as usize - 1);
        let mut attempts = Attempts::new(Patience::default());
        assert!(attempts.after(failure(false), true).is_err());
    }
}
