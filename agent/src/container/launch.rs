//! The agent's side of a launch: start `container-init`, follow what it says, open its gate.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use tokio::io::Interest;
use tokio::net::UnixDatagram;

use super::channel::{Channel, Received, to_memfd};
use super::error::{LaunchError, Step};
use super::job::{FromInit, HooksJob, Job, JobFollows, ToInit};
use super::{Io, State};

static EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();

/// Names the program that is run as `container-init`, where that is not the running one itself: in
/// tests. The first call counts.
pub fn use_executable(path: PathBuf) {
    let _ = EXECUTABLE.set(path);
}

/// A process that has been set up and waits at its gate.
#[derive(Debug)]
pub struct Launched {
    /// Its pid as the agent sees it.
    pub pid: i32,
    /// The master of its terminal, where it has one.
    pub console: Option<OwnedFd>,
    /// What it waits at. Dropped unopened, the process ends.
    pub gate: StartGate,
}

/// Where a process waits before it becomes the user's program.
pub struct StartGate {
    channel: AsyncChannel,
    container: Option<Arc<State>>,
}

impl fmt::Debug for StartGate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("StartGate").finish_non_exhaustive()
    }
}

impl Launched {
    /// Has the gate run the container's poststart hooks.
    pub(super) fn with_poststart(mut self, container: Arc<State>) -> Self {
        self.gate.container = Some(container);
        self
    }
}

impl StartGate {
    /// Lets the process run the user's program; returns when execve has succeeded.
    ///
    /// # Errors
    /// Why it did not; the process ends then.
    pub async fn release(self) -> Result<(), LaunchError> {
        self.channel
            .channel()
            .send(&ToInit::Start)
            .map_err(|_| ended("before it could be started"))?;
        let mut executing = false;
        loop {
            match self.channel.receive().await? {
                Some((FromInit::Executing, _)) => executing = true,
                Some((FromInit::Failed(error), _)) => return Err(error),
                Some((other, _)) => return Err(unexpected(&other)),
                // The socket is close-on-exec.
                None if executing => break,
                None => return Err(ended("before execve")),
            }
        }
        match &self.container {
            Some(container) => container.poststart().await,
            None => Ok(()),
        }
    }
}

/// A [`Channel`] that does not block the agent.
struct AsyncChannel {
    channel: Channel,
    /// The same socket: tells when there is something to read. (tokio knows no SEQPACKET; for readiness the type makes
    /// no difference.)
    readiness: UnixDatagram,
}

impl AsyncChannel {
    fn new(channel: Channel) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixDatagram::from(channel.as_fd().try_clone_to_owned()?);
        socket.set_nonblocking(true)?;
        Ok(Self {
            readiness: UnixDatagram::from_std(socket)?,
            channel,
        })
    }

    fn channel(&self) -> &Channel {
        &self.channel
    }

    async fn receive(&self) -> Result<Option<Received<FromInit>>, LaunchError> {
        let received = self
            .readiness
            .async_io(Interest::READABLE, || self.channel.try_receive())
            .await;
        match received {
            // It ended with something of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            other => other.step(|| "reading from container-init".to_owned()),
        }
    }
}

/// Starts a `container-init` process. Its socket is its stdin: so it inherits one descriptor that std knows
/// how to pass, and all others come as messages.
fn spawn(job: &Job, fds: &[&OwnedFd]) -> Result<AsyncChannel, LaunchError> {
    let what = || "starting container-init".to_owned();
    let (ours, theirs) = Channel::pair().step(what)?;
    let memfd = to_memfd(job).step(what)?;
    let executable = EXECUTABLE
        .get()
        .cloned()
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let child = Command::new(executable)
        .arg("container-init")
        .env_clear()
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .step(what)?;
    // The reaper waits for it.
    drop(child);
    let fds: Vec<_> = std::iter::once(&memfd)
        .chain(fds.iter().copied())
        .map(AsFd::as_fd)
        .collect();
    ours.send_with(&JobFollows, &fds).step(what)?;
    AsyncChannel::new(ours).step(what)
}

