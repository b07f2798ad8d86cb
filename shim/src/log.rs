//! The shim's log: lines in containerd's own form into the FIFO `<bundle>/log`, which containerd copies to its log.
//!
//! The FIFO is opened for reading too and does not block, so a containerd that has gone can neither stop the shim nor
//! kill it: once the pipe is full, lines are dropped and counted, and the count is logged when there is room again.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{DefaultFields, FormatEvent, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogLevel;

/// A write of up to this much to a pipe is whole or not at all (PIPE_BUF, pipe(7)).
const MAX_LINE: usize = 4096;

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// Opens `<bundle>/log`; `None` where the engine made none.
pub fn open(bundle: &Path) -> Option<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .ok()
}

/// Sends everything `tracing` sees, and panics, to `file`; each line carries the pod's id. The first call of a process counts.
///
/// # Errors
/// When the descriptor cannot be duplicated.
pub fn init(file: impl AsFd, level: LogLevel, pod: &str) -> io::Result<()> {
    let file = File::from(file.as_fd().try_clone_to_owned()?);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(level))
        .event_format(Logrus {
            pod: pod.to_owned(),
        })
        .with_writer(Lines {
            file,
            dropped: AtomicU64::new(0),
        })
        .finish();
    // A second call in one process (tests) keeps the first one's choice.
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        std::panic::set_hook(Box::new(|panic| tracing::error!("panic: {panic}")));
    }
    Ok(())
}

/// Writes whole lines and never waits.
#[derive(Debug)]
struct Lines {
    file: File,
    dropped: AtomicU64,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Lines;
    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl io::Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            let note = format!(
                "time=\"{}\" level=warning msg=\"{dropped} log lines dropped, nobody read them\"\n",
                Rfc3339(SystemTime::now())
            );
            if (&self.file).write(note.as_bytes()).is_ok() {
                self.dropped.fetch_sub(dropped, Ordering::Relaxed);
            }
        }
        let cut = shorten(line);
        if (&self.file).write_all(&cut).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Cuts a line to what a pipe takes whole.
fn shorten(line: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    match line.get(..MAX_LINE - 16) {
        Some(start) if line.len() > MAX_LINE => {
            let mut cut = start.to_vec();
            cut.extend_from_slice(b" [cut short]\"\n");
            cut.into()
        }
        _ => line.into(),
    }
}

/// containerd's text form: `time="…" level=info msg="…" pod=… key=value`.
struct Logrus {
    pod: String,
}

impl<S> FormatEvent<S, DefaultFields> for Logrus
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, DefaultFields>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(
            out,
            "time=\"{}\" level={level} msg={:?}",
            Rfc3339(SystemTime::now()),
            fields.message
        )?;
        let pod = Value(&self.pod);
        write!(out, " pod={pod} runtime=io.containerd.husk.v2")?;
        for span in context
            .event_scope()
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .iter()
            .rev()
        {
            write!(out, " span={}", span.name())?;
        }
        writeln!(out, "{}", fields.rest)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            // Writing to a String cannot fail.
            let _ = write!(self.rest, " {}={value:?}", field.name());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
            return;
        }
        let _ = write!(
            self.rest,
            " {}={}",
            field.name(),
            Value(&format!("{value:?}"))
        );
    }
}

/// A value as it stands in a line: quoted, whatever it looks like, unless nothing in it could be taken for more than a value.
struct Value<'a>(&'a str);

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_plain = self
            .0
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'/' | b':'));
        if is_plain && !self.0.is_empty() {
            f.write_str(self.0)
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}

/// A time as RFC 3339 in UTC with microseconds.
struct Rfc3339(SystemTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        let (year, month, day) = civil(days);
        let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:06}Z",
            since.subsec_micros()
        )
    }
}

/// Year, month and day of a day counted from 1970-01-01. Years are counted from March, so that a leap day is the year's last.
fn civil(days: u64) -> (u64, u64, u64) {
    // Days from 0000-03-01 to 1970-01-01.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::time::Duration;

    fn at(seconds: u64) -> String {
        Rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
    }

    #[test]
    fn times_as_date_prints_them() {
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000000Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000000Z");
    }

    /// What a guest or a person writes must not become a line or a field of its own.
    #[test]
    fn a_value_stays_a_value() {
        let forged = "\"x\" level=error\ntime=now msg=forged";
        assert_eq!(
            Value(forged).to_string(),
            r#""\"x\" level=error\ntime=now msg=forged""#
        );
        assert_eq!(Value("\"quoted\"").to_string(), r#""\"quoted\"""#);
        assert_eq!(Value("").to_string(), r#""""#);
        assert_eq!(Value("/run/a-b_c.d:1").to_string(), "/run/a-b_c.d:1");
    }

    #[test]
    fn a_full_pipe_drops_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let lines = Lines {
            file: open(dir.path()).unwrap(),
            dropped: AtomicU64::new(0),
        };
        let line = [b'x'; 1000];
        for _ in 0..200 {
            assert_eq!((&lines).write(&line).unwrap(), line.len());
        }
        let dropped = lines.dropped.load(Ordering::Relaxed);
        assert!(dropped > 0, "64 KiB of pipe do not hold 200 kB");
        // Somebody reads again: the loss is told.
        let mut got = vec![0; 1 << 20];
        let n = io::Read::read(&mut &lines.file, &mut got).unwrap();
        assert!(n >= 64_000);
        (&lines).write_all(b"on we go\n").unwrap();
        let n = io::Read::read(&mut &lines.file, &mut got).unwrap();
        let text = String::from_utf8_lossy(&got[..n]);
        assert!(
            text.contains(&format!("{dropped} log lines dropped")),
            "{text}"
        );
        assert!(text.ends_with("on we go\n"), "{text}");
    }

    #[test]
    fn a_long_line_is_cut_to_what_a_pipe_takes_whole() {
        assert_eq!(shorten(b"short\n"), &b"short\n"[..]);
        let cut = shorten(&[b'a'; 10_000]).into_owned();
        assert!(cut.len() <= MAX_LINE && cut.ends_with(b"\n"));
    }
}
