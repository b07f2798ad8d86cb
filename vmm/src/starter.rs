//! The thread that starts the others.
//!
//! A driver says that a device is to start by a write to a register, which comes out on a vCPU's thread. What starting takes, opening
//! files and making threads among it, is none of a vCPU's business (see [`crate::jail::seccomp`]): it is done here, while the vCPU waits.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::jail::seccomp::{Kind, SeccompError};

type Job = Box<dyn FnOnce() + Send>;

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub struct Starter {
    jobs: Sender<Job>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum StarterError {
    /// No thread.
    #[error("cannot start the thread that starts the others")]
    Spawn(#[source] io::Error),
    /// No filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// It has panicked.
    #[error("the thread that starts the others has failed")]
    Gone,
}

impl Starter {
    /// Starts it; returns when it is confined.
    ///
    /// # Errors
    /// [`StarterError`].
    pub fn new() -> Result<Self, StarterError> {
        let (jobs, to_do) = channel();
        let (confined, outcome) = channel();
        std::thread::Builder::new()
            .name(Kind::Starter.name().into())
            .spawn(move || work(&to_do, &confined))
            .map_err(StarterError::Spawn)?;
        outcome.recv().map_err(|_| StarterError::Gone)??;
        Ok(Self { jobs })
    }

    /// Does something there, and waits until it is done. Not from within a job.
    ///
    /// # Errors
    /// [`StarterError::Gone`]: this job, or an earlier one, has panicked.
    pub fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, StarterError> {
        let (done, outcome) = channel();
        let job = move || {
            // Whoever asked waits for it.
            let _ = done.send(job());
        };
        self.jobs
            .send(Box::new(job))
            .map_err(|_| StarterError::Gone)?;
        outcome.recv().map_err(|_| StarterError::Gone)
    }
}

fn work(jobs: &Receiver<Job>, confined: &Sender<Result<(), SeccompError>>) {
    let outcome = Kind::Starter.confine();
    let failed = outcome.is_err();
    if confined.send(outcome).is_err() || failed {
        return;
    }
    for job in jobs {
        job();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_done_on_one_thread_of_its_own() {
        let starter = Starter::new().unwrap();
        let there = || std::thread::current().id();
        let first = starter.run(there).unwrap();
        assert_eq!(first, starter.run(there).unwrap());
        assert_ne!(first, there());
    }

    #[test]
    fn a_job_that_fails_is_told_and_so_is_every_later_one() {
        let starter = Starter::new().unwrap();
        // Without the words of a panic, for which the thread would need more calls than it has.
        let failed = starter.run(|| std::panic::resume_unwind(Box::new(())));
        assert!(matches!(failed, Err(StarterError::Gone)));
        assert!(matches!(starter.run(|| ()), Err(StarterError::Gone)));
    }
}
