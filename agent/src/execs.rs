//! The further processes of a container, by their ids.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::AgentError;
use crate::process::{Phase, Process};

/// Ended execs of a container that can still be waited for: the shim asks while they run, and a container with
/// probes execs for years.
const ENDED_EXECS_KEPT: usize = 256;

/// The execs of one container.
#[derive(Default)]
pub(crate) struct Execs {
    by_id: HashMap<String, Exec>,
    /// Oldest first.
    ended: VecDeque<String>,
}

enum Exec {
    Launching,
    Process(Arc<Process>),
}

impl Execs {
    /// The process of an exec, whether or not it has ended.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Process>> {
        match self.by_id.get(id) {
            Some(Exec::Process(process)) => Some(Arc::clone(process)),
            _ => None,
        }
    }

    /// Those that run, by pid.
    pub(crate) fn running(&self) -> HashMap<i32, String> {
        self.by_id
            .iter()
            .filter_map(|(id, exec)| match exec {
                Exec::Process(process) if process.phase() != Phase::Exited => {
                    Some((process.pid(), id.clone()))
                }
                _ => None,
            })
            .collect()
    }

    /// Notes an end, and forgets the oldest of too many.
    pub(crate) fn has_ended(&mut self, id: String) {
        self.ended.push_back(id);
        if self.ended.len() > ENDED_EXECS_KEPT
            && let Some(oldest) = self.ended.pop_front()
            && matches!(self.by_id.get(&oldest), Some(Exec::Process(process)) if process.has_ended())
        {
            self.by_id.remove(&oldest);
        }
    }
}

/// Holds an exec's id while its process is made, and frees it again where that fails. The id of one that has ended
/// may be used again.
pub(crate) struct ExecReservation<'a> {
    execs: &'a Mutex<Execs>,
    exec_id: &'a str,
}

impl<'a> ExecReservation<'a> {
    /// Takes the id.
    pub(crate) fn take(all: &'a Mutex<Execs>, exec_id: &'a str) -> Result<Self, AgentError> {
        if exec_id.is_empty() {
            return Err(AgentError::Invalid("an exec needs an id of its own".into()));
        }
        let mut execs = lock(all);
        match execs.by_id.get(exec_id) {
            None => {}
            Some(Exec::Process(process)) if process.has_ended() => {
                execs.ended.retain(|id| id != exec_id);
            }
            Some(_) => return Err(AgentError::Exists("exec", exec_id.to_owned())),
        }
        execs.by_id.insert(exec_id.to_owned(), Exec::Launching);
        drop(execs);
        Ok(Self {
            execs: all,
            exec_id,
        })
    }

    /// Puts the process in its place.
    pub(crate) fn fill(self, process: Arc<Process>) {
        lock(self.execs)
            .by_id
            .insert(self.exec_id.to_owned(), Exec::Process(process));
    }
}

impl Drop for ExecReservation<'_> {
    fn drop(&mut self) {
        let mut execs = lock(self.execs);
        if matches!(execs.by_id.get(self.exec_id), Some(Exec::Launching)) {
            execs.by_id.remove(self.exec_id);
        }
    }
}

/// Locks: what a panic left behind is no worse than what it would have made.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
