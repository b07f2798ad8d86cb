//! One pod: one VM, from the request for it to its last trace.
//!
//! The VM is started as soon as the shim serves, while containerd is still on its way with the Create request and its mounts: what
//! a container needs from the host and what it needs from the VM are prepared side by side. Whatever ends the VM, a
//! person's Shutdown, a kernel panic or a `kill -9` of the VMM, arrives at one place ([`Phase::Gone`], with the reason), and everyone
//! who waits for the guest waits for that as well.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use husk_protocol::{
    agent::{CreateSandboxRequest, Share as AgentShare},
    guest_path, ports,
};
use tokio::{
    join,
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::timeout,
    try_join,
};
use tracing::{Instrument as _, debug, info, info_span, warn};

use crate::{
    agent::Agent,
    cgroup, clock,
    config::Config,
    context::ShimContext,
    error::{TaskError, chain},
    growth::{Growth, TooSmall},
    network::{
        self, Network,
        late::{Late, Loopback},
        model::Found,
        tap::Queues,
    },
    phase::{Phase, PhaseSender, PhaseWatch},
    plan,
    pod::{PodSource, PodSpec},
    share::Share,
    state::PodDir,
    streams::{self, Streams},
    timing::{Moment, Point, Timeline},
    vm::{
        Driver, GuestConnection, LaunchPlan, Machine, VmError,
        console::{self, Tail},
        quote_console,
    },
};

/// How long the guest may take to power itself off.
const POWER_OFF: Duration = Duration::from_secs(2);

/// How long a killed VMM may take to be reaped.
const REAP: Duration = Duration::from_secs(5);

/// Bytes that seed the guest's random pool: the strength of any key it will make.
const ENTROPY_LEN: usize = 64;

/// One pod.
pub struct Sandbox {
    id: String,
    /// containerd's namespace.
    namespace: String,
    config: Config,
    pod: PodDir,
    share: Share,
    driver: Arc<dyn Driver>,
    streams: Streams,
    phase: PhaseSender,
    machine: OnceLock<Arc<dyn Machine>>,
    growth: Growth,
    network: OnceLock<Arc<Network>>,
    /// Whoever looks for a network that was not there at the start.
    late: OnceLock<Late>,
    /// Why the shim itself ended the VM, where it did.
    doom: OnceLock<String>,
    /// What was in the pod's network namespace has been found: what comes now comes late.
    scanned: watch::Sender<bool>,
    /// The start is over, whatever came of it: it makes nothing on the host any more.
    settled: watch::Sender<bool>,
    timeline: Timeline,
}

impl Sandbox {
    /// A pod whose VM nobody has asked for yet.
    pub fn new(context: &ShimContext, share: Share, driver: Arc<dyn Driver>) -> Arc<Self> {
        let sandbox = Arc::new(Self {
            id: context.sandbox_id.clone(),
            namespace: context.namespace.clone(),
            config: context.config.clone(),
            pod: context.pod.clone(),
            share,
            driver,
            streams: Streams::default(),
            phase: PhaseSender::default(),
            machine: OnceLock::new(),
            growth: Growth::new(plan::default_size(&context.config)),
            network: OnceLock::new(),
            late: OnceLock::new(),
            doom: OnceLock::new(),
            scanned: watch::Sender::new(false),
            settled: watch::Sender::new(false),
            timeline: Timeline::default(),
        });
        sandbox
            .timeline
            .mark_at(Point::ShimStarted, Moment::shim_start());
        sandbox
    }

    /// Starts the VM in the background, the first time; its state tells how that goes. Must be called within a tokio runtime.
    pub fn start(self: &Arc<Self>, source: PodSource) {
        if !self.phase.advance(Phase::Starting) {
            return;
        }
        let starting = Arc::clone(self);
        let span = info_span!("sandbox", pod = self.id);
        tokio::spawn(async move { starting.bring_up(source).await }.instrument(span));
    }

    /// Its state.
    pub fn phase(&self) -> PhaseWatch {
        self.phase.watch()
    }

    /// The pod's share.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// The pod's streams.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// The points of this start.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// vCPUs of the VM; those of the configuration before it is known.
    pub fn vcpus(&self) -> u8 {
        self.growth.has().vcpus
    }

    /// What the containers may use, and the size of the VM.
    pub fn growth(&self) -> &Growth {
        &self.growth
    }

    /// Makes the VM fit what its containers may use, as far as it may grow. Returns when it does, cannot, or has ended.
    ///
    /// # Errors
    /// [`TooSmall`]: it still does not fit.
    pub async fn fit(&self) -> Result<(), TooSmall> {
        let pod = self.phase();
        tokio::select! {
            result = self.growth.fit() => result,
            // What comes next says so.
            _ = pod.gone() => Ok(()),
        }
    }

