//! The process that engines take for a container's: a child of whoever has called `create` or `exec`, which holds the standard streams that it
//! was given, hands signals on, and ends as the process in the guest does.
//!
//! It has nothing of the host but those streams and a connection to the shim. An engine goes by its pid into what it believes to be the container
//! (`podman cp` and `podman top` join its mount namespace, other containers its network), so its mount namespace has the container's
//! files and a `/proc` that tells of the guest's processes, its pid namespace has nobody but the proxies of containers that share theirs, and
//! its network is the container's. Its own root is an empty directory.

mod console;
mod files;
mod proc_fs;
mod processes;
mod streams;

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use command_fds::{CommandFdExt as _, FdMapping};
use containerd_shim_protos::{
    api::{CloseIORequest, DeleteRequest, KillRequest, ResizePtyRequest, WaitRequest},
    shim_async::{Client, TaskClient},
};
use husk_client::shim::{forever, said, soon};
use husk_protocol::{agent::ContainerRequest, shim::GuestClient};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::process::setsid;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use ttrpc::{asynchronous::transport::Socket, context::with_duration};

use crate::{args, task};
use console::Console;
use files::{Files, leave_host};
use proc_fs::ProcFs;
use processes::Processes;
use streams::Streams;

/// What a proxy says once everything is in its hands.
const READY: &str = "ready";

/// The descriptor that it says so on, or why not.
const REPORT: i32 = 3;

/// How long the rest of the output may take, once the process has ended.
const REST: Duration = Duration::from_secs(10);

/// How often a terminal's size is told that the guest could not take: before its process was started.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the guest may take to tell of its processes: longer than the shim gives it.
const DESCRIPTION: Duration = Duration::from_secs(15);

/// What it ends with where nobody can say how the process did: as after SIGKILL.
const LOST: u32 = 128 + task::KILL;

/// The last signal there is.
const LAST_SIGNAL: i32 = 64;

/// Starts one, with this process' standard streams unless it gets a terminal, and waits until it is ready. Its pid is one of this process' pid
/// namespace, though it has one of its own, or that of another proxy, `pids`: engines take containers whose processes have the same for
/// such as see each other (`podman pod top`), and a pod's end with those of its first. This process must have one thread.
pub(crate) fn spawn(root: &Path, args: &args::Proxy, pids: Option<&Path>) -> Result<Child> {
    let enter = |path: &Path| {
        let file = File::open(path)?;
        Ok::<_, anyhow::Error>(setns(file, CloneFlags::CLONE_NEWPID)?)
    };
    match pids {
        Some(path) => enter(path).with_context(|| format!("entering {}", path.display()))?,
        None => unshare(CloneFlags::CLONE_NEWPID).context("making a pid namespace")?,
    }
    let (reader, writer) = std::io::pipe().context("making a pipe")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("husk-oci")
        .arg("--root")
        .arg(root)
        .args([
            "proxy",
            "--exec-id",
            &args.exec_id,
            "--address",
            &args.address,
        ])
        .arg("--pipes")
        .arg(&args.pipes);
    if let Some(socket) = &args.console_socket {
        command.arg("--console-socket").arg(socket);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
    }
    if let Some(network) = &args.network {
        command.arg("--network").arg(network);
    }
    if let Some(spec) = &args.spec {
        command.arg("--spec").arg(spec);
    }
    command.arg(args.id.as_str());
    let report = FdMapping {
        parent_fd: OwnedFd::from(writer),
        child_fd: REPORT,
    };
    command
        .fd_mappings(vec![report])
        .context("arranging its descriptors")?;
    let child = command.spawn();
    // What else this process starts is not to be in there.
    enter(Path::new("/proc/self/ns/pid")).context("coming back to the own pid namespace")?;
    let mut child = child.context("starting the container's proxy")?;
    // Its end of the pipe is the proxy's alone.
    drop(command);
    let mut said = String::new();
    let read = BufReader::new(reader).read_line(&mut said);
    match read.map(|_| said.trim()) {
        Ok(READY) => Ok(child),
        told => {
            end(&mut child);
            match told {
                Ok("") => bail!("the container's proxy ended before it was ready"),
                Ok(why) => bail!("{why}"),
                Err(error) => Err(error).context("waiting for the container's proxy"),
            }
        }
    }
}

