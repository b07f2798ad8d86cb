//! Carries a process's standard streams between the container and the host.
//!
//! The container holds pipes or a pseudo terminal, never the socket, so that it can open `/dev/stdout` again
//! and tell a terminal from a pipe. The agent holds their other ends, non-blocking, and one copier a stream moves bytes
//! between them and a vsock connection; a closed direction on either side is the end of the stream.
//!
//! - Output whose reader has gone is read and thrown away: the process must not notice.
//! - Input that nobody can read any more closes its connection.
//! - At a process's end its output has to be out before anyone hears of it, yet a child that it left
//!   behind may hold the pipe for ever. So the copier is told of the end, empties the pipe once ([`Outputs::settle`]),
//!   and goes on until the real end of the stream.
//! - A terminal hangs up whenever nobody has it open, or somebody says so (vhangup(2)); systemd, as a container's first process, does both to its
//!   console. While the process lives that is not the end: the terminal's other end is opened again, and held.

use std::cell::RefCell;
use std::future::{pending, ready};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{read, write};
use tokio::io::Interest;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::polled::{Polled, polled};
use crate::terminal;

/// Bytes per write: with the kernel's headers a packet of this size fits an allocation of 32 KiB, the largest that the
/// page allocator does not give up on in a guest short of memory (`PAGE_ALLOC_COSTLY_ORDER`).
const WRITE_MAX: usize = 28 * 1024;

/// Bytes per read: two writes.
const READ_MAX: usize = 2 * WRITE_MAX;

/// No pipe holds more (`fs.pipe-max-size`): once that much was read after a process's end, whatever it had
/// written is among it, even if another process keeps writing.
const SETTLE_MAX: usize = 1 << 20;

/// How long a reader that takes nothing may hold up the news of an exit.
const STALL: Duration = Duration::from_secs(10);

/// Pause before a write is tried again that failed for want of memory.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(5);

thread_local! {
    /// Every copier fills and empties it between two awaits, so one per thread is enough.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_MAX].into_boxed_slice());
}

/// The copiers of one process's output.
#[derive(Debug, Default)]
pub struct Outputs {
    /// Of stdout, or of the terminal.
    pub stdout: Option<Output>,
    /// Of stderr.
    pub stderr: Option<Output>,
}

impl Outputs {
    /// Call when the process has ended: returns when everything it wrote is on its way, with the bytes carried by
    /// stdout and by stderr.
    pub async fn settle(self) -> (u64, u64) {
        let settle = async |output: Option<Output>| match output {
            Some(output) => output.settle().await,
            None => 0,
        };
        tokio::join!(settle(self.stdout), settle(self.stderr))
    }
}

/// The copier of one output stream.
#[derive(Debug)]
pub struct Output {
    written: Arc<AtomicU64>,
    exited: oneshot::Sender<()>,
    settled: oneshot::Receiver<()>,
}

impl Output {
    /// Starts to copy what comes out of `source` to `connection`; without one it is thrown away.
    pub fn start(source: Polled, connection: Option<Polled>) -> Self {
        let written = Arc::new(AtomicU64::new(0));
        let (exited, on_exit) = oneshot::channel();
        let (on_settled, settled) = oneshot::channel();
        tokio::spawn(carry_out(
            source,
            connection,
            Arc::clone(&written),
            Watch::Alive {
                on_exit,
                on_settled,
            },
        ));
        Self {
            written,
            exited,
            settled,
        }
    }

    async fn settle(mut self) -> u64 {
        // A copier that has come to the end of its stream is not there to listen any more.
        let _ = self.exited.send(());
        let mut before = self.written.load(Ordering::Relaxed);
        while timeout(STALL, &mut self.settled).await.is_err() {
            let now = self.written.load(Ordering::Relaxed);
            if now == before {
                tracing::warn!(
                    bytes = now,
                    "the reader of a stream takes nothing: not waiting for it"
                );
                break;
            }
            before = now;
        }
        self.written.load(Ordering::Relaxed)
    }
}

/// What a copier knows of its process.
enum Watch {
    Alive {
        on_exit: oneshot::Receiver<()>,
        on_settled: oneshot::Sender<()>,
    },
    /// It has ended; `left` more bytes may be its own.
    Settling {
        left: usize,
        on_settled: oneshot::Sender<()>,
    },
    Settled,
}