    /// The VMM's pid, which stands for every process in the guest; the shim's own before there is one. Never 0.
    pub fn pid(&self) -> u32 {
        self.machine
            .get()
            .map_or_else(std::process::id, |machine| machine.pid())
    }

    /// Returns when the pod's network may be set up, which stands on the VMM's namespace for a pod that has none of an engine's; or when
    /// it has ended.
    pub async fn await_network_scan(&self) {
        let mut scanned = self.scanned.subscribe();
        let phase = self.phase();
        tokio::select! {
            // The sender lives as long as this.
            _ = scanned.wait_for(|scanned| *scanned) => {}
            _ = phase.gone() => {}
        }
    }

    async fn bring_up(self: Arc<Self>, source: PodSource) {
        match self.boot(source).await {
            Ok(agent) => {
                self.let_grow(agent.clone());
                self.keep_time(agent.clone());
                if !self.phase.advance(Phase::Running(agent)) {
                    debug!("the guest is ready, but the pod is being stopped already");
                }
            }
            Err(error) => {
                let reason = chain(&error);
                warn!(reason, "the VM cannot be started");
                match self.machine.get() {
                    Some(_) => self.kill(&reason).await,
                    None => drop(self.phase.advance(Phase::Gone {
                        reason: reason.into(),
                    })),
                }
                self.release_network().await;
            }
        }
        self.settled.send_replace(true);
    }

    /// From here on the VM grows as it is needed, until it has gone.
    fn let_grow(self: &Arc<Self>, agent: Agent) {
        let Some(machine) = self.machine.get().cloned() else {
            return;
        };
        let sandbox = Arc::clone(self);
        tokio::spawn(async move {
            let grow = sandbox.growth.follow(machine, agent);
            sandbox.phase().while_there(grow).await;
        });
    }

    /// From here on the guest's clock follows the host's, until the VM has gone.
    fn keep_time(&self, agent: Agent) {
        let pod = self.phase();
        let keep = async move { pod.while_there(clock::follow(agent)).await };
        tokio::spawn(keep.in_current_span());
    }

    /// The start, top to bottom.
    async fn boot(self: &Arc<Self>, source: PodSource) -> Result<Agent, VmError> {
        self.timeline.mark(Point::VmRequested);
        let share_root = self.share.open_root().map_err(|source| VmError::Host {
            doing: "open the pod's share",
            source,
        })?;
        let users = self
            .share
            .users()
            .map(|users| users.namespace().try_clone_to_owned());
        let users = users.transpose().map_err(|source| VmError::Host {
            doing: "pass the VMM's user namespace on",
            source,
        })?;
        let spawned = self.driver.spawn(share_root, users)?;
        let machine = Arc::clone(&spawned.machine);
        // Nobody else sets it.
        let _ = self.machine.set(Arc::clone(&machine));
        self.watch_end(&machine);
        let (agent_sender, agent_connection) = oneshot::channel();
        tokio::spawn(Arc::clone(self).dispatch(spawned.connections, agent_sender));

        let (pod, network) = self.describe(machine.pid(), source).await?;
        let _ = self.network.set(Arc::clone(&network));
        // Both to their ends, whatever becomes of the other: a start that is over makes nothing any more.
        let (plan, found) = join!(self.plan(machine.pid(), &pod), network.scan(network::LIMIT));
        self.scanned.send_replace(true);
        let (mut plan, found) = (plan?, found?);
        let vcpus = plan.size.vcpus;
        plan.nics = network.nics(&found, vcpus);
        info!(
            vcpus = plan.size.vcpus,
            memory_mib = plan.size.memory_mib,
            nics = plan.nics.len(),
            vmm = machine.pid(),
            "starting the VM"
        );
        let limit = self.config.start_timeout;
        let mut forwarder = None;
        let plug = async {
            let taps = network.plug(&found, vcpus).await?;
            forwarder = network.forwarder(&found).await;
            Ok(taps)
        };
        let connect = self.connect(&*machine, plan, plug, agent_connection);
        let ended = || async {
            let reason = self.phase.watch().gone().await;
            VmError::Ended(reason.to_string())
        };
        let stream = tokio::select! {
            biased;
            connected = timeout(limit, connect) => match connected {
                Ok(Ok(stream)) => stream,
                // The VMM's own reason says more than that its sockets closed.
                Ok(Err(VmError::Ended(said))) => return Err(timeout(REAP, ended()).await.unwrap_or(VmError::Ended(said))),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(VmError::Silent { limit, console: quote_console(&machine.console_tail()) }),
            },
            error = ended() => return Err(error),
        };
        self.timeline.mark(Point::AgentConnected);
        let agent = Agent::new(stream, self.phase.watch());
        let guest = agent
            .create_sandbox(&self.sandbox_request(pod, &found)?)
            .instrument(info_span!("create_sandbox"))
            .await
            .map_err(|e| VmError::Other(format!("the guest cannot be set up: {}", e.message())))?;
        self.timeline.mark(Point::SandboxReady);
        info!(
            kernel = guest.kernel_release,
            agent = guest.agent_version,
            cpus = guest.online_cpus,
            memory_bytes = guest.memory_bytes,
            "the guest is ready"
        );
        if let Some(forwarder) = forwarder {
            let (streams, phase) = (self.streams.clone(), self.phase.watch());
            forwarder.serve(&self.id, agent.clone(), streams, phase);
        }
        if network.waits(&found) {
            let phase = self.phase.watch();
            let streams = self.streams.clone();
            let loopback = match network::has_resolver(&self.namespace) {
                true => Loopback::Resolver(streams),
                false => Loopback::Forwards(streams),
            };
            let late = Late::look_out(network, machine, agent.clone(), vcpus, phase, loopback);
            let _ = self.late.set(late);
        }
        Ok(agent)
    }

