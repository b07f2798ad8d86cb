//! A container's streams, between its pipes and whoever is attached.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::{CloseIORequest, KillRequest, ResizePtyRequest},
    shim_async::TaskClient,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf, pipe},
    },
    sync::{Mutex, Notify, mpsc, watch},
    time::sleep,
};

use crate::{
    frame::Frame,
    log::{Log, Stream},
    shim::{said, soon},
};

/// Frames that wait for one who is attached; then the container waits, as it does for a slow terminal.
const WAITING: usize = 64;

/// How long one who is attached may leave a frame unread when the container has ended.
const READS: Duration = Duration::from_secs(60);

/// The container's streams.
pub(super) struct Hub {
    stdin_once: bool,
    log: Mutex<Log>,
    clients: Mutex<Vec<mpsc::Sender<Frame>>>,
    container: Mutex<Inner>,
    /// The container is there.
    is_there: watch::Sender<bool>,
    /// It has ended.
    is_ending: watch::Sender<bool>,
}

/// What is there once the container is.
#[derive(Default)]
struct Inner {
    tasks: Option<(TaskClient, String)>,
    input: Option<pipe::Sender>,
    /// The terminal's size, told before there was one.
    size: Option<(u16, u16)>,
}

impl Hub {
    pub(super) fn new(log: Log, stdin_once: bool) -> Self {
        Self {
            stdin_once,
            log: Mutex::new(log),
            clients: Mutex::default(),
            container: Mutex::default(),
            is_there: watch::Sender::default(),
            is_ending: watch::Sender::default(),
        }
    }

    /// The container is there: what has waited for it goes on.
    pub(super) async fn connect(&self, tasks: TaskClient, id: String, input: Option<pipe::Sender>) {
        let mut inner = self.container.lock().await;
        inner.tasks = Some((tasks, id));
        inner.input = input;
        self.is_there.send_replace(true);
    }

    /// It runs: its terminal gets the size that it had before.
    pub(super) async fn started(&self) {
        let mut inner = self.container.lock().await;
        if let Some((rows, columns)) = inner.size {
            inner.resize(rows, columns).await;
        }
    }

    async fn tell(&self, frame: Frame) {
        let mut clients = self.clients.lock().await;
        let mut at = 0;
        while let Some(client) = clients.get(at) {
            match client.send(frame.clone()).await {
                Ok(()) => at += 1,
                // It has gone.
                Err(_) => drop(clients.swap_remove(at)),
            }
        }
    }

    /// The container has ended.
    pub(super) async fn end(&self, code: u32) {
        if let Err(error) = self.log.lock().await.end() {
            tracing::warn!("writing the container's log: {error}");
        }
        self.is_ending.send_replace(true);
        self.tell(Frame::Exit(code)).await;
        let clients = std::mem::take(&mut *self.clients.lock().await);
        for client in clients {
            // Until its writer has written the last frame, or has given up.
            client.closed().await;
        }
    }

    async fn serve(self: Arc<Self>, mut reader: OwnedReadHalf) {
        let mut has_left = false;
        let mut is_there = self.is_there.subscribe();
        while let Ok(Some(frame)) = Frame::read(&mut reader).await {
            if !matches!(frame, Frame::Size(..) | Frame::Detach) {
                // What is meant for the container waits for it.
                let _ = is_there.wait_for(|is_there| *is_there).await;
            }
            let mut inner = self.container.lock().await;
            match frame {
                Frame::Input(data) => inner.write(&data).await,
                Frame::InputEnd => inner.end_input().await,
                Frame::Size(rows, columns) => inner.resize(rows, columns).await,
                Frame::Signal(number) => inner.kill(number).await,
                Frame::Detach => has_left = true,
                // Not for us.
                Frame::Output(_) | Frame::Error(_) | Frame::Exit(_) => break,
            }
        }
        if self.stdin_once && !has_left {
            self.container.lock().await.end_input().await;
        }
    }
}

impl Inner {
    async fn write(&mut self, data: &[u8]) {
        if let Some(input) = &mut self.input {
            // A container that has closed its input, or has ended, does not want it.
            let _ = input.write_all(data).await;
        }
    }

