//! A container's task, asked of its shim.

use std::{fmt, future::Future, time::Duration};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::{self, KillRequest, StateRequest, WaitRequest},
    shim_async::TaskClient,
};
use husk_client::shim::{self, forever, said, soon};
use serde::Serialize;
use tokio::time::timeout;

use crate::store::{Container, Record};

/// SIGKILL.
pub(crate) const KILL: u32 = 9;

/// How long the end of what was killed may take: longer than the shim lets a guest be silent.
const END: Duration = Duration::from_secs(15);

/// A container's status (OCI runtime specification, "State").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Its process waits for `start`.
    Created,
    /// It goes on.
    Running,
    /// It is held.
    Paused,
    /// It has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Runs what asks the shim, on this thread: `create` makes no others ([`crate::proxy::spawn`]).
pub(crate) fn run<T>(asking: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    runtime.block_on(asking)
}

/// A container and its shim.
pub(crate) struct Task<'a> {
    container: &'a Container,
    /// The shim.
    pub(crate) client: TaskClient,
}

impl<'a> Task<'a> {
    /// Of a container that has a shim; `None`: the shim has gone, and the container's process with it.
    pub(crate) async fn find(container: &'a Container, record: &Record) -> Option<Self> {
        let client = shim::connect(&record.address).await.ok()?;
        Some(Self { container, client })
    }

    fn state_request(&self) -> StateRequest {
        StateRequest {
            id: self.container.id.to_string(),
            ..StateRequest::default()
        }
    }

    /// The pid that the shim knows the container by.
    pub(crate) async fn pid(&self) -> Result<u32> {
        let answer = self.client.state(soon(), &self.state_request()).await;
        Ok(said(answer)?.pid)
    }

    /// The shim's word for how the container is.
    pub(crate) async fn status(&self) -> Result<Status> {
        let answer = match self.client.state(soon(), &self.state_request()).await {
            Ok(answer) => answer,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {
                return Ok(Status::Stopped);
            }
            Err(error) => return said(Err(error)),
        };
        match answer.status.enum_value() {
            Ok(api::Status::CREATED) => Ok(Status::Created),
            Ok(api::Status::RUNNING | api::Status::PAUSING) => Ok(Status::Running),
            Ok(api::Status::PAUSED) => Ok(Status::Paused),
            Ok(api::Status::STOPPED) => Ok(Status::Stopped),
            other => bail!("the shim knows a status of its own: {other:?}"),
        }
    }

    /// Sends a signal.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let request = KillRequest {
            id: self.container.id.to_string(),
            signal,
            all,
            ..KillRequest::default()
        };
        said(self.client.kill(soon(), &request).await).map(drop)
    }

    /// Kills it and waits for its end, paused or not.
    pub(crate) async fn end(&self, status: Status) -> Result<()> {
        let id = self.container.id.to_string();
        self.kill(KILL, true).await?;
        if status == Status::Paused {
            let resume = api::ResumeRequest {
                id: id.clone(),
                ..api::ResumeRequest::default()
            };
            // It may have ended without.
            let _ = self.client.resume(soon(), &resume).await;
        }
        let wait = WaitRequest {
            id,
            ..WaitRequest::default()
        };
        match timeout(END, self.client.wait(forever(), &wait)).await {
            // Its answer or none: it is over.
            Ok(_) => Ok(()),
            Err(_) => bail!("the container has not ended within {} s", END.as_secs()),
        }
    }
}

/// How a container is. One whose proxy was killed is stopped, and if it is not yet, it is killed: nobody else will.
pub(crate) async fn status(container: &Container, record: &Record) -> Result<Status> {
    let Some(task) = Task::find(container, record).await else {
        return Ok(Status::Stopped);
    };
    let status = task.status().await?;
    if status != Status::Stopped && !record.proxy.is_alive() {
        task.end(status).await?;
        return Ok(Status::Stopped);
    }
    Ok(status)
}
