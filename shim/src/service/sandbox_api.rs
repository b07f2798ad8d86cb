//! The Sandbox API (`containerd.runtime.sandbox.v1`): a pod that containerd opens and closes itself, with
//! `sandboxer = "shim"` (2.x) or `sandbox_mode = "shim"` (1.7, with ENABLE_CRI_SANDBOXES in its environment).
//!
//! How containerd goes about it, read from `core/sandbox`, `core/runtime/v2` and `internal/cri/server`:
//! - `start` is run in a bundle without a spec, once a pod, with the pod's id. The network namespace is there and configured by then.
//! - CreateSandbox brings the pod's configuration (a CRI PodSandboxConfig), StartSandbox follows at once; the VM boots from the first on
//!   and the second waits for it. When either fails, ShutdownSandbox comes, and then `delete`.
//! - A container of the pod gets a bundle with `sandbox` and `bootstrap.json` (1.7: `address`) in it and a connection of its own to this
//!   shim: Task.Create without any `start`. When that fails, Task.Shutdown comes, and must not end the pod.
//! - CRI asks SandboxStatus before each container, for the pid; and WaitSandbox from the start on, to learn that the pod has gone.
//!   It leaves /etc/hosts and its like to the sandbox ([`crate::etc`]).
//! - StopSandbox comes after the containers were killed, ShutdownSandbox after they were deleted. NotFound is taken for done.
//! - After a restart containerd finds the shim by the bundle's `bootstrap.json` or `address`, and asks Task.Connect, Task.Pids (NotFound
//!   is fine), SandboxStatus and WaitSandbox.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
};
use serde_json::json;
use tokio::sync::watch;
use tracing::info;

use super::{Call, Tasks, stats, to_the_end};
use crate::{
    cgroup,
    error::TaskError,
    info::RUNTIME,
    lifecycle::Exit,
    pod::{Keeper, PodSpec},
};

/// CRI's names of a pod's states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// This machine in Go's words, in which containerd picks images.
const ARCHITECTURE: &str = if cfg!(target_arch = "x86_64") {
    "amd64"
} else {
    std::env::consts::ARCH
};

/// A sandbox, as its client sees it. It moves down this list and never back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Its VM comes up.
    Created,
    /// StartSandbox was answered.
    Ready,
    /// Somebody wants it to end.
    Stopping,
    /// Its VM has gone.
    Over,
}

/// A created sandbox.
struct Life {
    created_at: SystemTime,
    /// The path of the pod's network namespace; empty: it has none.
    netns: String,
    stage: watch::Sender<Stage>,
    /// Set before the stage is [`Stage::Over`].
    exit: OnceLock<Exit>,
}

impl Life {
    fn new(netns: &str) -> Self {
        Self {
            created_at: SystemTime::now(),
            netns: netns.to_owned(),
            stage: watch::Sender::new(Stage::Created),
            exit: OnceLock::new(),
        }
    }

    fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Moves on to `next`; a move back is not made.
    fn advance(&self, next: Stage) {
        self.stage.send_if_modified(|stage| {
            let forward = next > *stage;
            *stage = next.max(*stage);
            forward
        });
    }

    /// The VM has gone: as somebody wanted, or by itself.
    fn end(&self) {
        let exit = match self.stage() {
            Stage::Stopping => Exit::now(0),
            Stage::Created | Stage::Ready | Stage::Over => Exit::killed(),
        };
        let _ = self.exit.set(exit);
        self.advance(Stage::Over);
    }

    async fn over(&self) -> Exit {
        // The sender lives as long as this.
        let _ = self
            .stage
            .subscribe()
            .wait_for(|stage| *stage == Stage::Over)
            .await;
        self.exit.get().copied().unwrap_or_else(Exit::killed)
    }
}

/// The Sandbox API.
#[derive(Clone)]
pub struct SandboxService {
    tasks: Arc<Tasks>,
    life: Arc<OnceLock<Life>>,
}

