//! `husk stop`, `kill`, `wait`, `pause`, `unpause` and `rm`.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::{KillRequest, PauseRequest, ResumeRequest, WaitRequest},
    shim_async::TaskClient,
};
use rustix::process::Signal;

use crate::{
    NAMESPACE, args,
    command::Code,
    container::{Container, State},
    network,
    place::Place,
    run::on_threads,
    shim::{self, Shim, forever, said, soon},
    signal::signal_number,
};

/// Does something to each container, tells its user's word for it, and goes on where one fails.
fn each(
    place: &Place,
    words: &[String],
    tell: bool,
    act: impl Fn(&Container) -> Result<()>,
) -> Result<()> {
    let containers = place.containers()?;
    let mut failed = false;
    for word in words {
        match containers.find(word).and_then(|container| act(&container)) {
            Ok(()) if tell => writeln!(io::stdout(), "{word}")?,
            Ok(()) => {}
            Err(error) => {
                eprintln!("husk: {error:#}");
                failed = true;
            }
        }
    }
    match failed {
        true => Err(Code::silent(1)),
        false => Ok(()),
    }
}

/// The shim of a container that runs.
async fn tasks(container: &Container) -> Result<TaskClient> {
    let status = container.status()?;
    let Some(address) = status.address.filter(|_| status.state == State::Running) else {
        bail!("container {} is not running", container.record.name);
    };
    shim::connect(&address).await
}

async fn send(tasks: &TaskClient, id: &str, signal: u32, all: bool) -> Result<()> {
    let kill = KillRequest {
        id: id.to_owned(),
        signal,
        all,
        ..KillRequest::default()
    };
    said(tasks.kill(soon(), &kill).await).map(drop)
}

pub(crate) fn stop(place: &Place, args: &args::Stop) -> Result<()> {
    each(place, &args.containers, true, |container| {
        if container.status()?.state != State::Running {
            return Ok(());
        }
        let signal = signal_number(&container.record.stop_signal)?;
        end(container, signal, Duration::from_secs(args.time))
    })
}

/// Asks a container to end, and kills it after a while.
fn end(container: &Container, signal: u32, patience: Duration) -> Result<()> {
    let id = &container.record.id;
    on_threads(async {
        let tasks = match tasks(container).await {
            Ok(tasks) => tasks,
            // It has ended by itself.
            Err(_) if container.status()?.state != State::Running => return Ok(()),
            Err(error) => return Err(error),
        };
        let wait = WaitRequest {
            id: id.clone(),
            ..WaitRequest::default()
        };
        // It may end before it is asked.
        if let Err(error) = send(&tasks, id, signal, false).await {
            tracing::debug!("asking {id} to end: {error:#}");
        }
        let ended = tokio::time::timeout(patience, tasks.wait(forever(), &wait)).await;
        if ended.is_err()
            && let Err(error) = send(&tasks, id, Signal::KILL.as_raw().cast_unsigned(), true).await
        {
            tracing::debug!("killing {id}: {error:#}");
        }
        Ok(())
    })?;
    // Its monitor clears away first.
    container.wait_for_monitor()?;
    Ok(())
}

pub(crate) fn kill(place: &Place, args: &args::Kill) -> Result<()> {
    let signal = signal_number(&args.signal)?;
    each(place, &args.containers, true, |container| {
        on_threads(async {
            let tasks = tasks(container).await?;
            send(&tasks, &container.record.id, signal, false).await
        })
    })
}

pub(crate) fn pause(place: &Place, args: &args::Containers) -> Result<()> {
    each(place, &args.containers, true, |container| {
        on_threads(async {
            let pause = PauseRequest {
                id: container.record.id.clone(),
                ..PauseRequest::default()
            };
            said(tasks(container).await?.pause(soon(), &pause).await).map(drop)
        })
    })
}

pub(crate) fn unpause(place: &Place, args: &args::Containers) -> Result<()> {
    each(place, &args.containers, true, |container| {
        on_threads(async {
            let resume = ResumeRequest {
                id: container.record.id.clone(),
                ..ResumeRequest::default()
            };
            said(tasks(container).await?.resume(soon(), &resume).await).map(drop)
        })
    })
}

pub(crate) fn wait(place: &Place, args: &args::Containers) -> Result<()> {
    each(place, &args.containers, false, |container| {
        // One that removes itself takes its status along: it is asked for while it runs.
        let code = match container.status()?.state {
            State::Running => on_threads(async {
                let wait = WaitRequest {
                    id: container.record.id.clone(),
                    ..WaitRequest::default()
                };
                let ended = said(tasks(container).await?.wait(forever(), &wait).await);
                ended.map(|ended| Some(ended.exit_status))
            })
            .ok()
            .flatten(),
            _ => None,
        };
        container.wait_for_monitor()?;
        let code = match code {
            Some(code) => code,
            None => container.status()?.exit_code.unwrap_or(0),
        };
        Ok(writeln!(io::stdout(), "{code}")?)
    })
}

pub(crate) fn remove(place: &Place, args: &args::Rm) -> Result<()> {
    let containers = place.containers()?;
    let there: Vec<String> = args
        .containers
        .iter()
        .filter(|word| !args.force || containers.find(word).is_ok())
        .cloned()
        .collect();
    each(place, &there, true, |container| {
        if container.status()?.state == State::Running {
            if !args.force {
                bail!(
                    "container {} is running: stop it first, or --force kills and removes it",
                    container.record.name
                );
            }
            end(
                container,
                Signal::KILL.as_raw().cast_unsigned(),
                Duration::from_secs(10),
            )?;
            if container.record.remove {
                return Ok(());
            }
        }
        clear(container)
    })
}

/// Removes a container that does not run.
fn clear(container: &Container) -> Result<()> {
    let lock = container.try_lock().context("locking the container")?;
    let Some(_lock) = lock else {
        bail!(
            "container {} is being started or stopped",
            container.record.name
        );
    };
    // Of one whose monitor was killed, the VM may be there still.
    let shim = Shim {
        namespace: NAMESPACE,
        id: &container.record.id,
        bundle: &container.dir.join("bundle"),
    };
    shim.delete();
    network::detach(container);
    container.remove()
}

/// Removes all that have run and do not run any more: their names.
pub(crate) fn remove_ended(place: &Place) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for container in place.containers()?.all()? {
        if container.status()?.state == State::Exited {
            clear(&container)?;
            removed.push(container.record.name);
        }
    }
    Ok(removed)
}
