//! A world for the shim without a VM: a fake VMM, a fake agent on the other end of the bridge, and a containerd that writes
//! down the events it is sent. Everything between them is the real thing, ttrpc included.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{CreateTaskRequest, Empty, ForwardRequest},
    protobuf::MessageFull,
    shim_async::{Events, Task, create_events},
};
use husk_protocol::{
    agent::{self, *},
    ports,
    vm::LaunchTimes,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use ttrpc::{
    MessageHeader,
    r#async::TtrpcContext,
    asynchronous::{Server, transport::Listener},
};

use crate::{
    config::Config,
    context::ShimContext,
    engine_mounts::EngineMounts,
    error::TaskError,
    events::Publisher,
    network::tap::Queues,
    pod::Keeper,
    service::{SandboxService, TaskService, Tasks},
    share::Share,
    state::PodDir,
    timing::Moment,
    vm::{Driver, GuestConnection, LaunchPlan, Machine, Spawned, VmEnd, VmError},
};

/// Bound of every wait of a test: reached only by a bug.
pub const LIMIT: Duration = Duration::from_secs(20);

/// More than Linux gives out: what is done to the VMM by its pid must not hit somebody.
pub const VMM_PID: u32 = 1 << 30;

type Exits = HashMap<(String, String), watch::Sender<Option<u32>>>;

/// What the fake guest does and has been asked.
#[derive(Default)]
pub struct Guest {
    exits: Mutex<Exits>,
    /// Calls, oldest first: "method container exec".
    pub calls: Mutex<Vec<String>>,
    /// Says that it has killed, and has not.
    pub spares: std::sync::atomic::AtomicBool,
    /// Every call but these hangs.
    pub deaf: watch::Sender<bool>,
    /// StartContainer and ExecProcess fail with this.
    pub start_error: Mutex<Option<(ttrpc::Code, String)>>,
    /// Processes end with this status before their start is answered.
    pub ends_at_once: Mutex<Option<u32>>,
    /// CreateContainer fails with this.
    pub create_error: Mutex<Option<(ttrpc::Code, String)>>,
    /// SyncVolume fails with this.
    pub volume_error: Mutex<Option<(ttrpc::Code, String)>>,
    /// Volumes by id, with the text of each path.
    pub volumes: watch::Sender<BTreeMap<String, BTreeMap<String, String>>>,
    /// Sources of the last container's mounts.
    pub sources: Mutex<Vec<String>>,
    /// The last exec's streams.
    pub stdio: Mutex<agent::Stdio>,
    /// Processes have written this much to their stdout.
    pub stdout_bytes: Mutex<u64>,
    /// The networks it was given, oldest first.
    pub networks: Mutex<Vec<Network>>,
    /// What the last CreateSandbox asked for.
    pub sandbox: Mutex<CreateSandboxRequest>,
    /// The last container's spec.
    pub spec: Mutex<Vec<u8>>,
    /// Processes of each container.
    pub processes: Mutex<usize>,
    /// vCPUs that can be brought online.
    pub cpus: Mutex<u32>,
    /// Takes the ports that are forwarded, with their streams' tokens. Without it every port is refused.
    pub forwards: OnceLock<mpsc::UnboundedSender<(u32, Vec<u8>)>>,
    /// How far its clock is ahead.
    pub clock_ahead_ns: watch::Sender<i64>,
    /// NextEvent answers.
    pub events: OnceLock<tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>>,
}

impl Guest {
    fn exit_of(&self, id: &str, exec: &str) -> watch::Sender<Option<u32>> {
        let mut exits = self.exits.lock().unwrap();
        exits.entry((id.into(), exec.into())).or_default().clone()
    }

    /// A process of the guest ends.
    pub fn end(&self, id: &str, exec: &str, status: u32) {
        self.exit_of(id, exec).send_replace(Some(status));
    }

    async fn called(&self, what: String) {
        self.calls.lock().unwrap().push(what);
        let mut deaf = self.deaf.subscribe();
        deaf.wait_for(|deaf| !deaf).await.unwrap();
    }

    fn started(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        if let Some((code, message)) = self.start_error.lock().unwrap().clone() {
            return Err(TaskError::new(code, message).into());
        }
        if let Some(status) = *self.ends_at_once.lock().unwrap() {
            self.end(id, exec, status);
        }
        Ok(())
    }
}

struct FakeAgent(Arc<Guest>);

#[async_trait]
impl Agent for FakeAgent {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        assert!(
            request.entropy.len() >= 32 && request.wall_clock_ns > 0 && request.shares.len() == 1
        );
        self.0
            .networks
            .lock()
            .unwrap()
            .extend(request.network.clone().into_option());
        *self.0.sandbox.lock().unwrap() = request;
        self.0.called("create_sandbox".into()).await;
        Ok(CreateSandboxResponse::new())
    }
    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: Network,
    ) -> ttrpc::Result<agent::Empty> {
        self.0.networks.lock().unwrap().push(request);
        self.0.called("update_network".into()).await;
        Ok(agent::Empty::new())
    }
    async fn destroy_sandbox(
        &self,
        _: &TtrpcContext,
        _: agent::Empty,
    ) -> ttrpc::Result<agent::Empty> {
        self.0.called("destroy_sandbox".into()).await;
        Ok(agent::Empty::new())
    }
    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<AdjustClockResponse> {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = since_epoch.unwrap().as_nanos() as i64;
        let mut ahead = 0;
        self.0.clock_ahead_ns.send_modify(|clock| {
            *clock += request.add_ns;
            ahead = *clock;
        });
        Ok(AdjustClockResponse {
            wall_clock_ns: now.saturating_add(ahead) as u64,
            ..Default::default()
        })
    }
    async fn resize(
        &self,
        _: &TtrpcContext,
        request: ResizeRequest,
    ) -> ttrpc::Result<ResizeResponse> {
        self.0
            .called(format!("online {}", request.online_cpus))
            .await;
        Ok(ResizeResponse {
            online_cpus: request.online_cpus.min(*self.0.cpus.lock().unwrap()),
            ..Default::default()
        })
    }
    async fn forward_port(
        &self,
        _: &TtrpcContext,
        request: ForwardPortRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let port = request.port;
        self.0.called(format!("forward {port}")).await;
        let Some(tokens) = self.0.forwards.get() else {
            let refused = format!("nobody listens on port {port}");
            return Err(TaskError::new(ttrpc::Code::INTERNAL, refused).into());
        };
        tokens.send((port, request.token)).unwrap();
        Ok(agent::Empty::new())
    }
    async fn serve_names(
        &self,
        _: &TtrpcContext,
        _: agent::ServeNamesRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0.called("serve_names".into()).await;
        Err(TaskError::failed("no names here").into())
    }
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let mut call = format!("create {}", request.container_id);
        if !request.joins.is_empty() {
            call = format!("{call} joining {}", request.joins);
        }
        self.0.called(call).await;
        if let Some((code, message)) = self.0.create_error.lock().unwrap().clone() {
            return Err(TaskError::new(code, message).into());
        }
        let spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        let sources = mounts.map(|mount| mount["source"].as_str().unwrap().to_owned());
        *self.0.sources.lock().unwrap() = sources.collect();
        *self.0.spec.lock().unwrap() = request.spec_json;
        Ok(CreateContainerResponse::new())
    }
    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0
            .called(format!("start {}", request.container_id))
            .await;
        self.0.started(&request.container_id, "")?;
        Ok(agent::Empty::new())
    }
    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0
            .called(format!("delete {}", request.container_id))
            .await;
        Ok(agent::Empty::new())
    }
    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0
            .called(format!("pause {}", request.container_id))
            .await;
        Ok(agent::Empty::new())
    }
    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0
            .called(format!("resume {}", request.container_id))
            .await;
        Ok(agent::Empty::new())
    }
    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let json = String::from_utf8(request.resources_json).unwrap();
        self.0
            .called(format!("update {} {json}", request.container_id))
            .await;
        Ok(agent::Empty::new())
    }
    async fn sync_volume(
        &self,
        _: &TtrpcContext,
        request: SyncVolumeRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let id = request.volume_id;
        self.0
            .called(format!("sync {id} {}", request.entries.len()))
            .await;
        if let Some((code, message)) = self.0.volume_error.lock().unwrap().clone() {
            return Err(TaskError::new(code, message).into());
        }
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let entries = request.entries.into_iter().map(|entry| {
            let content = match entry.content {
                Some(volume_entry::Content::File(bytes) | volume_entry::Content::Link(bytes)) => {
                    text(bytes)
                }
                _ => "/".into(),
            };
            (text(entry.path), content)
        });
        let entries: BTreeMap<_, _> = entries.collect();
        self.0.volumes.send_modify(|volumes| {
            if entries.is_empty() {
                volumes.remove(&id);
            } else {
                volumes.insert(id, entries);
            }
        });
        Ok(agent::Empty::new())
    }
    async fn container_stats(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        self.0.called("stats".into()).await;
        Ok(ContainerStatsResponse::new())
    }
    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: agent::ExecProcessRequest,
    ) -> ttrpc::Result<agent::ExecProcessResponse> {
        *self.0.stdio.lock().unwrap() = request.stdio.clone().unwrap_or_default();
        self.0
            .called(format!("exec {} {}", request.container_id, request.exec_id))
            .await;
        self.0.started(&request.container_id, &request.exec_id)?;
        Ok(agent::ExecProcessResponse::new())
    }
    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let mut exit = self
            .0
            .exit_of(&request.container_id, &request.exec_id)
            .subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        let (id, exec) = (request.container_id, request.exec_id);
        self.0.called(format!("waited {id} {exec}")).await;
        Ok(WaitProcessResponse {
            exit_status: status,
            stdout_bytes: *self.0.stdout_bytes.lock().unwrap(),
            exited_at_ns: 1_000_000_000,
            ..Default::default()
        })
    }
    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let (id, exec, signal) = (request.container_id, request.exec_id, request.signal);
        self.0
            .called(format!("signal {id} {exec} {signal} {}", request.all))
            .await;
        if signal == 9 && !self.0.spares.load(std::sync::atomic::Ordering::Relaxed) {
            let all: Vec<_> = self.0.exits.lock().unwrap().keys().cloned().collect();
            for (container, process) in all {
                if container == id && (request.all || process == exec) {
                    self.0.end(&container, &process, 137);
                }
            }
        }
        Ok(agent::Empty::new())
    }
    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.0
            .called(format!("resize {}x{}", request.width, request.height))
            .await;
        Ok(agent::Empty::new())
    }
    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let mut deaf = self.0.deaf.subscribe();
        deaf.wait_for(|deaf| !deaf).await.unwrap();
        Ok(ListProcessesResponse {
            processes: vec![agent::ProcessInfo::new(); *self.0.processes.lock().unwrap()],
            ..Default::default()
        })
    }
    async fn describe_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<DescribeProcessesResponse> {
        let process = agent::ProcessTexts {
            pid: 1,
            cmdline: request.container_id.into_bytes(),
            ..Default::default()
        };
        Ok(DescribeProcessesResponse {
            boot_time: 7,
            processes: vec![process],
            ..Default::default()
        })
    }
    async fn next_event(&self, _: &TtrpcContext, _: agent::Empty) -> ttrpc::Result<Event> {
        match self.0.events.get() {
            Some(events) => match events.lock().await.recv().await {
                Some(event) => Ok(event),
                None => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }
}

/// How the fake VMM fails, if it does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It cannot be spawned.
    Spawn,
    /// The guest never dials.
    Silent,
}

