//! `binary://`: a logging program that takes a container's output.
//!
//! containerd's contract (`logging.Run`): fd 3 is the container's stdout, fd 4 its stderr, and closing fd 5, or a byte on it, says
//! that the program is ready. Its environment is the container's id and namespace alone. It ends by itself on EOF.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::target::Binary;

/// How long the program may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to end once its input has.
const END_LIMIT: Duration = Duration::from_secs(10);

/// One of the program's two inputs.
#[derive(Debug)]
pub(super) struct Output {
    sender: pipe::Sender,
    /// The watcher learns from the last one's drop that the input has ended.
    _open: Arc<watch::Sender<()>>,
}

impl Output {
    /// Writes all of it.
    ///
    /// # Errors
    /// The program has gone.
    pub(super) async fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            self.sender.writable().await?;
            match self.sender.try_write(data) {
                Ok(n) => data = data.get(n..).unwrap_or_default(),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Starts the program and waits until it is ready. Gives its inputs for stdout and stderr.
///
/// # Errors
/// When it cannot be started, or ends or stays silent instead of becoming ready.
pub(super) async fn start(
    binary: &Binary,
    container_id: &str,
    namespace: &str,
) -> io::Result<(Output, Output)> {
    let (stdout, to_stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, to_stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let (from_ready, ready) = pipe2(OFlag::O_CLOEXEC)?;
    let mut child = spawn(binary, container_id, namespace, [stdout, stderr, ready])?;
    let outcome = match timeout(READY_LIMIT, await_ready(from_ready)).await {
        Err(_) => Err(io::Error::other(format!(
            "not ready (fd 5) within {} s",
            READY_LIMIT.as_secs()
        ))),
        Ok(Err(e)) => Err(e),
        Ok(Ok(())) if is_ending(&child) => {
            let status = child.wait().await?;
            Err(io::Error::other(format!(
                "ended before it was ready: {status}"
            )))
        }
        Ok(Ok(())) => Ok(()),
    };
    if let Err(e) = outcome {
        let _ = child.kill().await;
        return Err(e);
    }
    let (open, closed) = watch::channel(());
    tokio::spawn(watch_child(
        child,
        closed,
        binary.program.display().to_string(),
    ));
    let open = Arc::new(open);
    let output = |fd: OwnedFd| -> io::Result<Output> {
        Ok(Output {
            sender: pipe::Sender::from_owned_fd(fd)?,
            _open: Arc::clone(&open),
        })
    };
    Ok((output(to_stdout)?, output(to_stderr)?))
}

fn spawn(
    binary: &Binary,
    container_id: &str,
    namespace: &str,
    fds: [OwnedFd; 3],
) -> io::Result<Child> {
    let mut command = Command::new(&binary.program);
    command.args(&binary.arguments).env_clear();
    command
        .env("CONTAINER_ID", container_id)
        .env("CONTAINER_NAMESPACE", namespace);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mappings = fds
        .into_iter()
        .zip(3..)
        .map(|(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        })
        .collect();
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    // The command owns our copies of the child's ends and closes them with its own end, here.
    command.spawn()
}

async fn await_ready(fd: OwnedFd) -> io::Result<()> {
    let receiver = pipe::Receiver::from_owned_fd(fd)?;
    loop {
        receiver.readable().await?;
        match receiver.try_read(&mut [0]) {
            Ok(_) => return Ok(()),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether fd 5 was closed by the program's end. A process gives its memory back before its files, and has no command line from then on.
fn is_ending(child: &Child) -> bool {
    let cmdline = |pid: u32| std::fs::read(format!("/proc/{pid}/cmdline"));
    child
        .id()
        .and_then(|pid| cmdline(pid).ok())
        .is_none_or(|line| line.is_empty())
}

/// Reaps the program; kills it when it does not end with its input.
async fn watch_child(mut child: Child, mut closed: watch::Receiver<()>, program: String) {
    let overdue = async {
        while closed.changed().await.is_ok() {}
        tokio::time::sleep(END_LIMIT).await;
    };
    let ended = tokio::select! {
        ended = child.wait() => Some(ended),
        () = overdue => None,
    };
    match ended {
        Some(Ok(status)) if status.success() => debug!(program, "logging binary ended"),
        Some(Ok(status)) => warn!(program, %status, "logging binary failed"),
        Some(Err(error)) => warn!(program, %error, "cannot wait for the logging binary"),
        None => {
            warn!(
                program,
                "logging binary does not end with its input: killed"
            );
            let _ = child.kill().await;
        }
    }
}
