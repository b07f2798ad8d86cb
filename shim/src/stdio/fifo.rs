//! FIFOs whose other end belongs to a client that may come and go.
//!
//! The shim holds both ends of each. On an output FIFO its read end keeps a write from failing while nobody reads; on
//! stdin its write end keeps the container's input open when a client detaches, until CloseIO lets go of it. The price of holding a read end is that the kernel no
//! longer tells that the client has gone, so a full pipe is probed: with our read end closed for a moment (nothing is written then, and what is in the
//! pipe stays), `POLLERR` on the write end says that no other reader exists. After [`READER_GRACE`] without one, new output is dropped
//! until somebody reads again, so that a container does not hang on a client that will not come back.
//!
//! tokio takes a pipe whose other end it once saw closed for closed for good: its waits return at once from then on. So no end is
//! registered with its reactor while its other end may be closed, if only for a moment.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::unix::pipe;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

/// How long a full pipe may be without a reader before output is dropped.
const READER_GRACE: Duration = Duration::from_secs(5);
/// How often a full pipe is looked at.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// An output FIFO.
#[derive(Debug)]
pub(super) struct Output {
    name: String,
    /// Known to the reactor only while [`Output::room`] waits.
    sender: File,
    /// Our read end.
    hold: Option<File>,
    readers: Readers,
}

/// What is known of the client.
#[derive(Debug, Clone, Copy)]
enum Readers {
    /// It takes what we write, as far as is known.
    Present,
    /// The pipe is full and nobody has it open, since then.
    Missing(Instant),
    /// For too long: what does not fit is dropped.
    Gone,
}

/// A stdin FIFO.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) receiver: pipe::Receiver,
    /// Our write end, until CloseIO.
    pub(super) hold: Option<File>,
}

fn read_end(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)
}

/// Opens both ends, to read and to write; never waits for a client.
fn both_ends(path: &Path) -> io::Result<(File, File)> {
    let read = read_end(path)?;
    let write = OpenOptions::new()
        .write(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    Ok((read, write))
}

impl Output {
    /// Opens both ends; never waits for a client.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let (hold, sender) = both_ends(path)?;
        Ok(Self {
            name: path.display().to_string(),
            sender,
            hold: Some(hold),
            readers: Readers::Present,
        })
    }

    /// Writes all of it, or drops what no client will read (see the module).
    ///
    /// # Errors
    /// The pipe is broken for good.
    pub(super) async fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            // Asked of the kernel, and not by a write: a short one fits into the rest of the pipe's last page without any reader.
            if matches!(self.readers, Readers::Gone) && !self.events()?.contains(PollFlags::POLLOUT)
            {
                return Ok(());
            }
            match self.sender.write(data) {
                Ok(n) => {
                    data = data.get(n..).unwrap_or_default();
                    if matches!(self.readers, Readers::Gone) {
                        info!(fifo = self.name, "the container's output is read again");
                    }
                    self.readers = Readers::Present;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.room().await? {
                        self.probe()?;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Waits for room, but no longer than until the next probe: false.
    async fn room(&self) -> io::Result<bool> {
        // Registering tells of the room that has come since the write, too.
        let sender = pipe::Sender::from_file_unchecked(self.sender.try_clone()?)?;
        match timeout(PROBE_INTERVAL, sender.writable()).await {
            Ok(ready) => ready.map(|_| true),
            Err(_) => Ok(false),
        }
    }

    /// What the kernel says of the write end now.
    fn events(&self) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(self.sender.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(fds.iter().filter_map(PollFd::revents).collect())
    }

    fn probe(&mut self) -> io::Result<()> {
        self.readers = match (self.has_reader()?, self.readers) {
            (true, _) => Readers::Present,
            (false, Readers::Missing(since)) if since.elapsed() >= READER_GRACE => {
                warn!(
                    fifo = self.name,
                    "nobody reads the container's output: dropping it until somebody does"
                );
                Readers::Gone
            }
            (false, Readers::Present) => Readers::Missing(Instant::now()),
            (false, known) => known,
        };
        Ok(())
    }

    /// Whether anybody else has the read end open.
    fn has_reader(&mut self) -> io::Result<bool> {
        self.hold = None;
        let events = self.events();
        // Through /proc: the client may have unlinked the path.
        let fd = self.sender.as_raw_fd();
        self.hold = Some(read_end(Path::new(&format!("/proc/self/fd/{fd}")))?);
        Ok(!events?.contains(PollFlags::POLLERR))
    }
}

impl Input {
    /// Opens both ends; never waits for a client.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let (receiver, hold) = both_ends(path)?;
        Ok(Self {
            receiver: pipe::Receiver::from_file(receiver)?,
            hold: Some(hold),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::path::PathBuf;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        (dir, path)
    }

    /// An output whose pipe is full, but for a byte in each page, and whose client is gone from the next probe on.
    fn full(path: &Path) -> Output {
        let mut output = Output::open(path).unwrap();
        while output.sender.write(&[b'x'; 4095]).is_ok() {}
        output.readers = Readers::Missing(Instant::now() - READER_GRACE);
        output
    }

    #[tokio::test]
    async fn what_is_written_once_the_pipe_has_been_read_is_not_dropped() {
        let (_dir, path) = fifo();
        let mut output = full(&path);
        output.write(&[b'y'; 2]).await.unwrap();
        // It would fit.
        output.write(b"z").await.unwrap();
        let mut client = read_end(&path).unwrap();
        let mut held = vec![0; 1 << 20];
        let n = client.read(&mut held).unwrap();
        assert!(held.get(..n).unwrap().iter().all(|&b| b == b'x'));
        // The reactor has had no turn in which to hear of the room.
        output.write(b"new").await.unwrap();
        let n = client.read(&mut held).unwrap();
        assert_eq!(held.get(..n).unwrap(), b"new");
    }

    #[test]
    fn probes_do_not_end_the_wait_for_room() {
        let (done, finished) = std::sync::mpsc::channel();
        // A wait that spins gives no thread back: it gets one that the test need not wait for.
        std::thread::spawn(move || {
            // Its workers idle in the reactor, which is to see none of the probes.
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let (_dir, path) = fifo();
                let mut output = full(&path);
                for _ in 0..1000 {
                    assert!(!output.has_reader().unwrap());
                }
                output.readers = Readers::Missing(Instant::now() - READER_GRACE);
                output.write(b"dropped").await.unwrap();
            });
            done.send(()).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(300)).unwrap();
    }

    #[test]
    fn a_client_that_has_left_before_stdin_is_held_open_does_not_end_it() {
        let (_dir, path) = fifo();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _reactor = runtime.enter();
        let client = path.clone();
        std::thread::spawn(move || while OpenOptions::new().write(true).open(&client).is_ok() {});
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..5000 {
            let input = Input::open(&path).unwrap();
            let mut buffer = [0];
            assert!(input.receiver.try_read(&mut buffer).is_err());
            assert!(
                pin!(input.receiver.readable())
                    .poll(&mut context)
                    .is_pending()
            );
        }
    }
}