/// The fake VMM.
pub struct FakeVmm {
    guest: Arc<Guest>,
    fault: Fault,
    connections: Mutex<Option<mpsc::Sender<GuestConnection>>>,
    ended: watch::Sender<Option<Arc<VmEnd>>>,
    pub plan: OnceLock<LaunchPlan>,
    /// What was connected to which network device; held as a VMM would.
    pub taps: Mutex<Vec<(u8, Vec<OwnedFd>)>>,
    /// The guest plugs no memory.
    pub is_full: std::sync::atomic::AtomicBool,
    /// The guest's end of the agent connection.
    server: tokio::sync::Mutex<Option<Server>>,
}

pub struct FakeDriver(pub Arc<FakeVmm>);

impl Driver for FakeDriver {
    fn spawn(&self, _: OwnedFd, _: Option<OwnedFd>) -> Result<Spawned, VmError> {
        if self.0.fault == Fault::Spawn {
            return Err(VmError::KvmPvm);
        }
        let (sender, connections) = mpsc::channel(8);
        *self.0.connections.lock().unwrap() = Some(sender);
        let machine: Arc<dyn Machine> = self.0.clone();
        Ok(Spawned {
            machine,
            connections,
        })
    }
}

impl FakeVmm {
    /// The guest dials the host for a stream.
    pub async fn dial(&self, token: &[u8]) -> UnixStream {
        let (mut guest, stream) = UnixStream::pair().unwrap();
        let sender = self.connections.lock().unwrap().clone().unwrap();
        let port = ports::STREAM;
        sender.send(GuestConnection { port, stream }).await.unwrap();
        guest.write_all(token).await.unwrap();
        guest
    }