    /// Runs the VM until its agent has dialled. The taps are made while the VMM builds the VM, and connected while the guest boots.
    async fn connect(
        &self,
        machine: &dyn Machine,
        plan: LaunchPlan,
        plug: impl Future<Output = Result<Vec<Queues>, VmError>>,
        agent: oneshot::Receiver<UnixStream>,
    ) -> Result<UnixStream, VmError> {
        let launch = machine.launch(plan).instrument(info_span!("launch"));
        let (times, taps) = try_join!(launch, plug)?;
        self.timeline
            .mark_at(Point::VcpusRunning, Moment(times.vcpus_running));
        let attach = async {
            for (nic, queues) in (0..).zip(taps) {
                machine.attach_nic(nic, queues).await?;
            }
            Ok(())
        };
        let dialled = async {
            let connection = agent.instrument(info_span!("kernel_to_agent")).await;
            connection.map_err(|_| VmError::Ended("its vsock bridge closed".into()))
        };
        let (connection, ()) = try_join!(dialled, attach)?;
        Ok(connection)
    }

    /// Reads what the pod is, and which network it means.
    async fn describe(
        &self,
        vmm: u32,
        source: PodSource,
    ) -> Result<(PodSpec, Arc<Network>), VmError> {
        let id = self.id.clone();
        let of_task = format!("/proc/{vmm}/ns/net");
        let vhost = self.config.vhost_net;
        let fills_any = network::fills_new_namespace(&self.namespace);
        let has_resolver = network::has_resolver(&self.namespace);
        let read = tokio::task::spawn_blocking(move || {
            let pod = source.load().map_err(|e| VmError::Other(chain(&e)))?;
            // containerd 1.7 fills that of a pod with users of its own: it has the runtime make it, for them to own it.
            let is_filled = fills_any || pod.users.is_some();
            let of_task = is_filled.then(|| Path::new(&of_task));
            let network = Network::of_pod(&pod, &id, of_task)?;
            let network = network.with_vhost(vhost).with_resolver(has_resolver);
            Ok((pod, Arc::new(network)))
        });
        read.await
            .map_err(|e| VmError::Other(format!("cannot read what the pod is: {e}")))?
    }

    /// Decides what the VM must be, and gives the VMM its place on the host.
    async fn plan(&self, vmm: u32, spec: &PodSpec) -> Result<LaunchPlan, VmError> {
        let (config, pod, id) = (self.config.clone(), self.pod.clone(), self.id.clone());
        let spec = spec.clone();
        let planned =
            tokio::task::spawn_blocking(move || plan::place_and_size(vmm, spec, &config, &pod, id));
        let (plan, cgroup) = planned
            .await
            .map_err(|e| VmError::Other(format!("cannot plan the VM: {e}")))??;
        self.growth.planned(plan.size, plan.max, cgroup);
        Ok(plan)
    }

