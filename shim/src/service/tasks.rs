//! The pod's containers: who is there, and who is on its way in or out.

mod end;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{events::task as events, types::mount::Mount};
use husk_protocol::agent::event::Kind;
use tokio::{
    sync::{OnceCell, watch},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    agent::Agent,
    config,
    container::{Container, Parts, TaskPid},
    context::ShimContext,
    demand::Demand,
    error::{TaskError, chain},
    etc::PodFiles,
    hooks::Subject,
    lifecycle::Exit,
    mount::MountRequest,
    network,
    phase::Phase,
    pod::{Keeper, PodSource, PodSpec},
    sandbox::Sandbox,
    share::Share,
    spec::{self, BundleSpec, GuestPaths, GuestSpec, Neighbours},
    stdio::StdioPaths,
    timing::Point,
    vm::Driver,
    volume::Volumes,
};

/// How long the guest may take with a container that is not wanted any more.
const GUEST_GRACE: Duration = Duration::from_secs(2);

enum Slot {
    /// A Create is on its way.
    Creating(Creation),
    Ready(Arc<Container>),
}

/// A Create under way, as seen by a Delete that does not wait for it.
#[derive(Clone, Default)]
struct Creation(Arc<watch::Sender<Progress>>);

#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    #[default]
    Wanted,
    /// Nobody wants the container any more.
    Cancelled,
    /// It is there, or nothing is left of it.
    Over,
}

impl Creation {
    fn advance(&self, next: Progress) {
        self.0.send_if_modified(|now| {
            let forward = next > *now;
            if forward {
                *now = next;
            }
            forward
        });
    }

    async fn reached(&self, progress: Progress) {
        // The sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|now| *now >= progress).await;
    }
}

/// Every task of one pod.
pub struct Tasks {
    context: ShimContext,
    sandbox: Arc<Sandbox>,
    slots: Mutex<BTreeMap<String, Slot>>,
    /// What a pod of the Sandbox API has below /etc.
    files: OnceLock<PodFiles>,
    cleared: OnceCell<()>,
    volumes: Volumes,
    done: watch::Sender<bool>,
}

/// A Create request.
pub struct Create {
    /// Container id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What makes up its root file system; none: the spec's root.path.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub paths: StdioPaths,
    /// The settings' file that its runtime options name.
    pub settings: Option<PathBuf>,
}

impl Tasks {
    /// Starts the pod, where its containers keep it. Must be called within a tokio runtime.
    pub fn start(context: ShimContext, share: Share, driver: Arc<dyn Driver>) -> Arc<Self> {
        let sandbox = Sandbox::new(&context, share, driver);
        let volumes = Volumes::start(sandbox.phase());
        let tasks = Arc::new(Self {
            sandbox,
            context,
            slots: Mutex::default(),
            files: OnceLock::new(),
            cleared: OnceCell::new(),
            volumes,
            done: watch::Sender::new(false),
        });
        if tasks.context.keeper == Keeper::Containers {
            tasks.bring_up(PodSource::Bundle(tasks.context.bundle.clone()));
        }
        tasks
    }

    fn bring_up(self: &Arc<Self>, source: PodSource) {
        self.sandbox.start(source);
        tokio::spawn(Arc::clone(self).follow_events());
    }

    /// Starts the pod of a CreateSandbox. Must be called once at most.
    ///
    /// # Errors
    /// When the pod's files cannot be written; its VM is not started then.
    pub async fn open_sandbox(self: &Arc<Self>, pod: PodSpec) -> Result<(), TaskError> {
        // On a disk, and removed by containerd with the bundle: containers may write to the files.
        let dir = self.context.bundle.join("work/etc");
        let written = tokio::task::spawn_blocking(move || {
            let files = PodFiles::write(&dir, &pod);
            files.map(|files| (files, pod))
        });
        let (files, pod) = written
            .await
            .map_err(|e| TaskError::failed(format!("cannot write the pod's files: {e}")))?
            .map_err(|e| TaskError::failed(e.to_string()))?;
        let _ = self.files.set(files);
        let id = &self.context.sandbox_id;
        self.sandbox.growth().set(id, Demand::of_pod(&pod));
        self.bring_up(PodSource::Request(Box::new(pod)));
        Ok(())
    }