impl Watch {
    /// Resolves when the process has ended, once.
    async fn exit(&mut self) {
        match self {
            // A dropped sender is an exit too: nobody will ask again.
            Self::Alive { on_exit, .. } => drop(on_exit.await),
            _ => pending().await,
        }
    }

    fn is_alive(&self) -> bool {
        matches!(self, Self::Alive { .. })
    }

    fn is_settling(&self) -> bool {
        matches!(self, Self::Settling { .. })
    }

    fn begin_settling(self) -> Self {
        match self {
            Self::Alive { on_settled, .. } => Self::Settling {
                left: SETTLE_MAX,
                on_settled,
            },
            other => other,
        }
    }

    /// After a read of `bytes`; 0 stands for a stream that has nothing at the moment.
    fn after_read(self, bytes: usize) -> Self {
        match self {
            Self::Settling { left, on_settled } if bytes == 0 || left <= bytes => {
                let _ = on_settled.send(());
                Self::Settled
            }
            Self::Settling { left, on_settled } => Self::Settling {
                left: left - bytes,
                on_settled,
            },
            other => other,
        }
    }
}

/// What came of one look at a stream.
enum Taken {
    Nothing,
    End,
    /// How much was read, and the part of it that could not be passed on at once.
    Some(usize, Vec<u8>),
}

/// Why a write stopped.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    Done,
    Full,
    NoMemory,
    Gone,
}

/// Writes without waiting: the bytes that went, and why no more did.
fn write_now(fd: &impl AsFd, data: &[u8]) -> (usize, Stop) {
    let mut sent = 0;
    loop {
        let rest = data.get(sent..).unwrap_or_default();
        let piece = rest.get(..rest.len().min(WRITE_MAX)).unwrap_or_default();
        if piece.is_empty() {
            return (sent, Stop::Done);
        }
        match write(fd, piece) {
            Ok(n) => sent += n,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return (sent, Stop::Full),
            Err(Errno::ENOMEM | Errno::ENOBUFS) => return (sent, Stop::NoMemory),
            Err(_) => return (sent, Stop::Gone),
        }
    }
}

/// Writes all of it, however long that takes.
///
/// # Errors
/// Where the other side has gone.
pub(crate) async fn write_all(
    to: &Polled,
    data: &[u8],
    mut progress: impl FnMut(usize),
) -> Result<(), Gone> {
    let mut rest = data;
    while !rest.is_empty() {
        let mut ready = to.writable().await.map_err(|_| Gone)?;
        let (sent, stop) = write_now(to.get_ref(), rest);
        progress(sent);
        rest = rest.get(sent..).unwrap_or_default();
        match stop {
            Stop::Done => {}
            // A terminal that has hung up once stays ready to be written to.
            Stop::Full if ready.ready().is_write_closed() => {
                tokio::time::sleep(NO_MEMORY_PAUSE).await;
            }
            Stop::Full => ready.clear_ready(),
            // Nothing tells when memory is there again.
            Stop::NoMemory => tokio::time::sleep(NO_MEMORY_PAUSE).await,
            Stop::Gone => return Err(Gone),
        }
    }
    Ok(())
}

/// Fills a buffer.
///
/// # Errors
/// The socket's; `UnexpectedEof` where it ends before.
pub(crate) async fn read_exact(from: &Polled, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let read = from
            .async_io(Interest::READABLE, |fd| Ok(read_now(fd, rest)?))
            .await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += read;
    }
    Ok(())
}

/// Nobody is left on the other side.
#[derive(Debug)]
pub struct Gone;

