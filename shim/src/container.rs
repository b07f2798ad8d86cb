//! One task of the pod: a container, its init and its execs, as the Task API drives them.
//!
//! The state lives in a [`Lifecycle`] under a plain mutex that is never held across an await. A call changes the state, asks the
//! guest, and reports the answer to the state again; meanwhile every other call sees a state and gets an answer. What the guest
//! reports on its own comes from one reaper a process.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::events::task as events;
use husk_protocol::agent::{ContainerStatsResponse, WaitProcessResponse};
use tokio::{sync::watch, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    agent::Agent,
    error::TaskError,
    events::Publisher,
    lifecycle::{Announcement, Exit, Lifecycle, Stage},
    phase::Phase,
    sandbox::Sandbox,
    spec,
    stdio::{Stdio, StdioPaths, StreamKind},
    streams::Expecting,
    timing::Point,
};

/// How long execs may outlive their init before they are given up.
const EXEC_GRACE: Duration = Duration::from_secs(10);

/// How long output that the shim already holds may take to reach its reader after the VM has gone.
const LAST_OUTPUT: Duration = Duration::from_secs(3);

/// How long a created container that is deleted may take to die.
const KILL_GRACE: Duration = Duration::from_secs(5);

const SIGKILL: u32 = 9;

/// What belongs to a process besides its state.
struct Process {
    paths: StdioPaths,
    /// An exec's OCI process, JSON for the agent; empty for the init.
    json: Vec<u8>,
    /// Its streams on the host, and the tokens with which the guest may still dial them.
    streams: Option<(Arc<Stdio>, Expecting)>,
}

/// One task.
pub struct Container {
    id: String,
    bundle: PathBuf,
    namespace: String,
    sandbox: Arc<Sandbox>,
    publisher: Publisher,
    life: Mutex<Lifecycle>,
    processes: Mutex<HashMap<String, Process>>,
    /// OOM kills announced so far.
    ooms: Mutex<u64>,
}

/// What State answers about a process.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it stands.
    pub stage: Stage,
    /// Its streams.
    pub paths: StdioPaths,
}

/// What a container is made of.
pub struct Parts {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Its pod.
    pub sandbox: Arc<Sandbox>,
    /// Where its events go.
    pub publisher: Publisher,
    /// The init's streams, as containerd named them.
    pub paths: StdioPaths,
}

impl Container {
    /// Makes the container in the guest from a spec that is already the guest's. Its init waits to be started.
    ///
    /// # Errors
    /// The stream that cannot be opened, or the agent's reason.
    pub async fn create(
        parts: Parts,
        agent: &Agent,
        spec_json: Vec<u8>,
    ) -> Result<Arc<Self>, TaskError> {
        let container = Arc::new(Self {
            id: parts.id,
            bundle: parts.bundle,
            namespace: parts.namespace,
            sandbox: parts.sandbox,
            publisher: parts.publisher,
            life: Mutex::default(),
            processes: Mutex::default(),
            ooms: Mutex::default(),
        });
        let (stdio, expecting) = container.open_stdio(&parts.paths).await?;
        let tokens = expecting.for_agent(parts.paths.terminal);
        let created = agent
            .create_container(&container.id, spec_json, tokens)
            .await;
        if let Err(error) = created {
            stdio.close();
            return Err(error);
        }
        container.processes().insert(
            String::new(),
            Process {
                paths: parts.paths,
                json: Vec::new(),
                streams: Some((stdio, expecting)),
            },
        );
        Ok(container)
    }

    /// Follows the init from now on. To be called once Create has been announced.
    pub fn follow_init(self: &Arc<Self>, agent: &Agent) {
        tokio::spawn(Arc::clone(self).reap(agent.clone(), String::new()));
    }

