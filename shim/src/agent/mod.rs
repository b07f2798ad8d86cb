//! The agent in the guest, as the rest of the shim calls it.
//!
//! The guest may be dead, wedged or hostile, so every call has a bound and ends with the VM: an answer always comes, if only
//! the reason why there is none. Errors of the agent pass through with their code and words, cut and cleaned; frames that are no answers
//! end the connection, and the VM with it ([`frames`]).

mod frames;

use std::{future::Future, time::Duration};

use husk_protocol::{
    agent::{
        AdjustClockRequest, AgentClient, ContainerRequest, ContainerStatsResponse,
        CreateContainerRequest, CreateSandboxRequest, CreateSandboxResponse,
        DescribeProcessesResponse, Empty, Event, ExecProcessRequest, ForwardPortRequest, Network,
        ProcessRequest, ResizeRequest, ResizeTerminalRequest, ServeNamesRequest,
        SignalProcessRequest, Stdio, SyncVolumeRequest, UpdateContainerRequest,
        WaitProcessResponse,
    },
    processes::MAX_PROCESSES,
};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{r#async::Client, asynchronous::transport::Socket, context::Context};

use self::frames::Answers;
use crate::{error::TaskError, phase::PhaseWatch};

/// Bound of a call that sets something up: it reads the container's files and may run on a starved CPU.
const SET_UP: Duration = Duration::from_secs(60);

/// Bound of everything else that the agent does on the spot.
const ON_THE_SPOT: Duration = Duration::from_secs(10);

/// Bound of a dial in the guest: beyond the agent's own, which tries two addresses for 5 s each.
const DIAL: Duration = Duration::from_secs(15);

/// Bound of a signal: short, because Kill is what people reach for when a guest does not answer.
const SIGNAL: Duration = Duration::from_secs(5);

/// Bound of a count: shorter than the 5 s within which a containerd that starts again wants to know that a task has processes.
const COUNT: Duration = Duration::from_secs(2);

/// How long the news of the VM's end may take to arrive after its connection broke.
const NEWS: Duration = Duration::from_secs(2);

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    pod: PhaseWatch,
}

impl Agent {
    /// Speaks over the connection that the agent has dialled. Must be called within a tokio runtime.
    pub fn new(stream: UnixStream, pod: PhaseWatch) -> Self {
        Self {
            client: AgentClient::new(Client::new(Socket::new(Answers::new(stream)))),
            pod,
        }
    }

    /// Runs one call to its end, its bound, or the VM's end.
    async fn call<T>(
        &self,
        doing: &str,
        limit: Option<Duration>,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, TaskError> {
        let bounded = async {
            match limit {
                Some(limit) => timeout(limit, call).await.map_err(|_| {
                    TaskError::timed_out(format!(
                        "{doing}: the guest did not answer within {limit:?}"
                    ))
                }),
                None => Ok(call.await),
            }
        };
        let result = tokio::select! {
            biased;
            result = bounded => result?,
            reason = self.pod.gone() => return Err(vm_gone(doing, &reason)),
        };
        match result {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(TaskError::of_guest(status.code(), &status.message))
            }
            Err(broken) => match timeout(NEWS, self.pod.gone()).await {
                Ok(reason) => Err(vm_gone(doing, &reason)),
                Err(_) => Err(TaskError::failed(format!(
                    "{doing}: the connection to the guest's agent is broken: {broken}"
                ))),
            },
        }
    }

    /// Sets the guest up.
    ///
    /// # Errors
    /// The agent's own, or why it gave no answer (so for every call below).
    pub async fn create_sandbox(
        &self,
        request: &CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse, TaskError> {
        let call = self.client.create_sandbox(Context::default(), request);
        self.call("set the guest up", Some(SET_UP), call).await
    }

    /// Ends everything in the guest and powers it off.
    ///
    /// # Errors
    /// Also when the VM was quicker than the answer.
    pub async fn destroy_sandbox(&self) -> Result<(), TaskError> {
        let request = Empty::new();
        let call = self.client.destroy_sandbox(Context::default(), &request);
        self.call("power the guest off", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// Configures a network that has come after the start.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn update_network(&self, network: &Network) -> Result<(), TaskError> {
        let call = self.client.update_network(Context::default(), network);
        self.call("set the guest's network up", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// Adds to the guest's wall clock; returns what it says then, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn adjust_clock(&self, add_ns: i64) -> Result<u64, TaskError> {
        let request = AdjustClockRequest {
            add_ns,
            ..Default::default()
        };
        let call = self.client.adjust_clock(Context::default(), &request);
        let answer = self
            .call("ask the guest for its time", Some(ON_THE_SPOT), call)
            .await?;
        Ok(answer.wall_clock_ns)
    }

    /// Brings vCPUs online until this many are; returns how many are.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn bring_online(&self, vcpus: u8) -> Result<u32, TaskError> {
        let request = ResizeRequest {
            online_cpus: vcpus.into(),
            ..Default::default()
        };
        let call = self.client.resize(Context::default(), &request);
        let answer = self.call("bring vCPUs online", Some(SET_UP), call).await?;
        Ok(answer.online_cpus)
    }

    /// Sets a container up. `joins` is the one whose namespaces its spec joins; empty where it joins none.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn create_container(
        &self,
        id: &str,
        spec_json: Vec<u8>,
        joins: String,
        stdio: Stdio,
    ) -> Result<(), TaskError> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json,
            joins,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let call = self.client.create_container(Context::default(), &request);
        self.call("create the container", Some(SET_UP), call)
            .await
            .map(drop)
    }

