//! A private Docker daemon on a private containerd, with the runtime under test as its default.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{
    containerd::Containerd,
    ctr::{self, Output, Running},
    runtime::Runtime,
    wait,
};

/// The image that most tests run, made by [`Docker::start`].
pub const BUSYBOX: &str = "busybox:husk";

/// A daemon of our own. Dropped, it is stopped, and what it has stored is removed.
pub struct Docker {
    dir: PathBuf,
    data: PathBuf,
    daemon: Mutex<Option<Child>>,
    next_name: AtomicU32,
}

impl Docker {
    /// Starts one on this containerd, with the busybox tree as its image.
    ///
    /// # Errors
    /// It did not come up; with the end of its log.
    pub fn start(containerd: &Containerd, runtime: Runtime, busybox: &Path) -> Result<Self> {
        let docker = Self {
            dir: PathBuf::from("/run/husk-e2e-docker"),
            // On the disk: layers of what it imports would fill memory.
            data: PathBuf::from("/var/lib/husk-e2e-docker"),
            daemon: Mutex::new(None),
            next_name: AtomicU32::new(1),
        };
        fs::create_dir_all(&docker.dir)?;
        fs::write(
            docker.dir.join("daemon.json"),
            serde_json::to_vec_pretty(&settings(runtime, &docker.dir))?,
        )?;
        fs::write(docker.dir.join("wrong.toml"), "no_such_key = 1\n")?;
        docker.launch(containerd)?;
        docker.import(busybox, BUSYBOX)?;
        Ok(docker)
    }

    fn launch(&self, containerd: &Containerd) -> Result<()> {
        let log = fs::File::create(self.log_path())?;
        let child = Command::new("dockerd")
            .arg("--config-file")
            .arg(self.dir.join("daemon.json"))
            .arg("--containerd")
            .arg(containerd.socket())
            .arg("--host")
            .arg(self.host())
            .arg("--pidfile")
            .arg(self.dir.join("pid"))
            .arg("--exec-root")
            .arg(self.dir.join("exec"))
            .arg("--data-root")
            .arg(&self.data)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting dockerd: is it installed?")?;
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let up = wait::until("dockerd to answer", || {
            (self.run(&["version"]).ok()?.code == 0).then_some(())
        });
        match up {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error}\n{}", self.log_tail(40)),
        }
    }

    /// The directory of its socket, configuration and log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.join("docker.sock").display())
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("dockerd.log")
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// A command that finds this daemon, `docker` or a shell that calls it.
    pub fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("DOCKER_HOST", self.host())
            // Nobody's configuration but the tests'.
            .env("DOCKER_CONFIG", self.dir.join("client"));
        command
    }

    /// `docker` with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program("docker");
        command.args(arguments);
        command
    }

    /// Runs `docker` to its end.
    ///
    /// # Errors
    /// It could not be started, or hangs.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        ctr::output(&mut self.command(arguments))
    }

    /// Runs `docker`, which is to succeed; what it printed.
    ///
    /// # Errors
    /// It did not; with everything it printed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.run(arguments)?.ok()?.text())
    }

    /// Starts `docker`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_client(&self, arguments: &[&str], stdin: bool) -> Result<Running> {
        Running::start(&mut self.command(arguments), stdin)
    }

    /// A name that no other test has.
    pub fn fresh(&self, what: &str) -> String {
        format!("{what}{}", self.next_name.fetch_add(1, Ordering::Relaxed))
    }

    /// `docker run --detach` with these flags, image, and command.
    ///
    /// # Errors
    /// It did not start.
    pub fn detached(&self, arguments: &[&str]) -> Result<Container<'_>> {
        let name = self.fresh("c");
        // First: what fails to start may be there all the same.
        let container = Container { docker: self, name };
        let head = ["run", "--detach", "--name", &container.name];
        self.ok(&[&head, arguments].concat())?;
        Ok(container)
    }

    /// The container of this name, to be removed with the value.
    pub fn named(&self, name: &str) -> Container<'_> {
        Container {
            docker: self,
            name: name.to_owned(),
        }
    }

    /// Makes an image of a directory.
    ///
    /// # Errors
    /// `tar` or `docker import` failed.
    pub fn import(&self, tree: &Path, image: &str) -> Result<()> {
        let mut packer = Command::new("tar")
            .arg("-C")
            .arg(tree)
            .args(["-c", "."])
            .stdout(Stdio::piped())
            .spawn()?;
        let archive = packer.stdout.take().context("tar has no output")?;
        let imported = self
            .command(&["import", "--change", "CMD [\"sh\"]", "-", image])
            .stdin(archive)
            .stdout(Stdio::null())
            .status()?;
        let packed = packer.wait()?;
        if !imported.success() || !packed.success() {
            bail!("docker import {image}: {imported}, tar: {packed}");
        }
        Ok(())
    }
}

/// As docs/engines/docker.md has it, one with an option that means nothing, and two that cannot be used: settings that are not there, and
/// settings with a key that is none.
fn settings(runtime: Runtime, dir: &Path) -> Value {
    let kind = runtime.containerd_type();
    match runtime {
        Runtime::Husk => json!({
            "runtimes": {
                "husk": { "runtimeType": kind },
                "husk-missing": { "runtimeType": kind, "options": { "ConfigPath": dir.join("missing.toml") } },
                "husk-odd": { "runtimeType": kind, "options": { "NoSuchOption": true } },
                "husk-wrong": { "runtimeType": kind, "options": { "ConfigPath": dir.join("wrong.toml") } },
            },
            "default-runtime": "husk",
        }),
        other => json!({ "default-runtime": other.name() }),
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let daemon = self
            .daemon
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(mut child) = daemon.take() {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let stopped = wait::until("dockerd to stop", || child.try_wait().ok().flatten());
            if stopped.is_err() {
                // Already gone is as good.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// A container of Docker's; dropped, it is removed with its anonymous volumes.
pub struct Container<'a> {
    docker: &'a Docker,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// `docker COMMAND… NAME`, which is to succeed; what it printed.
    ///
    /// # Errors
    /// It did not.
    pub fn ok(&self, command: &[&str]) -> Result<String> {
        self.docker.ok(&[command, &[&self.name]].concat())
    }

    /// Runs a shell script in it.
    ///
    /// # Errors
    /// `docker` could not be started, or hangs.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.docker.run(&["exec", &self.name, "sh", "-c", script])
    }

    /// What `docker inspect --format` says of it.
    ///
    /// # Errors
    /// It fails.
    pub fn inspect(&self, format: &str) -> Result<String> {
        self.ok(&["inspect", "--format", format])
    }

    /// Waits until `docker inspect --format` says this.
    ///
    /// # Errors
    /// It never does.
    pub fn until(&self, format: &str, wanted: &str) -> Result<()> {
        let mut last = String::new();
        wait::until(&format!("{format} of {} to be {wanted}", self.name), || {
            last = self.inspect(format).ok()?;
            (last == wanted).then_some(())
        })
        .with_context(|| format!("it is {last}\n{}", self.logs().unwrap_or_default()))
    }

    /// What it has written.
    ///
    /// # Errors
    /// `docker logs` fails.
    pub fn logs(&self) -> Result<String> {
        self.ok(&["logs"])
    }

    /// Waits until it has written this.
    ///
    /// # Errors
    /// It never does.
    pub fn until_logs(&self, part: &str) -> Result<()> {
        wait::until(&format!("{part:?} in the logs of {}", self.name), || {
            self.logs().ok()?.contains(part).then_some(())
        })
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.docker.run(&["rm", "--force", "--volumes", &self.name]);
    }
}
