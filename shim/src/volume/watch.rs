//! The kernel's news of the volumes' directories: one inotify instance a pod.
//!
//! Instances are few (fs.inotify.max_user_instances, 128 for all of root's unless the node raises it), so a pod takes one with its first
//! volume, and no more for others. A watch holds an inode and no mount: the kubelet can unmount a volume that is watched.

use std::{
    fmt, io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use futures::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

/// A watch on one directory.
pub type Watch = WatchDescriptor;

/// What changes what a reader finds. A file's contents count once it is closed.
const CHANGES: WatchMask = WatchMask::CREATE
    .union(WatchMask::MOVE)
    .union(WatchMask::DELETE)
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::ATTRIB)
    .union(WatchMask::ONLYDIR);

/// Bytes read at once: a dozen events or more (each is at most 16 and a file name).
const BUFFER: usize = 4096;

/// What the kernel told.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// Something changed in this directory.
    In(Watch),
    /// There was more than the kernel keeps: anything may have changed.
    Anywhere,
}

/// Watches directories.
pub struct Watcher {
    events: EventStream<[u8; BUFFER]>,
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

/// Adds watches, from wherever directories are read.
#[derive(Debug, Clone)]
pub struct Adder(Watches);

impl Watcher {
    /// Watches nothing yet. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's, mostly that there are too many instances.
    pub fn new() -> io::Result<Self> {
        let events = Inotify::init()?.into_event_stream([0; BUFFER])?;
        Ok(Self { events })
    }

    /// Adds watches.
    pub fn adder(&self) -> Adder {
        Adder(self.events.watches())
    }

    /// Drops a watch; one on a directory that has gone was dropped by the kernel.
    pub fn remove(&self, watch: &Watch) {
        let _ = self.events.watches().remove(watch.clone());
    }

    /// Waits for news. Nothing is lost where it is dropped.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn news(&mut self) -> io::Result<News> {
        let event = self.events.next().await;
        let event = event.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))?;
        Ok(if event.mask.contains(EventMask::Q_OVERFLOW) {
            News::Anywhere
        } else {
            News::In(event.wd)
        })
    }
}

impl Adder {
    /// Watches an open directory; the same watch again where there is one.
    ///
    /// # Errors
    /// The kernel's, mostly that there are too many watches.
    pub fn add(&mut self, dir: BorrowedFd<'_>) -> io::Result<Watch> {
        self.0
            .add(format!("/proc/self/fd/{}", dir.as_raw_fd()), CHANGES)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::{fd::AsFd as _, unix::fs::symlink},
        time::Duration,
    };

    use tokio::time::timeout;

    use super::*;

    /// Bound of a wait: reached only by a bug.
    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_swap_and_a_change_of_owner_are_news_of_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("..1")).unwrap();
        fs::write(at("..1/key"), "x").unwrap();
        symlink("..1", at("..data")).unwrap();
        let mut watcher = Watcher::new().unwrap();
        let mut adder = watcher.adder();
        let mut watch = |name: &str| adder.add(File::open(at(name)).unwrap().as_fd()).unwrap();
        let (root, version) = (watch(""), watch("..1"));
        assert_eq!(watch(""), root);
        assert_ne!(root, version);
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        std::os::unix::fs::chown(at("..1/key"), None, Some(2000)).unwrap();
        let mut seen = Vec::new();
        while seen.last() != Some(&News::In(version.clone())) {
            seen.push(timeout(LIMIT, watcher.news()).await.unwrap().unwrap());
        }
        assert!(seen.contains(&News::In(root.clone())), "{seen:?}");
        // Reading is none, nor what happens where nobody watches any more.
        fs::read(at("..1/key")).unwrap();
        watcher.remove(&version);
        fs::write(at("..1/key"), "y").unwrap();
        fs::write(at("last"), "").unwrap();
        let next = timeout(LIMIT, watcher.news()).await.unwrap().unwrap();
        // The kernel confirms the removal.
        assert_eq!(next, News::In(version));
        let next = timeout(LIMIT, watcher.news()).await.unwrap().unwrap();
        assert_eq!(next, News::In(root));
    }
}
