//! Which tests take the time: `make test` has a limit, and the emulated host makes it a near one.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Of these many the time is told.
const SHOWN: usize = 8;

/// How long each test took.
#[derive(Default)]
pub struct Durations(Mutex<Vec<(Duration, String)>>);

impl Durations {
    /// Notes one.
    pub fn add(&self, test: String, took: Duration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((took, test));
    }

    /// Prints the longest ones.
    pub fn print(&self) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.sort_by(|a, b| b.cmp(a));
        for (took, test) in all.iter().take(SHOWN) {
            println!("{:>6.1} s  {test}", took.as_secs_f64());
        }
    }
}
