//! What the Task API asks of a container besides Create and Start.

use std::{sync::Arc, time::Duration};

use husk_protocol::agent::{ContainerStatsResponse, DescribeProcessesResponse};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Container, Process, SIGKILL};
use crate::{
    agent::Agent,
    error::TaskError,
    lifecycle::{Exit, Lifecycle, Stage},
    phase::Phase,
    spec::{self, Resources},
    stdio::StdioPaths,
};

/// How long a created container that is deleted may take to die.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// How long the end of a container that was killed may take. Long: it may wait for a disk of the host's, and the rest of its pod with it.
const UNREPORTED: Duration = Duration::from_secs(300);

impl Container {
    /// Kill.
    ///
    /// # Errors
    /// NotFound when it is over, or the agent's reason.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        self.check_reachable(exec_id, "signal")?;
        let agent = match self.sandbox.phase().now() {
            Phase::Running(agent) => agent,
            // Its exit is on its way.
            Phase::Idle | Phase::Starting | Phase::Stopping | Phase::Gone { .. } => {
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
            Ok(()) if signal == SIGKILL && exec_id.is_empty() => {
                self.expect_end();
                Ok(())
            }
            answer => answer,
        }
    }

    /// A container that was killed ends, or its VM does: an agent that says yes and reports no end would keep its pod from going for good.
    fn expect_end(&self) {
        let Ok(mut over) = self.watch("") else { return };
        let (sandbox, id) = (Arc::clone(&self.sandbox), self.id.clone());
        tokio::spawn(async move {
            let phase = sandbox.phase();
            let ended = async {
                tokio::select! {
                    _ = over.wait_for(Option::is_some) => {}
                    _ = phase.gone() => {}
                }
            };
            if timeout(UNREPORTED, ended).await.is_err() {
                warn!(
                    container = id,
                    "the guest does not report the end of what was killed, its VM is ended"
                );
                sandbox
                    .kill("the guest did not report the end of a container that was killed")
                    .await;
            }
        });
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
                stdin_closed: false,
            },
        );
        Ok(())
    }

    /// Delete of an exec.
    ///
    /// # Errors
    /// NotFound, or FailedPrecondition while it runs.
    pub fn delete_exec(&self, exec_id: &str) -> Result<Exit, TaskError> {
        let (exit, process) = {
            // Both under one lock: an exec of the same name that follows at once keeps its process.
            let mut processes = self.processes();
            let exit = self.change(|life| life.remove_exec(exec_id))?;
            (exit, processes.remove(exec_id))
        };
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
            Phase::Idle | Phase::Starting | Phase::Stopping | Phase::Gone { .. } => None,
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
        self.hooks.stopped(self.subject()).await;
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

    /// Update. The VM grows first, where it has to and may: a limit beyond what it has is taken as runc takes one beyond the machine.
    ///
    /// # Errors
    /// InvalidArgument for resources that are no JSON, or the agent's reason.
    pub async fn update(&self, resources_json: &[u8]) -> Result<(), TaskError> {
        let invalid =
            |e: serde_json::Error| TaskError::invalid_argument(format!("invalid resources: {e}"));
        let limits = Resources::of_update(resources_json).map_err(invalid)?;
        self.check_alive()?;
        let agent = self.agent().await?;
        let growth = self.sandbox.growth();
        let before = growth.change(&self.id, |hints| limits.applied_to(hints));
        if let Err(error) = self.sandbox.fit().await {
            warn!(
                container = self.id,
                "{error}: the new limits hold all the same"
            );
        }
        // With the vCPUs that there are now.
        let resources =
            spec::update_resources(resources_json, self.sandbox.vcpus()).map_err(invalid)?;
        let json = serde_json::to_vec(&resources).map_err(invalid)?;
        let updated = agent.update_container(&self.id, json).await;
        if let (Err(_), Some(before)) = (&updated, before) {
            growth.set(&self.id, before);
        }
        updated
    }

    /// Stats.
    ///
    /// # Errors
    /// FailedPrecondition when it is over, or the agent's reason.
    pub async fn stats(&self) -> Result<ContainerStatsResponse, TaskError> {
        self.check_alive()?;
        self.agent().await?.stats(&self.id).await
    }

    /// How many processes the guest says that there are; `None` where it does not.
    pub async fn count_processes(&self) -> Option<usize> {
        // Without waiting for a guest that is not there yet.
        match self.sandbox.phase().now() {
            Phase::Running(agent) => agent.count_processes(&self.id).await.ok(),
            _ => None,
        }
    }

    /// What the guest tells of the processes that the container sees.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub async fn describe_processes(&self) -> Result<DescribeProcessesResponse, TaskError> {
        self.check_alive()?;
        self.agent().await?.describe_processes(&self.id).await
    }

    /// ResizePty.
    ///
    /// # Errors
    /// The agent's reason.
    pub async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), TaskError> {
        self.check_reachable(exec_id, "resize the terminal of")?;
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
        if let Some(process) = self.processes().get_mut(exec_id) {
            process.stdin_closed = true;
            if let Some((stdio, _)) = &process.streams {
                stdio.close_stdin();
            }
        }
        Ok(())
    }

    /// Whether the guest has this process: an init that was created, an exec that was started, and neither over.
    fn check_reachable(&self, exec_id: &str, doing: &str) -> Result<(), TaskError> {
        match self.life().stage(exec_id)? {
            Stage::Ending(_) | Stage::Exited(_) => {
                Err(TaskError::not_found("process already finished: not found"))
            }
            Stage::Created if !exec_id.is_empty() => Err(TaskError::failed_precondition(format!(
                "cannot {doing} an exec that was not started"
            ))),
            Stage::Created | Stage::Starting { .. } | Stage::Running | Stage::Paused => Ok(()),
        }
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
