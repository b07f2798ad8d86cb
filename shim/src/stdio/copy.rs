//! The copying between a guest's stream and its host end, one task a stream.
//!
//! A stream that is idle costs a task and no buffer: the buffer is made when there is something to read and dropped when there is
//! no more. Nothing spins on a FIFO without writers, because the shim itself is one until CloseIO.

use std::io;

use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{StreamKind, binary, fifo, file};

/// What a pipe holds by default, so one read fills one.
const CHUNK: usize = 64 * 1024;

/// How far an output has come.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    /// Bytes handed on, or dropped where nobody will read them.
    pub(super) forwarded: u64,
    /// There will be no more.
    pub(super) ended: bool,
}

/// Where an output goes.
#[derive(Debug)]
pub(super) enum Sink {
    Fifo(fifo::Output),
    File(File),
    Binary(binary::Output),
}

/// Where the input comes from.
#[derive(Debug)]
pub(super) enum Source {
    Fifo(fifo::Input),
    File(File),
}

impl Sink {
    async fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write(data).await,
            Self::File(file) => file::write(file, data).await,
            Self::Binary(binary) => binary.write(data).await,
        }
    }
}

/// Guest to host, until the guest's EOF. A host end that fails loses output, it does not stop the container.
pub(super) async fn output(
    kind: StreamKind,
    stream: UnixStream,
    sink: Sink,
    progress: watch::Sender<Progress>,
) {
    let mut sink = Some(sink);
    let mut buffer = Vec::new();
    loop {
        if stream.readable().await.is_err() {
            break;
        }
        buffer.resize(CHUNK, 0);
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                if let Some(open) = &mut sink
                    && let Err(error) = open.write(buffer.get(..n).unwrap_or_default()).await
                {
                    warn!(?kind, %error, "the container's output cannot be written: from here on it is lost");
                    sink = None;
                }
                progress.send_modify(|p| p.forwarded += u64::try_from(n).unwrap_or(0));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(error) => {
                debug!(?kind, %error, "stream broke off");
                break;
            }
        }
    }
    // The client's EOF before anybody hears that we are done.
    drop(sink);
    progress.send_modify(|p| p.ended = true);
}

/// Host to guest, until the source's EOF, or until CloseIO has been asked for and everything before it has been read.
pub(super) async fn input(
    source: Source,
    mut stream: UnixStream,
    mut close: watch::Receiver<bool>,
) {
    let copied = match source {
        Source::Fifo(fifo) => from_fifo(fifo, &mut stream, &mut close).await,
        Source::File(file) => from_file(file, &mut stream, &mut close).await,
    };
    match copied {
        Ok(()) => {
            let _ = stream.shutdown().await;
            // The stream stays until the guest is done with it: a close could overtake what it has not read yet.
            let mut rest = [0; 64];
            while matches!(stream.read(&mut rest).await, Ok(1..)) {}
        }
        Err(error) => debug!(%error, "the container takes no more input"),
    }
}

async fn from_fifo(
    mut fifo: fifo::Input,
    stream: &mut UnixStream,
    close: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let closing = *close.borrow_and_update();
        if closing {
            // From here on the client's leaving is an EOF.
            fifo.hold = None;
        } else {
            tokio::select! {
                ready = fifo.receiver.readable() => ready?,
                changed = close.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Ok(()),
                },
            }
        }
        buffer.resize(CHUNK, 0);
        let read = match closing {
            // tokio only asks the kernel once its reactor has heard of the data; here the kernel has the last word.
            true => nix::unistd::read(&fifo.receiver, &mut buffer).map_err(io::Error::from),
            false => fifo.receiver.try_read(&mut buffer),
        };
        match read {
            Ok(0) => return Ok(()),
            Ok(n) => {
                stream
                    .write_all(buffer.get(..n).unwrap_or_default())
                    .await?
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && closing => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(e) => return Err(e),
        }
    }
}

async fn from_file(
    mut file: File,
    stream: &mut UnixStream,
    close: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = tokio::select! {
            read = file.read(&mut buffer) => read?,
            _ = close.wait_for(|&closing| closing) => return Ok(()),
        };
        if n == 0 {
            return Ok(());
        }
        stream
            .write_all(buffer.get(..n).unwrap_or_default())
            .await?;
    }
}
