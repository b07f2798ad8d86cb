//! Devices without threads of their own: a fuzzer lets each look at its events when it says so, so that one input always does the same.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::*;

/// What would be a thread. No filter of system calls is set.
struct Parked {
    name: &'static str,
    handler: Box<dyn Handler>,
    poll: Poll,
    stop: EventFd,
    interrupt: Arc<dyn Interrupt>,
    has_entered: bool,
}

impl Parked {
    /// The error ends it.
    fn turn(&mut self) -> Result<Turn, Fault> {
        if !self.has_entered {
            self.has_entered = true;
            self.handler.enter()?;
        }
        turn(&mut *self.handler, &self.poll, 0)
    }
}

/// By number, and so in the order in which they were started.
static PARKED: Mutex<BTreeMap<u64, Parked>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

fn parked() -> MutexGuard<'static, BTreeMap<u64, Parked>> {
    PARKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets every device do all that there is to do; false if it is not done after so many `turns`.
pub fn settle(turns: usize) -> bool {
    for _ in 0..turns {
        let mut any = false;
        let mut ended = Vec::new();
        let mut all = parked();
        for (number, one) in all.iter_mut() {
            match one.turn() {
                Ok(Turn::Nothing) => {}
                Ok(Turn::Done) => any = true,
                Ok(Turn::Stop) => ended.push(*number),
                Err(fault) => {
                    end(&fault, one.name, &one.stop, &*one.interrupt);
                    ended.push(*number);
                }
            }
        }
        for number in ended {
            all.remove(&number);
        }
        if !any {
            return true;
        }
    }
    false
}

/// Has the place of a thread's.
pub(super) struct JoinHandle<T> {
    number: u64,
    result: PhantomData<T>,
}

impl<T> JoinHandle<T> {
    pub(super) fn join(self) -> Option<()> {
        parked().remove(&self.number).map(drop)
    }
}

pub(super) fn start(
    kind: Kind,
    handler: impl Handler,
    poll: Poll,
    stop: EventFd,
    interrupt: Arc<dyn Interrupt>,
) -> io::Result<JoinHandle<()>> {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let one = Parked {
        name: kind.name(),
        handler: Box::new(handler),
        poll,
        stop,
        interrupt,
        has_entered: false,
    };
    parked().insert(number, one);
    Ok(JoinHandle {
        number,
        result: PhantomData,
    })
}
