//! The life of one task: its init process and its execs, as one state machine.
//!
//! containerd and the engines above it rely on the order of a task's events: Create, Start, Exit, Delete; ExecAdded,
//! ExecStarted, Exit; the init's Exit last. The guest reports in whatever order things happen there: a process may
//! have ended before its start has been answered, and an exec may be reported after the init that took it down.
//! [`Lifecycle`] takes what happens and hands out what to announce, in an order that always holds. It does no
//! I/O and never waits, so [`crate::container`] can keep it under a plain mutex.

use std::{collections::BTreeMap, time::SystemTime};

use tokio::sync::watch;

use crate::error::TaskError;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128+n for a process that signal n ended.
    pub status: u32,
    /// When, by the best clock at hand.
    pub at: SystemTime,
}

impl Exit {
    /// An exit that happens now.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }

    /// What a process is given that vanished with its VM: killed.
    pub fn killed() -> Self {
        Self::now(128 + 9)
    }
}

/// Where one process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Set up, not asked to run yet.
    Created,
    /// The guest has been asked to run it and has not answered. It may have ended already.
    Starting {
        /// The end that was seen before the answer.
        ended: Option<Exit>,
    },
    /// It runs.
    Running,
    /// It is frozen (init only: a freeze holds for the whole container).
    Paused,
    /// The init has ended; execs have yet to be announced (init only).
    Ending(Exit),
    /// Over, and announced.
    Exited(Exit),
}

impl Stage {
    /// Still holds back the init's exit.
    fn is_live(self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Running)
    }
}

/// What to tell the world, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announcement {
    /// An exec was added.
    ExecAdded {
        /// Its id.
        exec_id: String,
    },
    /// A process runs; the init where `exec_id` is empty.
    Started {
        /// Its id.
        exec_id: String,
    },
    /// The container is frozen.
    Paused,
    /// The container runs on.
    Resumed,
    /// A process is over.
    Exited {
        /// Its id.
        exec_id: String,
        /// How.
        exit: Exit,
    },
}

struct Process {
    stage: Stage,
    /// Wakes those who wait for the end.
    over: watch::Sender<Option<Exit>>,
}

impl Process {
    fn new() -> Self {
        Self {
            stage: Stage::Created,
            over: watch::Sender::new(None),
        }
    }
}

/// One task. `exec_id` is empty for the init, as in the Task API.
pub struct Lifecycle {
    init: Process,
    execs: BTreeMap<String, Process>,
    announce: Vec<Announcement>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            init: Process::new(),
            execs: BTreeMap::new(),
            announce: Vec::new(),
        }
    }
}

impl Lifecycle {
    fn get(&self, exec_id: &str) -> Result<&Process, TaskError> {
        if exec_id.is_empty() {
            return Ok(&self.init);
        }
        self.execs.get(exec_id).ok_or_else(|| no_exec(exec_id))
    }

