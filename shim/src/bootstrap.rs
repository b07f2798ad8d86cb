//! `start`: finds the pod's shim or starts it, and tells containerd its address.
//!
//! The socket is bound here and handed to the serving shim ([`crate::daemon`]) as its standard input, so that it takes
//! connections before the shim has come up, and nobody can come in between. containerd reads our standard output and error as one
//! text: on success there is the address and not a byte more.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::args::Args;
use crate::config::{self, Config};
use crate::group::Group;
use crate::input::{self, Options};
use crate::state::{self, PodDir};
use crate::timing::{self, Moment};
use crate::{cleanup, delete, log, socket};

/// Environment variable in which containerd gives its ttrpc address.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// What the serving shim writes to its standard output once it serves.
pub const READY: &str = "ready\n";
/// File in the bundle that containerd finds the shim by after a restart.
const ADDRESS_FILE: &str = "address";
/// Inline settings from the runtime options are kept here, for the serving shim to read.
const INLINE_CONFIG: &str = "husk-config.toml";
/// How long a start waits for another one in the same namespace.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long a shim that does not serve any more may take to end by itself: it may still have events to deliver.
const LAST_WORDS: Duration = Duration::from_secs(4);
/// The kernel's bound of oom_score_adj.
const MAX_OOM_SCORE_ADJ: i32 = 1000;

/// Runs `start`; gives back the address to print.
///
/// # Errors
/// A sentence for the person who ran the container. Nothing is left behind then.
pub fn start(args: &Args) -> anyhow::Result<String> {
    let bundle = bundle(args)?;
    let options = Options::parse(&input::read_stdin(), &args.namespace, &args.id);
    let config_path = config_path(&options, &bundle)?;
    let config = Config::load(config_path.as_deref())?;
    let log_pipe = log::open(&bundle);
    if let Some(pipe) = &log_pipe {
        log::init(pipe, level(&config, args.debug), &args.id)?;
    }
    for remark in &options.remarks {
        warn!("{remark}");
    }
    let group = Group::of_bundle(&bundle, &args.id)?;
    let state_dir = state::make_state_dir(&config.state_dir)?;
    let pod = PodDir::new(&state_dir, &args.namespace, &group.id)?;
    let socket_dir = options.socket_dir.as_deref().unwrap_or(&config.socket_dir);
    let path = socket::path(socket_dir, &args.address, &args.namespace, &group.id);

    let _lock = pod.lock_namespace(LOCK_PATIENCE)?;
    if socket::is_served(&path) {
        info!(group = group.id, "joining the pod's shim");
        pod.update(|state| {
            state.containers.insert(args.id.clone());
        })?;
        pod.link_bundle(&bundle)?;
        return write_address(&bundle, &path);
    }
    if group.joins {
        anyhow::bail!(
            "the pod {} of container {} is not running: nobody serves {}",
            group.id,
            args.id,
            path.display()
        );
    }
    reclaim(&pod);
    give_way(&pod, &path)?;

    let listener = socket::listen(&path)?;
    let daemon = Daemon {
        args,
        group: &group.id,
        bundle: &bundle,
        socket: &path,
    };
    let mut child = match daemon.spawn(listener.into(), log_pipe, &options, config_path.as_deref())
    {
        Ok(child) => child,
        Err(e) => {
            delete::clear_pod(&pod);
            cleanup::remove_file(&path)?;
            anyhow::bail!("cannot start the serving shim: {e}");
        }
    };
    let started = await_ready(&mut child)
        .and_then(|()| place(child.id(), options.shim_cgroup.as_deref()))
        .and_then(|()| write_address(&bundle, &path));
    if started.is_err() {
        // Not there any more, or about to go: what it left is cleared away all the same.
        let _ = child.kill();
        let _ = child.wait();
        delete::clear_pod(&pod);
        cleanup::remove_file(&path)?;
    }
    started
}

/// The bundle, absolute: containerd starts us in it.
///
/// # Errors
/// When it is not a directory that can be entered.
pub fn bundle(args: &Args) -> anyhow::Result<PathBuf> {
    let given = args.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    fs::canonicalize(&given)
        .map_err(|e| anyhow::anyhow!("cannot enter the bundle {}: {e}", given.display()))
}

/// The level that settings and `-debug` ask for together.
pub fn level(config: &Config, debug: bool) -> config::LogLevel {
    if debug {
        config.log_level.max(config::LogLevel::Debug)
    } else {
        config.log_level
    }
}

/// The settings' file that the runtime options name; inline settings become one.
fn config_path(options: &Options, bundle: &Path) -> anyhow::Result<Option<PathBuf>> {
    match (&options.config_path, &options.config_body) {
        (Some(path), _) => Ok(Some(path.clone())),
        (None, Some(body)) => {
            let path = bundle.join(INLINE_CONFIG);
            fs::write(&path, body)
                .map_err(|e| anyhow::anyhow!("cannot write {}: {e}", path.display()))?;
            Ok(Some(path))
        }
        (None, None) => Ok(None),
    }
}

/// Clears away every pod of the namespace whose shim has died without doing so itself. Called with the namespace locked.
fn reclaim(pod: &PodDir) {
    for other in pod.siblings() {
        let alive = other
            .load()
            .and_then(|state| state.shim)
            .is_some_and(|shim| shim.is_alive());
        if !alive {
            warn!(
                dead = other.sandbox_id(),
                "clearing away a pod whose shim has died"
            );
            delete::clear_pod(&other);
        }
    }
}

