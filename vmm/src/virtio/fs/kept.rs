//! What the guest may keep of a file's content from one open to the next.
//!
//! FUSE promises close-to-open consistency: an open shows what was written on the host before. virtiofsd has the guest drop
//! all that it holds of a file at each open, so that every program which starts reads its libraries anew. A guest may as well keep it
//! if nobody has changed the file since; NFS clients decide so too, by the same three values (RFC 7530, 10.3.1).
//!
//! The kernel makes the content of some files up as they are read, with values that never change: sysfs, which monitoring has mounted. Such a
//! file takes no room on a disk, and is read anew each time.
//!
//! A version says more than that the values are the same:
//! - It is [settled](SETTLED). A change within the tick of a clock may leave all three as they were; and what a process of the host's writes
//!   through a mapping has a new time only at the first write after a page's writeback. That comes within 35 s, unless somebody has set
//!   `vm.dirty_expire_centisecs` or the file system has no disk (tmpfs): such a process has to call msync(2) or close, as it would have to for NFS.
//! - The guest *has* dropped what was older, which the answer to an open alone does not show: two of them may cross. So a version counts once the
//!   guest uses the handle that it got with it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use virtiofsd::fuse::Attr;

/// How old a file's last change has to be.
pub const SETTLED: Duration = Duration::from_secs(60);

/// Files and handles that are remembered, about 64 bytes each. With more, all are forgotten, and dropped once.
const MOST: usize = 16 * 1024;

/// What changes with a file's content, as far as stat(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    size: u64,
    modified: (u64, u32),
    changed: (u64, u32),
}

impl Version {
    /// Nothing for what is no regular file, and so has no pages, and for one without a block, whose content nobody has written.
    pub fn of(attr: &Attr) -> Option<Self> {
        let is_stored = attr.mode & libc::S_IFMT == libc::S_IFREG && attr.blocks > 0;
        is_stored.then_some(Self {
            size: attr.size,
            modified: (attr.mtime, attr.mtimensec),
            changed: (attr.ctime, attr.ctimensec),
        })
    }

    fn is_settled(&self, now: SystemTime, settled: Duration) -> bool {
        let changed = Duration::new(self.changed.0, self.changed.1);
        now.duration_since(SystemTime::UNIX_EPOCH)
            .ok()
            .and_then(|now| now.checked_sub(changed))
            .is_some_and(|age| age >= settled)
    }
}

/// The files of one share.
pub struct Kept {
    settled: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By inode, whose numbers virtiofsd gives once: all that the guest holds of a file is of this version.
    files: HashMap<u64, Version>,
    /// By handle: the inode, and what its version is once the guest uses the handle.
    opened: HashMap<u64, (u64, Version)>,
}

impl Kept {
    /// Versions count that are so old.
    pub fn new(settled: Duration) -> Self {
        Self {
            settled,
            state: Mutex::default(),
        }
    }

    /// Takes an open for reading of this version of the file, seen after it; true if the guest may keep what it has.
    pub fn open(&self, inode: u64, handle: u64, version: Version, now: SystemTime) -> bool {
        let mut state = self.lock();
        if state.files.get(&inode) == Some(&version) {
            return true;
        }
        if version.is_settled(now, self.settled) {
            insert(&mut state.opened, handle, (inode, version));
        }
        false
    }

    /// Takes it that the guest uses the handle, and so has read the answer to its open.
    pub fn used(&self, handle: u64) {
        let mut state = self.lock();
        if let Some((inode, version)) = state.opened.remove(&handle) {
            insert(&mut state.files, inode, version);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of a map is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn insert<T>(map: &mut HashMap<u64, T>, key: u64, value: T) {
    if map.len() >= MOST {
        map.clear();
    }
    map.insert(key, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_000_000);
    const FILE: u64 = 7;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + NOW
    }

    fn version(size: u64, age: Duration) -> Version {
        let changed = NOW - age;
        let changed = (changed.as_secs(), changed.subsec_nanos());
        Version {
            size,
            modified: (1, 0),
            changed,
        }
    }

    #[test]
    fn a_file_is_kept_once_a_handle_of_its_version_was_used() {
        let kept = Kept::new(SETTLED);
        let first = version(1, SETTLED);
        assert!(!kept.open(FILE, 1, first, now()));
        // Their answers may cross: nothing shows that what was older is gone.
        assert!(!kept.open(FILE, 2, first, now()));
        kept.used(9);
        assert!(!kept.open(FILE, 3, first, now()));
        kept.used(1);
        assert!(kept.open(FILE, 4, first, now()));
        assert!(!kept.open(FILE + 1, 5, first, now()));
    }

    #[test]
    fn any_change_drops_it() {
        let first = version(1, SETTLED);
        for second in [
            version(2, SETTLED),
            version(1, SETTLED + Duration::from_nanos(1)),
            version(1, Duration::ZERO),
            Version {
                modified: (2, 0),
                ..first
            },
        ] {
            let kept = Kept::new(SETTLED);
            kept.open(FILE, 1, first, now());
            kept.used(1);
            assert!(!kept.open(FILE, 2, second, now()), "{second:?}");
            kept.used(2);
            let settled = second.is_settled(now(), SETTLED);
            assert_eq!(kept.open(FILE, 3, second, now()), settled, "{second:?}");
        }
    }

    #[test]
    fn what_was_just_changed_is_never_kept() {
        let kept = Kept::new(SETTLED);
        for age in [Duration::ZERO, SETTLED - Duration::from_nanos(1)] {
            for handle in 1..4 {
                assert!(!kept.open(FILE, handle, version(1, age), now()));
                kept.used(handle);
            }
        }
        // As a clock was set back.
        let tomorrow = Version {
            changed: (2_000_000, 0),
            ..version(1, SETTLED)
        };
        assert!(!tomorrow.is_settled(now(), Duration::ZERO));
    }

    #[test]
    fn no_guest_has_more_remembered_than_there_is_room_for() {
        let kept = Kept::new(SETTLED);
        for number in 0..3 * MOST as u64 {
            kept.open(number, number, version(1, SETTLED), now());
            if number % 2 == 0 {
                kept.used(number);
            }
        }
        let state = kept.lock();
        assert!(state.files.len() <= MOST && state.opened.len() <= MOST);
    }
}
