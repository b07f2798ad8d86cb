//! What a call can fail with, and the ttrpc status each failure becomes.
//!
//! The messages reach the person who ran the container, so they use the words that runc's users know.

use std::io;

use husk_protocol::stream::BadToken;

use crate::container::LaunchError;
use crate::process::WrongState;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No container goes by this id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No process of the container goes by this id.
    #[error("container {container:?} has no process {exec:?}")]
    NoProcess {
        /// The container.
        container: String,
        /// The exec id.
        exec: String,
    },
    /// There is nothing left to signal.
    #[error("process already finished")]
    Finished,
    /// The id is in use.
    #[error("{0} {1:?} already exists")]
    Exists(&'static str, String),
    /// The call does not fit what the container is doing.
    #[error(transparent)]
    State(#[from] WrongState),
    /// The container is still being made.
    #[error("container {0:?} is still being created")]
    Creating(String),
    /// The guest was set up before.
    #[error("the sandbox is set up already")]
    SandboxExists,
    /// The guest has not been set up.
    #[error("the sandbox is not set up yet: CreateSandbox comes first")]
    NoSandbox,
    /// The request cannot be used; the text says which part and why.
    #[error("{0}")]
    Invalid(String),
    /// A stream token of the wrong length.
    #[error(transparent)]
    Token(#[from] BadToken),
    /// The container's set-up failed.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A newer `NextEvent` took over.
    #[error("another NextEvent call has taken over")]
    Superseded,
    /// Something the guest does for itself failed.
    #[error("{doing}: {source}")]
    Guest {
        /// What was being done, to what.
        doing: String,
        /// How it failed.
        source: io::Error,
    },
}

impl AgentError {
    /// Wraps a failure of the guest's own with what was being done.
    pub fn guest(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Guest {
            doing: doing.into(),
            source: source.into(),
        }
    }

    /// The status code of the contract in `agent.proto`.
    pub fn code(&self) -> ttrpc::Code {
        use ttrpc::Code;
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists(..) | Self::SandboxExists => Code::ALREADY_EXISTS,
            Self::State(_) | Self::Creating(_) | Self::NoSandbox => Code::FAILED_PRECONDITION,
            Self::Invalid(_) | Self::Token(_) => Code::INVALID_ARGUMENT,
            Self::Superseded => Code::ABORTED,
            Self::Guest { .. } => Code::INTERNAL,
            Self::Launch(e) => launch_code(e),
        }
    }
}

/// What the spec asks for and cannot have is the caller's to mend. `NOT_FOUND` stays for containers
/// and processes: a missing executable is a spec that cannot be used.
fn launch_code(error: &LaunchError) -> ttrpc::Code {
    match error {
        LaunchError::InvalidSpec(_)
        | LaunchError::NotFound(_)
        | LaunchError::PermissionDenied(_) => ttrpc::Code::INVALID_ARGUMENT,
        LaunchError::NotRunning(_) => ttrpc::Code::FAILED_PRECONDITION,
        LaunchError::Internal(_) => ttrpc::Code::INTERNAL,
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}
