//! `husk-agent`, PID 1 of a husk guest; as `husk-agent container-init` the first process of a container.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use husk_agent::dial::{Host as _, Vsock};
use husk_agent::reaper::Reaper;
use husk_agent::runtime::Guest;
use husk_agent::sandbox::Milestones;
use husk_agent::service::Service;
use husk_agent::{boot, clock, container, log, power};
use husk_protocol::ports;

/// Threads for what blocks; each lives for a moment.
const BLOCKING_THREADS: usize = 8;

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|job| job == "container-init")
    {
        // Before any runtime or thread exists: it changes namespaces.
        container::init_main();
    }
    std::panic::set_hook(Box::new(|panic| last_words(&panic.to_string())));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The kernel panics when PID 1 ends, and the VMM reports the last lines of its log.
            last_words(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    ensure!(
        std::process::id() == 1,
        "husk-agent is the init of a husk guest and does nothing anywhere else"
    );
    let started_ns = clock::monotonic_ns();
    boot::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context("starting the async runtime")?;
    let served = runtime.block_on(serve(started_ns));
    if let Err(error) = served {
        last_words(&format!("{error:#}"));
    }
    power::off().context("powering the guest off")?;
    Ok(())
}

async fn serve(started_ns: u64) -> anyhow::Result<()> {
    let reaper = Arc::new(Reaper::default());
    tokio::spawn({
        let reaper = Arc::clone(&reaper);
        async move {
            if let Err(e) = reaper.run().await {
                tracing::error!(error = %e, "children are no longer reaped");
            }
        }
    });
    let host = Arc::new(Vsock);
    let dialled_ns = clock::monotonic_ns();
    let connection = host
        .dial(ports::AGENT)
        .await
        .context("connecting to the host for the agent API")?;
    tokio::spawn(async {
        match Vsock.dial(ports::LOG).await {
            Ok(connection) => log::ship(connection).await,
            Err(e) => tracing::warn!(error = %e, "the host does not take the log"),
        }
    });
    let milestones = Milestones {
        started_ns,
        dialled_ns,
    };
    let service =
        Service::new(Guest, host, reaper, milestones).context("setting the service up")?;
    service
        .serve(connection)
        .await
        .context("serving the agent API")
}

/// Says something that must not get lost, in the kernel's log and wherever stderr goes.
fn last_words(words: &str) {
    // There is nobody left to tell of a failure.
    if let Ok(mut kmsg) = std::fs::File::options().write(true).open("/dev/kmsg") {
        let words = words.replace('\n', " ");
        let _ = kmsg.write_all(format!("<2>husk-agent: {words}").as_bytes());
    }
    let _ = writeln!(std::io::stderr(), "husk-agent: {words}");
}