/// Launches a process up to its gate. `hooks` are the jobs to run, for the pid, when it asks for them.
pub(super) async fn launch<const N: usize>(
    job: &Job,
    init: Option<&OwnedFd>,
    io: Io,
    hooks: impl Fn(i32) -> [HooksJob; N],
) -> Result<Launched, LaunchError> {
    let mut fds: Vec<&OwnedFd> = init.into_iter().collect();
    if let Io::Pipes(streams) = &io {
        fds.extend([&streams.stdin, &streams.stdout, &streams.stderr]);
    }
    let channel = spawn(job, &fds)?;
    // The child has its own copies: ours would keep the streams open.
    drop(io);
    follow(channel, hooks).await
}

/// Follows a set-up to its gate.
async fn follow<const N: usize>(
    channel: AsyncChannel,
    hooks: impl Fn(i32) -> [HooksJob; N],
) -> Result<Launched, LaunchError> {
    let mut pid = None;
    let mut console = None;
    loop {
        let Some((message, received)) = channel.receive().await? else {
            return Err(ended("during set-up"));
        };
        match (message, pid) {
            // Once: the agent reaps and signals this one. 0 and below would be groups, 1 is the agent.
            (FromInit::Pid(child), None) if child > 1 => pid = Some(child),
            (FromInit::Console, _) => console = received.into_iter().next(),
            (FromInit::RunHooks, Some(pid)) => {
                for job in hooks(pid) {
                    run_hooks(job).await?;
                }
                channel
                    .channel()
                    .send(&ToInit::Continue)
                    .map_err(|_| ended("during the hooks"))?;
            }
            (FromInit::Ready, Some(pid)) => {
                return Ok(Launched {
                    pid,
                    console,
                    gate: StartGate {
                        channel,
                        container: None,
                    },
                });
            }
            (FromInit::Failed(error), _) => return Err(error),
            (other, _) => return Err(unexpected(&other)),
        }
    }
}

/// Runs hooks in the runtime's namespaces, in a process that can wait for them.
pub(super) async fn run_hooks(job: HooksJob) -> Result<(), LaunchError> {
    if job.hooks.is_empty() {
        return Ok(());
    }
    run_to_its_end(&Job::Hooks(job)).await
}

/// Has a job done that leaves no process behind.
pub(super) async fn run_to_its_end(job: &Job) -> Result<(), LaunchError> {
    let channel = spawn(job, &[])?;
    match channel.receive().await? {
        Some((FromInit::Done, _)) => Ok(()),
        Some((FromInit::Failed(error), _)) => Err(error),
        Some((other, _)) => Err(unexpected(&other)),
        None => Err(ended("before its job was done")),
    }
}

/// Says that the kernel killed the process for memory, where that is why it ended without a word.
pub(super) fn explain_oom(error: LaunchError, kills: u64) -> LaunchError {
    match error {
        LaunchError::Internal(message) if kills > 0 && message.starts_with(ENDED) => {
            LaunchError::InvalidSpec(
                "container init was OOM-killed (memory limit too low?)".to_owned(),
            )
        }
        other => other,
    }
}

const ENDED: &str = "the container's process ended";

fn ended(when: &str) -> LaunchError {
    LaunchError::Internal(format!("{ENDED} {when}"))
}

fn unexpected(message: &FromInit) -> LaunchError {
    LaunchError::Internal(format!("container-init said {message:?} out of turn"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn told(pids: &[i32]) -> Result<Launched, LaunchError> {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        for pid in pids {
            theirs.send(&FromInit::Pid(*pid)).unwrap();
        }
        theirs.send(&FromInit::Ready).unwrap();
        follow(AsyncChannel::new(ours).unwrap(), |_| []).await
    }

    #[tokio::test]
    async fn a_pid_is_told_once_and_is_one_process() {
        assert_eq!(told(&[7]).await.unwrap().pid, 7);
        for bad in [&[7, 8][..], &[7, 7], &[1], &[0], &[-1], &[]] {
            let error = told(bad).await.unwrap_err();
            assert!(
                error.to_string().contains("out of turn"),
                "{bad:?}: {error}"
            );
        }
    }
}
