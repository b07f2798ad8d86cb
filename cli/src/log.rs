//! A container's output on the disk, in docker's format: a JSON object a line, of what was written, where to, and when.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use chrono::{SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

/// The most bytes of a file; then the next begins, and the one before the last goes. So a container does not fill its host's disk.
const MOST: u64 = 64 << 20;
/// The most bytes of an entry: a longer line becomes several (moby, daemon/logger/copier.go).
const LINE: usize = 16 << 10;

/// An entry.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What was written: a line with its end, or a part of one.
    pub(crate) log: String,
    /// `stdout` or `stderr`.
    pub(crate) stream: String,
    /// RFC 3339.
    pub(crate) time: String,
}

/// Where a container's log is, the older part first.
pub(crate) fn files(dir: &Path) -> [PathBuf; 2] {
    [dir.join("log.1"), dir.join("log")]
}

/// Writes a log.
pub(crate) struct Log {
    dir: PathBuf,
    file: File,
    size: u64,
    /// Of standard output and standard error: a line that has not ended.
    begun: [Vec<u8>; 2],
}

/// The two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Log {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let [_, path] = files(dir);
        let file = File::options().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            dir: dir.to_owned(),
            file,
            size,
            begun: Default::default(),
        })
    }

    /// Adds what the container has written.
    pub(crate) fn add(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        for part in data.split_inclusive(|byte| *byte == b'\n') {
            let begun = self.begun_of(stream);
            begun.extend_from_slice(part);
            if part.ends_with(b"\n") || begun.len() >= LINE {
                self.end_line(stream)?;
            }
        }
        Ok(())
    }

    /// Nothing more comes.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        self.end_line(Stream::Stdout)?;
        self.end_line(Stream::Stderr)
    }

    fn begun_of(&mut self, stream: Stream) -> &mut Vec<u8> {
        let [out, err] = &mut self.begun;
        match stream {
            Stream::Stdout => out,
            Stream::Stderr => err,
        }
    }

    fn end_line(&mut self, stream: Stream) -> io::Result<()> {
        let line = std::mem::take(self.begun_of(stream));
        if line.is_empty() {
            return Ok(());
        }
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let entry = Entry {
            log: String::from_utf8_lossy(&line).into_owned(),
            stream: name.to_owned(),
            time: Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true),
        };
        let mut text = serde_json::to_vec(&entry)?;
        text.push(b'\n');
        if self.size + text.len() as u64 > MOST {
            let [older, path] = files(&self.dir);
            fs::rename(&path, older)?;
            self.file = File::options().create(true).append(true).open(path)?;
            self.size = 0;
        }
        self.file.write_all(&text)?;
        self.size += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(dir: &Path) -> Vec<(String, String)> {
        let text = fs::read_to_string(dir.join("log")).unwrap();
        let entry = |line: &str| serde_json::from_str::<Entry>(line).unwrap();
        text.lines()
            .map(entry)
            .map(|entry| (entry.stream, entry.log))
            .collect()
    }

    #[test]
    fn lines_are_entries_and_streams_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path()).unwrap();
        log.add(Stream::Stdout, b"one\ntw").unwrap();
        log.add(Stream::Stderr, b"err\n").unwrap();
        log.add(Stream::Stdout, b"o\n\nrest").unwrap();
        log.add(Stream::Stderr, &[0xff]).unwrap();
        log.end().unwrap();
        let wanted = [
            ("stdout", "one\n"),
            ("stderr", "err\n"),
            ("stdout", "two\n"),
            ("stdout", "\n"),
            ("stdout", "rest"),
            ("stderr", "\u{fffd}"),
        ];
        assert_eq!(
            entries(dir.path()),
            wanted.map(|(s, l)| (s.to_owned(), l.to_owned()))
        );
    }

    #[test]
    fn a_log_has_two_files_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path()).unwrap();
        log.size = MOST - 10;
        log.add(Stream::Stdout, b"after\n").unwrap();
        assert!(dir.path().join("log.1").exists());
        assert_eq!(entries(dir.path()).len(), 1);
        let long = vec![b'x'; 3 * LINE];
        log.add(Stream::Stdout, &long).unwrap();
        log.end().unwrap();
        let length: usize = entries(dir.path())
            .iter()
            .skip(1)
            .map(|(_, line)| line.len())
            .sum();
        assert_eq!(length, long.len());
    }
}
