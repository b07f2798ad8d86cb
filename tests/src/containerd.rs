//! A private containerd: own root, state and socket, so that one already on the machine is never touched.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, bail};

use crate::{
    cri,
    ctr::{self, Output, Running},
    host,
    runtime::Runtime,
    wait,
};

/// Where the testbed has the programs of a second, newer containerd, if it has one.
pub const NEXT: &str = "/opt/containerd-next/usr/bin";

/// The image that most tests run.
pub const BUSYBOX: &str = "docker.io/library/busybox:husk";

/// The namespace of everything the suites make.
pub const NAMESPACE: &str = "husk-test";

/// The image of the container that CRI starts a pod with.
pub const PAUSE: &str = "docker.io/library/pause:husk";

/// What serves CRI, in the names of 1.7 and of 2.x.
const CRI_PLUGINS: [&str; 3] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.runtime",
    "io.containerd.cri.v1.images",
];

/// What nobody asks here, and what takes time to start.
const UNUSED_PLUGINS: [&str; 6] = [
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.devmapper",
];

/// The networks of CRI's containerd, by Debian's CNI plugins. The first is every pod's unless it asks for another by its
/// runtime handler (`husk-wide`, say).
const NETWORKS: [(&str, &str); 5] = [
    // A bridge with addresses of its own, as kubeadm's clusters have it.
    (
        "bridge",
        r#"{ "type": "bridge", "bridge": "husk0", "isGateway": true, "ipMasq": false,
             "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
           { "type": "portmap", "capabilities": { "portMappings": true } }"#,
    ),
    (
        "wide",
        r#"{ "type": "bridge", "bridge": "husk1", "isGateway": true, "ipMasq": false, "mtu": 9000,
             "ipam": { "type": "host-local",
                       "ranges": [[{ "subnet": "10.89.0.0/16" }], [{ "subnet": "fd00:89::/64" }]],
                       "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } }"#,
    ),
    // The address's network is not on the link: all of it is reached by the host.
    (
        "ptp",
        r#"{ "type": "ptp", "ipMasq": false,
             "ipam": { "type": "host-local",
                       "ranges": [[{ "subnet": "10.93.0.0/16" }], [{ "subnet": "fd00:93::/64" }]],
                       "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } }"#,
    ),
    (
        "macvlan",
        r#"{ "type": "macvlan", "master": "husk-mv", "mode": "bridge",
             "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.90.0.0/16" }]] } }"#,
    ),
    (
        "ipvlan",
        r#"{ "type": "ipvlan", "master": "husk-iv", "mode": "l2",
             "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.91.0.0/16" }]] } }"#,
    ),
];

/// Who makes the sandbox of husk's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandboxer {
    /// containerd, with a pause container: the default.
    Pause,
    /// The shim, asked through the Sandbox API.
    Shim,
}

/// Interfaces of the host, and their kinds: the first network's bridge, which its plugin would make with the first pod and leave
/// there, and what the last two networks branch off.
const LINKS: [(&str, &str); 3] = [
    ("husk0", "bridge"),
    ("husk-mv", "dummy"),
    ("husk-iv", "dummy"),
];

/// The runtime handler that gives a pod this runtime and one of [`NETWORKS`].
pub fn handler(runtime: Runtime, network: &str) -> String {
    if network == NETWORKS[0].0 {
        runtime.to_string()
    } else {
        format!("{runtime}-{network}")
    }
}

/// A containerd of our own. Dropped, it is stopped and its directory removed.
pub struct Containerd {
    dir: PathBuf,
    bin: PathBuf,
    environment: &'static [(&'static str, &'static str)],
    daemon: Mutex<Option<Child>>,
    /// Its programs are those of [`NEXT`].
    upgraded: AtomicBool,
    next_id: AtomicU32,
}

impl Containerd {
    /// Starts one below `dir`; `bin` holds husk's binaries (the shim is found through `PATH`).
    ///
    /// # Errors
    /// It did not come up; with the end of its log.
    pub fn start(dir: &Path, bin: &Path) -> Result<Self> {
        // CRI is off: these suites do not ask it.
        Self::start_with(dir, bin, "", &CRI_PLUGINS, &[])
    }

    /// Starts one that serves CRI, with the runtime handlers `husk` and `runc` on a bridge, and [those on other networks](handler).
    ///
    /// # Errors
    /// It did not come up; with the end of its log.
    pub fn start_with_cri(dir: &Path, bin: &Path, sandboxer: Sandboxer) -> Result<Self> {
        let settings = cri_settings(dir, sandboxer, &[Runtime::Husk, Runtime::Runc])?;
        let environment: &[_] = match sandboxer {
            Sandboxer::Pause => &[],
            // Without it 1.7 knows no other sandboxer than its own.
            Sandboxer::Shim => &[("ENABLE_CRI_SANDBOXES", "1")],
        };
        Self::start_with(dir, bin, &settings, &[], environment)?.with_image()
    }

