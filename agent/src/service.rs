//! Answers the host: the ttrpc service over the one connection that the agent dialled.
//!
//! A caller may stop waiting at any time, and its call is then dropped at its next await. What would leave something half
//! done runs as a task of its own and is only awaited here.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use husk_protocol::agent::{
    AdjustClockRequest, AdjustClockResponse, Agent, ContainerRequest, ContainerStatsResponse,
    CreateContainerRequest, CreateContainerResponse, CreateSandboxRequest, CreateSandboxResponse,
    DescribeProcessesResponse, Empty, Event, ExecProcessRequest, ExecProcessResponse,
    ForwardPortRequest, ListProcessesResponse, Network, OomKill, ProcessInfo, ProcessRequest,
    ResizeRequest, ResizeResponse, ResizeTerminalRequest, ServeNamesRequest, SignalProcessRequest,
    SyncVolumeRequest, UpdateContainerRequest, WaitProcessResponse, create_agent, event,
};
use husk_protocol::guest_path;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::boot::CGROUP_ROOT;
use crate::clock;
use crate::connection::Connection;
use crate::containers::Containers;
use crate::cpus;
use crate::dial::Host;
use crate::error::AgentError;
use crate::events::{Events, OomWatch};
use crate::forward;
use crate::names;
use crate::net;
use crate::polled::Polled;
use crate::processes;
use crate::reaper::Reaper;
use crate::runtime::Runtime;
use crate::sandbox::{self, Milestones};
use crate::share;
use crate::users;
use crate::volume::{self, Volumes};

/// Turns given to the runtime for the reply of the last call to leave.
const LAST_TURNS: usize = 32;

/// How long a description of processes waits for another one.
const TURN: Duration = Duration::from_secs(5);

/// The agent API.
pub struct Service<R: Runtime> {
    containers: Arc<Containers<R>>,
    host: Arc<dyn Host>,
    volumes: Arc<Volumes>,
    events: Arc<Events>,
    milestones: Milestones,
    set_up: AtomicBool,
    serves_names: AtomicBool,
    /// Held by who describes processes.
    describing: Arc<Mutex<()>>,
    over: Arc<Notify>,
}

impl<R: Runtime> Service<R> {
    /// A service without containers. Needs a runtime, not PID 1.
    ///
    /// # Errors
    /// Where the kernel does not give an inotify instance.
    pub fn new(
        runtime: R,
        host: Arc<dyn Host>,
        reaper: Arc<Reaper>,
        milestones: Milestones,
    ) -> io::Result<Self> {
        let events = Arc::new(Events::default());
        let oom = Arc::new(OomWatch::new(Arc::clone(&events))?);
        tokio::spawn({
            let oom = Arc::clone(&oom);
            async move {
                if let Err(e) = oom.run().await {
                    tracing::error!(error = %e, "no more news of out-of-memory kills");
                }
            }
        });
        Ok(Self {
            containers: Arc::new(Containers::new(runtime, Arc::clone(&host), reaper, oom)),
            host,
            volumes: Arc::new(Volumes::new(guest_path::VOLUMES)),
            events,
            milestones,
            set_up: AtomicBool::new(false),
            serves_names: AtomicBool::new(false),
            describing: Arc::default(),
            over: Arc::new(Notify::new()),
        })
    }

    /// Serves until the host ends the sandbox or goes away.
    ///
    /// # Errors
    /// Where the server does not start.
    pub async fn serve(self, connection: Polled) -> ttrpc::Result<()> {
        let over = Arc::clone(&self.over);
        let (connection, gone) = Connection::new(connection);
        let connections = futures::stream::once(async { io::Result::Ok(connection) });
        let service: Arc<dyn Agent + Send + Sync> = Arc::new(self);
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_agent(service));
        server.start().await?;
        tokio::select! {
            () = over.notified() => {
                for _ in 0..LAST_TURNS {
                    tokio::task::yield_now().await;
                }
            }
            // The sender is dropped with the connection.
            _ = gone => tracing::warn!("the host has closed the connection: powering off"),
        }
        Ok(())
    }
}

/// Lets work run to its end, whether or not the caller stays.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, AgentError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(done) => Ok(done?),
        Err(e) => Err(AgentError::guest("a task of the agent", io::Error::other(e)).into()),
    }
}

/// As [`to_its_end`], for work that blocks.
async fn off_the_runtime<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> ttrpc::Result<T> {
    // A thread of its own is not dropped with who waits for it.
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(e) => Err(AgentError::guest(doing, io::Error::other(e)).into()),
    }
}