    fn sandbox_request(
        &self,
        pod: PodSpec,
        found: &Found,
    ) -> Result<CreateSandboxRequest, VmError> {
        let mut entropy = vec![0; ENTROPY_LEN];
        streams::random(&mut entropy).map_err(|source| VmError::Host {
            doing: "read random bytes for the guest",
            source,
        })?;
        let users = pod.users.unwrap_or_default();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            hostname: pod.hostname,
            dns_servers: pod.dns.servers,
            dns_searches: pod.dns.searches,
            dns_options: pod.dns.options,
            sysctls: pod.sysctls,
            shm_size_bytes: pod.shm_size_bytes,
            uid_map: users.uid_map,
            gid_map: users.gid_map,
            shares: vec![AgentShare {
                tag: guest_path::SHARE_TAG.into(),
                path: guest_path::SHARE.into(),
                ..Default::default()
            }],
            wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            entropy,
            network: (!found.interfaces.is_empty()).then(|| found.into()).into(),
            ..Default::default()
        })
    }

    /// Returns when the guest has what the pod's network namespace has now: a network that was not there at the start may be by now.
    ///
    /// # Errors
    /// Why the guest cannot have it.
    pub async fn refresh_network(&self) -> Result<(), TaskError> {
        match self.late.get() {
            Some(late) => late.look().await,
            None => Ok(()),
        }
    }

    /// What was made in the pod's network namespace goes.
    async fn release_network(&self) {
        if let Some(network) = self.network.get() {
            network.release().await;
        }
    }

    /// Gives each connection of the guest to whom it belongs, and closes those that belong to nobody.
    async fn dispatch(
        self: Arc<Self>,
        mut connections: mpsc::Receiver<GuestConnection>,
        agent: oneshot::Sender<UnixStream>,
    ) {
        let mut agent = Some(agent);
        let mut log_taken = false;
        while let Some(GuestConnection { port, stream }) = connections.recv().await {
            match port {
                ports::STREAM => self.streams.accept(stream),
                ports::AGENT if agent.is_some() => {
                    if let Some(sender) = agent.take() {
                        // Nobody waits any more: the start was given up.
                        let _ = sender.send(stream);
                    }
                }
                ports::LOG if !log_taken => {
                    log_taken = true;
                    let pod = self.id.clone();
                    tokio::spawn(console::follow(stream, Tail::default(), move |line| {
                        info!(target: "husk_agent", pod, "{line}");
                    }));
                }
                _ => debug!(port, "the guest dialled a port that nobody serves, closed"),
            }
        }
    }

    /// From here on the end of the VM is told to everyone.
    fn watch_end(self: &Arc<Self>, machine: &Arc<dyn Machine>) {
        let sandbox = Arc::clone(self);
        let mut ended = machine.ended();
        tokio::spawn(async move {
            let end = match ended.wait_for(Option::is_some).await {
                Ok(end) => end.clone(),
                Err(_) => None,
            };
            let seen = match end {
                Some(end) if end.console.is_empty() => end.reason.clone(),
                Some(end) => format!("{}; {}", end.reason, quote_console(&end.console)),
                None => "nobody knows why".to_owned(),
            };
            let reason = sandbox.doom.get().cloned().unwrap_or(seen);
            info!(pod = sandbox.id, reason, "the VM has gone");
            sandbox.timeline.mark(Point::Reaped);
            sandbox.timeline.log_end(&sandbox.id);
            // A write that the kernel answers at once.
            if let Err(error) = cgroup::go_home() {
                warn!(%error, "the shim stays in the pod's cgroup");
            }
            sandbox.phase.advance(Phase::Gone {
                reason: reason.into(),
            });
        });
    }

    /// Ends the VM without asking the guest, and waits until it is over.
    pub async fn kill(&self, reason: &str) {
        let _ = self.doom.set(reason.to_owned());
        match self.machine.get() {
            Some(machine) => machine.kill(),
            None => drop(self.phase.advance(Phase::Gone {
                reason: reason.into(),
            })),
        }
        if timeout(REAP, self.phase.watch().gone()).await.is_err() {
            warn!(pod = self.id, "the VMM does not end although it was killed");
            self.phase.advance(Phase::Gone {
                reason: reason.into(),
            });
        }
    }

    /// Takes the pod down: the guest may end what runs and write back what it holds, then the VM goes. Idempotent.
    pub async fn stop(&self) {
        let before = self.phase.leave_for(Phase::Stopping);
        let gone = async {
            match before {
                Some(Phase::Running(agent)) => {
                    if let Err(error) = agent.destroy_sandbox().await {
                        debug!(%error, "the guest ended without an answer");
                    }
                }
                // Nobody to ask.
                Some(Phase::Starting) => return,
                // No start there is or will be.
                Some(_) => {
                    self.settled.send_replace(true);
                    return;
                }
                // Somebody else is at it, or was.
                None => {}
            }
            self.phase.watch().gone().await;
        };
        if timeout(POWER_OFF, gone).await.is_err() {
            warn!(
                pod = self.id,
                "the guest does not power itself off within {POWER_OFF:?}, ended by force"
            );
        }
        if !matches!(self.phase.watch().now(), Phase::Gone { .. }) {
            self.kill("the pod was stopped").await;
        }
        let mut settled = self.settled.subscribe();
        let settled = settled.wait_for(|&settled| settled);
        if timeout(REAP, settled).await.is_err() {
            warn!(
                pod = self.id,
                "the VM's start does not end although the VM has gone"
            );
        }
        self.release_network().await;
    }
}