    /// The VM ends, by itself.
    pub async fn die(&self, reason: &str) {
        self.connections.lock().unwrap().take();
        if let Some(mut server) = self.server.lock().await.take() {
            server.disconnect().await;
        }
        let end = VmEnd {
            reason: reason.into(),
            console: vec!["Kernel panic - not syncing".into()],
        };
        self.ended.send_replace(Some(Arc::new(end)));
    }
}

#[async_trait]
impl Machine for FakeVmm {
    fn pid(&self) -> u32 {
        VMM_PID
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<LaunchTimes, VmError> {
        self.plan.set(plan).unwrap();
        let now = Moment::now().0;
        if self.fault != Fault::Silent {
            let (guest, host) = UnixStream::pair().unwrap();
            let incoming = futures::stream::iter([Ok(guest)]);
            let mut server = Server::new()
                .add_listener(Listener::new(incoming))
                .register_service(create_agent(Arc::new(FakeAgent(self.guest.clone()))));
            server.start().await.unwrap();
            *self.server.lock().await = Some(server);
            let sender = self.connections.lock().unwrap().clone().unwrap();
            let connection = GuestConnection {
                port: ports::AGENT,
                stream: host,
            };
            sender.send(connection).await.unwrap();
        }
        Ok(LaunchTimes {
            process_started: now,
            vm_built: now,
            vcpus_running: now,
        })
    }

    async fn attach_nic(&self, nic: u8, queues: Queues) -> Result<(), VmError> {
        self.taps.lock().unwrap().push((nic, queues.taps));
        Ok(())
    }

    async fn set_memory(&self, from_mib: u64, to_mib: u64) -> Result<(), VmError> {
        self.guest
            .called(format!("memory {from_mib} {to_mib}"))
            .await;
        if self.is_full.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(VmError::Unplugged(Duration::ZERO));
        }
        Ok(())
    }