    async fn open_stdio(&self, paths: &StdioPaths) -> Result<(Arc<Stdio>, Expecting), TaskError> {
        let stdio = Stdio::open(paths, &self.id, &self.namespace)
            .await
            .map_err(|e| TaskError::failed(e.to_string()))?;
        let stdio = Arc::new(stdio);
        let wanted: Vec<StreamKind> = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr]
            .into_iter()
            .filter(|&kind| stdio.wants(kind))
            .collect();
        let expecting = self
            .sandbox
            .streams()
            .expect(&stdio, &wanted)
            .map_err(|e| TaskError::failed(format!("cannot make stream tokens: {e}")))?;
        Ok((stdio, expecting))
    }

    fn life(&self) -> MutexGuard<'_, Lifecycle> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Process>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and announces what follows from it. The announcements are queued under the lock, so their order is the
    /// state's; waiters wake after that.
    fn change<T>(&self, change: impl FnOnce(&mut Lifecycle) -> T) -> T {
        let mut life = self.life();
        let result = change(&mut life);
        for announcement in life.take_announcements() {
            self.publish(&announcement);
            if let Announcement::Exited { exec_id, exit } = &announcement {
                life.wake(exec_id, *exit);
            }
        }
        result
    }

    fn publish(&self, announcement: &Announcement) {
        let (container_id, pid) = (self.id.clone(), self.sandbox.pid());
        match announcement {
            Announcement::ExecAdded { exec_id } => self.publisher.send(events::TaskExecAdded {
                container_id,
                exec_id: exec_id.clone(),
                ..Default::default()
            }),
            Announcement::Started { exec_id } if exec_id.is_empty() => {
                self.publisher.send(events::TaskStart {
                    container_id,
                    pid,
                    ..Default::default()
                })
            }
            Announcement::Started { exec_id } => self.publisher.send(events::TaskExecStarted {
                container_id,
                exec_id: exec_id.clone(),
                pid,
                ..Default::default()
            }),
            Announcement::Paused => self.publisher.send(events::TaskPaused {
                container_id,
                ..Default::default()
            }),
            Announcement::Resumed => self.publisher.send(events::TaskResumed {
                container_id,
                ..Default::default()
            }),
            Announcement::Exited { exec_id, exit } => {
                info!(
                    container = container_id,
                    exec = exec_id,
                    status = exit.status,
                    "process ended"
                );
                self.publisher.send(events::TaskExit {
                    id: if exec_id.is_empty() {
                        container_id.clone()
                    } else {
                        exec_id.clone()
                    },
                    container_id,
                    pid,
                    exit_status: exit.status,
                    exited_at: Some(exit.at.into()).into(),
                    ..Default::default()
                });
            }
        }
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Its pid on this host.
    pub fn pid(&self) -> u32 {
        self.sandbox.pid()
    }

    /// State.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn snapshot(&self, exec_id: &str) -> Result<Snapshot, TaskError> {
        let stage = self.life().stage(exec_id)?;
        let paths = self
            .processes()
            .get(exec_id)
            .map(|p| p.paths.clone())
            .unwrap_or_default();
        Ok(Snapshot { stage, paths })
    }

    /// Execs that run.
    pub fn running_execs(&self) -> Vec<String> {
        self.life().running_execs()
    }

    /// Tells when a process is over.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn watch(&self, exec_id: &str) -> Result<watch::Receiver<Option<Exit>>, TaskError> {
        self.life().watch(exec_id)
    }

    async fn agent(&self) -> Result<Agent, TaskError> {
        let agent = self.sandbox.phase().agent().await;
        agent.map_err(|reason| TaskError::failed(format!("the VM has ended: {reason}")))
    }

    /// Start, of the init or of an exec.
    ///
    /// # Errors
    /// The wrong state, or why the guest could not run it.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<(), TaskError> {
        self.change(|life| life.begin_start(exec_id))?;
        let started = match self.agent().await {
            Err(error) => Err(error),
            Ok(agent) if exec_id.is_empty() => agent.start_container(&self.id).await,
            Ok(agent) => self.start_exec(&agent, exec_id).await,
        };
        match &started {
            Ok(()) => self.change(|life| life.started(exec_id)),
            Err(error) => {
                let exit = Exit::now(start_failure_status(error.message()));
                self.change(|life| life.start_failed(exec_id, exit));
            }
        }
        started
    }

    async fn start_exec(self: &Arc<Self>, agent: &Agent, exec_id: &str) -> Result<(), TaskError> {
        let (paths, json) = match self.processes().get(exec_id) {
            Some(process) => (process.paths.clone(), process.json.clone()),
            None => return Err(TaskError::not_found(format!("exec {exec_id:?} not found"))),
        };
        let (stdio, expecting) = self.open_stdio(&paths).await?;
        let tokens = expecting.for_agent(paths.terminal);
        if let Err(error) = agent.exec(&self.id, exec_id, json, tokens).await {
            stdio.close();
            return Err(error);
        }
        if let Some(process) = self.processes().get_mut(exec_id) {
            process.streams = Some((stdio, expecting));
        }
        tokio::spawn(Arc::clone(self).reap(agent.clone(), exec_id.to_owned()));
        Ok(())
    }

    /// Waits for one process's end in the guest, and for its output on the host, and reports it.
    async fn reap(self: Arc<Self>, agent: Agent, exec_id: String) {
        let exit = match agent.wait(&self.id, &exec_id).await {
            Ok(response) => {
                if exec_id.is_empty() {
                    self.sandbox.timeline().mark(Point::Exited);
                }
                self.drain(&exec_id, response.stdout_bytes, response.stderr_bytes)
                    .await;
                if response.oom_killed {
                    self.announce_oom(1);
                }
                exit_of(&response)
            }
            Err(error) => {
                warn!(container = self.id, exec = exec_id, %error, "the guest does not report this process's end, it counts as killed");
                // All that the guest has sent is here already; its streams have ended with it.
                let rest = self.drain(&exec_id, u64::MAX, u64::MAX);
                if timeout(LAST_OUTPUT, rest).await.is_err() {
                    debug!(
                        container = self.id,
                        "the reader of the last output takes its time, not waited for"
                    );
                }
                Exit::killed()
            }
        };
        if matches!(self.sandbox.phase().now(), Phase::Gone { .. }) {
            self.change(|life| life.all_ended(exit));
            return;
        }
        self.change(|life| life.ended(&exec_id, exit));
        if exec_id.is_empty() {
            self.end_execs(&agent).await;
        }
    }

    /// With the init gone every exec must go; where the container has no pid namespace of its own the kernel does not see to it.
    async fn end_execs(&self, agent: &Agent) {
        if self.running_execs().is_empty() {
            return;
        }
        if let Err(error) = agent.signal(&self.id, "", SIGKILL, true).await {
            debug!(container = self.id, %error, "nothing left to kill after the init's end");
        }
        let Ok(mut over) = self.watch("") else { return };
        if timeout(EXEC_GRACE, over.wait_for(Option::is_some))
            .await
            .is_err()
        {
            let left = self.running_execs();
            warn!(
                container = self.id,
                ?left,
                "execs whose end the guest does not report, given up"
            );
            self.change(|life| left.iter().for_each(|id| life.ended(id, Exit::killed())));
        }
    }

    fn stdio(&self, exec_id: &str) -> Option<Arc<Stdio>> {
        let processes = self.processes();
        let (stdio, _) = processes.get(exec_id)?.streams.as_ref()?;
        Some(Arc::clone(stdio))
    }

    async fn drain(&self, exec_id: &str, stdout_bytes: u64, stderr_bytes: u64) {
        let stdio = self.stdio(exec_id);
        if let Some(stdio) = stdio {
            stdio.drained(stdout_bytes, stderr_bytes).await;
        }
    }

    /// Announces that the kernel has killed for memory, unless that many kills have been announced already.
    pub fn announce_oom(&self, kills: u64) {
        let mut announced = self.ooms.lock().unwrap_or_else(PoisonError::into_inner);
        if kills > *announced {
            *announced = kills;
            self.publisher.send(events::TaskOOM {
                container_id: self.id.clone(),
                ..Default::default()
            });
        }
    }

    /// Kill.
    ///
    /// # Errors
    /// NotFound when it is over, or the agent's reason.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let stage = self.life().stage(exec_id)?;
        match stage {
            Stage::Ending(_) | Stage::Exited(_) => {
                return Err(TaskError::not_found("process already finished: not found"));
            }
            Stage::Created if !exec_id.is_empty() => {
                return Err(TaskError::failed_precondition(
                    "cannot signal an exec that was not started",
                ));
            }
            Stage::Created | Stage::Starting { .. } | Stage::Running | Stage::Paused => {}
        }
        let agent = match self.sandbox.phase().now() {
            Phase::Running(agent) => agent,
            // Its exit is on its way.
            Phase::Starting | Phase::Stopping | Phase::Gone { .. } => {
                return Err(TaskError::not_found(
                    "process already finished: the VM has ended",
                ));
            }
        };
        match agent.signal(&self.id, exec_id, signal, all).await {
            Err(error)
                if error.code() == ttrpc::Code::DEADLINE_EXCEEDED
                    && signal == SIGKILL
                    && exec_id.is_empty() =>
            {
                warn!(
                    container = self.id,
                    "the guest does not answer a SIGKILL, its VM is ended"
                );
                self.sandbox
                    .kill("the guest did not answer a SIGKILL")
                    .await;
                Ok(())
            }
            Err(_) if matches!(self.sandbox.phase().now(), Phase::Gone { .. }) => Err(
                TaskError::not_found("process already finished: the VM has ended"),
            ),
            answer => answer,
        }
    }

    /// Exec: adds a process, started by [`Self::start`].
    ///
    /// # Errors
    /// AlreadyExists, FailedPrecondition, or InvalidArgument for a process that is no JSON.
    pub fn add_exec(
        &self,
        exec_id: &str,
        process_json: &[u8],
        paths: StdioPaths,
    ) -> Result<(), TaskError> {
        let invalid = |e: serde_json::Error| {
            TaskError::invalid_argument(format!("exec {exec_id:?}: invalid process: {e}"))
        };
        let mut process = spec::exec_process(process_json).map_err(invalid)?;
        if let Some(process) = process.as_object_mut() {
            process.insert("terminal".into(), paths.terminal.into());
        }
        let json = serde_json::to_vec(&process).map_err(invalid)?;
        // Both under one lock: a start that follows at once finds the process.
        let mut processes = self.processes();
        self.change(|life| life.add_exec(exec_id))?;
        processes.insert(
            exec_id.to_owned(),
            Process {
                paths,
                json,
                streams: None,
            },
        );
        Ok(())
    }

    /// Delete of an exec.
    ///
    /// # Errors
    /// NotFound, or FailedPrecondition while it runs.
    pub fn delete_exec(&self, exec_id: &str) -> Result<Exit, TaskError> {
        let exit = self.change(|life| life.remove_exec(exec_id))?;
        let process = self.processes().remove(exec_id);
        if let Some((stdio, _)) = process.and_then(|p| p.streams) {
            stdio.close();
        }
        Ok(exit)
    }

    /// Delete of the container, as far as the guest and the host's files go.
    ///
    /// # Errors
    /// FailedPrecondition while it runs.
    pub async fn delete(&self) -> Result<Exit, TaskError> {
        let agent = match self.sandbox.phase().now() {
            Phase::Running(agent) => Some(agent),
            Phase::Starting | Phase::Stopping | Phase::Gone { .. } => None,
        };
        let stage = self.life().stage("")?;
        let exit = match stage {
            Stage::Exited(exit) => exit,
            Stage::Created => self.kill_created(agent.as_ref()).await?,
            Stage::Starting { .. } | Stage::Running | Stage::Paused | Stage::Ending(_) => {
                return Err(TaskError::failed_precondition(
                    "cannot delete a running container",
                ));
            }
        };
        if let Some(agent) = agent
            && let Err(error) = agent.delete_container(&self.id).await
        {
            warn!(container = self.id, %error, "the guest did not delete the container");
        }
        let (share, id) = (self.sandbox.share().clone(), self.id.clone());
        if let Err(error) = tokio::task::spawn_blocking(move || share.remove(&id)).await {
            warn!(container = self.id, %error, "the container's files were not cleared away");
        }
        for process in self.processes().values() {
            if let Some((stdio, _)) = &process.streams {
                stdio.close();
            }
        }
        Ok(exit)
    }

    /// A container that was never started: its waiting init is killed, so that everyone sees it end.
    async fn kill_created(&self, agent: Option<&Agent>) -> Result<Exit, TaskError> {
        let mut over = self.watch("")?;
        if let Some(agent) = agent
            && let Err(error) = agent.signal(&self.id, "", SIGKILL, true).await
        {
            debug!(container = self.id, %error, "the created container took no SIGKILL");
        }
        if timeout(KILL_GRACE, over.wait_for(Option::is_some))
            .await
            .is_err()
        {
            self.change(|life| life.ended("", Exit::killed()));
        }
        match self.life().stage("")? {
            Stage::Exited(exit) => Ok(exit),
            _ => Err(TaskError::failed_precondition(
                "cannot delete a running container",
            )),
        }
    }

    /// Announces that the container has been deleted.
    pub fn announce_delete(&self, exit: Exit) {
        self.publisher.send(events::TaskDelete {
            container_id: self.id.clone(),
            id: self.id.clone(),
            pid: self.sandbox.pid(),
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        });
    }

    /// Pause and Resume.
    ///
    /// # Errors
    /// FailedPrecondition in the wrong state, or the agent's reason.
    pub async fn freeze(&self, frozen: bool) -> Result<(), TaskError> {
        let check = if frozen {
            Lifecycle::check_pause
        } else {
            Lifecycle::check_resume
        };
        check(&self.life())?;
        self.agent().await?.freeze(&self.id, frozen).await?;
        self.change(if frozen {
            Lifecycle::paused
        } else {
            Lifecycle::resumed
        });
        Ok(())
    }

    /// Update.
    ///
    /// # Errors
    /// InvalidArgument for resources that are no JSON, or the agent's reason.
    pub async fn update(&self, resources_json: &[u8]) -> Result<(), TaskError> {
        let invalid =
            |e: serde_json::Error| TaskError::invalid_argument(format!("invalid resources: {e}"));
        let resources =
            spec::update_resources(resources_json, self.sandbox.vcpus()).map_err(invalid)?;
        let json = serde_json::to_vec(&resources).map_err(invalid)?;
        self.check_alive()?;
        self.agent().await?.update_container(&self.id, json).await
    }

    /// Stats.
    ///
    /// # Errors
    /// FailedPrecondition when it is over, or the agent's reason.
    pub async fn stats(&self) -> Result<ContainerStatsResponse, TaskError> {
        self.check_alive()?;
        self.agent().await?.stats(&self.id).await
    }

    /// ResizePty.
    ///
    /// # Errors
    /// The agent's reason.
    pub async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), TaskError> {
        let stage = self.life().stage(exec_id)?;
        match stage {
            Stage::Ending(_) | Stage::Exited(_) => {
                return Err(TaskError::not_found("process already finished: not found"));
            }
            Stage::Created if !exec_id.is_empty() => {
                return Err(TaskError::failed_precondition(
                    "cannot resize: the exec was not started",
                ));
            }
            _ => {}
        }
        self.agent()
            .await?
            .resize(&self.id, exec_id, width, height)
            .await
    }

    /// CloseIO of stdin.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn close_stdin(&self, exec_id: &str) -> Result<(), TaskError> {
        self.life().stage(exec_id)?;
        let stdio = self.stdio(exec_id);
        if let Some(stdio) = stdio {
            stdio.close_stdin();
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<(), TaskError> {
        match self.life().stage("")? {
            Stage::Ending(_) | Stage::Exited(_) => {
                Err(TaskError::failed_precondition("container not running"))
            }
            _ => Ok(()),
        }
    }
}

fn exit_of(response: &WaitProcessResponse) -> Exit {
    let at = match response.exited_at_ns {
        0 => SystemTime::now(),
        ns => SystemTime::UNIX_EPOCH + Duration::from_nanos(ns),
    };
    Exit {
        status: response.exit_status.min(255),
        at,
    }
}

/// The status that shells and engines give a process that could not be run.
fn start_failure_status(message: &str) -> u32 {
    let message = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|w| message.contains(w));
    if says(&["executable file not found", "no such file or directory"]) {
        127
    } else if says(&["permission denied", "exec format error", "is a directory"]) {
        126
    } else {
        128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_start_has_the_shells_status() {
        assert_eq!(
            start_failure_status("exec: \"x\": executable file not found in $PATH"),
            127
        );
        assert_eq!(start_failure_status("exec /x: Permission denied"), 126);
        assert_eq!(start_failure_status("the VM has ended"), 128);
    }

    #[test]
    fn an_exit_time_of_the_guest_is_kept() {
        let response = WaitProcessResponse {
            exit_status: 3,
            exited_at_ns: 1_000_000_000,
            ..Default::default()
        };
        let exit = exit_of(&response);
        assert_eq!(exit.at, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        assert_eq!(exit.status, 3);
    }
}
