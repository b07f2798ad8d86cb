//! Waiting for something that another process does, with a bound that only a hang reaches.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Far beyond anything a healthy run takes in the testbed: only a hang gets here.
pub const HANG: Duration = Duration::from_secs(120);

/// Asks `look` again until it gives something.
///
/// # Errors
/// After [`HANG`], saying what was waited for.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if start.elapsed() > HANG {
            bail!("waited {} s for {what}", HANG.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
}
