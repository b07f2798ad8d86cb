//! A process's standard streams on the host: from the guest's vsock streams to what containerd asked for.
//!
//! The ends are opened when the process is created ([`Stdio::open`]) and joined to the guest's streams as those arrive
//! ([`Stdio::connect`]). A client may come and go at any time: the shim holds both ends of every FIFO, so nobody's leaving ends
//! the container's streams (see [`fifo`]). [`Stdio::drained`] tells when the client has been given what the process wrote, which is when its exit
//! may be announced.

use tokio::net::UnixStream;

/// One of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// Host to guest.
    Stdin,
    /// Guest to host; with a terminal, all its output.
    Stdout,
    /// Guest to host.
    Stderr,
}

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
pub struct Stdio {}

impl Stdio {
    /// Opens the host ends. `container_id` and `namespace` are what a logging binary gets in its environment.
    ///
    /// # Errors
    /// [`StdioError`] naming the stream and its path.
    pub async fn open(
        _paths: &StdioPaths,
        _container_id: &str,
        _namespace: &str,
    ) -> Result<Self, StdioError> {
        Ok(Self {})
    }

    /// Whether the guest shall dial this stream at all (else its token stays empty).
    pub fn wants(&self, _kind: StreamKind) -> bool {
        false
    }

    /// Joins the guest's stream (the token already read off it) to the host end; copies in the background from here. A second
    /// stream of the same kind is closed.
    pub fn connect(&self, _kind: StreamKind, _stream: UnixStream) {}

    /// CloseIO: the guest's stdin ends after what is already in the FIFO. Also before the stream is connected.
    pub fn close_stdin(&self) {}

    /// Waits until that many bytes of each stream have been handed on. Gives up on a stream whose reader takes nothing for 10 s.
    pub async fn drained(&self, _stdout_bytes: u64, _stderr_bytes: u64) {}

    /// Lets go of every end; the client sees EOF. For Delete. Idempotent, also done by drop.
    pub fn close(&self) {}
}

/// A stream that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {stream} {path:?}: {reason}")]
pub struct StdioError {
    stream: &'static str,
    path: String,
    reason: String,
}
