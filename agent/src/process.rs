//! One process of a container: its phase, its end, its signals and its terminal.
//!
//! The phase is the one record of what a process is doing, and [`Phase::step`] the one place that changes
//! it. A container's phase is that of its init.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use tokio::sync::watch;

use crate::error::AgentError;
use crate::polled::Polled;
use crate::reaper::{Exit, ExitWatch, Reaper};
use crate::stream::Outputs;
use crate::terminal;

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Set up, waiting to be started.
    Created,
    /// Told to execve, not heard back from.
    Starting,
    /// Running its program.
    Running,
    /// Frozen.
    Paused,
    /// Ended and reaped.
    Exited,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Someone asks it to start.
    Start,
    /// Its execve succeeded.
    Started,
    /// Someone asks to freeze it.
    Pause,
    /// Someone asks to thaw it.
    Resume,
    /// Someone asks for a further process beside it.
    Exec,
    /// It ended.
    Exit,
}

/// A step that the phase does not allow, in runc's words where it has some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongState {
    /// Started twice.
    #[error("cannot start an already running container")]
    Running,
    /// Started after its end.
    #[error("cannot start a container that has stopped")]
    Stopped,
    /// Paused without running.
    #[error("cannot pause a container that is not running")]
    NotRunning,
    /// Resumed without being paused.
    #[error("container not paused")]
    NotPaused,
    /// Exec into a frozen container.
    #[error("cannot exec in a paused container")]
    ExecPaused,
    /// Exec into a container whose init is gone.
    #[error("cannot exec in a stopped container")]
    ExecStopped,
}

impl Phase {
    /// The phase after a step.
    ///
    /// # Errors
    /// [`WrongState`] where the step is not possible; the phase stays.
    pub fn step(self, step: Step) -> Result<Self, WrongState> {
        match (self, step) {
            (_, Step::Exit) => Ok(Self::Exited),
            (Self::Created, Step::Start) => Ok(Self::Starting),
            (Self::Exited, Step::Start) => Err(WrongState::Stopped),
            (_, Step::Start) => Err(WrongState::Running),
            // A short process may be reaped before the word that it started arrives.
            (Self::Exited, Step::Started) => Ok(Self::Exited),
            (_, Step::Started) => Ok(Self::Running),
            (Self::Running, Step::Pause) => Ok(Self::Paused),
            (_, Step::Pause) => Err(WrongState::NotRunning),
            (Self::Paused, Step::Resume) => Ok(Self::Running),
            (_, Step::Resume) => Err(WrongState::NotPaused),
            (Self::Paused, Step::Exec) => Err(WrongState::ExecPaused),
            (Self::Exited, Step::Exec) => Err(WrongState::ExecStopped),
            (phase, Step::Exec) => Ok(phase),
        }
    }
}

/// How a process ended and how much it had said by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Status and time.
    pub exit: Exit,
    /// Bytes of its stdout that were on their way to the host.
    pub stdout_bytes: u64,
    /// The same for stderr.
    pub stderr_bytes: u64,
    /// Something in its container was killed for memory.
    pub oom_killed: bool,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    reaper: Arc<Reaper>,
    phase: Mutex<Phase>,
    exit: ExitWatch,
    ended: watch::Sender<Option<Ended>>,
    /// The signal that it was ended by before it had started, whatever the kernel says.
    ended_by: OnceLock<i32>,
    /// The terminal's master, until the end.
    console: Mutex<Option<Polled>>,
}

impl Process {
    /// A process that has been launched.
    pub fn new(
        pid: i32,
        reaper: Arc<Reaper>,
        phase: Phase,
        exit: ExitWatch,
        console: Option<Polled>,
    ) -> Self {
        Self {
            pid,
            reaper,
            phase: Mutex::new(phase),
            exit,
            ended: watch::Sender::new(None),
            ended_by: OnceLock::new(),
            console: Mutex::new(console),
        }
    }