impl SandboxService {
    /// For the pod of these tasks.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self {
            tasks,
            life: Arc::default(),
        }
    }

    /// The pod must be this one, and containerd's.
    fn check(&self, id: &str) -> Result<(), TaskError> {
        let context = self.tasks.context();
        if id != context.sandbox_id {
            return Err(TaskError::not_found(format!(
                "sandbox {id:?} not found: this shim is sandbox {:?}'s",
                context.sandbox_id
            )));
        }
        match context.keeper {
            Keeper::SandboxApi => Ok(()),
            Keeper::Containers => Err(TaskError::not_found(format!(
                "sandbox {id:?} not found: the bundle that the shim was started with holds a container, which the Task API starts"
            ))),
        }
    }

    fn get(&self, id: &str) -> Result<&Life, TaskError> {
        self.check(id)?;
        self.life.get().ok_or_else(|| {
            TaskError::not_found(format!(
                "sandbox {id:?} not found: it has not been created, CreateSandbox comes first"
            ))
        })
    }

    async fn create(&self, request: CreateSandboxRequest) -> Result<(), TaskError> {
        self.check(&request.sandbox_id)?;
        if !request.rootfs.is_empty() {
            info!("the sandbox's root file system is not used: its guest has one of its own");
        }
        let pod = PodSpec::of_request(&request, &self.tasks.context().namespace)
            .map_err(|e| TaskError::invalid_argument(e.to_string()))?;
        if self.life.set(Life::new(&request.netns_path)).is_err() {
            return Err(TaskError::already_exists(format!(
                "sandbox {:?} already exists",
                request.sandbox_id
            )));
        }
        let opened = self.tasks.open_sandbox(pod).await;
        let service = self.clone();
        tokio::spawn(async move {
            service.tasks.sandbox().phase().gone().await;
            if let Some(life) = service.life.get() {
                life.end();
            }
        });
        if opened.is_err() {
            // Nobody can start it any more.
            self.tasks.sandbox().stop().await;
        }
        opened
    }

    /// Returns once the VM is up.
    async fn start(&self, id: &str) -> Result<StartSandboxResponse, TaskError> {
        let life = self.get(id)?;
        let failed =
            |reason: &str| TaskError::failed(format!("sandbox {id:?} cannot be started: {reason}"));
        let sandbox = self.tasks.sandbox();
        let agent = sandbox.phase().agent().await;
        agent.map_err(|reason| failed(&reason))?;
        life.advance(Stage::Ready);
        if life.stage() > Stage::Ready {
            return Err(failed("it has been stopped"));
        }
        Ok(StartSandboxResponse {
            pid: sandbox.pid(),
            created_at: Some(life.created_at.into()).into(),
            ..Default::default()
        })
    }

    async fn stop(&self, id: &str, patience: Duration) -> Result<(), TaskError> {
        let life = self.get(id)?;
        life.advance(Stage::Stopping);
        self.tasks.stop(patience).await;
        life.over().await;
        Ok(())
    }

    async fn shut_down(&self, id: &str) -> Result<(), TaskError> {
        self.check(id)?;
        if let Some(life) = self.life.get() {
            life.advance(Stage::Stopping);
        }
        self.tasks.end().await;
        Ok(())
    }

    /// What people see with `crictl inspectp`: under "info" what CRI itself adds to, under "vm" what only husk knows.
    fn details(&self, life: &Life, stage: Stage, pid: u32) -> HashMap<String, String> {
        let status = match stage {
            Stage::Ready => "running",
            Stage::Created => "created",
            Stage::Stopping | Stage::Over => "stopped",
        };
        let mut info = json!({"pid": pid, "processStatus": status, "runtimeType": RUNTIME});
        if !life.netns.is_empty() {
            // Where scripts look for it, as with a pause container.
            let network = json!({"type": "network", "path": life.netns});
            info["runtimeSpec"] = json!({"linux": {"namespaces": [network]}});
        }
        let size = self.tasks.sandbox().growth().size();
        let vm = size.map(|size| json!({"vcpus": size.vcpus, "memory_mib": size.memory_mib}));
        [("info", Some(info)), ("vm", vm)]
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?.to_string())))
            .collect()
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: Call<'_>,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        info!(
            sandbox = request.sandbox_id,
            netns = request.netns_path,
            "CreateSandbox"
        );
        let service = self.clone();
        to_the_end(async move { service.create(request).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: Call<'_>,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        info!(sandbox = request.sandbox_id, "StartSandbox");
        Ok(self.start(&request.sandbox_id).await?)
    }

    async fn platform(
        &self,
        _: Call<'_>,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.check(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        platform.architecture = ARCHITECTURE.into();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: Call<'_>,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let patience = Duration::from_secs(request.timeout_secs.into());
        info!(sandbox = request.sandbox_id, ?patience, "StopSandbox");
        let service = self.clone();
        to_the_end(async move { service.stop(&request.sandbox_id, patience).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: Call<'_>,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.get(&request.sandbox_id)?.over().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: Call<'_>,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let life = self.get(&request.sandbox_id)?;
        let stage = life.stage();
        let (state, pid) = match stage {
            Stage::Ready => (READY, self.tasks.sandbox().pid()),
            Stage::Created | Stage::Stopping => (NOT_READY, self.tasks.sandbox().pid()),
            Stage::Over => (NOT_READY, 0),
        };
        let info = if request.verbose {
            self.details(life, stage, pid)
        } else {
            HashMap::new()
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid,
            state: state.into(),
            info,
            created_at: Some(life.created_at.into()).into(),
            exited_at: life.exit.get().map(|exit| exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: Call<'_>, request: PingRequest) -> ttrpc::Result<PingResponse> {
        match self.get(&request.sandbox_id)?.stage() {
            Stage::Ready => Ok(PingResponse::new()),
            Stage::Created => Err(TaskError::failed_precondition("the sandbox is starting").into()),
            Stage::Stopping | Stage::Over => {
                Err(TaskError::failed_precondition("the sandbox has been stopped").into())
            }
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: Call<'_>,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        info!(sandbox = request.sandbox_id, "ShutdownSandbox");
        let service = self.clone();
        to_the_end(async move { service.shut_down(&request.sandbox_id).await }).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: Call<'_>,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        if self.get(&request.sandbox_id)?.stage() != Stage::Ready {
            return Err(TaskError::failed_precondition("the sandbox does not run").into());
        }
        let failed = |e: &dyn std::error::Error| {
            TaskError::failed(format!("cannot measure the sandbox's VM: {e}"))
        };
        let sandbox = self.tasks.sandbox();
        let memory = sandbox
            .growth()
            .size()
            .map_or(0, |size| size.memory_mib << 20);
        let figures = stats::of_process(sandbox.pid(), memory).map_err(|e| failed(&e))?;
        let data = stats::metrics(&figures, cgroup::is_unified()).map_err(|e| failed(&e))?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = Some(SystemTime::now().into()).into();
        metrics.data = Some(data).into();
        Ok(response)
    }
}
