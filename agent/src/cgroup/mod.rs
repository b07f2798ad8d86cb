//! A container's cgroup (v2): its processes, limits and devices; freezing and killing them as one.
//!
//! The guest has one hierarchy, mounted by `boot` with every controller handed down from the root. Containers'
//! cgroups lie side by side below [`PARENT`], one directory each, named by the container. The spec's cgroupsPath is the
//! host's business: the pod's own limits are enforced there.

pub mod cpu_list;
mod devices;
mod files;
mod owner;
mod resources;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;

pub(crate) use files::hand_down_controllers;
pub(crate) use owner::owner;

use crate::container::error::{LaunchError, Step};
use crate::stats;

/// The cgroup that holds the containers' cgroups.
pub(crate) const PARENT: &str = "containers";
/// How long freezing, thawing and removal may take before they are given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// The device program that is attached, to be replaced by the next.
    device_program: Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// Makes the cgroup of a container, empty and with the spec's limits on; `owner` may make others below it.
    pub(crate) fn create(
        id: &str,
        resources: Option<&LinuxResources>,
        owner: Option<u32>,
    ) -> Result<Self, LaunchError> {
        let root = files::hierarchy_root()
            .step(|| "looking for the cgroup v2 hierarchy in /proc/self/mountinfo".to_owned())?;
        let parent = root.join(PARENT);
        fs::create_dir_all(&parent).step(|| format!("creating cgroup {}", parent.display()))?;
        hand_down_controllers(&root);
        hand_down_controllers(&parent);
        let path = parent.join(id);
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(LaunchError::invalid(format!(
                    "container with id {id} exists already"
                )));
            }
            other => other.step(|| format!("creating cgroup {}", path.display()))?,
        }
        let cgroup = Self {
            path,
            device_program: Mutex::new(None),
        };
        let set_up = cgroup.set_up(resources, owner);
        if set_up.is_err() {
            // Nothing has entered it yet.
            let _ = fs::remove_dir(&cgroup.path);
        }
        set_up.map(|()| cgroup)
    }

    fn set_up(
        &self,
        resources: Option<&LinuxResources>,
        owner: Option<u32>,
    ) -> Result<(), LaunchError> {
        if let Some(owner) = owner {
            owner::hand_over(&self.path, owner)
                .step(|| format!("handing cgroup {} to user {owner}", self.path.display()))?;
        }
        if let Some(resources) = resources {
            resources::apply(&self.path, resources)?;
        }
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        self.limit_devices(rules.unwrap_or_default())
    }

    /// Applies new limits to a running container. What they do not name stays.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), LaunchError> {
        resources::apply(&self.path, resources)?;
        match resources.devices().as_deref() {
            // An update without device rules means no change, not no devices.
            None | Some([]) => Ok(()),
            Some(rules) => self.limit_devices(rules),
        }
    }

    fn limit_devices(
        &self,
        rules: &[oci_spec::runtime::LinuxDeviceCgroup],
    ) -> Result<(), LaunchError> {
        let mut attached = self
            .device_program
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let program = devices::attach(&self.path, rules, attached.as_ref())
            .step(|| "limiting devices".to_owned())?;
        *attached = Some(program);
        Ok(())
    }

    /// The cgroup's directory; `memory.events` and the statistics are files in it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Pids of every process, those of cgroups that the container made itself included.
    ///
    /// # Errors
    /// Where the cgroup is gone.
    pub fn procs(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for directory in files::tree(&self.path)? {
            // A cgroup of the container's that has just been removed has no processes.
            if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
        }
        // 0 is a process outside the agent's pid namespace.
        pids.retain(|pid| *pid > 0);
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills every process, frozen ones too.
    ///
    /// # Errors
    /// Where the cgroup is gone.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Stops every process; done when all have stopped.
    ///
    /// # Errors
    /// Where the cgroup is gone, or a process does not stop within ten seconds: they all run on then.
    pub async fn freeze(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "1")?;
        let frozen = self.wait_event("frozen", 1).await;
        if frozen.is_err() {
            let _ = fs::write(self.path.join("cgroup.freeze"), "0");
        }
        frozen
    }

    /// Lets every process run on.
    ///
    /// # Errors
    /// Where the cgroup is gone.
    pub async fn thaw(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "0")?;
        self.wait_event("frozen", 0).await
    }

    /// Whether [`Self::freeze`] is in force.
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|state| state.trim() == "1")
    }

    /// How often the kernel has killed a process of the container for memory.
    pub fn oom_kills(&self) -> u64 {
        stats::oom_kills(&self.path.join("memory.events"))
    }

    /// Kills what still runs and removes the cgroup with all below it. Gone already is fine.
    pub(crate) async fn remove(&self) -> Result<(), LaunchError> {
        if self.kill().is_err() && !self.path.exists() {
            return Ok(());
        }
        self.wait_event("populated", 0).await.step(|| {
            format!(
                "waiting for the processes of {} to end",
                self.path.display()
            )
        })?;
        // A zombie that nobody has reaped yet keeps the directory busy for a moment.
        let mut pause = Duration::from_millis(1);
        let started = tokio::time::Instant::now();
        loop {
            match files::remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error)
                    if error.raw_os_error() == Some(libc::EBUSY)
                        && started.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                error => {
                    return error.step(|| format!("removing cgroup {}", self.path.display()));
                }
            }
        }
    }

    /// Waits for a value in cgroup.events.
    async fn wait_event(&self, key: &str, wanted: u64) -> io::Result<()> {
        let file = self.path.join("cgroup.events");
        let started = tokio::time::Instant::now();
        let mut pause = Duration::from_micros(200);
        while files::keyed(&file, key)? != wanted {
            if started.elapsed() > PATIENCE {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{key} did not become {wanted} within {PATIENCE:?}"),
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Moves this process into a cgroup. Where that one takes no processes, since the container has made cgroups of
/// its own below it, into that of `init`.
pub(crate) fn join(path: &Path, init: Option<i32>) -> Result<(), LaunchError> {
    let entered = fs::write(path.join("cgroup.procs"), "0");
    let busy = entered
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY));
    match init {
        Some(init) if busy => {
            let of_init = files::cgroup_of(init)
                .step(|| "looking up the cgroup of the container's init".to_owned())?;
            fs::write(of_init.join("cgroup.procs"), "0")
                .step(|| format!("entering cgroup {}", of_init.display()))
        }
        _ => entered.step(|| format!("entering cgroup {}", path.display())),
    }
}