    fn kill(&self) {
        self.taps.lock().unwrap().clear();
        self.connections.lock().unwrap().take();
        let end = VmEnd {
            reason: "killed".into(),
            console: vec![],
        };
        self.ended.send_replace(Some(Arc::new(end)));
    }

    fn ended(&self) -> watch::Receiver<Option<Arc<VmEnd>>> {
        self.ended.subscribe()
    }

    fn console_tail(&self) -> Vec<String> {
        vec!["last line of the console".into()]
    }
}

#[derive(Clone)]
struct Recorder(watch::Sender<Vec<String>>);

#[async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        use containerd_shim_protos::events::task::*;
        let envelope = request.envelope;
        let value = &envelope.event.value;
        fn parse<M: MessageFull>(value: &[u8]) -> M {
            M::parse_from_bytes(value).unwrap()
        }
        let line = match envelope.topic.as_str() {
            "/tasks/create" => format!("create {}", parse::<TaskCreate>(value).container_id),
            "/tasks/start" => {
                let event: TaskStart = parse(value);
                assert!(event.pid > 0);
                format!("start {}", event.container_id)
            }
            "/tasks/exit" => {
                let event: TaskExit = parse(value);
                assert!(event.pid > 0);
                format!(
                    "exit {} {} {}",
                    event.container_id, event.id, event.exit_status
                )
            }
            "/tasks/delete" => format!("delete {}", parse::<TaskDelete>(value).container_id),
            "/tasks/oom" => format!("oom {}", parse::<TaskOOM>(value).container_id),
            "/tasks/exec-added" => format!("exec-added {}", parse::<TaskExecAdded>(value).exec_id),
            "/tasks/exec-started" => {
                format!("exec-started {}", parse::<TaskExecStarted>(value).exec_id)
            }
            topic => topic.to_owned(),
        };
        self.0.send_modify(|log| log.push(line));
        Ok(Empty::new())
    }
}

