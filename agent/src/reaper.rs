//! Reaps every child of PID 1 and hands out how each ended.
//!
//! A container's processes become children of the agent in three ways: it started them, an intermediate
//! process of the container set-up left them behind, or their parent in the guest's root pid
//! namespace died. One loop waits for all of them, so that nobody else may call `waitpid`.
//!
//! A process can be over before whoever started it has learnt its pid. So while a launch is in progress the statuses
//! of children nobody watches are kept, and only until every launch that may have been theirs is over.

#![allow(
    unsafe_code,
    reason = "waitpid: nix loses the status of a process that a real-time signal ended"
)]

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clock;

/// Reaps between two looks at the rest of the agent: a fork bomb's orphans must not hold up the API.
const REAPS_AT_ONCE: usize = 128;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0-255, or 128+n where signal n ended it.
    pub status: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: u64,
}

/// The children of this process.
#[derive(Debug, Default)]
pub struct Reaper {
    children: Mutex<Children>,
}

#[derive(Debug, Default)]
struct Children {
    watched: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: HashMap<i32, Unclaimed>,
    launches: BTreeSet<u64>,
    next_launch: u64,
}

#[derive(Debug)]
struct Unclaimed {
    exit: Exit,
    /// Launches with a lower number may be this child's.
    before: u64,
}

/// The exit of one watched child, now or to come.
#[derive(Debug, Clone)]
pub struct ExitWatch(watch::Receiver<Option<Exit>>);

impl ExitWatch {
    /// Waits for the end of the process. `None` only where the reaper is gone.
    pub async fn exit(&mut self) -> Option<Exit> {
        self.0
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit)
    }

    /// Whether the process has been reaped.
    pub fn is_over(&self) -> bool {
        self.0.borrow().is_some()
    }
}

/// A launch in progress: until it is dropped, no status of an unknown child is thrown away.
#[derive(Debug)]
pub struct Launch {
    reaper: Arc<Reaper>,
    number: u64,
}

impl Launch {
    /// Watches the process that this launch has brought forth.
    pub fn watch(&self, pid: i32) -> ExitWatch {
        self.reaper.watch(pid)
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut children = self.reaper.lock();
        children.launches.remove(&self.number);
        let oldest = children.launches.first().copied().unwrap_or(u64::MAX);
        children.unclaimed.retain(|_, child| oldest < child.before);
    }
}

impl Reaper {
    /// Begins a launch.
    pub fn launch(self: &Arc<Self>) -> Launch {
        let mut children = self.lock();
        let number = children.next_launch;
        children.next_launch += 1;
        children.launches.insert(number);
        Launch {
            reaper: Arc::clone(self),
            number,
        }
    }

    fn watch(&self, pid: i32) -> ExitWatch {
        let mut children = self.lock();
        let early = children.unclaimed.remove(&pid).map(|child| child.exit);
        let (sender, receiver) = watch::channel(early);
        if early.is_none() {
            children.watched.insert(pid, sender);
        }
        ExitWatch(receiver)
    }

    /// Signals a watched child. Its pid cannot be another process's by then: pids are freed by reaping
    /// alone, which takes the same lock.
    ///
    /// # Errors
    /// `ESRCH` where the child has been reaped, otherwise what `kill(2)` says.
    pub fn signal(&self, pid: i32, signal: i32) -> io::Result<()> {
        let children = self.lock();
        if !children.watched.contains_key(&pid) {
            return Err(Errno::ESRCH.into());
        }
        // SAFETY: kill takes no pointers.
        Errno::result(unsafe { libc::kill(pid, signal) })?;
        Ok(())
    }

    /// Reaps until the runtime ends.
    ///
    /// # Errors
    /// Where SIGCHLD cannot be listened to.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut child = signal(SignalKind::child())?;
        loop {
            while self.reap() == REAPS_AT_ONCE {
                tokio::task::yield_now().await;
            }
            if child.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    /// Reaps what is there, at most [`REAPS_AT_ONCE`], and says how many that was.
    fn reap(&self) -> usize {
        let mut children = self.lock();
        for reaped in 0..REAPS_AT_ONCE {
            let mut raw = 0;
            // SAFETY: `raw` is a valid place for the status.
            let pid = unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG) };
            if pid <= 0 {
                return reaped;
            }
            children.ended(
                pid,
                Exit {
                    status: status(raw),
                    at_ns: clock::realtime_ns(),
                },
            );
        }
        REAPS_AT_ONCE
    }

    /// Has a child end that a test has made up.
    #[cfg(test)]
    pub(crate) fn ended(&self, pid: i32, status: u32) {
        self.lock().ended(pid, Exit { status, at_ns: 1 });
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Signals a process that the agent did not launch, as read from a cgroup a moment ago; it may have ended since.
pub fn signal_unwatched(pid: i32, signal: i32) {
    if pid > 0 {
        // SAFETY: kill takes no pointers.
        unsafe { libc::kill(pid, signal) };
    }
}

impl Children {
    fn ended(&mut self, pid: i32, exit: Exit) {
        if let Some(watcher) = self.watched.remove(&pid) {
            watcher.send_replace(Some(exit));
        } else if !self.launches.is_empty() {
            let before = self.next_launch;
            self.unclaimed.insert(pid, Unclaimed { exit, before });
        }
    }
}

/// The status a shell would show.
fn status(raw: i32) -> u32 {
    let shown = if libc::WIFSIGNALED(raw) {
        128 + libc::WTERMSIG(raw)
    } else {
        libc::WEXITSTATUS(raw)
    };
    u32::try_from(shown).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        status: 3,
        at_ns: 1,
    };

    #[test]
    fn a_status_is_what_a_shell_shows() {
        assert_eq!(status(42 << 8), 42);
        assert_eq!(status(libc::SIGKILL), 137);
        assert_eq!(status(64), 192, "a real-time signal");
        assert_eq!(status(libc::SIGSEGV | 0x80), 139, "with a core dump");
    }

    #[test]
    fn an_exit_before_its_watch_is_delivered() {
        let reaper = Arc::new(Reaper::default());
        let launch = reaper.launch();
        reaper.lock().ended(7, EXIT);
        assert!(launch.watch(7).is_over());
        assert!(!launch.watch(7).is_over(), "and only once");
    }

    #[test]
    fn nothing_is_kept_without_a_launch() {
        let reaper = Arc::new(Reaper::default());
        reaper.lock().ended(7, EXIT);
        assert!(reaper.lock().unclaimed.is_empty());
    }

    #[test]
    fn a_status_is_dropped_with_the_last_launch_it_may_belong_to() {
        let reaper = Arc::new(Reaper::default());
        let first = reaper.launch();
        let second = reaper.launch();
        reaper.lock().ended(7, EXIT);
        let third = reaper.launch();
        drop(first);
        assert_eq!(reaper.lock().unclaimed.len(), 1);
        drop(second);
        assert!(
            reaper.lock().unclaimed.is_empty(),
            "the third began after that exit"
        );
        drop(third);
    }

    #[test]
    fn a_reaped_or_foreign_pid_is_not_signalled() {
        let reaper = Arc::new(Reaper::default());
        let error = reaper.signal(1, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
