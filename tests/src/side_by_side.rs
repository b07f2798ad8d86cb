//! The same work for many, some at a time, as a kubelet starts pods.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Result, bail};

/// Does something for each number below `count`, by `rows` threads. What it gives comes in the order of the numbers.
///
/// # Errors
/// The first one of a row, which ends that row.
pub fn side_by_side<T: Send>(
    count: usize,
    rows: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let row = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(done);
            }
            // Said at once: what is put away because of it may take long, or hang as well.
            let result =
                work(number).inspect_err(|error| eprintln!("number {number}: {error:#}"))?;
            done.push((number, result));
        }
    };
    let mut done = thread::scope(|scope| {
        let rows: Vec<_> = (0..rows).map(|_| scope.spawn(row)).collect();
        let mut all = Vec::new();
        for row in rows {
            let done: Result<Vec<_>> = row.join().unwrap_or_else(|_| bail!("a thread panicked"));
            all.extend(done?);
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    done.sort_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
