//! What every test gets: a containerd with the image in it, the runtime under test, and short ways to use them.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

use anyhow::Result;
use husk_tests::{
    busybox,
    containerd::{Containerd, Sandboxer},
    cri::Cri,
    ctr::{self, Output, Running},
    docker::Docker,
    runtime::Runtime,
    spec::SpecRun,
};
use sha2::{Digest, Sha256};

use crate::durations::Durations;

/// The suites' common ground.
pub struct Context {
    // First: dropped before its containerd.
    docker: OnceLock<Docker>,
    /// Shared by the tests that do not disturb it.
    pub containerd: Containerd,
    /// The runtime under test.
    pub runtime: Runtime,
    /// Where husk's binaries are.
    pub bin: PathBuf,
    cri: OnceLock<(Containerd, Cri)>,
    sandboxer: OnceLock<(Containerd, Cri)>,
    /// A busybox root file system on the host, for specs with a root path.
    pub rootfs: PathBuf,
    /// Of the tests that have run.
    pub durations: Durations,
}

impl Context {
    /// Unpacks what the tests share.
    ///
    /// # Errors
    /// The root file system could not be made.
    pub fn new(containerd: Containerd, runtime: Runtime, bin: PathBuf) -> Result<Self> {
        let rootfs = containerd.dir().join("rootfs");
        busybox::lay_out(&rootfs)?;
        Ok(Self {
            containerd,
            runtime,
            bin,
            rootfs,
            docker: OnceLock::new(),
            cri: OnceLock::new(),
            sandboxer: OnceLock::new(),
            durations: Durations::default(),
        })
    }

    /// A kubelet's view of a second containerd, which the first who asks starts.
    ///
    /// # Errors
    /// It did not come up.
    pub fn cri(&self) -> Result<&Cri> {
        Ok(self.cri_and_containerd()?.1)
    }

    /// The same, and the containerd that serves it.
    ///
    /// # Errors
    /// It did not come up.
    pub fn cri_and_containerd(&self) -> Result<(&Containerd, &Cri)> {
        self.kubelet(&self.cri, "/run/husk-e2e-cri", Sandboxer::Pause)
    }

    /// One whose pods have the shim as their sandbox, and its containerd.
    ///
    /// # Errors
    /// It did not come up.
    pub fn sandboxer(&self) -> Result<(&Containerd, &Cri)> {
        self.kubelet(&self.sandboxer, "/run/husk-e2e-sandboxer", Sandboxer::Shim)
    }

    fn kubelet<'a>(
        &self,
        place: &'a OnceLock<(Containerd, Cri)>,
        dir: &str,
        sandboxer: Sandboxer,
    ) -> Result<(&'a Containerd, &'a Cri)> {
        static STARTING: Mutex<()> = Mutex::new(());
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((containerd, cri)) = place.get() {
            return Ok((containerd, cri));
        }
        let containerd = Containerd::start_with_cri(Path::new(dir), &self.bin, sandboxer)?;
        let cri = Cri::connect(&containerd, self.runtime)?;
        let (containerd, cri) = place.get_or_init(|| (containerd, cri));
        Ok((containerd, cri))
    }

    /// Docker on the shared containerd, which the first who asks starts.
    ///
    /// # Errors
    /// It did not come up.
    pub fn docker(&self) -> Result<&Docker> {
        static STARTING: Mutex<()> = Mutex::new(());
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(docker) = self.docker.get() {
            return Ok(docker);
        }
        let docker = Docker::start(&self.containerd, self.runtime, &self.rootfs)?;
        Ok(self.docker.get_or_init(|| docker))
    }

    /// The end of Docker's log, where it has been started.
    pub fn docker_log(&self) -> Option<String> {
        Some(self.docker.get()?.log_tail(40))
    }

    /// The end of the log of CRI's containerd, where it has been started.
    pub fn cri_log(&self) -> Option<String> {
        let (containerd, _) = self.cri.get().or_else(|| self.sandboxer.get())?;
        Some(containerd.log_tail(60))
    }

    /// Runs a command in a new container of the busybox image and removes it.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn run(&self, flags: &[&str], command: &[&str]) -> Result<Output> {
        let id = self.containerd.fresh_id("run");
        let flags = [&["--rm"], flags].concat();
        ctr::output(
            &mut self
                .containerd
                .run_command(self.runtime, &id, &flags, command),
        )
    }

    /// Runs a shell script in a new container and removes it.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.run(&[], &["sh", "-c", script])
    }

    /// A container that goes on until it is removed.
    ///
    /// # Errors
    /// It did not start.
    pub fn detached(&self, flags: &[&str], command: &[&str]) -> Result<Detached<'_>> {
        let id = self.containerd.fresh_id("bg");
        let flags = [&["--detach"], flags].concat();
        ctr::output(
            &mut self
                .containerd
                .run_command(self.runtime, &id, &flags, command),
        )?
        .ok()?;
        Ok(self.started(id))
    }

    /// A container that has been started with this id.
    pub fn started(&self, id: String) -> Detached<'_> {
        Detached { suite: self, id }
    }

    /// A spec with the shared root file system.
    ///
    /// # Errors
    /// `ctr oci spec` failed.
    pub fn spec(&self, command: &[&str]) -> Result<SpecRun<'_>> {
        SpecRun::new(&self.containerd, self.runtime, &self.rootfs, command)
    }
}

/// A running container; dropped, it is killed and removed.
pub struct Detached<'a> {
    suite: &'a Context,
    /// Its id.
    pub id: String,
}

impl Detached<'_> {
    /// Runs a command in it.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.start_exec(command)?.finish()
    }

    /// Starts a command in it.
    ///
    /// # Errors
    /// `ctr` could not be started.
    pub fn start_exec(&self, command: &[&str]) -> Result<Running> {
        let exec_id = self.suite.containerd.fresh_id("exec");
        let head = ["task", "exec", "--exec-id", &exec_id, &self.id];
        self.suite
            .containerd
            .start_ctr(&[&head, command].concat(), false)
    }

    /// `ctr task ARGS… ID`.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn task(&self, arguments: &[&str]) -> Result<Output> {
        let all = [&["task"], arguments, &[&self.id]].concat();
        self.suite.containerd.run_ctr(&all)
    }

    /// The task's state in containerd's word (`RUNNING`, `STOPPED`, `PAUSED`), empty where there is no task.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn state(&self) -> Result<String> {
        self.suite.containerd.state(&self.id)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = self.suite.containerd.remove(&self.id);
    }
}

/// Hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as `sha256sum` writes them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
