//! One who is attached to a container: the caller's streams, and the monitor's socket.

use std::io;

use anyhow::{Context as _, Result};
use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{container::Container, frame::Frame, monitor::SOCKET, terminal};

/// Ctrl-P, Ctrl-Q leave a container with a terminal, as in docker.
const DETACH: [u8; 2] = [0x10, 0x11];

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The container ended with this code.
    Exited(u32),
    /// The user has left it.
    Detached,
    /// Its monitor has gone.
    Lost,
}

/// What of the caller's is connected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) terminal: bool,
    /// Signals that the caller gets are the container's.
    pub(crate) signals: bool,
}

/// A connection to the monitor.
pub(crate) async fn connect(container: &Container) -> Result<UnixStream> {
    let path = container.run_dir().join(SOCKET);
    let stream = UnixStream::connect(&path).await;
    stream.with_context(|| {
        format!(
            "connecting to the monitor of {} at {}",
            container.record.name,
            path.display()
        )
    })
}

/// Connects the caller's streams with the container's, until one of them ends.
pub(crate) async fn attach(stream: UnixStream, wanted: Wanted) -> Result<Outcome> {
    let (mut reader, mut writer) = stream.into_split();
    let raw = match wanted.terminal && wanted.stdin {
        true => terminal::Raw::new().context("setting the terminal up")?,
        false => None,
    };
    let is_raw = raw.is_some();
    let (frames, mut waiting) = mpsc::channel::<Frame>(16);
    if wanted.stdin {
        tokio::spawn(input(frames.clone(), is_raw));
    }
    if wanted.terminal {
        tokio::spawn(sizes(frames.clone()));
    }
    if wanted.signals && !is_raw {
        for kind in [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ] {
            tokio::spawn(signals(frames.clone(), kind));
        }
    }
    // Held, so that the channel stays open for as long as this lasts.
    let _frames = frames;
    let outcome = loop {
        tokio::select! {
            frame = Frame::read(&mut reader) => match frame {
                Ok(Some(Frame::Output(data))) => show(&mut io::stdout().lock(), &data)?,
                Ok(Some(Frame::Error(data))) => show(&mut io::stderr().lock(), &data)?,
                Ok(Some(Frame::Exit(code))) => break Outcome::Exited(code),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break Outcome::Lost,
            },
            Some(frame) = waiting.recv() => {
                let leaves = frame == Frame::Detach;
                if frame.write(&mut writer).await.is_err() && !leaves {
                    continue;
                }
                if leaves {
                    break Outcome::Detached;
                }
            }
        }
    };
    Ok(outcome)
}

/// At once, as its writer meant it: a prompt has no end of line.
pub(crate) fn show(to: &mut impl io::Write, data: &[u8]) -> io::Result<()> {
    to.write_all(data)?;
    to.flush()
}

async fn input(frames: mpsc::Sender<Frame>, is_raw: bool) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 << 10];
    let mut keys = Keys::default();
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        let data = buffer.get(..count).unwrap_or_default();
        if !is_raw {
            if frames.send(Frame::Input(data.to_vec())).await.is_err() {
                return;
            }
            continue;
        }
        let (typed, leaves) = keys.take(data);
        if !typed.is_empty() && frames.send(Frame::Input(typed)).await.is_err() {
            return;
        }
        if leaves {
            // It has gone otherwise.
            let _ = frames.send(Frame::Detach).await;
            return;
        }
    }
    let _ = frames.send(Frame::InputEnd).await;
}

/// Looks for the keys that leave.
#[derive(Debug, Default)]
struct Keys {
    /// The first of them has been typed, and is held back.
    held: bool,
}

impl Keys {
    /// What is the container's of these bytes, and whether the user leaves.
    fn take(&mut self, data: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::new();
        for &byte in data {
            if self.held {
                self.held = false;
                if byte == DETACH[1] {
                    return (typed, true);
                }
                typed.push(DETACH[0]);
            }
            if byte == DETACH[0] {
                self.held = true;
            } else {
                typed.push(byte);
            }
        }
        (typed, false)
    }
}

async fn sizes(frames: mpsc::Sender<Frame>) {
    // Without the signal the first size stays.
    let mut changes = signal(SignalKind::window_change()).ok();
    loop {
        if let Some((rows, columns)) = terminal::size()
            && frames.send(Frame::Size(rows, columns)).await.is_err()
        {
            return;
        }
        match &mut changes {
            Some(changes) => drop(changes.recv().await),
            None => return,
        }
    }
}

async fn signals(frames: mpsc::Sender<Frame>, kind: SignalKind) {
    let Ok(mut received) = signal(kind) else {
        return;
    };
    while received.recv().await.is_some() {
        let number = kind.as_raw_value().cast_unsigned();
        if frames.send(Frame::Signal(number)).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_leave_and_nothing_else_is_lost() {
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"a\x10b"), (b"a\x10b".to_vec(), false));
        assert_eq!(keys.take(b"\x10"), (Vec::new(), false));
        assert_eq!(keys.take(b"\x10x"), (b"\x10\x10x".to_vec(), false));
        assert_eq!(keys.take(b"end\x10"), (b"end".to_vec(), false));
        assert_eq!(keys.take(b"\x11rest"), (Vec::new(), true));
    }
}
