//! The serving shim: from the hand-over by `start` to the last trace of the pod.
//!
//! It lives in a mount namespace of its own, whose mounts nobody else sees and which the kernel takes apart when the shim and
//! its VMM have ended, however that happens. The namespace is left before any thread exists, because it belongs to a thread.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use nix::unistd::{dup2_stdin, dup2_stdout, setsid};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::args::{Args, HELP};
use crate::bootstrap::{self, READY, TTRPC_ADDRESS};
use crate::config::Config;
use crate::context::ShimContext;
use crate::delete;
use crate::engine_mounts::EngineMounts;
use crate::events::Publisher;
use crate::pod::Keeper;
use crate::state::{self, PodDir, PodState, ProcessId};
use crate::{cleanup, log, service, share};

/// How long containerd may take for the last events.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);
/// What a shim does is little and mostly waiting.
const WORKERS: usize = 2;

/// Serves the pod until it is over.
///
/// # Errors
/// What went wrong before it could serve; also told to `start`.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let stdin = io::stdin();
    if !getsockopt(&stdin, AcceptConn).unwrap_or(false) {
        // Nobody handed a listening socket over: a person has called.
        print!("{HELP}");
        return Ok(());
    }
    let listener = UnixListener::from(stdin.as_fd().try_clone_to_owned()?);
    let prepared = prepare(args);
    let word = match &prepared {
        Ok(_) => READY.to_owned(),
        Err(e) => format!("{e:#}\n"),
    };
    let mut stdout = io::stdout();
    stdout.write_all(word.as_bytes())?;
    stdout.flush()?;
    let (config, pod, engine) = prepared?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?;
    runtime.block_on(serve(args, config, pod.clone(), engine, listener));
    // Tasks that still hold something of the pod end here.
    runtime.shutdown_timeout(Duration::from_secs(1));
    // Where containerd has asked for the end, the pod is cleared away already, and its id may be in use again.
    if pod.load().and_then(|state| state.shim) == ProcessId::current().ok() {
        delete::clear_pod(&pod);
    }
    info!("shim ends");
    Ok(())
}

/// Everything that can fail before the first thread.
fn prepare(args: &Args) -> anyhow::Result<(Config, PodDir, EngineMounts)> {
    let config = Config::load(None)?;
    log::init(
        io::stderr(),
        bootstrap::level(&config, args.debug),
        &args.group,
    )?;
    let step =
        |what: &'static str| move |e: nix::errno::Errno| anyhow::anyhow!("cannot {what}: {e}");
    setsid().map_err(step("start a session for the shim"))?;
    let engine = EngineMounts::of_this_thread()
        .map_err(|e| anyhow::anyhow!("cannot keep the engine's mount namespace: {e}"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(step(
        "make a mount namespace for the shim (is it run as root?)",
    ))?;
    // What the host mounts later (volumes) still arrives; what we mount stays here.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .map_err(step("detach the shim's mounts from the host's"))?;
    leave_other_containers(args, &config);
    // A process with all its streams takes nine descriptors; the usual soft limit of 1024 would be a limit on execs.
    let limits = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = limits {
        warn!(%error, "cannot raise the limit of open files");
    }
    let state_dir = state::make_state_dir(&config.state_dir)?;
    let pod = PodDir::new(&state_dir, &args.namespace, &args.group)?;
    pod.create().map_err(|e| {
        anyhow::anyhow!(
            "cannot make the pod's directory {}: {e}",
            pod.path().display()
        )
    })?;
    share::publish(&pod.share(), &pod.served())
        .map_err(|e| anyhow::anyhow!("cannot mount the pod's share: {e}"))?;
    pod.store(&PodState {
        shim: Some(ProcessId::current()?),
        socket: args.socket.clone(),
        containers: [args.id.clone()].into(),
        ..Default::default()
    })?;
    let bundle = bootstrap::bundle(args)?;
    pod.link_bundle(&bundle)?;
    std::env::set_current_dir("/")?;
    Ok((config, pod, engine))
}

/// Without this the pod works as well, so that a failure is told alone.
fn leave_other_containers(args: &Args, config: &Config) {
    let program = std::env::current_exe().unwrap_or_default();
    let bundle = args.bundle.clone().unwrap_or_default();
    let needed = [
        Path::new("/"),
        &program,
        &bundle,
        &config.vmm,
        &config.kernel,
        &config.initramfs,
        &config.state_dir,
        &config.socket_dir,
    ];
    if let Err(error) = cleanup::leave_private_overlays(&needed) {
        warn!(%error, "the root file system of another container stays in use until this pod's end");
    }
}

async fn serve(
    args: &Args,
    config: Config,
    pod: PodDir,
    engine: EngineMounts,
    listener: UnixListener,
) {
    let ttrpc_address = std::env::var(TTRPC_ADDRESS).ok().filter(|a| !a.is_empty());
    let publisher = Publisher::new(ttrpc_address.as_deref(), &args.namespace);
    let bundle = args.bundle.clone().unwrap_or_default();
    let context = ShimContext {
        namespace: args.namespace.clone(),
        sandbox_id: args.group.clone(),
        keeper: Keeper::of_bundle(&bundle),
        bundle,
        publisher: publisher.clone(),
        config,
        settings: Config::named(),
        pod,
        engine,
    };
    info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        "shim serves"
    );
    tokio::select! {
        served = listen(context, listener) => if let Err(e) = served {
            error!("{e:#}");
        },
        () = asked_to_end() => warn!("ended by a signal, the pod goes with the shim"),
    }
    let waiting = publisher.flush(FLUSH_LIMIT).await;
    if waiting > 0 {
        error!(
            waiting,
            "events that containerd did not take are lost with the shim"
        );
    }
}

async fn listen(context: ShimContext, listener: UnixListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    Box::pin(service::serve(context, listener)).await?;
    Ok(())
}

/// SIGTERM or SIGINT; never, where they cannot be caught.
async fn asked_to_end() {
    match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}
