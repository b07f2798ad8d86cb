//! `kill`, `pause`, `resume` and `delete`.

use anyhow::{Result, bail};
use containerd_shim_protos::api::{DeleteRequest, PauseRequest, ResumeRequest, ShutdownRequest};
use husk_client::{
    shim::{said, soon},
    signal::signal_number,
};

use crate::{
    args,
    create::warn_of_failed,
    list,
    store::{Container, Record, Store},
    task::{self, Status, Task},
};

pub(crate) fn kill(store: &Store, args: &args::Kill) -> Result<()> {
    let container = store.find(&args.id)?;
    let record = container.record()?;
    let signal = match args.signal.as_str() {
        // Asks whether it is there (kill(2)).
        "0" => None,
        text => match signal_number(text) {
            Ok(number) => Some(number),
            Err(_) => bail!("unknown signal `{text}`"),
        },
    };
    task::run(async {
        match (task::status(&container, &record).await?, signal) {
            (Status::Stopped, _) if args.all => Ok(()),
            (Status::Stopped, _) => bail!("container not running: No such process"),
            (_, None) => Ok(()),
            (_, Some(number)) => {
                running(&container, &record)
                    .await?
                    .kill(number, args.all)
                    .await
            }
        }
    })
}

/// The task of a container that has one.
pub(crate) async fn running<'a>(container: &'a Container, record: &Record) -> Result<Task<'a>> {
    match Task::find(container, record).await {
        Some(task) => Ok(task),
        None => bail!("the container `{}` is not running", container.id),
    }
}

/// Holds all of a container's processes, or lets them go on.
pub(crate) fn freeze(store: &Store, args: &args::One, is_held: bool) -> Result<()> {
    let container = store.find(&args.id)?;
    let _lock = container.lock()?;
    let record = container.record()?;
    task::run(async {
        let status = task::status(&container, &record).await?;
        if status == Status::Stopped {
            bail!(
                "the container `{}` is not running: No such process",
                container.id
            );
        }
        if (status == Status::Paused) == is_held {
            return Ok(());
        }
        let task = running(&container, &record).await?;
        let id = container.id.to_string();
        let answer = match is_held {
            true => {
                let request = PauseRequest {
                    id,
                    ..PauseRequest::default()
                };
                task.client.pause(soon(), &request).await
            }
            false => {
                let request = ResumeRequest {
                    id,
                    ..ResumeRequest::default()
                };
                task.client.resume(soon(), &request).await
            }
        };
        said(answer).map(drop)
    })
}

pub(crate) fn delete(store: &Store, args: &args::Delete) -> Result<()> {
    let container = match store.find(&args.id) {
        Ok(container) => container,
        Err(_) if args.force => return Ok(()),
        Err(error) => return Err(error),
    };
    let _lock = match container.lock() {
        Ok(lock) => lock,
        // Somebody else has just removed it.
        Err(_) if args.force && !container.dir.exists() => return Ok(()),
        Err(error) => return Err(error),
    };
    match container.record() {
        Ok(record) => {
            let removed = task::run(remove(&container, &record, args.force))?;
            if !removed {
                container.shim().delete();
            }
            let state = list::state_of(&container, &record, Status::Stopped);
            warn_of_failed(&record.hooks.poststop, &state);
        }
        // Of one that was never whole, whatever there is.
        Err(_) if args.force => container.shim().delete(),
        Err(error) => return Err(error),
    }
    container.remove()
}

/// Has the shim forget a container. `false`: there is no shim to ask, or it does not do so.
async fn remove(container: &Container, record: &Record, force: bool) -> Result<bool> {
    let Some(task) = Task::find(container, record).await else {
        return Ok(false);
    };
    let status = task.status().await;
    match status {
        Ok(Status::Stopped) => {}
        Ok(Status::Created) => {}
        Ok(status) if force || !record.proxy.is_alive() => {
            if task.end(status).await.is_err() {
                return Ok(false);
            }
        }
        Err(_) if force => return Ok(false),
        Ok(_) => bail!(
            "the container `{}` is not in `created` or `stopped` state",
            container.id
        ),
        Err(error) => return Err(error),
    }
    let id = container.id.to_string();
    let request = DeleteRequest {
        id: id.clone(),
        ..DeleteRequest::default()
    };
    if said(task.client.delete(soon(), &request).await).is_err() {
        return Ok(false);
    }
    // It ends with its last container, and does not stay to say so.
    let request = ShutdownRequest {
        id,
        ..ShutdownRequest::default()
    };
    let _ = task.client.shutdown(soon(), &request).await;
    Ok(true)
}