    async fn end_input(&mut self) {
        let Some((tasks, id)) = &self.tasks else {
            return;
        };
        // All that was written is in the pipe; the shim reads it to its end.
        if self.input.take().is_some() {
            let close = CloseIORequest {
                id: id.clone(),
                stdin: true,
                ..CloseIORequest::default()
            };
            if let Err(error) = said(tasks.close_io(soon(), &close).await) {
                tracing::debug!("closing the container's input: {error:#}");
            }
        }
    }

    async fn resize(&mut self, rows: u16, columns: u16) {
        self.size = Some((rows, columns));
        let Some((tasks, id)) = &self.tasks else {
            return;
        };
        let resize = ResizePtyRequest {
            id: id.clone(),
            height: rows.into(),
            width: columns.into(),
            ..ResizePtyRequest::default()
        };
        if let Err(error) = said(tasks.resize_pty(soon(), &resize).await) {
            tracing::debug!("resizing the container's terminal: {error:#}");
        }
    }

    async fn kill(&mut self, signal: u32) {
        let Some((tasks, id)) = &self.tasks else {
            return;
        };
        let kill = KillRequest {
            id: id.clone(),
            signal,
            ..KillRequest::default()
        };
        if let Err(error) = said(tasks.kill(soon(), &kill).await) {
            tracing::debug!("sending the container a signal: {error:#}");
        }
    }
}

/// Takes those who attach.
pub(super) async fn accept(listener: UnixListener, hub: Arc<Hub>, came: Arc<Notify>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Too many files, say: the next may have more luck.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        attach(stream, &hub).await;
        came.notify_one();
    }
}

async fn attach(stream: UnixStream, hub: &Arc<Hub>) {
    let (reader, writer) = stream.into_split();
    let (sender, receiver) = mpsc::channel(WAITING);
    hub.clients.lock().await.push(sender);
    tokio::spawn(write(writer, receiver, hub.is_ending.subscribe()));
    tokio::spawn(Arc::clone(hub).serve(reader));
}

/// As slowly as whoever is attached reads; but once the container has ended, one who does not read at all is not waited for.
async fn write(
    mut writer: OwnedWriteHalf,
    mut frames: mpsc::Receiver<Frame>,
    mut is_ending: watch::Receiver<bool>,
) {
    while let Some(frame) = frames.recv().await {
        let given_up = async {
            // The hub lives as long as its clients.
            let _ = is_ending.wait_for(|is_ending| *is_ending).await;
            sleep(READS).await;
        };
        let written = tokio::select! {
            written = frame.write(&mut writer) => written.is_ok(),
            () = given_up => false,
        };
        if !written || matches!(frame, Frame::Exit(_)) {
            return;
        }
    }
}

/// Copies what the container writes, until it has closed the pipe.
pub(super) async fn output(mut pipe: pipe::Receiver, hub: Arc<Hub>, stream: Stream) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        let data = match pipe.read(&mut buffer).await {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) => {
                tracing::warn!("reading the container's output: {error}");
                return;
            }
        };
        // A full disk does not stop the container.
        if let Err(error) = hub.log.lock().await.add(stream, data) {
            tracing::warn!("writing the container's log: {error}");
        }
        let frame = match stream {
            Stream::Stdout => Frame::Output(data.to_vec()),
            Stream::Stderr => Frame::Error(data.to_vec()),
        };
        hub.tell(frame).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_reads_slowly_gets_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let hub = Arc::new(Hub::new(Log::open(dir.path()).unwrap(), false));
        let (monitors, mut clients) = UnixStream::pair().unwrap();
        attach(monitors, &hub).await;
        let writer = tokio::spawn({
            let hub = Arc::clone(&hub);
            async move {
                for byte in 0..100 {
                    hub.tell(Frame::Output(vec![byte; 32 << 10])).await;
                }
                hub.end(7).await;
            }
        });
        // There is more than all that is between holds.
        sleep(Duration::from_secs(3)).await;
        for byte in 0..100 {
            let frame = Frame::read(&mut clients).await.unwrap();
            assert_eq!(frame, Some(Frame::Output(vec![byte; 32 << 10])));
            if byte == 50 {
                sleep(Duration::from_secs(3)).await;
                // The monitor ends after it, and with it the connection.
                assert!(!writer.is_finished());
            }
        }
        assert_eq!(
            Frame::read(&mut clients).await.unwrap(),
            Some(Frame::Exit(7))
        );
        writer.await.unwrap();
    }
}