    /// Pid in the agent's pid namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What it is doing now.
    pub fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a step.
    ///
    /// # Errors
    /// [`WrongState`] where its phase does not allow that.
    pub fn step(&self, step: Step) -> Result<(), WrongState> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        *phase = phase.step(step)?;
        Ok(())
    }

    /// Follows the process to its end: marks it exited, calls `on_exit` (which kills what must not outlive
    /// it and says whether memory was the cause), sees the output out, and then tells everyone who waits.
    pub async fn follow<F, Fut>(self: Arc<Self>, mut watch: ExitWatch, outputs: Outputs, on_exit: F)
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = bool>,
    {
        let Some(mut exit) = watch.exit().await else {
            return;
        };
        if let Some(signal) = self.ended_by.get()
            && exit.status == by_signal(libc::SIGKILL)
        {
            exit.status = by_signal(*signal);
        }
        // An exit is possible in every phase.
        let _ = self.step(Step::Exit);
        let oom_killed = on_exit().await;
        let (stdout_bytes, stderr_bytes) = outputs.settle().await;
        // A process is remembered long after its end, its terminal is not: the guest has only so many.
        drop(self.console().take());
        self.ended.send_replace(Some(Ended {
            exit,
            stdout_bytes,
            stderr_bytes,
            oom_killed,
        }));
    }

    /// Waits for the end; answers again and again. `None` only while the agent shuts down.
    pub async fn wait(&self) -> Option<Ended> {
        let mut ended = self.ended.subscribe();
        ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|ended| *ended)
    }

    /// Whether nothing of it is left in the process table.
    pub fn is_reaped(&self) -> bool {
        self.exit.is_over()
    }

    /// Whether [`Process::wait`] answers at once.
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Signals this one process. One that has not started is ended by every signal that ends a program which does not
    /// care: the kernel keeps all but SIGKILL from the init of a pid namespace that has no handlers.
    ///
    /// # Errors
    /// [`AgentError::Finished`] where it has ended.
    pub fn signal(&self, signal: i32) -> Result<(), AgentError> {
        let mut sent = signal;
        if self.phase() == Phase::Created && ends_by_default(signal) {
            sent = libc::SIGKILL;
            // The first one counts.
            let _ = self.ended_by.set(signal);
        }
        self.reaper.signal(self.pid, sent).map_err(|e| {
            if e.raw_os_error() == Some(Errno::ESRCH as i32) {
                AgentError::Finished
            } else {
                AgentError::guest(format!("signal {signal} to process {}", self.pid), e)
            }
        })
    }

    fn console(&self) -> MutexGuard<'_, Option<Polled>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the terminal its size; its foreground processes get SIGWINCH.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] where the process has no terminal, [`AgentError::Finished`] where it has ended.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), AgentError> {
        let console = self.console();
        let console = match &*console {
            Some(console) => console,
            None if self.phase() == Phase::Exited => return Err(AgentError::Finished),
            None => {
                return Err(AgentError::Invalid(
                    "the process has no terminal to resize".into(),
                ));
            }
        };
        terminal::resize(console.get_ref(), width, height)
            .map_err(|e: io::Error| AgentError::guest("setting the size of the terminal", e))
    }
}

/// The exit status of a process that a signal ended.
fn by_signal(signal: i32) -> u32 {
    128 + signal.unsigned_abs()
}

/// Whether a signal ends a process that neither handles nor ignores it (signal(7)); 0 is none.
fn ends_by_default(signal: i32) -> bool {
    !matches!(
        signal,
        0 | libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
            | libc::SIGURG
            | libc::SIGWINCH
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Start),
            Just(Step::Started),
            Just(Step::Pause),
            Just(Step::Resume),
            Just(Step::Exec),
            Just(Step::Exit),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_the_phase_makes_sense(steps in proptest::collection::vec(any_step(), 0..40)) {
            let mut phase = Phase::Created;
            let (mut starts, mut exited) = (0, false);
            for step in steps {
                let before = phase;
                match phase.step(step) {
                    Ok(next) => phase = next,
                    Err(_) => {
                        prop_assert!(step != Step::Exit && step != Step::Started);
                        prop_assert_eq!(phase, before);
                        continue;
                    }
                }
                match step {
                    Step::Start => starts += 1,
                    Step::Exit => exited = true,
                    Step::Exec => {
                        prop_assert_eq!(phase, before);
                        prop_assert!(phase != Phase::Paused && phase != Phase::Exited);
                    }
                    Step::Pause => prop_assert_eq!((before, phase), (Phase::Running, Phase::Paused)),
                    Step::Resume => prop_assert_eq!((before, phase), (Phase::Paused, Phase::Running)),
                    Step::Started => {}
                }
                prop_assert_eq!(phase == Phase::Exited, exited, "an end is for good");
            }
            prop_assert!(starts <= 1, "an init starts at most once");
        }
    }

    #[tokio::test]
    async fn a_terminal_goes_with_its_process() {
        let reaper = Arc::new(Reaper::default());
        let exit = reaper.launch().watch(7);
        let pty = nix::pty::openpty(None, None).unwrap();
        let console = crate::polled::polled(pty.master).unwrap();
        let process = Process::new(
            7,
            Arc::clone(&reaper),
            Phase::Running,
            exit.clone(),
            Some(Polled::clone(&console)),
        );
        let process = Arc::new(process);
        process.resize(80, 25).unwrap();
        reaper.ended(7, 0);
        let follow = Arc::clone(&process).follow(exit, Outputs::default(), async || false);
        follow.await;
        assert!(process.has_ended());
        assert_eq!(Arc::strong_count(&console), 1);
        let refused = process.resize(80, 25).unwrap_err();
        assert!(matches!(refused, AgentError::Finished), "{refused}");
    }

    /// Also one that has not started, which every other signal ends.
    #[test]
    fn signal_0_asks_whether_it_is_there() {
        let reaper = Arc::new(Reaper::default());
        let pid = std::process::id().cast_signed();
        let exit = reaper.launch().watch(pid);
        let process = Process::new(pid, Arc::clone(&reaper), Phase::Created, exit, None);
        process.signal(0).unwrap();
        assert_eq!(process.ended_by.get(), None);
        reaper.ended(pid, 0);
        assert!(matches!(process.signal(0), Err(AgentError::Finished)));
    }

    #[test]
    fn a_refusal_says_what_runc_says() {
        let said = |phase: Phase, step| phase.step(step).unwrap_err().to_string();
        assert_eq!(
            said(Phase::Exited, Step::Exec),
            "cannot exec in a stopped container"
        );
        assert_eq!(said(Phase::Running, Step::Resume), "container not paused");
        assert_eq!(
            said(Phase::Starting, Step::Start),
            "cannot start an already running container"
        );
    }
}
