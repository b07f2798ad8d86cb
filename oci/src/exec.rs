//! `exec`.

use std::{fs, path::Path, process::Child};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::{DeleteRequest, StartRequest},
    shim_async::TaskClient,
};
use husk_client::{
    pipes::Pipes,
    shim::{self, said, soon},
};
use serde_json::{Value, json};

use crate::{
    args::{self, Args},
    create::{make_pipes, no_descriptors, write_pid},
    delete::running,
    proxy,
    spec::{Spec, read_json},
    store::{Container, Store},
    task::{self, Status},
};

/// A process that did not come to run, for this reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotRun(String);

/// Runs it; the code to end with.
pub(crate) fn exec(all: &Args, args: &args::Exec) -> Result<u8> {
    no_descriptors(args.preserve_fds)?;
    let container = Store::open(&all.root)?.find(&args.id)?;
    let record = container.record()?;
    let process = process(&container, args)?;
    let terminal = process["terminal"].as_bool().unwrap_or(false);
    if terminal && args.console_socket.is_none() {
        bail!("use --console-socket with exec when a terminal is used");
    }
    let id = format!("exec-{}", std::process::id());
    let dir = container.dir.join(&id);
    let pipes = make_pipes(&dir, terminal)?;
    let started = task::run(async {
        match task::status(&container, &record).await? {
            Status::Stopped => bail!("the container `{}` is not running", container.id),
            Status::Paused => bail!("the container `{}` is paused", container.id),
            Status::Created | Status::Running => {}
        }
        let task = running(&container, &record).await?;
        let exec = Exec {
            tasks: &task.client,
            container: &container,
            id: &id,
        };
        exec.add(&process, &pipes, terminal).await?;
        let proxy = args::Proxy {
            exec_id: id.clone(),
            address: record.address.clone(),
            pipes: dir.clone(),
            console_socket: args.console_socket.clone().filter(|_| terminal),
            network: None,
            spec: None,
            id: container.id.clone(),
        };
        let mut child = match proxy::spawn(&all.root, &proxy, None) {
            Ok(child) => child,
            Err(error) => {
                exec.delete().await;
                return Err(error);
            }
        };
        let started = exec.start(args.pid_file.as_deref(), &child).await;
        if started.is_err() {
            proxy::end(&mut child);
            exec.delete().await;
        }
        started.map(|()| child)
    });
    // Both have the pipes open, or never will.
    let removed = fs::remove_dir_all(&dir);
    let mut child = started?;
    removed.with_context(|| format!("removing {}", dir.display()))?;
    if args.detach {
        return Ok(0);
    }
    let status = child.wait().context("waiting for the process")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX))
}

/// What is to run: a file's, or the container's own with what the command line says.
fn process(container: &Container, args: &args::Exec) -> Result<Value> {
    if let Some(path) = &args.process {
        let mut process = read_json(path)?;
        if !process.is_object() {
            bail!("{} holds no process", path.display());
        }
        if args.tty {
            process["terminal"] = json!(true);
        }
        return Ok(process);
    }
    if args.command.is_empty() {
        bail!("exec wants a command, or --process with a file");
    }
    let mut process = Spec::of_bundle(&container.dir)?.process();
    if !process.is_object() {
        process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}});
    }
    process["args"] = json!(args.command);
    process["terminal"] = json!(args.tty);
    if let Some(cwd) = &args.cwd {
        process["cwd"] = json!(cwd);
    }
    if let Some(user) = &args.user {
        process["user"] = self::user(user)?;
    }
    if args.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    if !args.env.is_empty() {
        let mut env: Vec<Value> = process["env"].as_array().cloned().unwrap_or_default();
        env.extend(args.env.iter().map(|line| json!(line)));
        process["env"] = json!(env);
    }
    if !args.cap.is_empty() {
        let sets = [
            "bounding",
            "effective",
            "permitted",
            "inheritable",
            "ambient",
        ];
        for set in sets {
            let mut caps: Vec<Value> = process["capabilities"][set]
                .as_array()
                .cloned()
                .unwrap_or_default();
            caps.extend(args.cap.iter().map(|cap| json!(cap)));
            process["capabilities"][set] = json!(caps);
        }
    }
    Ok(process)
}

/// `UID[:GID]`.
fn user(text: &str) -> Result<Value> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    match (uid.parse::<u32>(), gid.parse::<u32>()) {
        (Ok(uid), Ok(gid)) => Ok(json!({"uid": uid, "gid": gid})),
        _ => bail!("invalid USERSPEC specified: `{text}` is not UID[:GID]"),
    }
}

/// A process on its way.
struct Exec<'a> {
    tasks: &'a TaskClient,
    container: &'a Container,
    id: &'a str,
}

impl Exec<'_> {
    async fn add(&self, process: &Value, pipes: &Pipes, terminal: bool) -> Result<()> {
        let process = serde_json::to_vec(process)?;
        let container = self.container.id.as_str();
        let request = shim::exec_request(container, self.id, terminal, pipes, process);
        said(self.tasks.exec(soon(), &request).await).map(drop)
    }

    async fn start(&self, pid_file: Option<&Path>, proxy: &Child) -> Result<()> {
        write_pid(pid_file, proxy.id())?;
        let request = StartRequest {
            id: self.container.id.to_string(),
            exec_id: self.id.to_owned(),
            ..StartRequest::default()
        };
        match said(self.tasks.start(soon(), &request).await) {
            Ok(_) => Ok(()),
            Err(error) => Err(NotRun(format!("{error:#}")).into()),
        }
    }

    async fn delete(&self) {
        let request = DeleteRequest {
            id: self.container.id.to_string(),
            exec_id: self.id.to_owned(),
            ..DeleteRequest::default()
        };
        // It may never have been added.
        let _ = said(self.tasks.delete(soon(), &request).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("7").unwrap(), json!({"uid": 7, "gid": 0}));
        assert_eq!(user("7:8").unwrap(), json!({"uid": 7, "gid": 8}));
        for bad in ["", "a", "1:", "1:b", "-1", "1:2:3"] {
            assert!(user(bad).is_err(), "{bad}");
        }
    }
}
