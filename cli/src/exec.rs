//! `husk exec`: one more process in a container, asked of its shim without anybody between.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::{
    api::{
        CloseIORequest, DeleteRequest, KillRequest, ResizePtyRequest, StartRequest, WaitRequest,
    },
    shim_async::TaskClient,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};

use crate::{
    args,
    attach::show,
    command::Code,
    container::{Container, State},
    files,
    log::Stream,
    pipes::{Pipes, Wanted},
    place::Place,
    run::on_threads,
    shim::{self, forever, said, soon},
    spec, terminal,
};

pub(crate) fn exec(place: &Place, args: &args::Exec) -> Result<()> {
    terminal::check(args.tty, args.interactive && !args.detach)?;
    let container = place.containers()?.find(&args.container)?;
    let status = container.status()?;
    let Some(address) = status.address.filter(|_| status.state == State::Running) else {
        bail!("container {} is not running", container.record.name);
    };
    let process = process(&container, args)?;
    let code = on_threads(async {
        let tasks = shim::connect(&address).await?;
        let id = format!("exec-{}", std::process::id());
        let mut exec = Exec::new(&container, tasks, id, args)?;
        exec.run(&process, args).await
    })?;
    match u8::try_from(code).unwrap_or(255) {
        0 => Ok(()),
        code => Err(Code::silent(code)),
    }
}

/// The container's own process, with what the command line says.
fn process(container: &Container, args: &args::Exec) -> Result<Value> {
    let record = &container.record;
    let mut process = record.spec["process"].clone();
    process["args"] = json!(args.command);
    process["terminal"] = json!(args.tty);
    if let Some(dir) = &args.workdir {
        process["cwd"] = json!(dir);
    }
    let mut env: Vec<String> = serde_json::from_value(process["env"].clone())
        .context("reading the container's environment")?;
    if args.tty && !env.iter().any(|line| line.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    for line in &args.env {
        let key = line.split('=').next().unwrap_or_default();
        let line = match line.contains('=') {
            true => line.clone(),
            false => format!("{key}={}", std::env::var(key).unwrap_or_default()),
        };
        env.retain(|old| old.split('=').next() != Some(key));
        env.push(line);
    }
    process["env"] = json!(env);
    if let Some(user) = &args.user {
        // As the image has them, and as the container may have changed them.
        let mut layers = vec![container.dir.join("upper")];
        layers.extend(record.layers.iter().cloned());
        let who = files::identity(&layers, user)?;
        process["user"] = json!({"uid": who.uid, "gid": who.gid, "additionalGids": who.groups});
        if who.uid != 0 {
            process["capabilities"]["permitted"] = json!([]);
            process["capabilities"]["effective"] = json!([]);
        } else {
            let all = process["capabilities"]["bounding"].clone();
            process["capabilities"]["permitted"] = all.clone();
            process["capabilities"]["effective"] = all;
        }
    }
    if args.privileged {
        process["capabilities"] = spec::all_capabilities();
    }
    Ok(process)
}

/// A process of a container, and its pipes. Dropped, they are removed.
struct Exec {
    tasks: TaskClient,
    container: String,
    id: String,
    dir: PathBuf,
    pipes: Pipes,
}

impl Drop for Exec {
    fn drop(&mut self) {
        // With the container it may have gone.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Exec {
    fn new(
        container: &Container,
        tasks: TaskClient,
        id: String,
        args: &args::Exec,
    ) -> Result<Self> {
        let dir = container.run_dir().join(&id);
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.with_context(|| format!("making {}", dir.display()))?;
        let wanted = Wanted {
            stdin: args.interactive && !args.detach,
            stdout: !args.detach,
            stderr: !args.detach && !args.tty,
        };
        let pipes = Pipes::make(&dir, wanted);
        if pipes.is_err() {
            // Nobody else does.
            let _ = fs::remove_dir_all(&dir);
        }
        Ok(Self {
            tasks,
            container: container.record.id.clone(),
            id,
            dir,
            pipes: pipes?,
        })
    }

    async fn run(&mut self, process: &Value, args: &args::Exec) -> Result<u32> {
        let process = serde_json::to_vec(process)?;
        let request = shim::exec_request(&self.container, &self.id, args.tty, &self.pipes, process);
        said(self.tasks.exec(soon(), &request).await)?;
        let outputs: Vec<JoinHandle<()>> = self
            .pipes
            .outputs()?
            .into_iter()
            .zip([Stream::Stdout, Stream::Stderr])
            .filter_map(|(pipe, stream)| Some(tokio::spawn(output(pipe?, stream))))
            .collect();
        let started = said(
            self.tasks
                .start(
                    soon(),
                    &StartRequest {
                        id: self.container.clone(),
                        exec_id: self.id.clone(),
                        ..StartRequest::default()
                    },
                )
                .await,
        );
        if let Err(error) = started {
            self.delete().await;
            let text = format!("{error:#}");
            return Err(Code::with(crate::monitor::exit_code_of(&text), error));
        }
        if args.detach {
            return Ok(0);
        }
        let raw = match args.tty && args.interactive {
            true => terminal::Raw::new().context("setting the terminal up")?,
            false => None,
        };
        let mut helpers = Vec::new();
        if let Some(sender) = self.pipes.input()? {
            helpers.push(tokio::spawn(input(
                sender,
                self.tasks.clone(),
                self.container.clone(),
                self.id.clone(),
            )));
        }
        if args.tty {
            helpers.push(tokio::spawn(sizes(
                self.tasks.clone(),
                self.container.clone(),
                self.id.clone(),
            )));
        }
        if raw.is_none() {
            for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
                helpers.push(tokio::spawn(signals(
                    kind,
                    self.tasks.clone(),
                    self.container.clone(),
                    self.id.clone(),
                )));
            }
        }
        let wait = WaitRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            ..WaitRequest::default()
        };
        let ended = said(self.tasks.wait(forever(), &wait).await);
        self.delete().await;
        for output in outputs {
            // Of a container that has ended with it, nothing more comes.
            let _ = tokio::time::timeout(std::time::Duration::from_secs(10), output).await;
        }
        helpers.iter().for_each(JoinHandle::abort);
        Ok(ended?.exit_status)
    }

    async fn delete(&self) {
        let delete = DeleteRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            ..DeleteRequest::default()
        };
        if let Err(error) = said(self.tasks.delete(soon(), &delete).await) {
            tracing::debug!("deleting the process: {error:#}");
        }
    }
}