    /// Starts one that serves CRI with these runtimes alone.
    ///
    /// # Errors
    /// It did not come up; with the end of its log.
    pub fn start_with_runtimes(dir: &Path, bin: &Path, runtimes: &[Runtime]) -> Result<Self> {
        let settings = cri_settings(dir, Sandboxer::Pause, runtimes)?;
        Self::start_with(dir, bin, &settings, &[], &[])?.with_image()
    }

    /// With the image in CRI's namespace.
    fn with_image(self) -> Result<Self> {
        self.import_into(cri::NAMESPACE, Path::new("/srv/images/busybox.tar"))?;
        Ok(self)
    }

    fn start_with(
        dir: &Path,
        bin: &Path,
        settings: &str,
        off: &[&str],
        environment: &'static [(&'static str, &'static str)],
    ) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let containerd = Self {
            dir: dir.to_owned(),
            bin: bin.to_owned(),
            environment,
            daemon: Mutex::new(None),
            upgraded: AtomicBool::new(false),
            next_id: AtomicU32::new(1),
        };
        let off: Vec<String> = UNUSED_PLUGINS
            .iter()
            .chain(off)
            .map(|p| format!("{p:?}"))
            .collect();
        // Version 2 of the configuration is read by 1.7 and 2.x alike.
        let config = format!(
            "version = 2\nroot = \"{root}\"\nstate = \"{state}\"\ndisabled_plugins = [{off}]\n[grpc]\naddress = \"{socket}\"\n[ttrpc]\naddress = \"{socket}.ttrpc\"\n[debug]\nlevel = \"debug\"\n{settings}",
            root = dir.join("root").display(),
            state = dir.join("state").display(),
            off = off.join(", "),
            socket = containerd.socket().display(),
        );
        fs::write(dir.join("config.toml"), config)?;
        containerd.launch()?;
        Ok(containerd)
    }

    /// The gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Where its log goes, the shims' lines among it.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("containerd.log")
    }

    /// A directory that lives as long as this containerd.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path_env(&self) -> String {
        let old = env::var("PATH").unwrap_or_default();
        let own = self.bin.display();
        let next = match self.upgraded.load(Ordering::Relaxed) {
            true => format!("{NEXT}:"),
            false => String::new(),
        };
        format!("{next}{own}:{old}:/usr/local/sbin:/usr/sbin:/sbin")
    }

    fn launch(&self) -> Result<()> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env("PATH", self.path_env())
            .envs(self.environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd: is it installed?")?;
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let up = wait::until("containerd to answer", || {
            let out = ctr::output(self.ctr().arg("version")).ok()?;
            (out.code == 0).then_some(())
        });
        match up {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error}\n{}", self.log_tail(40)),
        }
    }

    /// The pid of the daemon.
    ///
    /// # Errors
    /// It is not running.
    pub fn pid(&self) -> Result<u32> {
        let daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        daemon
            .as_ref()
            .map(Child::id)
            .context("containerd is not running")
    }

    /// Kills the daemon outright and leaves the shims alone.
    pub fn kill(&self) {
        if let Some(mut child) = self
            .daemon
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks the daemon to end, as a package's upgrade does, and leaves the shims alone.
    ///
    /// # Errors
    /// It does not end (it is killed then).
    pub fn stop(&self) -> Result<()> {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut child) = daemon.take() else {
            return Ok(());
        };
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let stopped = wait::until("containerd to stop", || child.try_wait().ok().flatten());
        if stopped.is_err() {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        stopped.map(drop)
    }

    /// Starts the daemon of [`NEXT`] on what [`Containerd::stop`] has left.
    ///
    /// # Errors
    /// It did not come up.
    pub fn upgrade(&self) -> Result<()> {
        self.upgraded.store(true, Ordering::Relaxed);
        self.launch()
    }

    /// Starts the daemon again after [`Containerd::kill`].
    ///
    /// # Errors
    /// It did not come up.
    pub fn relaunch(&self) -> Result<()> {
        self.launch()
    }

    /// The daemon's version, without a `v` in front.
    ///
    /// # Errors
    /// `ctr` could not be started, or does not say.
    pub fn version(&self) -> Result<String> {
        let text = self.run_ctr(&["version"])?.ok()?.text();
        let server = text.split_once("Server:").context("ctr names no server")?.1;
        let version = server.split_once("Version:").context("no version")?.1;
        let word = version.split_whitespace().next().unwrap_or_default();
        Ok(word.trim_start_matches('v').to_owned())
    }

    /// `ctr` against this daemon.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command
            .env("PATH", self.path_env())
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", NAMESPACE]);
        command
    }

    /// Runs `ctr ARGS`.
    ///
    /// # Errors
    /// It could not be started, or hangs.
    pub fn run_ctr<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Output> {
        ctr::output(self.ctr().args(args))
    }

    /// Starts `ctr ARGS` and returns at once.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_ctr<S: AsRef<std::ffi::OsStr>>(&self, args: &[S], stdin: bool) -> Result<Running> {
        Running::start(self.ctr().args(args), stdin)
    }

    /// Imports an image archive.
    ///
    /// # Errors
    /// containerd refused it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.import_into(NAMESPACE, archive)
    }

    /// Imports an image archive into a namespace.
    ///
    /// # Errors
    /// containerd refused it.
    pub fn import_into(&self, namespace: &str, archive: &Path) -> Result<()> {
        // ctr takes the last --namespace.
        let mut command = self.ctr();
        command.args(["--namespace", namespace, "image", "import"]);
        ctr::output(command.arg(archive))?.ok()?;
        Ok(())
    }

    /// A container id nobody has used.
    pub fn fresh_id(&self, stem: &str) -> String {
        format!("{stem}-{}", self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// `ctr run --rm` of the busybox image with these flags and this command.
    pub fn run_command(
        &self,
        runtime: Runtime,
        id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Command {
        let mut ctr = self.ctr();
        ctr.arg("run")
            .args(runtime.ctr_flags())
            .args(flags)
            .arg(BUSYBOX)
            .arg(id)
            .args(command);
        ctr
    }

    /// Waits until a task runs.
    ///
    /// # Errors
    /// It does not.
    pub fn running(&self, id: &str) -> Result<()> {
        wait::until(&format!("task {id} to run"), || {
            (self.state(id).ok()? == "RUNNING").then_some(())
        })
    }

    /// A task's state in containerd's word (`RUNNING`, `STOPPED`, `PAUSED`), empty where there is no task.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn state(&self, id: &str) -> Result<String> {
        let list = self.run_ctr(&["task", "list"])?.ok()?.text();
        Ok(list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|row| row.first() == Some(&id))
            .and_then(|row| row.last().map(|s| (*s).to_owned()))
            .unwrap_or_default())
    }

    /// Kills and deletes a container, whatever its state. For the end of a test that left it running.
    ///
    /// # Errors
    /// `ctr` hangs.
    pub fn remove(&self, id: &str) -> Result<()> {
        // Each may have nothing to do.
        self.run_ctr(&["task", "kill", "--signal", "SIGKILL", id])?;
        self.run_ctr(&["task", "delete", "--force", id])?;
        self.run_ctr(&["container", "delete", id])?;
        Ok(())
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.log();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// What came into the log after a moment at which [`Containerd::log`] had this length.
    pub fn log_since(&self, length: usize) -> String {
        let mut log = self.log();
        log.split_off(length.min(log.len()))
    }

    /// The whole log.
    pub fn log(&self) -> String {
        fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

/// CRI's part of the configuration, with these runtimes on each of [`NETWORKS`], whose files it writes below `dir`.
fn cri_settings(dir: &Path, sandboxer: Sandboxer, runtimes: &[Runtime]) -> Result<String> {
    for (link, kind) in LINKS {
        // It may be there from an earlier one.
        let _ = host::run(&["ip", "link", "add", link, "type", kind]);
        host::run(&["ip", "link", "set", link, "up"])?;
    }
    // containerd 2 reads version 2's names of what it has since split up.
    let mut settings = format!(
        "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\nstream_server_address = \"127.0.0.1\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{}\"\n",
        dir.join("cni-bridge").display()
    );
    for (network, plugins) in NETWORKS {
        let networks = dir.join(format!("cni-{network}"));
        fs::create_dir_all(&networks).with_context(|| format!("making {}", networks.display()))?;
        fs::write(
            networks.join("10-husk.conflist"),
            format!(
                r#"{{ "cniVersion": "1.0.0", "name": "{network}", "plugins": [ {plugins} ] }}"#
            ),
        )?;
        for &runtime in runtimes {
            let _ = writeln!(
                settings,
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{}]\n\
                 runtime_type = \"{}\"\ncni_conf_dir = \"{}\"\n\
                 pod_annotations = [\"io.husk.*\"]",
                handler(runtime, network),
                runtime.containerd_type(),
                networks.display(),
            );
            if (runtime, sandboxer) == (Runtime::Husk, Sandboxer::Shim) {
                // The names of 2.x and of 1.7 for the same setting.
                settings.push_str("sandboxer = \"shim\"\nsandbox_mode = \"shim\"\n");
            }
            if let Some(binary) = runtime.binary() {
                let _ = writeln!(
                    settings,
                    "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{}.options]\nBinaryName = \"{binary}\"",
                    handler(runtime, network),
                );
            }
        }
    }
    Ok(settings)
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Asked, it unmounts what it has mounted.
        let _ = self.stop();
        // Best effort: the directory may hold a mount that a failed test left.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