#[async_trait]
impl<R: Runtime> Agent for Service<R> {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        // First: a request that is refused has set nothing up, and its like may follow.
        let plan = sandbox::Plan::new(request)?;
        if self.set_up.swap(true, Ordering::Relaxed) {
            return Err(AgentError::SandboxExists.into());
        }
        if let Some(users) = plan.users() {
            // On this thread, the one that starts processes and connects to ports. Without this call's end there is no sandbox.
            users.make().await?;
        }
        let milestones = self.milestones;
        off_the_runtime("setting the sandbox up", move || plan.set_up(milestones)).await
    }

    async fn update_network(&self, _: &TtrpcContext, request: Network) -> ttrpc::Result<Empty> {
        let network = net::Config::new(request)?;
        if !self.set_up.load(Ordering::Relaxed) {
            return Err(AgentError::NoSandbox.into());
        }
        off_the_runtime("configuring the network", move || {
            users::enter_network()?;
            net::configure(&network)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        tracing::info!("the sandbox ends");
        self.containers.kill_everything();
        self.over.notify_one();
        Ok(Empty::new())
    }

    async fn sync_volume(
        &self,
        _: &TtrpcContext,
        request: SyncVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let plan = volume::Plan::new(request)?;
        let volumes = Arc::clone(&self.volumes);
        to_its_end(async move {
            tokio::task::spawn_blocking(move || volumes.sync(&plan))
                .await
                .map_err(|e| {
                    AgentError::guest("bringing a volume up to date", io::Error::other(e))
                })?
        })
        .await?;
        Ok(Empty::new())
    }

    async fn forward_port(
        &self,
        _: &TtrpcContext,
        request: ForwardPortRequest,
    ) -> ttrpc::Result<Empty> {
        let plan = forward::Plan::new(&request)?;
        // Half a port-forward is none: it may end with its caller.
        plan.open(&*self.host).await?;
        Ok(Empty::new())
    }

    async fn serve_names(
        &self,
        _: &TtrpcContext,
        request: ServeNamesRequest,
    ) -> ttrpc::Result<Empty> {
        let plan = names::Plan::new(&request)?;
        // The kernel would ask the programs of both, and the second find nothing.
        if self.serves_names.swap(true, Ordering::Relaxed) {
            return Err(AgentError::Invalid("names are served already".into()).into());
        }
        let host = Arc::clone(&self.host);
        to_its_end(async move { plan.open(&*host, Path::new(CGROUP_ROOT)).await }).await?;
        Ok(Empty::new())
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<AdjustClockResponse> {
        if request.add_ns != 0 {
            clock::adjust(request.add_ns).map_err(|e| {
                AgentError::guest(format!("adding {} ns to the clock", request.add_ns), e)
            })?;
        }
        Ok(AdjustClockResponse {
            wall_clock_ns: clock::realtime_ns(),
            ..Default::default()
        })
    }

    async fn resize(
        &self,
        _: &TtrpcContext,
        request: ResizeRequest,
    ) -> ttrpc::Result<ResizeResponse> {
        let wanted = request.online_cpus;
        let online = to_its_end(async move {
            tokio::task::spawn_blocking(move || cpus::bring_online(Path::new(cpus::SYSFS), wanted))
                .await
                .unwrap_or_else(|e| Err(io::Error::other(e)))
                .map_err(|e| AgentError::guest(format!("bringing {wanted} CPUs online"), e))
        })
        .await?;
        Ok(ResizeResponse {
            online_cpus: online,
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move {
            let joins = Some(&*request.joins).filter(|id| !id.is_empty());
            let (id, spec) = (&request.container_id, &request.spec_json);
            containers.create(id, spec, &request.stdio, joins).await
        })
        .await?;
        Ok(CreateContainerResponse {
            pid: pid.unsigned_abs(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.start(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            containers
                .update(&request.container_id, &request.resources_json)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.pause(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move { containers.resume(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        Ok(self.containers.stats(&request.container_id)?)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            containers.delete(&request.container_id).await?;
            share::forget(&request.container_id);
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move {
            containers
                .exec(
                    &request.container_id,
                    &request.exec_id,
                    &request.process_json,
                    &request.stdio,
                )
                .await
        })
        .await?;
        Ok(ExecProcessResponse {
            pid: pid.unsigned_abs(),
            ..Default::default()
        })
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let ended = self
            .containers
            .wait(&request.container_id, &request.exec_id)
            .await?;
        Ok(WaitProcessResponse {
            exit_status: ended.exit.status,
            exited_at_ns: ended.exit.at_ns,
            stdout_bytes: ended.stdout_bytes,
            stderr_bytes: ended.stderr_bytes,
            oom_killed: ended.oom_killed,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.containers.signal(
            &request.container_id,
            &request.exec_id,
            request.signal,
            request.all,
        )?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        self.containers.resize(
            &request.container_id,
            &request.exec_id,
            request.width,
            request.height,
        )?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = self
            .containers
            .list(&request.container_id)?
            .into_iter()
            .map(|(pid, exec_id)| ProcessInfo {
                pid: pid.unsigned_abs(),
                exec_id,
                ..Default::default()
            })
            .collect();
        Ok(ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn describe_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<DescribeProcessesResponse> {
        let (containers, id) = (Arc::clone(&self.containers), request.container_id);
        let failed = |e| AgentError::guest("describing the processes of a container", e);
        // A command line is its process' memory, which may let nobody read on: that holds up one thread and no more.
        let turn = Arc::clone(&self.describing).lock_owned();
        let turn = timeout(TURN, turn).await;
        let turn = turn.map_err(|_| failed(io::ErrorKind::ResourceBusy.into()))?;
        off_the_runtime("describing processes", move || {
            let own: Vec<i32> = containers
                .list(&id)?
                .into_iter()
                .map(|(pid, _)| pid)
                .collect();
            let described = processes::describe(Path::new("/proc"), containers.init(&id)?, &own);
            drop(turn);
            described.map_err(failed)
        })
        .await
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        let oom = self.events.next().await?;
        Ok(Event {
            container_id: oom.container,
            kind: Some(event::Kind::Oom(OomKill {
                kills: oom.kills,
                ..Default::default()
            })),
            ..Default::default()
        })
    }
}