    /// What the shim knows of its start.
    pub fn context(&self) -> &ShimContext {
        &self.context
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of this id.
    ///
    /// # Errors
    /// NotFound; FailedPrecondition while it is being created.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating(_)) => Err(TaskError::failed_precondition(format!(
                "container {id:?} is being created"
            ))),
            None => Err(TaskError::not_found(format!(
                "container {id:?} not found: container does not exist"
            ))),
        }
    }

    /// The pod.
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// Create.
    ///
    /// # Errors
    /// AlreadyExists, or what is wrong with the bundle, its mounts, the VM or the spec; nothing of the container stays then.
    pub async fn create(self: &Arc<Self>, request: Create) -> Result<u32, TaskError> {
        let id = request.id.clone();
        if matches!(self.sandbox.phase().now(), Phase::Idle) {
            return Err(TaskError::failed_precondition(format!(
                "cannot create container {id:?}: the shim was started with a bundle that has no root file system, for a sandbox, and no CreateSandbox came"
            )));
        }
        self.sandbox.timeline().mark(Point::CreateReceived);
        let creation = Creation::default();
        {
            let mut slots = self.slots();
            if slots.contains_key(&id) {
                return Err(TaskError::already_exists(format!(
                    "container {id:?} already exists"
                )));
            }
            slots.insert(id.clone(), Slot::Creating(creation.clone()));
        }
        let created = Box::pin(self.create_in_slot(request, &creation)).await;
        if let Err(error) = &created {
            warn!(container = id, %error, "the container cannot be created");
            self.sandbox.growth().forget(&id);
            self.slots().remove(&id);
            self.stop_if_empty();
        }
        creation.advance(Progress::Over);
        created.map(|container| container.pid())
    }

    async fn create_in_slot(
        self: &Arc<Self>,
        request: Create,
        creation: &Creation,
    ) -> Result<Arc<Container>, TaskError> {
        let id = request.id.clone();
        self.check_settings(&request)?;
        // The VM comes up meanwhile; where the files cannot be had, nobody waits for it.
        let (spec, paths) = self.add_files(&request).await?;
        match self
            .create_in_guest(&request, creation, &spec, &paths)
            .await
        {
            Ok((container, agent)) => {
                self.sandbox.timeline().mark(Point::Created);
                self.announce_create(&request, container.pid());
                self.slots().insert(id, Slot::Ready(Arc::clone(&container)));
                container.follow_init(&agent);
                Ok(container)
            }
            Err(error) => {
                self.remove_failed(&id).await;
                let subject = Subject {
                    id: &id,
                    bundle: &request.bundle,
                    pid: self.sandbox.pid(),
                };
                // Those before the start may have made something.
                spec.hooks().stopped(subject).await;
                spec.hooks().owe(&self.context.pod, &id, false).await;
                Err(error)
            }
        }
    }

    /// The pod's VM has its settings from the shim's `start`. CRI-O names a file (`runtime_config_path`) with Create alone, which is too late;
    /// a pod that ran with other settings than its node's owner wrote would be worse than none.
    fn check_settings(&self, request: &Create) -> Result<(), TaskError> {
        match &request.settings {
            Some(wanted) if self.context.settings.as_ref() != Some(wanted) => {
                let had = self.context.settings.as_deref();
                Err(TaskError::invalid_argument(format!(
                    "cannot create container {:?}: its runtime options name the settings {}, but the pod's VM was started with those of {}, because \
                     this engine names them with Create alone (CRI-O's runtime_config_path): put them there",
                    request.id,
                    wanted.display(),
                    had.unwrap_or(Path::new(config::DEFAULT_PATH)).display(),
                )))
            }
            _ => Ok(()),
        }
    }

    async fn create_in_guest(
        &self,
        request: &Create,
        creation: &Creation,
        spec: &BundleSpec,
        paths: &GuestPaths,
    ) -> Result<(Arc<Container>, Agent), TaskError> {
        let cancelled = || async {
            creation.reached(Progress::Cancelled).await;
            TaskError::new(
                ttrpc::Code::CANCELLED,
                "the container was deleted while it was being created",
            )
        };
        // The sandbox's pid is the pod's, by which Docker and CRI find its network.
        let pid = spec.is_member().then(TaskPid::new).transpose();
        let pid = pid.map_err(|e| {
            TaskError::failed(format!(
                "cannot start a thread for the container's pid: {e}"
            ))
        })?;
        let hooks = spec.hooks();
        // The VM boots meanwhile.
        let hooked = async {
            self.sandbox.await_network_scan().await;
            let subject = Subject {
                id: &request.id,
                bundle: &request.bundle,
                pid: pid
                    .as_ref()
                    .map_or_else(|| self.sandbox.pid(), TaskPid::get),
            };
            hooks.owe(&self.context.pod, &request.id, true).await;
            let hooked = hooks.before(subject).await;
            hooked.map_err(|e| TaskError::failed(chain(&e)))
        };
        let phase = self.sandbox.phase();
        let ready = async {
            let agent = phase.agent().await;
            agent.map_err(|reason| TaskError::failed(reason.to_string()))
        };
        let agent = tokio::select! {
            biased;
            error = cancelled() => return Err(error),
            ready = async { tokio::try_join!(ready, hooked) } => ready?.0,
        };
        self.sandbox
            .growth()
            .set(&request.id, Demand::of_spec(spec));
        tokio::select! {
            biased;
            error = cancelled() => return Err(error),
            fitted = self.sandbox.fit() => if let Err(error) = fitted {
                info!(container = request.id, "{error}");
            }
        }
        self.sandbox.refresh_network().await?;
        let neighbours = self.neighbours();
        let parts = Parts {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            namespace: self.context.namespace.clone(),
            sandbox: Arc::clone(&self.sandbox),
            pid,
            publisher: self.context.publisher.clone(),
            hooks: spec.hooks(),
            paths: request.paths.clone(),
        };
        // A guest that is at it is better let finish: it cannot delete what it is still making.
        let given_up = async {
            let error = cancelled().await;
            sleep(GUEST_GRACE).await;
            error
        };
        let making = async {
            let mut paths = paths.clone();
            let kept = spec.kept_volumes();
            let mirrored = self.volumes.attach(&request.id, kept).await;
            paths.mounts.extend(mirrored);
            for volume in &paths.huge_volumes {
                agent.sync_volume(&volume.request()).await?;
            }
            let GuestSpec { mut spec, joins } = spec
                .for_guest(&paths, self.sandbox.vcpus(), &neighbours)
                .map_err(|e| TaskError::failed_precondition(e.to_string()))?;
            if let Some(bytes) = self.sandbox.growth().huge_pages() {
                spec::limit_huge_pages(&mut spec, bytes);
            }
            let spec_json = serde_json::to_vec(&spec)
                .map_err(|e| TaskError::failed(format!("cannot write the guest's spec: {e}")))?;
            Container::create(parts, &agent, spec_json, joins).await
        };
        let container = tokio::select! {
            created = making => created?,
            error = given_up => return Err(error),
        };
        Ok((container, agent))
    }

    /// Who is there to share namespaces with.
    fn neighbours(&self) -> Neighbours {
        let slots = self.slots();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container),
            Slot::Creating(_) => None,
        });
        let by_pid = ready.map(|container| (container.pid(), container.id().to_owned()));
        let pause = &self.context.sandbox_id;
        Neighbours {
            by_pid: by_pid.collect(),
            pause: slots.contains_key(pause).then(|| pause.clone()),
        }
    }

    /// Loads the spec and brings the container's files into the share.
    async fn add_files(&self, request: &Create) -> Result<(BundleSpec, GuestPaths), TaskError> {
        let (share, id, bundle) = (
            self.sandbox.share().clone(),
            request.id.clone(),
            request.bundle.clone(),
        );
        let rootfs: Vec<MountRequest> = request.rootfs.iter().map(mount_request).collect();
        let files = self.files.get().cloned();
        let fills_network = network::fills_new_namespace(&self.context.namespace);
        let added = tokio::task::spawn_blocking(move || {
            let mut spec =
                BundleSpec::load(&bundle).map_err(|e| TaskError::invalid_argument(chain(&e)))?;
            for (destination, source) in files.iter().flat_map(PodFiles::mounts) {
                spec.bind_file(&destination, &source);
            }
            if fills_network {
                spec.join_network();
            }
            // The pod's files are there where the sandbox is the shim itself.
            if files.is_some() {
                spec.share_shm();
            }
            let paths = share
                .add(&id, &rootfs, &spec)
                .map_err(|e| TaskError::failed(chain(&e)))?;
            Ok((spec, paths))
        });
        let added = added
            .await
            .map_err(|e| TaskError::failed(format!("cannot prepare the container's files: {e}")))?;
        self.sandbox.timeline().mark(Point::RootfsReady);
        added
    }

    /// Takes out what a failed create has brought in.
    async fn remove_failed(&self, id: &str) {
        if let Phase::Running(agent) = self.sandbox.phase().now() {
            // A Delete may wait for this, and containerd waits 5 s for that. The guest goes on by itself.
            let deleted = timeout(GUEST_GRACE, agent.delete_container(id)).await;
            debug!(
                container = id,
                ?deleted,
                "the guest was asked to clear the failed container away"
            );
        }
        self.volumes.detach(id);
        let (share, id) = (self.sandbox.share().clone(), id.to_owned());
        if let Err(error) = tokio::task::spawn_blocking(move || share.remove(&id)).await {
            warn!(%error, "the files of a failed container were not cleared away");
        }
    }

    fn announce_create(&self, request: &Create, pid: u32) {
        let paths = &request.paths;
        let io = events::TaskIO {
            stdin: paths.stdin.clone(),
            stdout: paths.stdout.clone(),
            stderr: paths.stderr.clone(),
            terminal: paths.terminal,
            ..Default::default()
        };
        self.context.publisher.send(events::TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.display().to_string(),
            rootfs: request.rootfs.clone(),
            io: Some(io).into(),
            pid,
            ..Default::default()
        });
    }

    /// Delete of a container.
    ///
    /// # Errors
    /// NotFound, or FailedPrecondition while it runs.
    pub async fn delete(&self, id: &str) -> Result<(u32, Exit), TaskError> {
        // containerd deletes what it has lost patience with, and comes back with Shutdown when that is done.
        let creation = match self.slots().get(id) {
            Some(Slot::Creating(creation)) => Some(creation.clone()),
            _ => None,
        };
        if let Some(creation) = creation {
            creation.advance(Progress::Cancelled);
            creation.reached(Progress::Over).await;
        }
        let container = self.get(id)?;
        let exit = container.delete().await?;
        let (pod, name) = (self.context.pod.clone(), id.to_owned());
        let forgotten = tokio::task::spawn_blocking(move || {
            pod.update(|state| {
                state.containers.remove(&name);
                state.hooked.remove(&name);
            })
        });
        match forgotten.await {
            Ok(Ok(())) => {}
            outcome => debug!(?outcome, "the pod's state file still lists the container"),
        }
        // Last: the Shutdown that follows another's Delete ends the shim where nobody is left, and this answer with it.
        let removed = self.slots().remove(id);
        if removed.is_none() {
            return Err(TaskError::not_found(format!(
                "container {id:?} not found: it was deleted meanwhile"
            )));
        }
        self.volumes.detach(id);
        container.announce_delete(exit);
        self.sandbox.growth().forget(id);
        self.stop_if_empty();
        Ok((container.pid(), exit))
    }

    /// Events that the guest tells unasked. The call that waits for them also shows when the agent has gone while the VM still
    /// runs: nothing can be done with such a VM.
    async fn follow_events(self: Arc<Self>) {
        let Ok(agent) = self.sandbox.phase().agent().await else {
            return;
        };
        loop {
            match agent.next_event().await {
                Ok(event) => match event.kind {
                    Some(Kind::Oom(oom)) => match self.get(&event.container_id) {
                        Ok(container) => container.announce_oom(oom.kills),
                        Err(error) => debug!(%error, "an event of a container that is not there"),
                    },
                    _ => debug!("an event of a kind that this shim does not know"),
                },
                Err(error) => {
                    if matches!(self.sandbox.phase().now(), Phase::Running(_)) {
                        let reason = format!("the guest's agent has gone: {error}");
                        warn!(reason, "the VM is ended");
                        self.sandbox.kill(&reason).await;
                    }
                    return;
                }
            }
        }
    }
}

fn mount_request(mount: &Mount) -> MountRequest {
    MountRequest {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}
