//! What the agent asks of a `container-init` process, and what the two say to each other.

use std::path::PathBuf;

use oci_spec::runtime::{Hook, LinuxPersonality, LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};

use super::error::LaunchError;

/// The work of one `container-init` process. The descriptors beside it: for `Exec` a pidfd of the container's
/// init, for `Create` one of the init of the container that it joins, if any; then, without a terminal, stdin, stdout and stderr.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Set up a container and become its init.
    Create(Box<CreateJob>),
    /// Join a container and become a further process of it.
    Exec(Box<ExecJob>),
    /// Run hooks in the runtime's namespaces.
    Hooks(HooksJob),
    /// Make the namespaces of a pod that has users of its own, with this `uid_map` and `gid_map`.
    Users(String, String),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreateJob {
    pub(crate) id: String,
    pub(crate) spec: Spec,
    pub(crate) user_name: Option<String>,
    pub(crate) cgroup: PathBuf,
    /// A container to join comes with the job.
    pub(crate) joins: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecJob {
    pub(crate) process: Process,
    pub(crate) user_name: Option<String>,
    pub(crate) cgroup: PathBuf,
    /// Pid of the container's init: where its cgroup is looked up when `cgroup` cannot take processes.
    pub(crate) init: i32,
    /// CLONE_NEW* bits of the namespaces to join.
    pub(crate) namespaces: i32,
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) personality: Option<LinuxPersonality>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HooksJob {
    /// The kind of hook, for messages.
    pub(crate) kind: String,
    pub(crate) hooks: Vec<Hook>,
    /// The container's state, JSON, for each hook's stdin.
    pub(crate) state: String,
    /// Run all of them even when one fails (poststop).
    pub(crate) keep_going: bool,
}

/// The first message to a `container-init` process, with the job's memfd as its first descriptor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JobFollows;

/// What `container-init` tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromInit {
    /// The pid of the process that will run the user's program, as the agent sees it.
    Pid(i32),
    /// The container's namespaces and mounts exist: run the createRuntime hooks and answer `Continue`.
    RunHooks,
    /// The terminal's master is attached.
    Console,
    /// Everything is set up; waits for `Start`.
    Ready,
    /// execve comes next: the end of file means that it succeeded.
    Executing,
    /// The job is done, and there is no process to wait for.
    Done,
    /// It failed and the process ends.
    Failed(LaunchError),
}

/// What the agent tells `container-init`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToInit {
    /// The hooks ran.
    Continue,
    /// Run the user's program.
    Start,
}
