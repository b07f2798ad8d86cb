//! The Task API: each call as containerd sends it, onto the pod's tasks.
//!
//! What changes something runs as a task of its own ([`to_the_end`]), and the handler only waits for it.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{Message as _, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::Task,
};
use tracing::{debug, info};

use super::{Call, Tasks, stats, tasks::Create, to_the_end};
use crate::{
    cgroup,
    error::TaskError,
    input::Options,
    lifecycle::{Exit, Stage},
    stdio::StdioPaths,
    timing::Point,
};

/// Type of the details that runc's shim gives about an exec; its users look for them.
const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

/// Most processes that are counted for a container, whatever its guest says: the kernel's default for pid_max.
const MAX_PROCESSES: usize = 32 * 1024;

/// The Task API.
pub struct TaskService {
    tasks: Arc<Tasks>,
}

impl TaskService {
    /// For these tasks.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }
}

/// A task's status as containerd knows it.
fn status(stage: Stage) -> (Status, Option<Exit>) {
    match stage {
        Stage::Created | Stage::Starting { .. } => (Status::CREATED, None),
        Stage::Running | Stage::Ending(_) => (Status::RUNNING, None),
        Stage::Paused => (Status::PAUSED, None),
        Stage::Exited(exit) => (Status::STOPPED, Some(exit)),
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: Call<'_>,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        info!(
            container = request.id,
            bundle = request.bundle,
            terminal = request.terminal,
            "Create"
        );
        if !request.checkpoint.is_empty() {
            return Err(TaskError::unimplemented(
                "restoring a checkpoint is not supported by husk",
            )
            .into());
        }
        let create = Create {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs,
            paths: StdioPaths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            settings: request
                .options
                .as_ref()
                .and_then(|options| Options::of(options).config_path),
        };
        let tasks = Arc::clone(&self.tasks);
        let pid = to_the_end(async move { tasks.create(create).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: Call<'_>, request: StartRequest) -> ttrpc::Result<StartResponse> {
        info!(container = request.id, exec = request.exec_id, "Start");
        let container = self.tasks.get(&request.id)?;
        let sandbox = Arc::clone(self.tasks.sandbox());
        let pid = container.pid();
        to_the_end(async move {
            container.start(&request.exec_id).await?;
            if request.exec_id.is_empty() {
                sandbox.timeline().mark(Point::Started);
                sandbox.timeline().log_start(container.id());
            }
            Ok(())
        })
        .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: Call<'_>, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.tasks.get(&request.id)?;
        let snapshot = container.snapshot(&request.exec_id)?;
        let (status, exit) = status(snapshot.stage);
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle().display().to_string(),
            pid: container.pid(),
            status: status.into(),
            stdin: snapshot.paths.stdin,
            stdout: snapshot.paths.stdout,
            stderr: snapshot.paths.stderr,
            terminal: snapshot.paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn delete(&self, _: Call<'_>, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        info!(container = request.id, exec = request.exec_id, "Delete");
        let tasks = Arc::clone(&self.tasks);
        let (pid, exit) = to_the_end(async move {
            if request.exec_id.is_empty() {
                return tasks.delete(&request.id).await;
            }
            let container = tasks.get(&request.id)?;
            Ok((container.pid(), container.delete_exec(&request.exec_id)?))
        })
        .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: Call<'_>, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.tasks.get(&request.id)?;
        let in_guest = container.count_processes().await.unwrap_or(0);
        let process = |info: Option<Any>| ProcessInfo {
            pid: container.pid(),
            info: info.into(),
            ..Default::default()
        };
        // The init counts as long as the task is there: containerd takes a shim without pids for a leaked one.
        let mut processes = vec![process(None)];
        for exec_id in container.running_execs() {
            let details = ProcessDetails {
                exec_id,
                ..Default::default()
            };
            let value = details
                .write_to_bytes()
                .map_err(|e| TaskError::failed(e.to_string()))?;
            processes.push(process(Some(Any {
                type_url: PROCESS_DETAILS.to_owned(),
                value,
                ..Default::default()
            })));
        }
        // The others have no pid here, but they are counted (CRI's PodSandboxStats).
        let count = in_guest.min(MAX_PROCESSES).max(processes.len());
        processes.resize(count, process(None));
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: Call<'_>, request: PauseRequest) -> ttrpc::Result<Empty> {
        info!(container = request.id, "Pause");
        let container = self.tasks.get(&request.id)?;
        to_the_end(async move { container.freeze(true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: Call<'_>, request: ResumeRequest) -> ttrpc::Result<Empty> {
        info!(container = request.id, "Resume");
        let container = self.tasks.get(&request.id)?;
        to_the_end(async move { container.freeze(false).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: Call<'_>, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(TaskError::unimplemented("checkpoints are not supported by husk").into())
    }

    async fn kill(&self, _: Call<'_>, request: KillRequest) -> ttrpc::Result<Empty> {
        info!(
            container = request.id,
            exec = request.exec_id,
            signal = request.signal,
            all = request.all,
            "Kill"
        );
        let container = self.tasks.get(&request.id)?;
        to_the_end(async move {
            container
                .kill(&request.exec_id, request.signal, request.all)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: Call<'_>, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        info!(container = request.id, exec = request.exec_id, "Exec");
        let container = self.tasks.get(&request.id)?;
        if request.exec_id.is_empty() {
            return Err(TaskError::invalid_argument("an exec needs an id").into());
        }
        let paths = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.add_exec(&request.exec_id, &request.spec.value, paths)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: Call<'_>, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.get(&request.id)?;
        container
            .resize(&request.exec_id, request.width, request.height)
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: Call<'_>, request: CloseIORequest) -> ttrpc::Result<Empty> {
        debug!(container = request.id, exec = request.exec_id, "CloseIO");
        let container = self.tasks.get(&request.id)?;
        if request.stdin {
            container.close_stdin(&request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: Call<'_>, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        info!(container = request.id, "Update");
        let container = self.tasks.get(&request.id)?;
        let resources = request.resources.value.clone();
        to_the_end(async move { container.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: Call<'_>, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.tasks.get(&request.id)?;
        let mut over = container.watch(&request.exec_id)?;
        drop(container);
        let exit = match over.wait_for(Option::is_some).await {
            Ok(exit) => *exit,
            // Deleted without ever having been started.
            Err(_) => None,
        };
        let exit = exit.ok_or_else(|| TaskError::not_found("the process was deleted"))?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: Call<'_>, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.tasks.get(&request.id)?;
        let figures = container.stats().await?;
        let stats = stats::metrics(&figures, cgroup::is_unified())
            .map_err(|e| TaskError::failed(e.to_string()))?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: Call<'_>,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // Also without a container: CRI-O asks before Create.
        debug!(container = request.id, "Connect");
        let container = self.tasks.get(&request.id);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.map_or_else(|_| self.tasks.sandbox().pid(), |c| c.pid()),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: Call<'_>, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        info!(container = request.id, now = request.now, "Shutdown");
        let tasks = Arc::clone(&self.tasks);
        to_the_end(async move {
            tasks.shutdown().await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}
