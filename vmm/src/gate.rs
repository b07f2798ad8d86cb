//! Whether the vCPUs may run: the one word between the control loop and the vCPU threads.
//!
//! A vCPU looks at the gate before each entry into the guest: an atomic load while all is well. To pause or stop, the
//! control loop changes the word and then kicks every thread out of the guest; the kick is never lost, because
//! it stays visible to the thread until it has looked again (see [`crate::vcpu`]).
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Run,
    Pause,
    Stop,
}

/// What a vCPU does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest.
    Run,
    /// Enter the guest, which has been held for a while.
    RunAfterPause,
    /// End the thread.
    Stop,
}

#[derive(Debug)]
struct State {
    word: Word,
    /// Threads that have not ended.
    alive: usize,
    /// Threads waiting at the gate.
    held: usize,
}

/// The gate of one VM's vCPUs.
#[derive(Debug)]
pub struct Gate {
    /// The word is `Run`: what a vCPU asks before it takes the lock.
    open: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// An open gate for `vcpus` threads.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self {
            open: AtomicBool::new(true),
            state: Mutex::new(State {
                word: Word::Run,
                alive: vcpus,
                held: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, word: Word) {
        let mut state = self.lock();
        // Stop is final.
        if state.word != Word::Stop {
            state.word = word;
        }
        self.open.store(state.word == Word::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// For a vCPU thread, before it enters the guest: returns at once while the gate is open, else when it opens or stops.
    pub fn pass(&self) -> Next {
        if self.open.load(Ordering::SeqCst) {
            return Next::Run;
        }
        let mut state = self.lock();
        let mut next = Next::Run;
        if state.word == Word::Pause {
            next = Next::RunAfterPause;
            state.held = state.held.saturating_add(1);
            // Told once: those who wake for nothing must not wake each other again.
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.word == Word::Pause)
                .unwrap_or_else(PoisonError::into_inner);
            state.held = state.held.saturating_sub(1);
        }
        match state.word {
            Word::Stop => Next::Stop,
            Word::Run | Word::Pause => next,
        }
    }

    /// For a vCPU thread, when it ends.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.alive = state.alive.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// Closes the gate; `kick` must get every thread out of the guest. Returns when none runs.
    pub fn pause(&self, kick: impl FnOnce()) {
        self.say(Word::Pause);
        kick();
        let mut state = self.lock();
        while state.word == Word::Pause && state.held < state.alive {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate.
    pub fn resume(&self) {
        self.say(Word::Run);
    }

    /// Ends every thread; `kick` must get them out of the guest. Returns when all have left.
    pub fn stop(&self, kick: impl FnOnce()) {
        self.say(Word::Stop);
        kick();
        let mut state = self.lock();
        while state.alive > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use super::*;

    #[test]
    fn pause_holds_everyone_and_stop_ends_everyone() {
        let gate = Arc::new(Gate::new(3));
        let rounds = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, rounds) = (Arc::clone(&gate), Arc::clone(&rounds));
                std::thread::spawn(move || {
                    while gate.pass() != Next::Stop {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                    gate.leave();
                })
            })
            .collect();
        for _ in 0..50 {
            gate.pause(|| {});
            let held = rounds.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(rounds.load(Ordering::SeqCst), held);
            gate.resume();
        }
        gate.pause(|| {});
        gate.stop(|| {});
        for thread in threads {
            thread.join().unwrap();
        }
        gate.resume();
        assert_eq!(gate.pass(), Next::Stop, "stop is final");
    }

    /// User and system time of the calling thread.
    fn thread_time() -> Duration {
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
            .unwrap()
            .into()
    }

    /// Held vCPUs sleep: they once woke each other for as long as the pause lasted.
    #[test]
    fn a_pause_costs_nothing() {
        let gate = Arc::new(Gate::new(3));
        gate.say(Word::Pause);
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                std::thread::spawn(move || {
                    let before = thread_time();
                    assert_eq!(gate.pass(), Next::RunAfterPause);
                    gate.leave();
                    thread_time() - before
                })
            })
            .collect();
        gate.pause(|| {});
        std::thread::sleep(Duration::from_millis(300));
        gate.resume();
        for thread in threads {
            let spent = thread.join().unwrap();
            assert!(spent < Duration::from_millis(10), "{spent:?}");
        }
    }

    #[test]
    fn a_vcpu_learns_that_it_was_held() {
        let gate = Arc::new(Gate::new(1));
        gate.say(Word::Pause);
        let inner = Arc::clone(&gate);
        let vcpu = std::thread::spawn(move || inner.pass());
        gate.pause(|| {});
        gate.resume();
        assert_eq!(vcpu.join().unwrap(), Next::RunAfterPause);
    }

    #[test]
    fn a_vcpu_that_has_left_is_not_waited_for() {
        let gate = Gate::new(1);
        gate.leave();
        gate.pause(|| {});
        gate.stop(|| {});
    }
}
