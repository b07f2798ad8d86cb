//! News that nobody asked for: out-of-memory kills.
//!
//! The kernel changes a cgroup's `memory.events` when it kills, and inotify tells. What the host has not fetched yet is
//! kept per container, so that a container which is killed over and over fills no queue.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::{Notify, watch};

use crate::error::AgentError;
use crate::polled::{Polled, polled};
use crate::stats;

/// OOM kills in a container since it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OomKill {
    /// The container.
    pub container: String,
    /// Processes killed so far.
    pub kills: u64,
}

/// The events that the host has yet to fetch.
#[derive(Debug, Default)]
pub struct Events {
    pending: Mutex<BTreeMap<String, u64>>,
    news: Notify,
    caller: watch::Sender<u64>,
}

impl Events {
    fn push(&self, event: OomKill) {
        self.lock().insert(event.container, event.kills);
        self.news.notify_one();
    }

    /// Waits for the next event. One caller at a time: a newer call ends an older one, whose
    /// caller has given up waiting.
    ///
    /// # Errors
    /// [`AgentError::Superseded`] for the older call.
    pub async fn next(&self) -> Result<OomKill, AgentError> {
        let mut newest = self.caller.subscribe();
        self.caller.send_modify(|caller| *caller += 1);
        newest.mark_unchanged();
        loop {
            if let Some((container, kills)) = self.lock().pop_first() {
                return Ok(OomKill { container, kills });
            }
            tokio::select! {
                biased;
                _ = newest.changed() => return Err(AgentError::Superseded),
                () = self.news.notified() => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches the containers' cgroups for kills.
#[derive(Debug)]
pub struct OomWatch {
    inotify: Inotify,
    /// The same inotify instance.
    notes: Polled,
    watched: Mutex<HashMap<String, Watched>>,
    events: Arc<Events>,
}

#[derive(Debug)]
struct Watched {
    descriptor: WatchDescriptor,
    file: PathBuf,
    kills: u64,
}

impl OomWatch {
    /// A watch over no container yet.
    ///
    /// # Errors
    /// inotify's.
    pub fn new(events: Arc<Events>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        Ok(Self {
            notes: polled(inotify.as_fd().try_clone_to_owned()?)?,
            inotify,
            watched: Mutex::default(),
            events,
        })
    }

    /// Watches one container.
    ///
    /// # Errors
    /// inotify's, where the cgroup has no memory controller among others.
    pub fn watch(&self, container: &str, cgroup: &Path) -> io::Result<()> {
        let file = cgroup.join("memory.events");
        let descriptor = self.inotify.add_watch(&file, AddWatchFlags::IN_MODIFY)?;
        let watched = Watched {
            descriptor,
            file,
            kills: 0,
        };
        self.lock().insert(container.to_owned(), watched);
        Ok(())
    }

    /// Forgets a container.
    pub fn forget(&self, container: &str) {
        if let Some(watched) = self.lock().remove(container) {
            // The kernel drops the watch itself where the cgroup has gone first.
            let _ = self.inotify.rm_watch(watched.descriptor);
        }
    }

    /// Looks now, and says whether the kernel has ever killed something in the container.
    pub fn check(&self, container: &str) -> bool {
        self.lock().get_mut(container).is_some_and(|watched| {
            self.look(container, watched);
            watched.kills > 0
        })
    }

    fn look(&self, container: &str, watched: &mut Watched) {
        let kills = stats::oom_kills(&watched.file);
        if kills > watched.kills {
            watched.kills = kills;
            self.events.push(OomKill {
                container: container.to_owned(),
                kills,
            });
        }
    }

    /// Follows the kernel's notes until the runtime ends.
    ///
    /// # Errors
    /// Where inotify cannot be read any more.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        loop {
            let mut ready = self.notes.readable().await?;
            match self.inotify.read_events() {
                Ok(notes) => {
                    let mut watched = self.lock();
                    for (container, one) in watched.iter_mut() {
                        if notes.iter().any(|note| note.wd == one.descriptor) {
                            self.look(container, one);
                        }
                    }
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn event(container: &str, kills: u64) -> OomKill {
        OomKill {
            container: container.into(),
            kills,
        }
    }

    #[tokio::test]
    async fn what_is_not_fetched_is_merged_per_container() {
        let events = Events::default();
        events.push(event("a", 1));
        events.push(event("b", 1));
        events.push(event("a", 5));
        assert_eq!(events.next().await.unwrap(), event("a", 5));
        assert_eq!(events.next().await.unwrap(), event("b", 1));
    }

    #[tokio::test]
    async fn a_newer_call_ends_an_older_one() {
        let events = Arc::new(Events::default());
        let older = tokio::spawn({
            let events = Arc::clone(&events);
            async move { events.next().await }
        });
        tokio::task::yield_now().await;
        let newer = tokio::spawn({
            let events = Arc::clone(&events);
            async move { events.next().await }
        });
        assert!(matches!(older.await.unwrap(), Err(AgentError::Superseded)));
        events.push(event("a", 1));
        assert_eq!(newer.await.unwrap().unwrap(), event("a", 1));
    }

    #[tokio::test]
    async fn a_kill_is_noticed() {
        let cgroup = tempfile::tempdir().unwrap();
        let file = cgroup.path().join("memory.events");
        fs::write(&file, "oom 0\noom_kill 0\n").unwrap();
        let events = Arc::new(Events::default());
        let watch = Arc::new(OomWatch::new(Arc::clone(&events)).unwrap());
        tokio::spawn(Arc::clone(&watch).run());
        watch.watch("a", cgroup.path()).unwrap();
        assert!(!watch.check("a"));
        fs::write(&file, "oom 3\noom_kill 2\n").unwrap();
        assert_eq!(events.next().await.unwrap(), event("a", 2));
        assert!(watch.check("a"));
        watch.forget("a");
        assert!(!watch.check("a"));
    }
}
