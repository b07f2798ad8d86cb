//! A process' three pipes, which its shim opens by their names.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::net::unix::pipe;

/// Which of them there are.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output; all of a terminal's.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// The pipes, on the disk.
#[derive(Debug)]
pub struct Pipes {
    stdin: Option<PathBuf>,
    outputs: [Option<PathBuf>; 2],
}

impl Pipes {
    /// Makes them in a directory, which goes with them.
    ///
    /// # Errors
    /// They are there already, or the file system refuses.
    pub fn make(dir: &Path, wanted: Wanted) -> Result<Self> {
        let pipe = |is_wanted: bool, name: &str| -> io::Result<Option<PathBuf>> {
            if !is_wanted {
                return Ok(None);
            }
            let path = dir.join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
            Ok(Some(path))
        };
        let make = || {
            Ok::<_, io::Error>(Self {
                stdin: pipe(wanted.stdin, "stdin")?,
                outputs: [
                    pipe(wanted.stdout, "stdout")?,
                    pipe(wanted.stderr, "stderr")?,
                ],
            })
        };
        make().with_context(|| format!("making pipes in {}", dir.display()))
    }

    /// What a request to the shim calls them: stdin, stdout and stderr, empty where there is none.
    #[must_use]
    pub fn names(&self) -> [String; 3] {
        let [stdout, stderr] = &self.outputs;
        [&self.stdin, stdout, stderr].map(|path| {
            let path = path.as_deref();
            path.map_or_else(String::new, |path| path.display().to_string())
        })
    }

    /// The ends to read, of standard output and standard error, from now on. Nobody need have opened the others.
    ///
    /// # Errors
    /// A pipe cannot be opened.
    pub fn outputs(&self) -> Result<[Option<pipe::Receiver>; 2]> {
        let open = |path: &Option<PathBuf>| {
            let open = |path: &PathBuf| {
                let end = pipe::OpenOptions::new().open_receiver(path);
                end.with_context(|| format!("opening {}", path.display()))
            };
            path.as_ref().map(open).transpose()
        };
        let [stdout, stderr] = &self.outputs;
        Ok([open(stdout)?, open(stderr)?])
    }

    /// The end to write to, once the shim has opened the other.
    ///
    /// # Errors
    /// The pipe cannot be opened, for want of the shim above all.
    pub fn input(&self) -> Result<Option<pipe::Sender>> {
        let open = |path: &PathBuf| {
            let end = pipe::OpenOptions::new().open_sender(path);
            end.with_context(|| format!("opening {}", path.display()))
        };
        self.stdin.as_ref().map(open).transpose()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn only_what_is_wanted_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted {
            stdin: false,
            stdout: true,
            stderr: false,
        };
        let pipes = Pipes::make(dir.path(), wanted).unwrap();
        let [stdin, stdout, stderr] = pipes.names();
        assert_eq!((&*stdin, &*stderr), ("", ""));
        assert!(pipes.input().unwrap().is_none());
        let [Some(mut end), None] = pipes.outputs().unwrap() else {
            panic!("another stream");
        };
        let mut other = pipe::OpenOptions::new().open_sender(&stdout).unwrap();
        other.write_all(b"said").await.unwrap();
        drop(other);
        let mut said = String::new();
        end.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "said");
        // Two cannot have the same.
        assert!(Pipes::make(dir.path(), wanted).is_err());
    }
}