/// Ends a proxy whose process has not come to be.
pub(crate) fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// The proxy's own life: what it ends with.
pub(crate) fn run(args: &args::Proxy) -> Result<u8> {
    // As its program's name is that of a link in /proc.
    let _ = rustix::thread::set_name(c"husk-oci");
    // Opened anew, as a bare number belongs to nobody here. A person who tries this has no such descriptor.
    let report = File::options()
        .write(true)
        .open(format!("/proc/self/fd/{REPORT}"));
    let mut report = report.context("`create` and `exec` start a proxy, nobody else")?;
    let prepared = match Prepared::new(args) {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = writeln!(report, "{}", format!("{error:#}").replace('\n', " "));
            return Err(error);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    let code = runtime.block_on(prepared.wait(args, report))?;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

/// All that a proxy holds.
struct Prepared {
    shim: std::os::unix::net::UnixStream,
    streams: Streams,
    console: Option<Console>,
    proc: Option<ProcFs>,
}

impl Prepared {
    /// Gathers it and leaves the host. No thread has been started yet.
    fn new(args: &args::Proxy) -> Result<Self> {
        setsid().context("leaving the caller's session")?;
        let console = args
            .console_socket
            .as_deref()
            .map(Console::new)
            .transpose()?;
        let given = match &console {
            Some(console) => [console.file()?, console.file()?, console.file()?],
            None => standard_streams()?,
        };
        let streams = Streams::open(&args.pipes, given)?;
        let path = args
            .address
            .strip_prefix("unix://")
            .unwrap_or(&args.address);
        let shim = std::os::unix::net::UnixStream::connect(path)
            .with_context(|| format!("connecting to the container's shim at {path}"))?;
        shim.set_nonblocking(true)?;
        if let Some(network) = &args.network {
            let enter =
                || Ok::<_, anyhow::Error>(setns(File::open(network)?, CloneFlags::CLONE_NEWNET)?);
            enter().with_context(|| format!("entering the network {}", network.display()))?;
        }
        // Without FUSE nobody is told of the processes, and all else is as it is.
        let wanted = args.spec.as_ref().and_then(|_| ProcFs::new().ok());
        let (proc, mount) = wanted.unzip();
        let files = args.spec.as_deref().map(|spec| Files::of(spec, mount));
        let files = files.transpose()?;
        leave_host(&args.pipes, files.as_ref()).context("leaving the host's files")?;
        Ok(Self {
            shim,
            streams,
            console,
            proc,
        })
    }

    /// Waits for the process' end: its exit code.
    async fn wait(self, args: &args::Proxy, mut report: File) -> Result<u32> {
        let stream = tokio::net::UnixStream::from_std(self.shim)?;
        let client = Client::new(Socket::from(stream));
        let process = Process {
            tasks: TaskClient::new(client.clone()),
            id: args.id.to_string(),
            exec_id: args.exec_id.clone(),
        };
        let mut signals = signals(self.console.is_some())?;
        let (sender, mut input_ended) = mpsc::unbounded_channel();
        let outputs = self.streams.copy(sender)?;
        let (asker, mut asked) = mpsc::unbounded_channel::<Answer>();
        if let Some(proc) = self.proc {
            let ask = move || {
                let (answer, answered) = std::sync::mpsc::channel();
                asker.send(answer).ok()?;
                answered.recv().ok()
            };
            proc.serve(Box::new(ask)).context("starting a thread")?;
        }
        writeln!(report, "{READY}").context("telling that it is ready")?;
        drop(report);
        let request = WaitRequest {
            id: process.id.clone(),
            exec_id: process.exec_id.clone(),
            ..WaitRequest::default()
        };
        let ended = process.tasks.wait(forever(), &request);
        let mut ended = std::pin::pin!(ended);
        // Somebody may have set it already.
        let mut is_size_told = self.console.is_none();
        let answer = loop {
            tokio::select! {
                answer = &mut ended => break answer,
                () = sleep(AGAIN), if !is_size_told => {
                    is_size_told = match &self.console {
                        Some(console) => process.resize(console).await,
                        None => true,
                    };
                }
                Some(number) = signals.recv() => match &self.console {
                    Some(_) if number == SignalKind::window_change().as_raw_value() => is_size_told = false,
                    _ => process.kill(number).await,
                },
                Some(()) = input_ended.recv() => process.end_input().await,
                Some(answer) = asked.recv() => {
                    tokio::spawn(describe(GuestClient::new(client.clone()), process.id.clone(), answer));
                }
            }
        };
        // A shim that has gone has taken the process along; one that knows nothing of it has deleted it, unstarted.
        let code = answer.map_or(LOST, |answer| answer.exit_status);
        for output in outputs {
            let _ = timeout(REST, output).await;
        }
        if !process.exec_id.is_empty() {
            process.delete().await;
        }
        Ok(code)
    }
}

/// The process in the guest.
struct Process {
    tasks: TaskClient,
    id: String,
    exec_id: String,
}

impl Process {
    // What it is told it may not hear any more: it may have ended.

    async fn kill(&self, signal: i32) {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            signal: signal.unsigned_abs(),
            ..KillRequest::default()
        };
        let _ = said(self.tasks.kill(soon(), &request).await);
    }

    /// Tells the terminal's size, if it has one. `false`: it could not be told.
    async fn resize(&self, console: &Console) -> bool {
        let Some((width, height)) = console.size() else {
            return true;
        };
        let request = ResizePtyRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            width: width.into(),
            height: height.into(),
            ..ResizePtyRequest::default()
        };
        self.tasks.resize_pty(soon(), &request).await.is_ok()
    }

    async fn end_input(&self) {
        let request = CloseIORequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        let _ = said(self.tasks.close_io(soon(), &request).await);
    }

    async fn delete(&self) {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..DeleteRequest::default()
        };
        let _ = said(self.tasks.delete(soon(), &request).await);
    }
}

