//! A blob that is read while it comes.

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::{
    layer::Sha256Digest,
    store::{Partial, Store, StoreError},
};

/// How far a blob has come.
#[derive(Debug, Clone, Default)]
pub(super) struct Arrival(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
enum State {
    /// Nobody fetches it yet, or another process does.
    #[default]
    Waiting,
    /// Its file, and how many bytes are in it.
    Coming(Arc<File>, u64),
    /// It is in the store: this file, if this process has fetched it.
    There(Option<Arc<File>>),
    /// It will not come.
    GivenUp,
}

/// A blob, and the file that it is read from while it comes.
type Opened = (Box<dyn Read>, Option<Arc<File>>);

impl Arrival {
    /// Reads the blob, waiting for what has not come yet; with the file that it is read from while it comes. Blocks.
    ///
    /// # Errors
    /// When it will not come, or cannot be opened.
    pub(super) fn reader(
        &self,
        store: &Store,
        digest: &Sha256Digest,
    ) -> Result<Opened, StoreError> {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Waiting => {}
                State::Coming(file, _) => {
                    let follower = Follower {
                        arrival: self.clone(),
                        file: Arc::clone(file),
                        read: 0,
                    };
                    return Ok((Box::new(follower), Some(Arc::clone(file))));
                }
                State::There(_) => {
                    let blob = store.blob(digest)?.ok_or(StoreError::NoBlob(*digest))?;
                    return Ok((Box::new(blob), None));
                }
                State::GivenUp => return Err(StoreError::GivenUp(*digest)),
            }
            state = self.wait(state);
        }
    }

    /// Was what a reader has read thrown away, so that its failure says nothing? Waits until that is known. Blocks.
    pub(super) fn was_void(&self, file: Option<&Arc<File>>) -> bool {
        let Some(file) = file else {
            return false;
        };
        let mut state = self.lock();
        loop {
            match &*state {
                State::Coming(coming, _) if Arc::ptr_eq(coming, file) => {}
                State::Waiting | State::Coming(..) => return true,
                State::There(there) => {
                    return !there.as_ref().is_some_and(|there| Arc::ptr_eq(there, file));
                }
                State::GivenUp => return false,
            }
            state = self.wait(state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let woken = self.0.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        self.0.changed.notify_all();
    }
}

/// The fetcher's end. Dropped before [`Ticket::arrived`], the blob is given up.
pub(super) struct Ticket(Arrival);

impl Ticket {
    pub(super) fn new(arrival: &Arrival) -> Self {
        Self(arrival.clone())
    }

    /// This process fetches it, into this file. What was read of another is void.
    pub(super) fn begun(&self, partial: &Partial) {
        // Without a file of its own the reader waits until all is there.
        if let Ok(file) = partial.reader() {
            self.0.set(State::Coming(Arc::new(file), 0));
        }
    }

    /// So many bytes are there.
    pub(super) fn written(&self, bytes: u64) {
        if let State::Coming(_, written) = &mut *self.0.lock() {
            *written = bytes;
        }
        self.0.0.changed.notify_all();
    }

    /// What came is void. Whoever reads it learns so.
    pub(super) fn restarted(&self) {
        self.0.set(State::Waiting);
    }

    pub(super) fn arrived(self) {
        let file = match &*self.0.lock() {
            State::Coming(file, _) => Some(Arc::clone(file)),
            _ => None,
        };
        self.0.set(State::There(file));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if !matches!(*state, State::There(_)) {
            *state = State::GivenUp;
        }
        drop(state);
        self.0.0.changed.notify_all();
    }
}

/// Reads a file as far as it has come.
struct Follower {
    arrival: Arrival,
    file: Arc<File>,
    read: u64,
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.arrival.lock();
        let there = loop {
            match &*state {
                State::Coming(file, written) if Arc::ptr_eq(file, &self.file) => {
                    if *written > self.read {
                        break Some(*written - self.read);
                    }
                }
                // Whole, and checked.
                State::There(Some(file)) if Arc::ptr_eq(file, &self.file) => break None,
                State::GivenUp => return Err(io::Error::other("it does not come to its end")),
                State::Waiting | State::Coming(..) | State::There(_) => {
                    return Err(io::Error::other("it comes anew, from its beginning"));
                }
            }
            state = self.arrival.wait(state);
        };
        drop(state);
        let most = there.map_or(buffer.len(), |there| {
            usize::try_from(there)
                .unwrap_or(usize::MAX)
                .min(buffer.len())
        });
        let count = (&*self.file).read(buffer.get_mut(..most).unwrap_or_default())?;
        self.read += count as u64;
        Ok(count)
    }
}
