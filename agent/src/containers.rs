//! The containers of this guest and what can be done with them.
//!
//! Locks guard maps and phases for a few instructions and never span an await, so that a call on one container waits for no
//! other. What takes time and must not stop half-way (its caller may give up at any await) runs as a task of
//! its own; see `service`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protocol::agent::Stdio;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

use crate::container::Io;
use crate::dial::Host;
use crate::error::AgentError;
use crate::events::OomWatch;
use crate::execs::{ExecReservation, Execs, lock};
use crate::launch::{Plan, Wiring};
use crate::process::{Ended, Phase, Process, Step, WrongState};
use crate::reaper::{ExitWatch, Launch, Reaper, signal_unwatched};
use crate::runtime::{Gate, Handle, Launched, Runtime};
use crate::stream::Outputs;

/// How long a killed process may take to go: one stuck in the kernel never does.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Highest signal number (`_NSIG`).
const SIGNAL_MAX: u32 = 64;

/// The containers of this guest.
pub struct Containers<R: Runtime> {
    runtime: R,
    host: Arc<dyn Host>,
    reaper: Arc<Reaper>,
    oom: Arc<OomWatch>,
    slots: Mutex<HashMap<String, Slot<R::Container>>>,
}

enum Slot<H: Handle> {
    Creating,
    Ready(Arc<Entry<H>>),
}

/// One container.
struct Entry<H: Handle> {
    handle: H,
    init: Arc<Process>,
    gate: Mutex<Option<H::Gate>>,
    execs: Mutex<Execs>,
    deletion: OnceCell<()>,
}

/// A process that has been made and wired.
struct Made<H: Handle> {
    process: Arc<Process>,
    exit: ExitWatch,
    outputs: Outputs,
    gate: H::Gate,
}

impl<R: Runtime> Containers<R> {
    /// No container yet.
    pub fn new(runtime: R, host: Arc<dyn Host>, reaper: Arc<Reaper>, oom: Arc<OomWatch>) -> Self {
        Self {
            runtime,
            host,
            reaper,
            oom,
            slots: Mutex::default(),
        }
    }

    /// Sets a container up; its init then waits for [`Containers::start`]. Returns the init's pid. `joins` is the container whose
    /// namespaces the spec means where it joins some.
    ///
    /// # Errors
    /// The id is taken, the other container is not there, the streams cannot be opened, or the set-up fails; nothing is left of it.
    pub async fn create(
        self: &Arc<Self>,
        id: &str,
        spec_json: &[u8],
        stdio: &Stdio,
        joins: Option<&str>,
    ) -> Result<i32, AgentError> {
        let plan = Plan::new(stdio)?;
        let joined = joins.map(|other| self.entry(other)).transpose()?;
        let reservation = SlotReservation::take(self, id)?;
        let (io, wiring) = plan.open(&*self.host).await?;
        let launch = self.reaper.launch();
        let joined = joined.as_ref().map(|entry| &entry.handle);
        let (handle, launched) = self.runtime.create(id, spec_json, io, joined).await?;
        let made = match self
            .wire::<R::Container>(launch, launched, wiring, Phase::Created)
            .await
        {
            Ok(made) => made,
            Err(error) => {
                if let Err(e) = handle.delete().await {
                    tracing::error!(container = id, error = %e, "undoing a container that did not come to be");
                }
                return Err(error);
            }
        };
        if let Err(e) = self.oom.watch(id, handle.cgroup_dir()) {
            tracing::warn!(container = id, error = %e, "no news of out-of-memory kills for this container");
        }
        let entry = Arc::new(Entry {
            handle,
            init: Arc::clone(&made.process),
            gate: Mutex::new(Some(made.gate)),
            execs: Mutex::default(),
            deletion: OnceCell::new(),
        });
        let pid = made.process.pid();
        let follow = made.process.follow(made.exit, made.outputs, {
            let (containers, entry, id) = (Arc::clone(self), Arc::clone(&entry), id.to_owned());
            async move || {
                // In a pid namespace of its own the kernel has done so; otherwise the rest would outlive its init.
                if let Err(e) = entry.handle.kill() {
                    tracing::error!(container = id, error = %e, "killing what is left of a container");
                }
                containers.oom.check(&id)
            }
        });
        tokio::spawn(follow);
        reservation.fill(entry);
        Ok(pid)
    }