fn read_now(fd: &impl AsFd, buffer: &mut [u8]) -> nix::Result<usize> {
    loop {
        match read(fd, buffer) {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

/// Reads once and passes on what goes without waiting. `to` becomes `None` where its other side has gone.
fn take(from: &Polled, to: &mut Option<Polled>, mut progress: impl FnMut(usize)) -> Taken {
    BUFFER.with_borrow_mut(|buffer| match read_now(from.get_ref(), buffer) {
        Ok(0) => Taken::End,
        Ok(n) => {
            let data = buffer.get(..n).unwrap_or_default();
            let Some(target) = to else {
                return Taken::Some(n, Vec::new());
            };
            let (sent, stop) = write_now(target.get_ref(), data);
            progress(sent);
            if stop == Stop::Gone {
                *to = None;
                return Taken::Some(n, Vec::new());
            }
            Taken::Some(n, data.get(sent..).unwrap_or_default().to_vec())
        }
        Err(Errno::EAGAIN) => Taken::Nothing,
        // The master of a terminal says EIO when it has hung up.
        Err(_) => Taken::End,
    })
}

/// Copies one output stream to its end.
async fn carry_out(
    mut source: Polled,
    mut sink: Option<Polled>,
    written: Arc<AtomicU64>,
    mut watch: Watch,
) {
    let count = |bytes: usize| {
        written.fetch_add(bytes as u64, Ordering::Relaxed);
    };
    let mut other_end = None;
    loop {
        let ready = tokio::select! {
            biased;
            () = watch.exit() => {
                watch = watch.begin_settling();
                other_end = None;
                None
            }
            ready = source.readable() => match ready {
                Ok(ready) => Some(ready),
                Err(_) => break,
            },
            // Look, do not wait: an edge that was there is gone once its data has been read.
            () = ready(()), if watch.is_settling() => None,
        };
        match take(&source, &mut sink, count) {
            Taken::Nothing => {
                if let Some(mut ready) = ready {
                    ready.clear_ready();
                }
                watch = watch.after_read(0);
            }
            Taken::Some(bytes, rest) => {
                if let Some(to) = &sink
                    && write_all(to, &rest, count).await.is_err()
                {
                    sink = None;
                }
                watch = watch.after_read(bytes);
                tokio::task::consume_budget().await;
            }
            Taken::End => {
                let again = watch.is_alive().then(|| open_again(&source)).flatten();
                let Some((terminal, held)) = again else {
                    break;
                };
                source = terminal;
                other_end.replace(held);
                tokio::task::consume_budget().await;
            }
        }
    }
    if let Some(connection) = sink {
        half_close(&connection);
    }
}

/// A terminal that has hung up, once more: its master side, to be polled anew, as a hangup stays with a descriptor's readiness for good, and the
/// other end. `None` for what is no terminal.
fn open_again(master: &Polled) -> Option<(Polled, OwnedFd)> {
    let other_end = terminal::open_other_end(master.get_ref()).ok()?;
    let master = polled(master.get_ref().try_clone().ok()?).ok()?;
    Some((master, other_end))
}

/// Where a process reads its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// A pipe: closing it is the end of the input.
    Pipe,
    /// The master of a terminal, which has no half-close.
    Terminal,
}

/// Starts to copy what the host sends on `connection` into `target`.
pub fn start_input(connection: Polled, target: Polled, kind: InputKind) {
    tokio::spawn(carry_in(connection, target, kind));
}

async fn carry_in(connection: Polled, target: Polled, kind: InputKind) {
    let mut sink = Some(target);
    while let Some(target) = sink.clone() {
        let mut ready = tokio::select! {
            ready = connection.readable() => match ready {
                Ok(ready) => ready,
                Err(_) => return,
            },
            // The last reader has closed the pipe. (A terminal whose slaves are closed can be opened again.)
            _ = target.ready(Interest::ERROR), if kind == InputKind::Pipe => return,
        };
        match take(&connection, &mut sink, |_| ()) {
            Taken::Nothing => ready.clear_ready(),
            Taken::Some(_, rest) => {
                if write_all(&target, &rest, |_| ()).await.is_err() {
                    return;
                }
                tokio::task::consume_budget().await;
            }
            Taken::End => {
                if kind == InputKind::Terminal
                    && let Some(character) = terminal::end_of_input(target.get_ref())
                {
                    let _ = write_all(&target, &[character], |_| ()).await;
                }
                return;
            }
        }
    }
}

/// Copies what comes from one socket to another, to its end, which is passed on.
///
/// # Errors
/// Where nobody takes it any more.
pub async fn carry(from: &Polled, to: &Polled) -> Result<(), Gone> {
    let mut sink = Some(Polled::clone(to));
    loop {
        let mut ready = from.readable().await.map_err(|_| Gone)?;
        match take(from, &mut sink, |_| ()) {
            Taken::Nothing => ready.clear_ready(),
            Taken::Some(_, rest) => {
                write_all(sink.as_ref().ok_or(Gone)?, &rest, |_| ()).await?;
                tokio::task::consume_budget().await;
            }
            Taken::End => {
                half_close(to);
                return Ok(());
            }
        }
    }
}

/// Tells the other side that nothing more comes.
fn half_close(connection: &Polled) {
    // Where that fails the host has gone, or closing the socket says the same in a moment.
    let _ = nix::sys::socket::shutdown(
        connection.get_ref().as_raw_fd(),
        nix::sys::socket::Shutdown::Write,
    );
}