    /// Lets a container's init run.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn start_container(&self, id: &str) -> Result<(), TaskError> {
        let request = container(id);
        let call = self.client.start_container(Context::default(), &request);
        self.call("start the container", Some(SET_UP), call)
            .await
            .map(drop)
    }

    /// Kills and forgets a container.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn delete_container(&self, id: &str) -> Result<(), TaskError> {
        let request = container(id);
        let call = self.client.delete_container(Context::default(), &request);
        self.call("delete the container", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn freeze(&self, id: &str, frozen: bool) -> Result<(), TaskError> {
        let request = container(id);
        if frozen {
            let call = self.client.pause_container(Context::default(), &request);
            self.call("pause the container", Some(ON_THE_SPOT), call)
                .await
                .map(drop)
        } else {
            let call = self.client.resume_container(Context::default(), &request);
            self.call("resume the container", Some(ON_THE_SPOT), call)
                .await
                .map(drop)
        }
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn update_container(
        &self,
        id: &str,
        resources_json: Vec<u8>,
    ) -> Result<(), TaskError> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources_json,
            ..Default::default()
        };
        let call = self.client.update_container(Context::default(), &request);
        self.call("update the container", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// A container's figures.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, TaskError> {
        let request = container(id);
        let call = self.client.container_stats(Context::default(), &request);
        self.call("read the container's statistics", Some(ON_THE_SPOT), call)
            .await
    }

    /// How many processes a container has, those that nobody but itself knows of included.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn count_processes(&self, id: &str) -> Result<usize, TaskError> {
        let request = container(id);
        let call = self.client.list_processes(Context::default(), &request);
        let answer = self.call("count the container's processes", Some(COUNT), call);
        Ok(answer.await?.processes.len())
    }

    /// What the guest tells of the processes that a container sees, of as many as it may tell of. What it says of each nobody has looked at.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn describe_processes(
        &self,
        id: &str,
    ) -> Result<DescribeProcessesResponse, TaskError> {
        let request = container(id);
        let call = self.client.describe_processes(Context::default(), &request);
        let answer = self.call("describe the processes", Some(ON_THE_SPOT), call);
        let mut told = answer.await?;
        told.processes.truncate(MAX_PROCESSES);
        Ok(told)
    }

    /// Runs a further process.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), TaskError> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let call = self.client.exec_process(Context::default(), &request);
        self.call("start the process", Some(SET_UP), call)
            .await
            .map(drop)
    }

    /// Waits for a process's end, however long that takes.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<WaitProcessResponse, TaskError> {
        let request = ProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let call = self.client.wait_process(Context::default(), &request);
        self.call("wait for the process", None, call).await
    }

    /// Sends a signal to one process or to all of the container.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let call = self.client.signal_process(Context::default(), &request);
        self.call("send the signal", Some(SIGNAL), call)
            .await
            .map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), TaskError> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height,
            ..Default::default()
        };
        let call = self.client.resize_terminal(Context::default(), &request);
        self.call("resize the terminal", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// Brings a directory of the guest's to what a volume of the host holds.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn sync_volume(&self, request: &SyncVolumeRequest) -> Result<(), TaskError> {
        let call = self.client.sync_volume(Context::default(), request);
        self.call("bring the volume up to date", Some(ON_THE_SPOT), call)
            .await
            .map(drop)
    }

    /// Connects a port of the guest's localhost to the stream of this token.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`]: also where nobody listens.
    pub async fn forward_port(&self, port: u16, token: Vec<u8>) -> Result<(), TaskError> {
        let request = ForwardPortRequest {
            port: port.into(),
            token,
            ..Default::default()
        };
        let call = self.client.forward_port(Context::default(), &request);
        self.call("connect to the port", Some(DIAL), call)
            .await
            .map(drop)
    }

    /// Has the pod's name queries sent to the stream of this token.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn serve_names(&self, token: Vec<u8>) -> Result<(), TaskError> {
        let request = ServeNamesRequest {
            token,
            ..Default::default()
        };
        let call = self.client.serve_names(Context::default(), &request);
        self.call("serve names", Some(DIAL), call).await.map(drop)
    }

    /// Waits for the next event, however long that takes.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`].
    pub async fn next_event(&self) -> Result<Event, TaskError> {
        let request = Empty::new();
        let call = self.client.next_event(Context::default(), &request);
        self.call("wait for an event", None, call).await
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

fn vm_gone(doing: &str, reason: &str) -> TaskError {
    TaskError::failed(format!("{doing}: the VM has ended: {reason}"))
}

#[cfg(test)]
mod tests;