    /// Lets the init run its program.
    ///
    /// # Errors
    /// It has been started before, or its execve fails; it ends then.
    pub async fn start(&self, id: &str) -> Result<(), AgentError> {
        let entry = self.entry(id)?;
        entry.init.step(Step::Start)?;
        let gate = lock(&entry.gate).take().ok_or(WrongState::Running)?;
        gate.release().await?;
        entry.init.step(Step::Started)?;
        Ok(())
    }

    /// Runs a further process in the container and returns its pid.
    ///
    /// # Errors
    /// The id is taken, the container's init is gone or frozen, or the execve fails.
    pub async fn exec(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        process_json: &[u8],
        stdio: &Stdio,
    ) -> Result<i32, AgentError> {
        let plan = Plan::new(stdio)?;
        let entry = self.entry(id)?;
        entry.init.step(Step::Exec)?;
        let reservation = ExecReservation::take(&entry.execs, exec_id)?;
        let (io, wiring) = plan.open(&*self.host).await?;
        let made = self
            .make_exec(&entry, process_json, io, wiring)
            .await
            // Whatever the step that failed for it says, the reason is that the init went meanwhile.
            .map_err(|e| {
                entry
                    .init
                    .step(Step::Exec)
                    .err()
                    .map_or(e, AgentError::from)
            })?;
        let process = Arc::clone(&made.process);
        if entry.init.phase() == Phase::Exited {
            // It has come after the kill that follows the init's end.
            let _ = process.signal(libc::SIGKILL);
        }
        let follow = Arc::clone(&process).follow(made.exit, made.outputs, {
            let (containers, id) = (Arc::clone(self), id.to_owned());
            async move || containers.oom.check(&id)
        });
        tokio::spawn({
            let (entry, exec_id) = (Arc::clone(&entry), exec_id.to_owned());
            async move {
                follow.await;
                lock(&entry.execs).has_ended(exec_id);
            }
        });
        made.gate.release().await?;
        process.step(Step::Started)?;
        let pid = process.pid();
        reservation.fill(process);
        Ok(pid)
    }

    async fn make_exec(
        &self,
        entry: &Entry<R::Container>,
        process_json: &[u8],
        io: Io,
        wiring: Wiring,
    ) -> Result<Made<R::Container>, AgentError> {
        let launch = self.reaper.launch();
        let launched = entry.handle.exec(process_json, io).await?;
        self.wire(launch, launched, wiring, Phase::Starting).await
    }

    /// Connects a launched process to its streams; one that cannot be connected is killed.
    async fn wire<H: Handle>(
        &self,
        launch: Launch,
        launched: Launched<H>,
        wiring: Wiring,
        phase: Phase,
    ) -> Result<Made<H>, AgentError> {
        let mut exit = launch.watch(launched.pid);
        drop(launch);
        match wiring.attach(launched.console) {
            Ok((outputs, console)) => {
                let reaper = Arc::clone(&self.reaper);
                let process = Process::new(launched.pid, reaper, phase, exit.clone(), console);
                Ok(Made {
                    process: Arc::new(process),
                    exit,
                    outputs,
                    gate: launched.gate,
                })
            }
            Err(e) => {
                drop(launched.gate);
                // Gone already is as good.
                let _ = self.reaper.signal(launched.pid, libc::SIGKILL);
                exit.exit().await;
                Err(AgentError::guest("connecting the streams of a process", e))
            }
        }
    }

