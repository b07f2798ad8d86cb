//! FIFOs whose other end belongs to a client that may come and go.
//!
//! The shim holds both ends of each. On an output FIFO its read end keeps a write from failing while nobody reads; on
//! stdin its write end keeps the container's input open when a client detaches, until CloseIO lets go of it. The price of holding a read end is that the kernel no
//! longer tells that the client has gone, so a full pipe is probed: with our read end closed for a moment (nothing is written then, and what is in the
//! pipe stays), `POLLERR` on the write end says that no other reader exists. After [`READER_GRACE`] without one, new output is dropped
//! until somebody reads again, so that a container does not hang on a client that will not come back.

use std::fs::{File, OpenOptions};
use std::io;
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
    sender: pipe::Sender,
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
    pub(super) hold: Option<pipe::Sender>,
}

fn read_end(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)
}

impl Output {
    /// Opens both ends; never waits for a client.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let hold = read_end(path)?;
        let sender = pipe::OpenOptions::new().open_sender(path)?;
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
            match self.sender.try_write(data) {
                Ok(n) => {
                    data = data.get(n..).unwrap_or_default();
                    if matches!(self.readers, Readers::Gone) {
                        info!(fifo = self.name, "the container's output is read again");
                    }
                    self.readers = Readers::Present;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if matches!(self.readers, Readers::Gone) {
                        return Ok(());
                    }
                    if timeout(PROBE_INTERVAL, self.sender.writable())
                        .await
                        .is_err()
                    {
                        self.probe()?;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
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
        let mut fds = [PollFd::new(self.sender.as_fd(), PollFlags::POLLOUT)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let gone = fds
            .iter()
            .any(|fd| fd.revents().is_some_and(|r| r.contains(PollFlags::POLLERR)));
        // Through /proc: the client may have unlinked the path.
        let fd = self.sender.as_raw_fd();
        self.hold = Some(read_end(Path::new(&format!("/proc/self/fd/{fd}")))?);
        polled?;
        Ok(!gone)
    }
}

impl Input {
    /// Opens both ends; never waits for a client.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let receiver = pipe::OpenOptions::new().open_receiver(path)?;
        let hold = pipe::OpenOptions::new().open_sender(path)?;
        Ok(Self {
            receiver,
            hold: Some(hold),
        })
    }
}