/// A pod of this id whose shim lives: another containerd's, which has the same namespaces, or one of ours that is about to end.
fn give_way(pod: &PodDir, socket: &Path) -> anyhow::Result<()> {
    let Some(state) = pod.load() else {
        return Ok(());
    };
    let Some(shim) = state.shim else {
        return Ok(());
    };
    if !is_own(&state.socket, socket) || socket::is_served(&state.socket) {
        anyhow::bail!(
            "the id {} is in use by another containerd: its shim (pid {}) serves {}; give each containerd a state_dir of its own",
            pod.sandbox_id(),
            shim.pid,
            state.socket.display()
        );
    }
    let deadline = Instant::now() + LAST_WORDS;
    while shim.is_alive() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    delete::clear_pod(pod);
    Ok(())
}

/// Whether a pod's socket is one that this containerd would have given it. The directory may have been another one.
pub fn is_own(recorded: &Path, expected: &Path) -> bool {
    recorded.file_name() == expected.file_name()
}

/// The serving shim about to be started.
struct Daemon<'a> {
    args: &'a Args,
    group: &'a str,
    bundle: &'a Path,
    socket: &'a Path,
}

impl Daemon<'_> {
    fn spawn(
        &self,
        listener: OwnedFd,
        log: Option<fs::File>,
        options: &Options,
        config: Option<&Path>,
    ) -> io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([
            "-namespace",
            &self.args.namespace,
            "-address",
            &self.args.address,
            "-id",
            &self.args.id,
        ]);
        command
            .args(["-group", self.group])
            .arg("-bundle")
            .arg(self.bundle)
            .arg("-socket")
            .arg(self.socket);
        if self.args.debug {
            command.arg("-debug");
        }
        command.env(timing::STARTED, Moment::process_start().0.to_string());
        if let Some(address) = &options.ttrpc_address {
            command.env(TTRPC_ADDRESS, address);
        }
        if let Some(path) = config {
            command.env(config::PATH_VARIABLE, path);
        }
        command.stdin(Stdio::from(listener)).stdout(Stdio::piped());
        // The log pipe stays open across the hand-over: containerd stops reading once nobody holds its other end.
        command.stderr(log.map_or_else(Stdio::null, Stdio::from));
        command.spawn()
    }
}

/// Waits for the serving shim's word: [`READY`] or why not.
fn await_ready(child: &mut Child) -> anyhow::Result<()> {
    let mut said = String::new();
    if let Some(out) = child.stdout.take() {
        out.take(4096).read_to_string(&mut said)?;
    }
    match said.trim() {
        word if word == READY.trim() => Ok(()),
        "" => anyhow::bail!(
            "the serving shim ended before it was ready ({})",
            child.wait()?
        ),
        why => anyhow::bail!("{why}"),
    }
}

/// Puts the serving shim where containerd wants it: a little before containerd itself for the OOM killer, and into its cgroup.
fn place(pid: u32, cgroup: Option<&str>) -> anyhow::Result<()> {
    let parent = fs::read_to_string(format!("/proc/{}/oom_score_adj", parent_id()));
    let score = parent
        .ok()
        .and_then(|s| s.trim().parse::<i32>().ok())
        .unwrap_or(0);
    let score = (score + 1).min(MAX_OOM_SCORE_ADJ);
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        warn!(%error, score, "cannot set the shim's oom_score_adj");
    }
    match cgroup {
        Some(cgroup) => join_cgroup(pid, Path::new("/sys/fs/cgroup"), cgroup),
        None => Ok(()),
    }
}

/// v2 has one tree; v1 has one a controller, of which those count that have the cgroup.
fn join_cgroup(pid: u32, root: &Path, cgroup: &str) -> anyhow::Result<()> {
    let below = cgroup.trim_start_matches('/');
    let trees = if root.join("cgroup.controllers").exists() {
        vec![root.to_owned()]
    } else {
        fs::read_dir(root)?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .collect()
    };
    let mut joined = false;
    for procs in trees
        .into_iter()
        .map(|tree| tree.join(below).join("cgroup.procs"))
        .filter(|p| p.exists())
    {
        fs::write(&procs, pid.to_string()).map_err(|e| {
            anyhow::anyhow!(
                "cannot put the shim into the cgroup {}: {e}",
                procs.display()
            )
        })?;
        joined = true;
    }
    anyhow::ensure!(
        joined,
        "the cgroup {cgroup:?} that the runtime options name for the shim does not exist"
    );
    Ok(())
}

/// Leaves the address in the bundle, whole or not at all.
fn write_address(bundle: &Path, socket: &Path) -> anyhow::Result<String> {
    let address = socket::address(socket);
    let new = bundle.join(format!(".{ADDRESS_FILE}"));
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o666)
            .open(&new)?;
        io::Write::write_all(&mut file, address.as_bytes())?;
        fs::rename(&new, bundle.join(ADDRESS_FILE))
    };
    write().map_err(|e| {
        anyhow::anyhow!("cannot write {}: {e}", bundle.join(ADDRESS_FILE).display())
    })?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shims_cgroup_in_both_hierarchies() {
        let root = tempfile::tempdir().unwrap();
        let procs = |path: &str| {
            let dir = root.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("cgroup.procs"), "").unwrap();
            dir.join("cgroup.procs")
        };
        let error = join_cgroup(7, root.path(), "/shims")
            .unwrap_err()
            .to_string();
        assert!(error.contains("/shims"), "{error}");
        let (cpu, memory) = (procs("cpu/shims"), procs("memory/shims"));
        join_cgroup(7, root.path(), "/shims").unwrap();
        assert_eq!(fs::read_to_string(cpu).unwrap(), "7");
        assert_eq!(fs::read_to_string(memory).unwrap(), "7");
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        assert!(join_cgroup(8, root.path(), "/shims").is_err());
        let unified = procs("shims");
        join_cgroup(8, root.path(), "/shims").unwrap();
        assert_eq!(fs::read_to_string(unified).unwrap(), "8");
    }
}