    /// Waits for a process to end and its output to be on its way.
    ///
    /// # Errors
    /// No such process.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Ended, AgentError> {
        let process = self.process(id, exec_id)?;
        process.wait().await.ok_or(AgentError::Finished)
    }

    /// Signals one process, or all of the container. Signal 0 asks whether it is there (kill(2)), as CRI-O does.
    ///
    /// # Errors
    /// No such process, it has ended, or no such signal.
    pub fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let signal = match signal {
            0..=SIGNAL_MAX => signal.cast_signed(),
            _ => return Err(AgentError::Invalid(format!("{signal} is not a signal"))),
        };
        if all {
            self.entry(id)?.signal_all(signal)
        } else {
            self.process(id, exec_id)?.signal(signal)
        }
    }

    /// Changes the size of a process's terminal.
    ///
    /// # Errors
    /// No such process, or it has no terminal.
    pub fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let fit = |n| u16::try_from(n).unwrap_or(u16::MAX);
        self.process(id, exec_id)?.resize(fit(width), fit(height))
    }

    /// Applies new resource limits.
    ///
    /// # Errors
    /// No such container, or the limits do not fit.
    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), AgentError> {
        Ok(self.entry(id)?.handle.update(resources_json).await?)
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// It is not running, or does not freeze; it runs on then.
    pub async fn pause(&self, id: &str) -> Result<(), AgentError> {
        let entry = self.entry(id)?;
        entry.init.step(Step::Pause)?;
        let frozen = entry.handle.freeze().await;
        if frozen.is_err() {
            let _ = entry.handle.thaw().await;
            // It may have ended meanwhile, which is as well.
            let _ = entry.init.step(Step::Resume);
        }
        frozen.map_err(|e| AgentError::guest(format!("freezing container {id:?}"), e))
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// It is not paused, or does not thaw.
    pub async fn resume(&self, id: &str) -> Result<(), AgentError> {
        let entry = self.entry(id)?;
        entry.init.step(Step::Resume)?;
        let thawed = entry.handle.thaw().await;
        if thawed.is_err() {
            let _ = entry.init.step(Step::Pause);
        }
        thawed.map_err(|e| AgentError::guest(format!("thawing container {id:?}"), e))
    }

    /// The container's figures.
    ///
    /// # Errors
    /// No such container.
    pub fn stats(
        &self,
        id: &str,
    ) -> Result<husk_protocol::agent::ContainerStatsResponse, AgentError> {
        Ok(crate::stats::read(self.entry(id)?.handle.cgroup_dir()))
    }

    /// Every process of the container, with the id of its exec where it has one.
    ///
    /// # Errors
    /// No such container, or its cgroup cannot be read.
    pub fn list(&self, id: &str) -> Result<Vec<(i32, String)>, AgentError> {
        let entry = self.entry(id)?;
        let procs = entry.handle.procs().map_err(|e| {
            AgentError::guest(format!("listing the processes of container {id:?}"), e)
        })?;
        let execs = lock(&entry.execs).running();
        let exec_of = |pid: i32| execs.get(&pid).cloned().unwrap_or_default();
        Ok(procs.into_iter().map(|pid| (pid, exec_of(pid))).collect())
    }

    /// The pid of the container's init.
    ///
    /// # Errors
    /// No such container.
    pub fn init(&self, id: &str) -> Result<i32, AgentError> {
        Ok(self.entry(id)?.init.pid())
    }

    /// Kills what runs in a container, undoes its set-up and forgets it. One that is not there is deleted already.
    ///
    /// # Errors
    /// It is still being created, or something of it does not go away; the call can be repeated.
    pub async fn delete(&self, id: &str) -> Result<(), AgentError> {
        let entry = match self.entry(id) {
            Err(AgentError::NoContainer(_)) => return Ok(()),
            entry => entry?,
        };
        entry
            .deletion
            .get_or_try_init(|| entry.tear_down(id))
            .await?;
        self.oom.forget(id);
        let mut slots = lock(&self.slots);
        if matches!(slots.get(id), Some(Slot::Ready(there)) if Arc::ptr_eq(there, &entry)) {
            slots.remove(id);
        }
        Ok(())
    }

    /// Kills every process of every container.
    pub fn kill_everything(&self) {
        for slot in lock(&self.slots).values() {
            if let Slot::Ready(entry) = slot
                && let Err(e) = entry.handle.kill()
            {
                tracing::error!(error = %e, "killing a container at the end of the sandbox");
            }
        }
    }

    fn entry(&self, id: &str) -> Result<Arc<Entry<R::Container>>, AgentError> {
        match lock(&self.slots).get(id) {
            None => Err(AgentError::NoContainer(id.to_owned())),
            Some(Slot::Creating) => Err(AgentError::Creating(id.to_owned())),
            Some(Slot::Ready(entry)) => Ok(Arc::clone(entry)),
        }
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, AgentError> {
        let entry = self.entry(id)?;
        if exec_id.is_empty() {
            return Ok(Arc::clone(&entry.init));
        }
        lock(&entry.execs)
            .get(exec_id)
            .ok_or_else(|| AgentError::NoProcess {
                container: id.to_owned(),
                exec: exec_id.to_owned(),
            })
    }
}

impl<H: Handle> Entry<H> {
    fn signal_all(&self, signal: i32) -> Result<(), AgentError> {
        let failed = |e| {
            AgentError::guest(
                format!("signal {signal} to every process of a container"),
                e,
            )
        };
        let procs = self.handle.procs().map_err(failed)?;
        if procs.is_empty() {
            return Err(AgentError::Finished);
        }
        if signal == libc::SIGKILL {
            return self.handle.kill().map_err(failed);
        }
        for pid in procs {
            if pid == self.init.pid() {
                // It may have ended by now, like the others.
                let _ = self.init.signal(signal);
            } else {
                signal_unwatched(pid, signal);
            }
        }
        Ok(())
    }

    async fn tear_down(&self, id: &str) -> Result<(), AgentError> {
        let failed = |e| AgentError::guest(format!("killing what runs in container {id:?}"), e);
        drop(lock(&self.gate).take());
        self.handle.kill().map_err(failed)?;
        let deadline = Instant::now() + KILL_PATIENCE;
        let mut pause = Duration::from_millis(1);
        while !self.init.is_reaped() || !self.handle.procs().map_err(failed)?.is_empty() {
            if Instant::now() > deadline {
                return Err(AgentError::guest(
                    format!("container {id:?} has processes that do not die"),
                    std::io::Error::from(std::io::ErrorKind::TimedOut),
                ));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(self.handle.delete().await?)
    }
}

/// Holds an id while its container is made, and frees it again where that fails.
struct SlotReservation<'a, R: Runtime> {
    containers: &'a Containers<R>,
    id: &'a str,
}

impl<'a, R: Runtime> SlotReservation<'a, R> {
    fn take(containers: &'a Containers<R>, id: &'a str) -> Result<Self, AgentError> {
        if id.is_empty() {
            return Err(AgentError::Invalid("a container needs an id".into()));
        }
        let mut slots = lock(&containers.slots);
        if slots.contains_key(id) {
            return Err(AgentError::Exists("container", id.to_owned()));
        }
        slots.insert(id.to_owned(), Slot::Creating);
        drop(slots);
        Ok(Self { containers, id })
    }

    fn fill(self, entry: Arc<Entry<R::Container>>) {
        lock(&self.containers.slots).insert(self.id.to_owned(), Slot::Ready(entry));
    }
}

impl<R: Runtime> Drop for SlotReservation<'_, R> {
    fn drop(&mut self) {
        let mut slots = lock(&self.containers.slots);
        if matches!(slots.get(self.id), Some(Slot::Creating)) {
            slots.remove(self.id);
        }
    }
}
