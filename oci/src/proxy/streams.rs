//! A process' streams, between the pipes that its shim has opened and the descriptors that an engine has given us: a thread each, as what an
//! engine gives may be anything.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, open};
use tokio::sync::{mpsc, oneshot};

/// As much as a pipe holds by default.
const CHUNK: usize = 64 << 10;

/// Bytes of a thread's stack.
const STACK: usize = 256 << 10;

/// The streams that are copied.
pub(super) struct Streams {
    outputs: Vec<(File, File)>,
    input: Option<(File, File)>,
}

impl Streams {
    /// Opens the pipes; nobody need have opened the others' ends. `given`: standard input, standard output and standard error, as far as there are
    /// pipes for them in `dir`.
    pub(super) fn open(dir: &Path, given: [File; 3]) -> Result<Self> {
        let [stdin, stdout, stderr] = given;
        let pipe = |name: &str, flags: OFlags| {
            let path: PathBuf = dir.join(name);
            let opened = open(&path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from);
            match opened {
                Err(rustix::io::Errno::NOENT) => Ok(None),
                opened => opened
                    .map(Some)
                    .with_context(|| format!("opening {}", path.display())),
            }
        };
        // Without O_NONBLOCK it would wait for the shim, maybe until the process has come and gone.
        let reading = OFlags::RDONLY | OFlags::NONBLOCK;
        let outputs = [
            (pipe("stdout", reading)?, stdout),
            (pipe("stderr", reading)?, stderr),
        ];
        // Both ends, for the same reason; the shim learns of the input's end by CloseIO.
        let input = pipe("stdin", OFlags::RDWR)?;
        Ok(Self {
            outputs: outputs
                .into_iter()
                .filter_map(|(from, to)| Some((from?, to)))
                .collect(),
            input: input.map(|to| (stdin, to)),
        })
    }

    /// Begins to copy. What is returned ends with each of the outputs; `input_ended` hears of the input's end.
    pub(super) fn copy(
        self,
        input_ended: mpsc::UnboundedSender<()>,
    ) -> Result<Vec<oneshot::Receiver<()>>> {
        let mut ended = Vec::new();
        for (from, to) in self.outputs {
            let (done, is_done) = oneshot::channel();
            ended.push(is_done);
            start(move || {
                output(from, to);
                // Nobody waits where the process has been given up.
                let _ = done.send(());
            })?;
        }
        if let Some((from, to)) = self.input {
            start(move || {
                input(from, &to);
                let _ = input_ended.send(());
                // Until the shim has its own end, what is in the pipe is only here.
                thread::park();
            })?;
        }
        Ok(ended)
    }
}

fn start(run: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = thread::Builder::new().stack_size(STACK).spawn(run);
    started.map(drop).context("starting a thread")
}

/// Until all writers have gone. What the engine does not take is dropped: the process is not held up for it.
fn output(mut from: File, mut to: File) {
    let mut buffer = vec![0; CHUNK];
    loop {
        // Before the first writer there is nothing to wait for but this: a read would say that it is the end.
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => drop(to.write_all(buffer.get(..count).unwrap_or_default())),
            Err(error) if is_for_now(&error) => {}
            Err(_) => return,
        }
    }
}

fn input(mut from: File, mut to: &File) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let data = buffer.get(..count).unwrap_or_default();
                if to.write_all(data).is_err() {
                    return;
                }
            }
            Err(error) if is_for_now(&error) => {}
            // A terminal whose other end has gone, say.
            Err(_) => return,
        }
    }
}

fn is_for_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use husk_client::pipes::{Pipes, Wanted};

    use super::*;

    fn all() -> Wanted {
        Wanted {
            stdin: true,
            stdout: true,
            stderr: true,
        }
    }

    #[tokio::test]
    async fn streams_are_copied_whenever_the_shim_opens_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("pipes")).unwrap();
        Pipes::make(&at("pipes"), all()).unwrap();
        std::fs::write(at("in"), "typed").unwrap();
        let given = [
            File::open(at("in")).unwrap(),
            File::create(at("out")).unwrap(),
            File::create(at("err")).unwrap(),
        ];
        let streams = Streams::open(&at("pipes"), given).unwrap();
        let (sender, mut input_ended) = mpsc::unbounded_channel();
        let ended = streams.copy(sender).unwrap();
        input_ended.recv().await.unwrap();
        let write = |name: &str, text: &str| {
            let mut pipe = File::options()
                .write(true)
                .open(at("pipes").join(name))
                .unwrap();
            pipe.write_all(text.as_bytes()).unwrap();
        };
        write("stdout", "said");
        write("stderr", "complained");
        for ended in ended {
            ended.await.unwrap();
        }
        let mut typed = [0; 5];
        let mut pipe = File::open(at("pipes/stdin")).unwrap();
        pipe.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"typed");
        let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
        assert_eq!([read("out"), read("err")], ["said", "complained"]);
    }

    #[tokio::test]
    async fn an_engine_that_takes_nothing_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let only = Wanted {
            stdin: false,
            stderr: false,
            ..all()
        };
        Pipes::make(dir.path(), only).unwrap();
        let null = || File::open("/dev/null").unwrap();
        // Written to, /dev/full is full.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let streams = Streams::open(dir.path(), [null(), full, null()]).unwrap();
        let ended = streams.copy(mpsc::unbounded_channel().0).unwrap();
        let pipe = dir.path().join("stdout");
        let mut pipe = File::options().write(true).open(pipe).unwrap();
        pipe.write_all(&vec![b'x'; 1 << 20]).unwrap();
        drop(pipe);
        for ended in ended {
            ended.await.unwrap();
        }
    }
}