    fn get_mut(&mut self, exec_id: &str) -> Result<&mut Process, TaskError> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec_id).ok_or_else(|| no_exec(exec_id))
    }

    /// Where the process stands.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn stage(&self, exec_id: &str) -> Result<Stage, TaskError> {
        Ok(self.get(exec_id)?.stage)
    }

    /// Resolves when the process's exit has been announced; at once if that is past.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn watch(&self, exec_id: &str) -> Result<watch::Receiver<Option<Exit>>, TaskError> {
        Ok(self.get(exec_id)?.over.subscribe())
    }

    /// Execs that run.
    pub fn running_execs(&self) -> Vec<String> {
        self.execs
            .iter()
            .filter(|(_, p)| p.stage.is_live())
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// FailedPrecondition after the init's end, AlreadyExists for a taken id.
    pub fn add_exec(&mut self, exec_id: &str) -> Result<(), TaskError> {
        match self.init.stage {
            Stage::Ending(_) | Stage::Exited(_) => {
                return Err(TaskError::failed_precondition(
                    "cannot exec in a stopped container: container not running",
                ));
            }
            Stage::Paused => {
                return Err(TaskError::failed_precondition(
                    "cannot exec in a paused container",
                ));
            }
            Stage::Created | Stage::Starting { .. } | Stage::Running => {}
        }
        if self.execs.contains_key(exec_id) {
            return Err(TaskError::already_exists(format!(
                "exec {exec_id:?} already exists"
            )));
        }
        self.execs.insert(exec_id.to_owned(), Process::new());
        self.announce.push(Announcement::ExecAdded {
            exec_id: exec_id.to_owned(),
        });
        Ok(())
    }

    /// The guest is about to be asked to run the process.
    ///
    /// # Errors
    /// FailedPrecondition when it was asked before, or (for an exec) the container does not run.
    pub fn begin_start(&mut self, exec_id: &str) -> Result<(), TaskError> {
        if !exec_id.is_empty() && self.init.stage != Stage::Running {
            self.get(exec_id)?;
            return Err(TaskError::failed_precondition(
                "cannot start an exec: container not running",
            ));
        }
        let process = self.get_mut(exec_id)?;
        match process.stage {
            Stage::Created => {
                process.stage = Stage::Starting { ended: None };
                Ok(())
            }
            Stage::Exited(_) | Stage::Ending(_) => Err(TaskError::failed_precondition(
                "cannot start a stopped process: process already finished",
            )),
            Stage::Starting { .. } | Stage::Running | Stage::Paused => Err(
                TaskError::failed_precondition("cannot start a process that is already running"),
            ),
        }
    }

    /// The guest answered: it runs.
    pub fn started(&mut self, exec_id: &str) {
        let Ok(process) = self.get_mut(exec_id) else {
            return;
        };
        let Stage::Starting { ended } = process.stage else {
            return;
        };
        process.stage = Stage::Running;
        self.announce.push(Announcement::Started {
            exec_id: exec_id.to_owned(),
        });
        if let Some(exit) = ended {
            self.ended(exec_id, exit);
        }
    }

    /// The guest could not run it. An init that does not start has ended; an exec that does not has never been.
    pub fn start_failed(&mut self, exec_id: &str, exit: Exit) {
        let Ok(process) = self.get_mut(exec_id) else {
            return;
        };
        let Stage::Starting { ended } = process.stage else {
            return;
        };
        let exit = ended.unwrap_or(exit);
        if exec_id.is_empty() {
            self.init.stage = Stage::Ending(exit);
        } else {
            process.stage = Stage::Exited(exit);
            process.over.send_replace(Some(exit));
        }
        self.end_init_if_last();
    }

    /// The process has ended and its output has been drained. Later reports of the same are ignored.
    pub fn ended(&mut self, exec_id: &str, exit: Exit) {
        let Ok(process) = self.get_mut(exec_id) else {
            return;
        };
        match process.stage {
            Stage::Starting { ended: None } => {
                process.stage = Stage::Starting { ended: Some(exit) };
                return;
            }
            Stage::Starting { ended: Some(_) } | Stage::Ending(_) | Stage::Exited(_) => return,
            Stage::Created | Stage::Running | Stage::Paused => {}
        }
        if exec_id.is_empty() {
            self.init.stage = Stage::Ending(exit);
        } else {
            let was_announced = process.stage != Stage::Created;
            process.stage = Stage::Exited(exit);
            if was_announced {
                self.announce.push(Announcement::Exited {
                    exec_id: exec_id.to_owned(),
                    exit,
                });
            } else {
                // Nobody was told of a start, so nobody is told of an end.
                process.over.send_replace(Some(exit));
            }
        }
        self.end_init_if_last();
    }

    fn end_init_if_last(&mut self) {
        let Stage::Ending(exit) = self.init.stage else {
            return;
        };
        if self.execs.values().any(|p| p.stage.is_live()) {
            return;
        }
        self.init.stage = Stage::Exited(exit);
        self.announce.push(Announcement::Exited {
            exec_id: String::new(),
            exit,
        });
    }

    /// May the container be frozen?
    ///
    /// # Errors
    /// FailedPrecondition unless it runs.
    pub fn check_pause(&self) -> Result<(), TaskError> {
        match self.init.stage {
            Stage::Running => Ok(()),
            Stage::Paused => Err(TaskError::failed_precondition("container already paused")),
            _ => Err(TaskError::failed_precondition(
                "cannot pause: container not running",
            )),
        }
    }

    /// May the container be thawed?
    ///
    /// # Errors
    /// FailedPrecondition unless it is frozen.
    pub fn check_resume(&self) -> Result<(), TaskError> {
        match self.init.stage {
            Stage::Paused => Ok(()),
            _ => Err(TaskError::failed_precondition(
                "cannot resume: container not paused",
            )),
        }
    }

    /// The guest froze the container.
    pub fn paused(&mut self) {
        if self.init.stage == Stage::Running {
            self.init.stage = Stage::Paused;
            self.announce.push(Announcement::Paused);
        }
    }

    /// The guest thawed the container.
    pub fn resumed(&mut self) {
        if self.init.stage == Stage::Paused {
            self.init.stage = Stage::Running;
            self.announce.push(Announcement::Resumed);
        }
    }

    /// Forgets an exec that does not run.
    ///
    /// # Errors
    /// NotFound for an unknown one, FailedPrecondition while it runs.
    pub fn remove_exec(&mut self, exec_id: &str) -> Result<Exit, TaskError> {
        let exit = match self.get(exec_id)?.stage {
            Stage::Exited(exit) | Stage::Ending(exit) => exit,
            Stage::Created => Exit::now(0),
            Stage::Starting { .. } | Stage::Running | Stage::Paused => {
                return Err(TaskError::failed_precondition(
                    "cannot delete a running process",
                ));
            }
        };
        self.execs.remove(exec_id);
        Ok(exit)
    }

    /// Takes what is to be announced since the last call, oldest first.
    pub fn take_announcements(&mut self) -> Vec<Announcement> {
        std::mem::take(&mut self.announce)
    }

    /// Wakes those who wait for this process: to be called once its exit has been announced.
    pub fn wake(&mut self, exec_id: &str, exit: Exit) {
        if let Ok(process) = self.get_mut(exec_id) {
            process.over.send_replace(Some(exit));
        }
    }
}

fn no_exec(exec_id: &str) -> TaskError {
    TaskError::not_found(format!(
        "exec {exec_id:?} not found: process does not exist"
    ))
}

#[cfg(test)]
mod tests;
