//! The guest's console output: the last lines for a panic report, and a forwarder that never holds a vCPU up.
//!
//! A vCPU thread appends to a bounded buffer; one thread, which exists only where the output is wanted, writes that
//! buffer to the shim. A reader that stalls costs lost output, which is counted and said, never a stalled guest; and so does a guest
//! that talks without end, which must not fill the host's disk. The last lines are kept in any case.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use husk_protocol::vm::CONSOLE_TAIL_LINES;

use crate::jail::seccomp::Kind;
use crate::sentence;

/// Characters of a line that the tail keeps: all lines, escaped as JSON, fit one control packet several times over.
const LINE_MAX: usize = 400;
/// Output waiting for a slow reader.
const BACKLOG_MAX: usize = 64 * 1024;
/// Output that is forwarded within [`PERIOD`] at most. A whole boot is a tenth of it.
const PERIOD_MAX: usize = 1 << 20;
const PERIOD: Duration = Duration::from_secs(10);

/// The last lines of a stream of bytes.
#[derive(Debug, Default)]
struct Tail {
    done: VecDeque<String>,
    current: Vec<u8>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = clean(&self.current);
                self.current.clear();
                if self.done.len() == CONSOLE_TAIL_LINES {
                    self.done.pop_front();
                }
                self.done.push_back(line);
            } else if self.current.len() < LINE_MAX {
                self.current.push(byte);
            }
        }
    }

    fn lines(&self) -> Vec<String> {
        let unfinished = (!self.current.is_empty()).then(|| clean(&self.current));
        let skip = usize::from(unfinished.is_some() && self.done.len() == CONSOLE_TAIL_LINES);
        self.done
            .iter()
            .skip(skip)
            .cloned()
            .chain(unfinished)
            .collect()
    }
}

