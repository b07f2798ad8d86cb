//! Containers: from an OCI spec to a process that runs in it.
//!
//! The agent is PID 1, with threads for what blocks: it can neither enter a container nor fork, so it sets nothing up in
//! its own process. [`launch`] re-executes `/proc/self/exe` as `container-init`, a fresh single-threaded process, and hands
//! it a [`job`] over a socket
//! ([`channel`]). That process ([`init`]) enters the container's cgroup, makes or joins the [`namespaces`] and forks into
//! them; the child builds the [`rootfs`] out of [`mounts`] and [`devices`], takes on the user's [`identity`], reports that it is
//! ready and waits. When the gate is released it becomes the user's program. Both processes end up as children of PID 1,
//! whose reaper learns how they end.

mod channel;
mod console;
mod copy_up;
mod devices;
pub(crate) mod error;
mod exec_lookup;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod hooks;
mod identity;
mod init;
mod job;
mod launch;
pub(crate) mod mount_options;
mod mounts;
mod namespaces;
mod passwd;
mod paths;
mod pid1;
mod pod_users;
mod rootfs;
mod scheduling;
mod seccomp;
mod spec;
pub(crate) mod sys;
pub(crate) mod sysctl;
mod unsupported;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use oci_spec::runtime::Hook;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

pub use error::LaunchError;
pub use init::init_main;
pub use launch::{Launched, StartGate, use_executable};
pub(crate) use rootfs::open_null;

use self::error::Step;
use self::job::{CreateJob, ExecJob, HooksJob, Job};
use self::spec::ParsedSpec;
use crate::cgroup::{self, Cgroup};

/// The child's ends of a process's standard streams.
#[derive(Debug)]
pub struct StdioFds {
    /// What the process reads.
    pub stdin: OwnedFd,
    /// Where it writes.
    pub stdout: OwnedFd,
    /// Where it complains.
    pub stderr: OwnedFd,
}

/// Where a process's standard streams go.
#[derive(Debug)]
pub enum Io {
    /// To these descriptors.
    Pipes(StdioFds),
    /// To a terminal in the container's own devpts, whose master comes back in [`Launched::console`].
    Terminal,
}

/// A container: its spec, its cgroup, and its init process, which holds its namespaces.
#[derive(Debug)]
pub struct Container {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    id: String,
    spec: ParsedSpec,
    cgroup: Cgroup,
    /// Pid of the init process; meaningless once `init` says that it has ended.
    pid: i32,
    init: OwnedFd,
}

impl Container {
    /// Sets a container up to the point where its process waits at the gate. `joined` is the container whose namespaces those of the
    /// spec with the path [`husk_protocol::JOINED_NAMESPACE`] are.
    ///
    /// # Errors
    /// What could not be set up, in runc's words where it has some. Nothing is left behind then: no process, no
    /// cgroup.
    pub async fn create(
        id: &str,
        spec_json: &[u8],
        io: Io,
        joined: Option<&Self>,
    ) -> Result<(Self, Launched), LaunchError> {
        spec::check_id(id)?;
        let spec = ParsedSpec::parse(spec_json)?;
        let resources = spec.linux().and_then(|linux| linux.resources().as_ref());
        let cgroup = Cgroup::create(id, resources, cgroup::owner(&spec.spec))?;
        match Self::launch_init(id, &spec, &cgroup, io, joined).await {
            Ok((init, launched)) => {
                let state = Arc::new(State {
                    id: id.to_owned(),
                    spec,
                    cgroup,
                    pid: launched.pid,
                    init,
                });
                let launched = launched.with_poststart(Arc::clone(&state));
                Ok((Self { state }, launched))
            }
            Err(error) => {
                let error = launch::explain_oom(error, cgroup.oom_kills());
                if let Err(leftover) = cgroup.remove().await {
                    tracing::warn!("after a failed create of {id}: {leftover}");
                }
                Err(error)
            }
        }
    }

    async fn launch_init(
        id: &str,
        spec: &ParsedSpec,
        cgroup: &Cgroup,
        io: Io,
        joined: Option<&Self>,
    ) -> Result<(OwnedFd, Launched), LaunchError> {
        let job = Job::Create(Box::new(CreateJob {
            id: id.to_owned(),
            spec: spec.spec.clone(),
            user_name: spec.user_name.clone(),
            cgroup: cgroup.path().to_owned(),
            joins: joined.is_some(),
        }));
        let joined = joined.map(|container| &container.state.init);
        let launched = launch::launch(&job, joined, io, |pid| {
            // Both kinds run in the runtime's namespaces before the container's root is in place.
            let state = hooks::state_json(&spec.spec, id, "creating", pid);
            [
                hooks_job(spec, "prestart", &state, false),
                hooks_job(spec, "createRuntime", &state, false),
            ]
        })
        .await?;
        let init = open_pidfd(launched.pid)?;
        Ok((init, launched))
    }