/// All of it.
pub struct World {
    pub service: TaskService,
    pub sandbox: SandboxService,
    pub tasks: Arc<Tasks>,
    pub vmm: Arc<FakeVmm>,
    pub guest: Arc<Guest>,
    log: watch::Sender<Vec<String>>,
    dir: tempfile::TempDir,
    _containerd: Server,
}

impl World {
    pub async fn new() -> Self {
        Self::with(Arc::default(), Fault::None).await
    }

    pub async fn with(guest: Arc<Guest>, fault: Fault) -> Self {
        Self::in_network(guest, fault, "").await
    }

    /// With a network namespace of this path; none: a new one.
    pub async fn in_network(guest: Arc<Guest>, fault: Fault, netns: &str) -> Self {
        // On a busy machine a guest that does come up takes its time.
        let config = match fault {
            Fault::Silent => impatient(),
            Fault::None | Fault::Spawn => Config::default(),
        };
        Self::configured(guest, fault, config, in_netns(netns)).await
    }

    /// With the node's settings, and `linux` of the first container's spec.
    pub async fn configured(
        guest: Arc<Guest>,
        fault: Fault,
        config: Config,
        linux: serde_json::Value,
    ) -> Self {
        Self::made(guest, fault, config, linux, Keeper::Containers).await
    }

    /// A pod that the Sandbox API keeps, called "pod".
    pub async fn kept(guest: Arc<Guest>, fault: Fault, config: Config) -> Self {
        Self::made(guest, fault, config, in_netns(""), Keeper::SandboxApi).await
    }

