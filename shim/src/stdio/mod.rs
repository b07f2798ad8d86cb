//! A process's standard streams on the host: from the guest's vsock streams to what containerd asked for.
//!
//! The ends are opened when the process is created ([`Stdio::open`]) and joined to the guest's streams as those arrive
//! ([`Stdio::connect`]). A client may come and go at any time: the shim holds both ends of every FIFO, so nobody's leaving ends
//! the container's streams. [`Stdio::drained`] tells when the client has been given what the process wrote, which is
//! when its exit may be announced.

mod binary;
mod copy;
mod fifo;
mod file;
mod target;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::fs::OpenOptions;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::warn;

use copy::{Progress, Sink, Source};
use target::Target;

pub use crate::streams::StreamKind;

/// How long [`Stdio::drained`] waits while nothing moves.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// How long it waits in all: a guest may let the last of it come byte by byte.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);

/// Most bytes between the agent and here once it has told of a process's end: the credit of a vsock connection, a socket's buffer and a
/// [`copy`]'s, several times over. A guest that tells of more is not believed.
const MAX_UNDERWAY: u64 = 4 << 20;

/// What containerd asks for, as in the Create and Exec requests. Empty: none (`/dev/null` in the guest).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Path of a FIFO.
    pub stdin: String,
    /// Path of a FIFO, `file://…` or `binary://…`.
    pub stdout: String,
    /// Path of a FIFO, `file://…` or `binary://…`.
    pub stderr: String,
    /// The process has a terminal: stderr is not used.
    pub terminal: bool,
}

/// The host's ends of one process's streams.
#[derive(Debug)]
pub struct Stdio {
    /// Each end until it is joined to its stream.
    stdin: Mutex<Option<Source>>,
    stdout: Mutex<Option<Sink>>,
    stderr: Mutex<Option<Sink>>,
    wanted: [bool; 3],
    closing_stdin: watch::Sender<bool>,
    stdout_progress: watch::Sender<Progress>,
    stderr_progress: watch::Sender<Progress>,
    copying: Mutex<Vec<AbortHandle>>,
}

impl crate::streams::Sink for Stdio {
    fn connect(&self, kind: StreamKind, stream: UnixStream) {
        Self::connect(self, kind, stream);
    }
}

/// A stream that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {kind:?} {path:?}: {reason}")]
pub struct StdioError {
    kind: StreamKind,
    path: String,
    reason: String,
}

impl Stdio {
    /// Opens the host ends. `container_id` and `namespace` are what a logging binary gets in its environment.
    ///
    /// # Errors
    /// [`StdioError`] naming the stream and its path.
    pub async fn open(
        paths: &StdioPaths,
        container_id: &str,
        namespace: &str,
    ) -> Result<Self, StdioError> {
        let stderr = if paths.terminal {
            ""
        } else {
            paths.stderr.as_str()
        };
        let stdin = open_source(&paths.stdin).await?;
        let (stdout, stderr) = open_sinks(&paths.stdout, stderr, container_id, namespace).await?;
        // A stream that nobody wants has nothing to wait for.
        let progress = |sink: &Option<Sink>| {
            watch::Sender::new(Progress {
                forwarded: 0,
                ended: sink.is_none(),
            })
        };
        Ok(Self {
            wanted: [stdin.is_some(), stdout.is_some(), stderr.is_some()],
            stdout_progress: progress(&stdout),
            stderr_progress: progress(&stderr),
            stdin: Mutex::new(stdin),
            stdout: Mutex::new(stdout),
            stderr: Mutex::new(stderr),
            closing_stdin: watch::Sender::new(false),
            copying: Mutex::default(),
        })
    }

    /// Whether the guest shall dial this stream at all (else its token stays empty).
    pub fn wants(&self, kind: StreamKind) -> bool {
        let [stdin, stdout, stderr] = self.wanted;
        match kind {
            StreamKind::Stdin => stdin,
            StreamKind::Stdout => stdout,
            StreamKind::Stderr => stderr,
        }
    }

    /// Joins the guest's stream (the token already read off it) to the host end; copies in the background from here. A second
    /// stream of the same kind, or one after [`Stdio::close`], is closed.
    pub fn connect(&self, kind: StreamKind, stream: UnixStream) {
        // Held across the spawn, so that a close cannot come between.
        let mut copying = lock(&self.copying);
        let task = match kind {
            StreamKind::Stdin => lock(&self.stdin).take().map(|source| {
                tokio::spawn(copy::input(source, stream, self.closing_stdin.subscribe()))
            }),
            StreamKind::Stdout => lock(&self.stdout).take().map(|sink| {
                tokio::spawn(copy::output(
                    kind,
                    stream,
                    sink,
                    self.stdout_progress.clone(),
                ))
            }),
            StreamKind::Stderr => lock(&self.stderr).take().map(|sink| {
                tokio::spawn(copy::output(
                    kind,
                    stream,
                    sink,
                    self.stderr_progress.clone(),
                ))
            }),
        };
        match task {
            Some(task) => copying.push(task.abort_handle()),
            None => warn!(?kind, "a stream that nobody waits for is closed"),
        }
    }

    /// CloseIO: the guest's stdin ends after what is already in the FIFO. Also before the stream is connected.
    pub fn close_stdin(&self) {
        self.closing_stdin.send_replace(true);
    }

