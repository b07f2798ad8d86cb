//! What the service asks of the container set-up.
//!
//! The guest's own answer is [`Guest`], which passes everything to [`crate::container`]. The service is generic over it, so that
//! its tests run plain processes where no container can be made.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::container::{Container, Io, LaunchError, StartGate};
use crate::huge_pages;

/// Makes containers.
pub trait Runtime: Send + Sync + 'static {
    /// What it makes.
    type Container: Handle;

    /// Sets a container up to where its process waits for its gate. `joined` is the one whose namespaces it may join.
    fn create(
        &self,
        id: &str,
        spec_json: &[u8],
        io: Io,
        joined: Option<&Self::Container>,
    ) -> impl Future<Output = Result<(Self::Container, Launched<Self::Container>), LaunchError>> + Send;
}

/// A container that exists.
pub trait Handle: Send + Sync + Sized + 'static {
    /// What a process waits at before its execve.
    type Gate: Gate;

    /// Makes a further process in the container, waiting for its gate.
    fn exec(
        &self,
        process_json: &[u8],
        io: Io,
    ) -> impl Future<Output = Result<Launched<Self>, LaunchError>> + Send;

    /// Applies new resource limits.
    fn update(&self, resources_json: &[u8])
    -> impl Future<Output = Result<(), LaunchError>> + Send;

    /// Freezes every process; done when all are.
    fn freeze(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Lets them run on.
    fn thaw(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Kills every process, frozen ones too.
    ///
    /// # Errors
    /// Where the kernel does not take the order.
    fn kill(&self) -> io::Result<()>;

    /// Pids of every process, in the agent's pid namespace.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn procs(&self) -> io::Result<Vec<i32>>;

    /// The directory of the container's cgroup.
    fn cgroup_dir(&self) -> &Path;

    /// Undoes the set-up, once no process is left.
    fn delete(&self) -> impl Future<Output = Result<(), LaunchError>> + Send;
}

/// Where a process waits before its execve. Dropped unopened, it ends the process.
pub trait Gate: Send + 'static {
    /// Lets the process go on; returns when its execve has succeeded, or with its error.
    fn release(self) -> impl Future<Output = Result<(), LaunchError>> + Send;
}

/// A process that waits for its gate.
#[derive(Debug)]
pub struct Launched<H: Handle> {
    /// Pid in the agent's pid namespace; a child of the agent.
    pub pid: i32,
    /// Master of its terminal, where it asked for one.
    pub console: Option<OwnedFd>,
    /// What it waits for.
    pub gate: H::Gate,
}

/// Containers of this guest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Guest;

impl From<crate::container::Launched> for Launched<Container> {
    fn from(launched: crate::container::Launched) -> Self {
        Self {
            pid: launched.pid,
            console: launched.console,
            gate: launched.gate,
        }
    }
}

impl Runtime for Guest {
    type Container = Container;

    async fn create(
        &self,
        id: &str,
        spec_json: &[u8],
        io: Io,
        joined: Option<&Container>,
    ) -> Result<(Container, Launched<Container>), LaunchError> {
        let (container, launched) = Container::create(id, spec_json, io, joined).await?;
        huge_pages::give_to(container.cgroup().path());
        Ok((container, launched.into()))
    }
}

impl Handle for Container {
    type Gate = StartGate;

    async fn exec(&self, process_json: &[u8], io: Io) -> Result<Launched<Self>, LaunchError> {
        Ok(Container::exec(self, process_json, io).await?.into())
    }

    async fn update(&self, resources_json: &[u8]) -> Result<(), LaunchError> {
        Container::update(self, resources_json).await
    }

    async fn freeze(&self) -> io::Result<()> {
        self.cgroup().freeze().await
    }

    async fn thaw(&self) -> io::Result<()> {
        self.cgroup().thaw().await
    }

    fn kill(&self) -> io::Result<()> {
        self.cgroup().kill()
    }

    fn procs(&self) -> io::Result<Vec<i32>> {
        self.cgroup().procs()
    }

    fn cgroup_dir(&self) -> &Path {
        self.cgroup().path()
    }

    async fn delete(&self) -> Result<(), LaunchError> {
        Container::delete(self).await
    }
}

impl Gate for StartGate {
    async fn release(self) -> Result<(), LaunchError> {
        StartGate::release(self).await
    }
}
