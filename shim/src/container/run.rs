//! A process from its start to its end, as the guest reports them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use husk_protocol::agent::WaitProcessResponse;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Container, SIGKILL};
use crate::{agent::Agent, error::TaskError, lifecycle::Exit, phase::Phase, timing::Point};

/// How long execs may outlive their init before they are given up.
const EXEC_GRACE: Duration = Duration::from_secs(10);

/// How long output that the shim already holds may take to reach its reader after the VM has gone.
const LAST_OUTPUT: Duration = Duration::from_secs(3);

/// The status of a process that could not be run, for no reason of its own.
const NOT_STARTED: u32 = 128;

impl Container {
    /// Start, of the init or of an exec.
    ///
    /// # Errors
    /// The wrong state, or why the guest could not run it.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<(), TaskError> {
        self.change(|life| life.begin_start(exec_id))?;
        let started = match self.agent().await {
            Err(error) => Err(error),
            Ok(agent) if exec_id.is_empty() => self.start_init(&agent).await,
            Ok(agent) => self.start_exec(&agent, exec_id).await,
        };
        match &started {
            Ok(()) => self.change(|life| life.started(exec_id)),
            Err(error) => {
                let exit = self.exit_of_failed_start(error);
                self.change(|life| life.start_failed(exec_id, exit));
            }
        }
        started
    }

    async fn start_init(&self, agent: &Agent) -> Result<(), TaskError> {
        // Docker from 27 on sets the network up between Create and Start.
        self.sandbox.refresh_network().await?;
        agent.start_container(&self.id).await?;
        self.hooks.started(self.subject()).await;
        Ok(())
    }

    fn exit_of_failed_start(&self, error: &TaskError) -> Exit {
        if error.is_of_guest() {
            return Exit::now(start_failure_status(error.message()));
        }
        match self.sandbox.phase().now() {
            Phase::Stopping | Phase::Gone { .. } => Exit::killed(),
            Phase::Idle | Phase::Starting | Phase::Running(_) => Exit::now(NOT_STARTED),
        }
    }

    async fn start_exec(self: &Arc<Self>, agent: &Agent, exec_id: &str) -> Result<(), TaskError> {
        let (paths, json) = match self.processes().get(exec_id) {
            Some(process) => (process.paths.clone(), process.json.clone()),
            None => return Err(TaskError::not_found(format!("exec {exec_id:?} not found"))),
        };
        let (stdio, expecting) = self.open_stdio(&paths).await?;
        let tokens = expecting.for_agent(paths.terminal);
        // Before the agent is asked: a CloseIO may come while it works, or have come already.
        if let Some(process) = self.processes().get_mut(exec_id) {
            if process.stdin_closed {
                stdio.close_stdin();
            }
            process.streams = Some((stdio, expecting));
        }
        if let Err(error) = agent.exec(&self.id, exec_id, json, tokens).await {
            let streams = self
                .processes()
                .get_mut(exec_id)
                .and_then(|process| process.streams.take());
            if let Some((stdio, _)) = streams {
                stdio.close();
            }
            return Err(error);
        }
        tokio::spawn(Arc::clone(self).reap(agent.clone(), exec_id.to_owned()));
        Ok(())
    }

    /// Waits for one process's end in the guest, and for its output on the host, and reports it.
    pub(super) async fn reap(self: Arc<Self>, agent: Agent, exec_id: String) {
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
        // Also when the VM has gone: every other process has a reaper that waits for its last output, or a start that fails.
        self.change(|life| life.ended(&exec_id, exit));
        if exec_id.is_empty() {
            self.sandbox.growth().forget(&self.id);
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

    async fn drain(&self, exec_id: &str, stdout_bytes: u64, stderr_bytes: u64) {
        let stdio = self.stdio(exec_id);
        if let Some(stdio) = stdio {
            stdio.drained(stdout_bytes, stderr_bytes).await;
        }
    }
}

fn exit_of(response: &WaitProcessResponse) -> Exit {
    let now = SystemTime::now();
    let at = match response.exited_at_ns {
        0 => now,
        // What has ended has not ended later than now, whatever the guest's clock says.
        ns => (SystemTime::UNIX_EPOCH + Duration::from_nanos(ns)).min(now),
    };
    Exit {
        status: response.exit_status.min(255),
        at,
    }
}

/// The status that shells and engines give a process that could not be run, by the agent's words.
fn start_failure_status(message: &str) -> u32 {
    let message = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|w| message.contains(w));
    if says(&["executable file not found", "no such file or directory"]) {
        127
    } else if says(&["permission denied", "exec format error", "is a directory"]) {
        126
    } else {
        NOT_STARTED
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
        assert_eq!(start_failure_status("out of memory"), NOT_STARTED);
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
        let absurd = WaitProcessResponse {
            exit_status: u32::MAX,
            exited_at_ns: u64::MAX,
            ..Default::default()
        };
        let exit = exit_of(&absurd);
        assert!(exit.at <= SystemTime::now());
        assert_eq!(exit.status, 255);
    }
}
