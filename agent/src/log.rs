//! The agent's log: `tracing` events as lines of text to the host, and to the kernel's log until that is connected.
//!
//! Logging never waits: lines queue up to a bound and are dropped and counted beyond it.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::polled::Polled;

/// Bytes that wait for the host at most.
const QUEUE_MAX: usize = 64 * 1024;

/// Longest line. The kernel's log takes no record much longer (`PRINTKRB_RECORD_MAX`, 1024).
const LINE_MAX: usize = 960;

/// Kernel parameter with the level: `husk.log=debug`.
const PARAMETER: &str = "husk.log=";

static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    level: Level,
    queue: Mutex<Queue>,
    news: Notify,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<String>,
    bytes: usize,
    lost: usize,
    /// The kernel's log, until the host listens.
    kmsg: Option<File>,
}

impl Queue {
    fn push(&mut self, level: Level, line: String) {
        if let Some(kmsg) = &mut self.kmsg {
            // One write is one record; the number is syslog's level. Nothing can be done where it fails.
            let _ =
                kmsg.write_all(format!("<{}>husk-agent: {line}", syslog_level(level)).as_bytes());
        }
        if self.bytes + line.len() > QUEUE_MAX {
            self.lost += 1;
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line);
    }

    /// Everything that waits, as one text.
    fn take(&mut self) -> String {
        let mut text = String::with_capacity(self.bytes + self.lines.len());
        for line in self.lines.drain(..) {
            text.push_str(&line);
            text.push('\n');
        }
        if self.lost > 0 {
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "WARN husk_agent::log: {} lines lost: the host did not read",
                self.lost
            );
        }
        self.bytes = 0;
        self.lost = 0;
        text
    }
}

/// Begins to log, at the level that the kernel's command line asks for.
pub fn init() {
    let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let log = LOG.get_or_init(|| Log {
        level: level(&cmdline),
        queue: Mutex::new(Queue {
            kmsg: File::options().write(true).open("/dev/kmsg").ok(),
            ..Queue::default()
        }),
        news: Notify::new(),
    });
    // A second call changes nothing.
    let _ = tracing::subscriber::set_global_default(Lines(log));
}

/// Sends the log to the host for as long as it listens.
pub async fn ship(connection: Polled) {
    let Some(log) = LOG.get() else {
        return;
    };
    let kmsg = log.lock().kmsg.take();
    loop {
        let text = log.lock().take();
        if send(&connection, text.as_bytes()).await.is_err() {
            log.lock().kmsg = kmsg;
            return;
        }
        log.news.notified().await;
    }
}

async fn send(connection: &Polled, text: &[u8]) -> std::io::Result<()> {
    let mut rest = text;
    while !rest.is_empty() {
        let mut ready = connection.writable().await?;
        match nix::unistd::write(connection.get_ref(), rest) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn level(cmdline: &str) -> Level {
    cmdline
        .split_ascii_whitespace()
        .rev()
        .find_map(|word| word.strip_prefix(PARAMETER)?.parse().ok())
        .unwrap_or(Level::INFO)
}

fn syslog_level(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns events into lines. The agent has no spans: each line names its container itself.
struct Lines(&'static Log);

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.0.level
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let level = *event.metadata().level();
        let mut line = Line(format!("{level} {}:", event.metadata().target()));
        event.record(&mut line);
        self.0.lock().push(level, line.finish());
        self.0.news.notify_one();
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Line {
    /// One line: what a container named itself must not look like a second one.
    fn finish(self) -> String {
        let mut line: String = self
            .0
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        if line.len() > LINE_MAX {
            line.truncate(line.floor_char_boundary(LINE_MAX));
            line.push('…');
        }
        line
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_parameter_wins_and_nonsense_does_not() {
        assert_eq!(level("quiet"), Level::INFO);
        assert_eq!(level("husk.log=debug quiet husk.log=loud"), Level::DEBUG);
        assert_eq!(level("husk.log=debug husk.log=error"), Level::ERROR);
    }

    #[test]
    fn a_full_queue_counts_what_it_drops() {
        let mut queue = Queue::default();
        for _ in 0..3 {
            queue.push(Level::INFO, "x".repeat(QUEUE_MAX / 2));
        }
        let text = queue.take();
        assert!(
            text.ends_with("1 lines lost: the host did not read\n"),
            "{text}"
        );
        assert_eq!(queue.take(), "");
    }

    #[test]
    fn a_line_stays_one_line_of_bounded_length() {
        let line = Line(format!("a\nb\u{1b}{}", "ü".repeat(LINE_MAX))).finish();
        assert!(line.starts_with("a b ü"), "{line}");
        assert!(line.len() <= LINE_MAX + 3);
        assert!(!line.contains('\n'));
    }
}