/// A guest's line as it may appear in a log: no control characters, so no terminal escapes.
fn clean(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .map(|c| match c {
            '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Output on its way to the reader.
#[derive(Debug, Default)]
struct Backlog {
    bytes: VecDeque<u8>,
    /// Bytes dropped since the last that were kept.
    lost: u64,
    /// When the current [`PERIOD`] began, and what has been kept in it.
    period: Option<(Instant, usize)>,
    /// The forwarder is between taking bytes and having written them.
    writing: bool,
    /// The reader is gone: nothing is kept for it any more.
    closed: bool,
}

#[derive(Debug, Default)]
struct Forward {
    backlog: Mutex<Backlog>,
    changed: Condvar,
}

/// The guest's console. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    tail: Arc<Mutex<Tail>>,
    forward: Option<Arc<Forward>>,
}

impl Console {
    /// A console whose output goes to `out` as it comes, if given.
    ///
    /// # Errors
    /// The forwarding thread cannot be started.
    pub fn new(out: Option<OwnedFd>) -> io::Result<Self> {
        let forward = match out {
            None => None,
            Some(fd) => {
                let forward = Arc::new(Forward::default());
                let shared = Arc::clone(&forward);
                std::thread::Builder::new()
                    .name(Kind::Console.name().into())
                    .spawn(move || match Kind::Console.confine() {
                        Ok(()) => shared.run(&mut File::from(fd)),
                        // The console's last lines are kept all the same.
                        Err(error) => tracing::error!("{}", sentence(&error)),
                    })?;
                Some(forward)
            }
        };
        Ok(Self {
            tail: Arc::default(),
            forward,
        })
    }

    /// The last lines, oldest first, fit for a log.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        self.tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .lines()
    }

    /// Waits until the reader has everything, `limit` at most.
    pub fn drain(&self, limit: Duration) {
        if let Some(forward) = &self.forward {
            forward.drain(limit);
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes);
        if let Some(forward) = &self.forward {
            forward.push(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Backlog {
    /// Keeps `bytes`, or counts them as lost; false if there is nothing new to write.
    fn push(&mut self, bytes: &[u8], now: Instant) -> bool {
        let (start, kept) = match self.period {
            Some((start, kept)) if now.saturating_duration_since(start) < PERIOD => (start, kept),
            _ => (now, 0),
        };
        let kept = kept.saturating_add(bytes.len());
        let waiting = self.bytes.len().saturating_add(bytes.len());
        let fits = kept <= PERIOD_MAX && waiting <= BACKLOG_MAX && !self.closed;
        if fits {
            self.period = Some((start, kept));
            self.say_lost();
            self.bytes.extend(bytes);
        } else {
            self.lost = self.lost.saturating_add(bytes.len() as u64);
        }
        fits
    }

    fn say_lost(&mut self) {
        if self.lost > 0 && !self.closed {
            let note = format!(
                "\n[{} bytes of console output lost: more than the reader took, or than {} KiB in {} s]\n",
                self.lost,
                PERIOD_MAX >> 10,
                PERIOD.as_secs()
            );
            self.bytes.extend(note.as_bytes());
            self.lost = 0;
        }
    }
}

impl Forward {
    fn push(&self, bytes: &[u8]) {
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        if backlog.push(bytes, Instant::now()) {
            self.changed.notify_all();
        }
    }

    fn run(&self, out: &mut impl Write) {
        loop {
            let bytes = {
                let mut backlog = self
                    .changed
                    .wait_while(
                        self.backlog.lock().unwrap_or_else(PoisonError::into_inner),
                        |backlog| backlog.bytes.is_empty(),
                    )
                    .unwrap_or_else(PoisonError::into_inner);
                backlog.writing = true;
                std::mem::take(&mut backlog.bytes)
            };
            let (front, back) = bytes.as_slices();
            let result = out.write_all(front).and_then(|()| out.write_all(back));
            let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
            backlog.writing = false;
            backlog.closed = result.is_err();
            self.changed.notify_all();
            if let Err(error) = result {
                tracing::warn!(%error, "console output is no longer forwarded");
                return;
            }
        }
    }

    fn drain(&self, limit: Duration) {
        let start = Instant::now();
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        backlog.say_lost();
        self.changed.notify_all();
        while !backlog.closed && (backlog.writing || !backlog.bytes.is_empty()) {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return;
            }
            backlog = self
                .changed
                .wait_timeout(backlog, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use husk_protocol::vm::{Event, FromVmm, MAX_PACKET, VmExit};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_lines_are_kept_in_order() {
        let mut console = Console::new(None).unwrap();
        for i in 0..CONSOLE_TAIL_LINES + 5 {
            writeln!(console, "line {i}\r").unwrap();
        }
        write!(console, "unfinished").unwrap();
        let tail = console.tail();
        assert_eq!(tail.len(), CONSOLE_TAIL_LINES);
        assert_eq!(tail.first().unwrap(), "line 6");
        assert_eq!(tail.last().unwrap(), "unfinished");
    }

    #[test]
    fn escapes_do_not_reach_the_log() {
        let mut console = Console::new(None).unwrap();
        console.write_all(b"\x1b[2Jred\tteam\xff\n").unwrap();
        assert_eq!(console.tail(), ["\u{fffd}[2Jred team\u{fffd}"]);
    }

    proptest! {
        #[test]
        fn any_tail_fits_a_packet(pattern in prop::collection::vec(prop_oneof![Just(b'"'), Just(0u8), Just(0xffu8), any::<u8>()], 1..600)) {
            let bytes = pattern.repeat(40_000 / pattern.len());
            let mut console = Console::new(None).unwrap();
            console.write_all(&bytes).unwrap();
            let event = FromVmm::Event(Event::Exited(VmExit::GuestPanic { console: console.tail() }));
            prop_assert!(serde_json::to_vec(&event).unwrap().len() <= MAX_PACKET);
        }
    }

    #[test]
    fn output_reaches_the_reader() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut console = Console::new(Some(writer.into())).unwrap();
        console.write_all(b"hello\n").unwrap();
        let mut got = [0; 6];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello\n");
        console.drain(Duration::from_secs(5));
    }

    #[test]
    fn a_stalled_reader_stalls_nobody() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut console = Console::new(Some(writer.into())).unwrap();
        for _ in 0..1000 {
            console.write_all(&[b'x'; 1000]).unwrap();
        }
        // The pipe and the backlog are full by now; reading makes room, and the loss is said.
        let drained = std::thread::spawn(move || {
            let mut all = Vec::new();
            let mut chunk = [0; 4096];
            while !String::from_utf8_lossy(&all).contains("output lost") {
                let n = reader.read(&mut chunk).unwrap();
                all.extend_from_slice(&chunk[..n]);
            }
        });
        while !drained.is_finished() {
            console.write_all(b"more\n").unwrap();
            std::thread::yield_now();
        }
        drained.join().unwrap();
    }

    #[test]
    fn a_guest_that_talks_without_end_is_cut_short() {
        let mut backlog = Backlog::default();
        let start = Instant::now();
        let mut forwarded = 0;
        for _ in 0..10_000 {
            backlog.push(&[b'x'; 1000], start);
            forwarded += std::mem::take(&mut backlog.bytes).len();
        }
        assert_eq!(forwarded, PERIOD_MAX / 1000 * 1000);
        assert_eq!(backlog.lost, 10_000_000 - forwarded as u64);
        // Then it may speak again, and the gap is said once.
        for _ in 0..2 {
            assert!(backlog.push(b"again\n", start + PERIOD));
        }
        let bytes: Vec<u8> = std::mem::take(&mut backlog.bytes).into();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text.matches("bytes of console output lost").count(), 1);
        assert!(text.ends_with("s]\nagain\nagain\n"), "{text}");
    }

    /// At the end of the VM the reader hears what it has missed, and the report has the last words.
    #[test]
    fn a_flood_ends_with_the_newest_lines() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut console = Console::new(Some(writer.into())).unwrap();
        let block = [&[b'x'; 1023][..], b"\n"].concat();
        for _ in 0..3 << 10 {
            console.write_all(&block).unwrap();
        }
        console.write_all(b"Kernel panic\n").unwrap();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            let mut chunk = [0; 4096];
            while !String::from_utf8_lossy(&all).contains("output lost") {
                let count = reader.read(&mut chunk).unwrap();
                all.extend_from_slice(&chunk[..count]);
            }
        });
        console.drain(Duration::from_secs(60));
        reading.join().unwrap();
        assert_eq!(console.tail().last().unwrap(), "Kernel panic");
    }

    #[test]
    fn a_closed_reader_is_forgotten() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut console = Console::new(Some(writer.into())).unwrap();
        console.write_all(b"anyone?\n").unwrap();
        console.drain(Duration::from_secs(60));
        assert_eq!(console.tail(), ["anyone?"]);
    }
}