    /// Waits until that many bytes of each stream have been handed on. Gives up on a stream that does not move for 10 s, and on both after
    /// two minutes.
    pub async fn drained(&self, stdout_bytes: u64, stderr_bytes: u64) {
        let all = async {
            tokio::join!(
                reached(
                    StreamKind::Stdout,
                    self.stdout_progress.subscribe(),
                    stdout_bytes
                ),
                reached(
                    StreamKind::Stderr,
                    self.stderr_progress.subscribe(),
                    stderr_bytes
                ),
            )
        };
        if tokio::time::timeout(DRAIN_LIMIT, all).await.is_err() {
            warn!("output has come slowly for {DRAIN_LIMIT:?}: its rest may be lost");
        }
    }

    /// Lets go of every end; the client sees EOF. For Delete. Idempotent, also done by drop.
    pub fn close(&self) {
        for task in lock(&self.copying).drain(..) {
            task.abort();
        }
        drop(lock(&self.stdin).take());
        drop(lock(&self.stdout).take());
        drop(lock(&self.stderr).take());
        for progress in [&self.stdout_progress, &self.stderr_progress] {
            progress.send_modify(|p| p.ended = true);
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.close();
    }
}

/// The data behind these locks is whole at every point, also where a holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn reached(kind: StreamKind, mut progress: watch::Receiver<Progress>, bytes: u64) {
    let underway = progress.borrow().forwarded.saturating_add(MAX_UNDERWAY);
    let bytes = bytes.min(underway);
    loop {
        let now = *progress.borrow_and_update();
        if now.ended || now.forwarded >= bytes {
            return;
        }
        match tokio::time::timeout(DRAIN_PATIENCE, progress.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                warn!(
                    ?kind,
                    forwarded = now.forwarded,
                    bytes,
                    "output is not read: its rest may be lost"
                );
                return;
            }
        }
    }
}

async fn open_source(address: &str) -> Result<Option<Source>, StdioError> {
    let failed = |reason: String| StdioError {
        kind: StreamKind::Stdin,
        path: address.to_owned(),
        reason,
    };
    let path = match Target::parse(address).map_err(failed)? {
        Target::Null => return Ok(None),
        Target::Path(path) | Target::File(path) => path,
        Target::Binary(_) => {
            return Err(failed(
                "binary:// takes output, it gives no input".to_owned(),
            ));
        }
    };
    let open = async {
        Ok::<_, io::Error>(match is_fifo(&path)? {
            true => Source::Fifo(fifo::Input::open(&path)?),
            false => Source::File(OpenOptions::new().read(true).open(&path).await?),
        })
    };
    open.await.map(Some).map_err(|e| failed(e.to_string()))
}

async fn open_sinks(
    stdout: &str,
    stderr: &str,
    container_id: &str,
    namespace: &str,
) -> Result<(Option<Sink>, Option<Sink>), StdioError> {
    let parse = |kind: StreamKind, address: &str| {
        Target::parse(address).map_err(|reason| StdioError {
            kind,
            path: address.to_owned(),
            reason,
        })
    };
    let failed = |kind: StreamKind, address: &str, e: io::Error| StdioError {
        kind,
        path: address.to_owned(),
        reason: e.to_string(),
    };
    let out = parse(StreamKind::Stdout, stdout)?;
    let err = parse(StreamKind::Stderr, stderr)?;
    // The same program for both is one process.
    if let (Target::Binary(program), true) = (&out, out == err) {
        let both = binary::start(program, container_id, namespace).await;
        let (to_out, to_err) = both.map_err(|e| failed(StreamKind::Stdout, stdout, e))?;
        return Ok((Some(Sink::Binary(to_out)), Some(Sink::Binary(to_err))));
    }
    let out = match out {
        Target::Binary(program) => {
            let started = binary::start(&program, container_id, namespace).await;
            Some(Sink::Binary(
                started
                    .map_err(|e| failed(StreamKind::Stdout, stdout, e))?
                    .0,
            ))
        }
        other => open_sink(&other)
            .await
            .map_err(|e| failed(StreamKind::Stdout, stdout, e))?,
    };
    let err = match err {
        Target::Binary(program) => {
            let started = binary::start(&program, container_id, namespace).await;
            Some(Sink::Binary(
                started
                    .map_err(|e| failed(StreamKind::Stderr, stderr, e))?
                    .1,
            ))
        }
        other => open_sink(&other)
            .await
            .map_err(|e| failed(StreamKind::Stderr, stderr, e))?,
    };
    Ok((out, err))
}

/// Everything but a program.
async fn open_sink(target: &Target) -> io::Result<Option<Sink>> {
    Ok(match target {
        Target::Null | Target::Binary(_) => None,
        Target::File(path) => Some(Sink::File(file::append_or_create(path).await?)),
        Target::Path(path) if is_fifo(path)? => Some(Sink::Fifo(fifo::Output::open(path)?)),
        Target::Path(path) => Some(Sink::File(
            OpenOptions::new().append(true).open(path).await?,
        )),
    })
}

fn is_fifo(path: &Path) -> io::Result<bool> {
    Ok(std::fs::metadata(path)?.file_type().is_fifo())
}