async fn output(mut pipe: pipe::Receiver, stream: Stream) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let data = buffer.get(..count).unwrap_or_default();
        let shown = match stream {
            Stream::Stderr => show(&mut io::stderr().lock(), data),
            Stream::Stdout => show(&mut io::stdout().lock(), data),
        };
        // The reader has gone, and with it the wish for more.
        if shown.is_err() {
            return;
        }
    }
}

async fn input(mut pipe: pipe::Sender, tasks: TaskClient, container: String, id: String) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        if pipe
            .write_all(buffer.get(..count).unwrap_or_default())
            .await
            .is_err()
        {
            return;
        }
    }
    drop(pipe);
    let close = CloseIORequest {
        id: container,
        exec_id: id,
        stdin: true,
        ..CloseIORequest::default()
    };
    // It may have ended.
    let _ = tasks.close_io(soon(), &close).await;
}

async fn sizes(tasks: TaskClient, container: String, id: String) {
    let mut changes = signal(SignalKind::window_change()).ok();
    loop {
        if let Some((rows, columns)) = terminal::size() {
            let resize = ResizePtyRequest {
                id: container.clone(),
                exec_id: id.clone(),
                height: rows.into(),
                width: columns.into(),
                ..ResizePtyRequest::default()
            };
            // It may have ended.
            let _ = tasks.resize_pty(soon(), &resize).await;
        }
        match &mut changes {
            Some(changes) => drop(changes.recv().await),
            None => return,
        }
    }
}

async fn signals(kind: SignalKind, tasks: TaskClient, container: String, id: String) {
    let Ok(mut received) = signal(kind) else {
        return;
    };
    while received.recv().await.is_some() {
        let kill = KillRequest {
            id: container.clone(),
            exec_id: id.clone(),
            signal: kind.as_raw_value().cast_unsigned(),
            ..KillRequest::default()
        };
        // It may have ended.
        let _ = tasks.kill(soon(), &kill).await;
    }
}
