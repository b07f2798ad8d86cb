//! One task of the pod: a container, its init and its execs, as the Task API drives them.
//!
//! The state lives in a [`Lifecycle`] under a plain mutex that is never held across an await. A call changes the state, asks the
//! guest, and reports the answer to the state again; meanwhile every other call sees a state and gets an answer. What the guest
//! reports on its own comes from one reaper a process.

mod announce;
mod calls;
mod run;
mod task_pid;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

pub use task_pid::TaskPid;
use tokio::sync::watch;

use crate::{
    agent::Agent,
    error::TaskError,
    events::Publisher,
    hooks::{Hooks, Subject},
    lifecycle::{Announcement, Exit, Lifecycle, Stage},
    sandbox::Sandbox,
    stdio::{Stdio, StdioPaths, StreamKind},
    streams::Expecting,
};

const SIGKILL: u32 = 9;

/// What belongs to a process besides its state.
struct Process {
    paths: StdioPaths,
    /// An exec's OCI process, JSON for the agent; empty for the init.
    json: Vec<u8>,
    /// Its streams on the host, and the tokens with which the guest may still dial them.
    streams: Option<(Arc<Stdio>, Expecting)>,
    /// CloseIO came; also before there were streams.
    stdin_closed: bool,
}

/// One task.
pub struct Container {
    id: String,
    bundle: PathBuf,
    namespace: String,
    sandbox: Arc<Sandbox>,
    pid: Option<TaskPid>,
    publisher: Publisher,
    hooks: Hooks,
    life: Mutex<Lifecycle>,
    processes: Mutex<HashMap<String, Process>>,
    ooms: Mutex<Ooms>,
}

/// OOM kills as announced so far. How many there are and when is the guest's to say, so their number is bounded here.
#[derive(Default)]
struct Ooms {
    kills: u64,
    last: Option<Instant>,
}

/// What State answers about a process.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it stands.
    pub stage: Stage,
    /// Its streams.
    pub paths: StdioPaths,
}

/// What a container is made of.
pub struct Parts {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Its pod.
    pub sandbox: Arc<Sandbox>,
    /// Its own pid; `None`: the VMM's stands for it.
    pub pid: Option<TaskPid>,
    /// Where its events go.
    pub publisher: Publisher,
    /// What runs on the host when it starts, and when it has gone.
    pub hooks: Hooks,
    /// The init's streams, as containerd named them.
    pub paths: StdioPaths,
}

impl Container {
    /// Makes the container in the guest from a spec that is already the guest's, in JSON. Its init waits to be started. `joins` is the
    /// container whose namespaces the spec joins; empty where it joins none.
    ///
    /// # Errors
    /// The stream that cannot be opened, or the agent's reason.
    pub async fn create(
        parts: Parts,
        agent: &Agent,
        spec_json: Vec<u8>,
        joins: String,
    ) -> Result<Arc<Self>, TaskError> {
        let container = Arc::new(Self {
            id: parts.id,
            bundle: parts.bundle,
            namespace: parts.namespace,
            sandbox: parts.sandbox,
            pid: parts.pid,
            publisher: parts.publisher,
            hooks: parts.hooks,
            life: Mutex::default(),
            processes: Mutex::default(),
            ooms: Mutex::default(),
        });
        let (stdio, expecting) = container.open_stdio(&parts.paths).await?;
        let tokens = expecting.for_agent(parts.paths.terminal);
        let created = agent
            .create_container(&container.id, spec_json, joins, tokens)
            .await;
        if let Err(error) = created {
            stdio.close();
            return Err(error);
        }
        container.processes().insert(
            String::new(),
            Process {
                paths: parts.paths,
                json: Vec::new(),
                streams: Some((stdio, expecting)),
                stdin_closed: false,
            },
        );
        Ok(container)
    }

    /// Follows the init from now on. To be called once Create has been announced.
    pub fn follow_init(self: &Arc<Self>, agent: &Agent) {
        tokio::spawn(Arc::clone(self).reap(agent.clone(), String::new()));
    }

    async fn open_stdio(&self, paths: &StdioPaths) -> Result<(Arc<Stdio>, Expecting), TaskError> {
        let stdio = Stdio::open(paths, &self.id, &self.namespace)
            .await
            .map_err(|e| TaskError::failed(e.to_string()))?;
        let stdio = Arc::new(stdio);
        let wanted: Vec<StreamKind> = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr]
            .into_iter()
            .filter(|&kind| stdio.wants(kind))
            .collect();
        let expecting = self
            .sandbox
            .streams()
            .expect(&stdio, &wanted)
            .map_err(|e| TaskError::failed(format!("cannot make stream tokens: {e}")))?;
        Ok((stdio, expecting))
    }

    fn life(&self) -> MutexGuard<'_, Lifecycle> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Process>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and announces what follows from it. The announcements are queued under the lock, so their order is the
    /// state's; waiters wake after that.
    fn change<T>(&self, change: impl FnOnce(&mut Lifecycle) -> T) -> T {
        let mut life = self.life();
        let result = change(&mut life);
        for announcement in life.take_announcements() {
            self.publish(&announcement);
            if let Announcement::Exited { exec_id, exit } = &announcement {
                life.wake(exec_id, *exit);
            }
        }
        result
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Its pid on this host.
    pub fn pid(&self) -> u32 {
        self.pid
            .as_ref()
            .map_or_else(|| self.sandbox.pid(), TaskPid::get)
    }

    fn subject(&self) -> Subject<'_> {
        Subject {
            id: &self.id,
            bundle: &self.bundle,
            pid: self.pid(),
        }
    }

    /// State.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn snapshot(&self, exec_id: &str) -> Result<Snapshot, TaskError> {
        let stage = self.life().stage(exec_id)?;
        let paths = self
            .processes()
            .get(exec_id)
            .map(|p| p.paths.clone())
            .unwrap_or_default();
        Ok(Snapshot { stage, paths })
    }

    /// Execs that run.
    pub fn running_execs(&self) -> Vec<String> {
        self.life().running_execs()
    }

    /// Tells when a process is over.
    ///
    /// # Errors
    /// NotFound for an unknown exec.
    pub fn watch(&self, exec_id: &str) -> Result<watch::Receiver<Option<Exit>>, TaskError> {
        self.life().watch(exec_id)
    }

    async fn agent(&self) -> Result<Agent, TaskError> {
        let agent = self.sandbox.phase().agent().await;
        agent.map_err(|reason| TaskError::failed(format!("the VM has ended: {reason}")))
    }

    fn stdio(&self, exec_id: &str) -> Option<Arc<Stdio>> {
        let processes = self.processes();
        let (stdio, _) = processes.get(exec_id)?.streams.as_ref()?;
        Some(Arc::clone(stdio))
    }
}