/// Whom the guest's word on the processes goes to; one that goes without any has failed.
type Answer = std::sync::mpsc::Sender<Processes>;

async fn describe(guest: GuestClient, container_id: String, answer: Answer) {
    let request = ContainerRequest {
        container_id,
        ..ContainerRequest::default()
    };
    let told = guest.describe_processes(with_duration(DESCRIPTION), &request);
    if let Ok(told) = told.await {
        let _ = answer.send(told.into());
    }
}

/// Every signal that can be caught and that somebody sends, from now on.
fn signals(has_console: bool) -> Result<mpsc::UnboundedReceiver<i32>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for number in 1..=LAST_SIGNAL {
        let is_own = [SignalKind::child(), SignalKind::pipe()]
            .iter()
            .any(|kind| kind.as_raw_value() == number);
        // Without a terminal a change of size is none of the container's business.
        let is_nobodys = !has_console && number == SignalKind::window_change().as_raw_value();
        if is_own || is_nobodys {
            continue;
        }
        // Some cannot be caught (SIGKILL, SIGSTOP), some are the process' own faults (SIGSEGV), two are the C library's.
        let Ok(mut caught) = signal(SignalKind::from_raw(number)) else {
            continue;
        };
        let sender = sender.clone();
        tokio::spawn(async move {
            while caught.recv().await.is_some() && sender.send(number).is_ok() {}
        });
    }
    Ok(receiver)
}

fn standard_streams() -> Result<[File; 3]> {
    use std::os::fd::AsFd as _;
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let copies = || {
        Ok::<_, std::io::Error>([
            copy(std::io::stdin().as_fd())?,
            copy(std::io::stdout().as_fd())?,
            copy(std::io::stderr().as_fd())?,
        ])
    };
    copies().context("holding the standard streams")
}