    async fn made(
        guest: Arc<Guest>,
        fault: Fault,
        config: Config,
        linux: serde_json::Value,
        keeper: Keeper,
    ) -> Self {
        let (id, name) = match keeper {
            Keeper::Containers => ("c", "bundle"),
            Keeper::SandboxApi => ("pod", "sandbox"),
        };
        let dir = tempfile::tempdir().unwrap();
        let log = watch::Sender::new(Vec::new());
        let socket = dir.path().join("containerd.ttrpc");
        let mut containerd = Server::new()
            .add_listener(Listener::from(UnixListener::bind(&socket).unwrap()))
            .register_service(create_events(Arc::new(Recorder(log.clone()))));
        containerd.start().await.unwrap();
        let pod = PodDir::new(dir.path(), "test", id).unwrap();
        pod.create().unwrap();
        let vmm = Arc::new(FakeVmm {
            guest: guest.clone(),
            fault,
            connections: Mutex::default(),
            ended: watch::Sender::new(None),
            plan: OnceLock::new(),
            taps: Mutex::default(),
            is_full: false.into(),
            server: tokio::sync::Mutex::default(),
        });
        let address = socket.display().to_string();
        let context = ShimContext {
            namespace: "test".into(),
            sandbox_id: id.into(),
            bundle: dir.path().join(name),
            keeper,
            publisher: Publisher::new(Some(&address), "test"),
            config,
            settings: None,
            pod,
            engine: EngineMounts::of_this_thread().unwrap(),
        };
        write_bundle(&dir.path().join("bundle"), dir.path(), linux);
        let share = Share::without_mounts(context.pod.share());
        let tasks = Tasks::start(context, share, Arc::new(FakeDriver(vmm.clone())));
        Self {
            service: TaskService::new(tasks.clone()),
            sandbox: SandboxService::new(tasks.clone()),
            tasks,
            vmm,
            guest,
            log,
            dir,
            _containerd: containerd,
        }
    }

    /// A FIFO in the bundle.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.bundle().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    pub fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    /// Create of the one container.
    pub async fn create(&self) -> ttrpc::Result<u32> {
        self.create_as("c").await
    }

    /// Gives the one bundle's spec hooks.
    pub fn set_hooks(&self, hooks: serde_json::Value) {
        let path = self.bundle().join("config.json");
        let mut spec: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        spec["hooks"] = hooks;
        std::fs::write(path, spec.to_string()).unwrap();
    }

    /// Create of a container of this id, in the one bundle.
    pub async fn create_as(&self, id: &str) -> ttrpc::Result<u32> {
        self.create_in(id, &self.bundle()).await
    }

    /// Create of a further container.
    pub async fn create_also(&self, id: &str, linux: serde_json::Value) -> ttrpc::Result<u32> {
        let bundle = self.dir.path().join(id).join("bundle");
        write_bundle(&bundle, self.dir.path(), linux);
        self.create_in(id, &bundle).await
    }

    async fn create_in(&self, id: &str, bundle: &Path) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        self.service
            .create(&context(), request)
            .await
            .map(|answer| answer.pid)
    }

    /// Returns once the guest has been asked this.
    pub async fn called(&self, what: &str) {
        let asked = async {
            while !self.guest.calls.lock().unwrap().iter().any(|c| c == what) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(LIMIT, asked).await.unwrap();
    }

    /// Events so far, once there are this many.
    pub async fn events(&self, count: usize) -> Vec<String> {
        let mut log = self.log.subscribe();
        let seen = tokio::time::timeout(LIMIT, log.wait_for(|log| log.len() >= count)).await;
        match seen {
            Ok(log) => log.unwrap().clone(),
            Err(_) => panic!("only these events came: {:?}", self.log.borrow()),
        }
    }
}

/// Settings under which a VM that does not come up is soon given up.
pub fn impatient() -> Config {
    Config {
        start_timeout: Duration::from_millis(300),
        ..Config::default()
    }
}

/// `linux` of a spec with a network namespace of this path; none: a new one.
fn in_netns(path: &str) -> serde_json::Value {
    serde_json::json!({ "namespaces": [{ "type": "network", "path": path }] })
}

fn write_bundle(bundle: &Path, dir: &Path, linux: serde_json::Value) {
    let rootfs = dir.join("rootfs");
    std::fs::create_dir_all(&rootfs).unwrap();
    std::fs::create_dir_all(bundle).unwrap();
    let spec = serde_json::json!({
        "ociVersion": "1.0.2", "root": {"path": rootfs}, "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "linux": linux,
    });
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
}

/// What a ttrpc handler gets.
pub fn context() -> TtrpcContext {
    TtrpcContext {
        mh: MessageHeader::default(),
        metadata: HashMap::new(),
        timeout_nano: 0,
        connection_data: Default::default(),
    }
}