    /// Sets a further process up in the container, to the point where it waits at the gate.
    ///
    /// # Errors
    /// What could not be set up, or that the container is paused or has ended.
    pub async fn exec(&self, process_json: &[u8], io: Io) -> Result<Launched, LaunchError> {
        let State {
            spec, cgroup, init, ..
        } = &*self.state;
        if cgroup.is_frozen() {
            return Err(LaunchError::NotRunning(
                "cannot exec in a paused container".to_owned(),
            ));
        }
        let parsed = spec.exec_process(process_json)?;
        let job = Job::Exec(Box::new(ExecJob {
            process: parsed.process,
            user_name: parsed.user_name,
            cgroup: cgroup.path().to_owned(),
            init: self.state.pid,
            namespaces: spec.namespaces(),
            seccomp: spec.linux().and_then(|linux| linux.seccomp().clone()),
            personality: spec.linux().and_then(|linux| linux.personality().clone()),
        }));
        let kills = cgroup.oom_kills();
        launch::launch(&job, Some(init), io, |_| [])
            .await
            .map_err(|error| launch::explain_oom(error, cgroup.oom_kills().saturating_sub(kills)))
    }

    /// The container's cgroup: limits, freezing, killing, processes, statistics.
    pub fn cgroup(&self) -> &Cgroup {
        &self.state.cgroup
    }

    /// Applies new limits (LinuxResources, JSON); what they leave out stays.
    ///
    /// # Errors
    /// The limit that could not be set. Those before it are set.
    pub async fn update(&self, resources_json: &[u8]) -> Result<(), LaunchError> {
        let resources = spec::parse_resources(resources_json)?;
        let state = Arc::clone(&self.state);
        // A lower memory limit makes the kernel reclaim before the write returns.
        tokio::task::spawn_blocking(move || state.cgroup.update(&resources))
            .await
            .map_err(|error| LaunchError::internal(format!("updating the limits: {error}")))?
    }

    /// Undoes the set-up: kills what still runs, runs the poststop hooks, removes the cgroup. The mounts went
    /// with the namespaces: the container's own and, with what opening its sources mounted, that of its launch.
    ///
    /// # Errors
    /// What is left behind. Failed hooks are only logged, as the spec has it.
    pub async fn delete(&self) -> Result<(), LaunchError> {
        self.state.cgroup.remove().await?;
        let State { id, spec, .. } = &*self.state;
        let state = hooks::state_json(&spec.spec, id, "stopped", 0);
        let job = hooks_job(spec, "poststop", &state, true);
        if let Err(error) = launch::run_hooks(job).await {
            tracing::warn!("container {id}: {error}");
        }
        Ok(())
    }
}

impl State {
    /// The poststart hooks; the container does not outlive their failure.
    async fn poststart(&self) -> Result<(), LaunchError> {
        let state = hooks::state_json(&self.spec.spec, &self.id, "running", self.pid);
        let ran = launch::run_hooks(hooks_job(&self.spec, "poststart", &state, false)).await;
        if ran.is_err() {
            // It may have ended by itself.
            let _ = self.cgroup.kill();
        }
        ran
    }
}

/// Makes the namespaces of a pod that has users of its own, at [`husk_protocol::guest_path::USERS`] and
/// [`husk_protocol::guest_path::NETWORK`], and moves the VM's network devices there. The maps are those of user_namespaces(7).
///
/// # Errors
/// What could not be made, or that the kernel does not take the maps.
pub async fn make_users(uid_map: String, gid_map: String) -> Result<(), LaunchError> {
    launch::run_to_its_end(&Job::Users(uid_map, gid_map)).await
}

/// A descriptor that stays with this one process, whatever its pid is used for later.
fn open_pidfd(pid: i32) -> Result<OwnedFd, LaunchError> {
    let pid =
        Pid::from_raw(pid).ok_or_else(|| LaunchError::internal(format!("{pid} is not a pid")))?;
    pidfd_open(pid, PidfdFlags::empty()).step(|| "opening the init process".to_owned())
}

#[allow(
    deprecated,
    reason = "prestart is deprecated in the spec, and still part of it"
)]
fn hooks_job(spec: &ParsedSpec, kind: &str, state: &str, keep_going: bool) -> HooksJob {
    let hooks: Vec<Hook> = spec
        .spec
        .hooks()
        .as_ref()
        .and_then(|hooks| match kind {
            "prestart" => hooks.prestart().clone(),
            "createRuntime" => hooks.create_runtime().clone(),
            "poststart" => hooks.poststart().clone(),
            _ => hooks.poststop().clone(),
        })
        .unwrap_or_default();
    HooksJob {
        kind: kind.to_owned(),
        hooks,
        state: state.to_owned(),
        keep_going,
    }
}
