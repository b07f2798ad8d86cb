//! `ctr` with a time limit: what a command printed and how it ended.

use std::{
    fmt,
    io::{Read, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use crate::wait;

/// How a command ended.
pub struct Output {
    /// The exit code; 128+n after signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    what: String,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` exited {}\nstdout: {}\nstderr: {}",
            self.what,
            self.code,
            clip(&self.stdout),
            clip(&self.stderr)
        )
    }
}

impl Output {
    /// Standard output as text, without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }

    /// The command did what it should.
    ///
    /// # Errors
    /// It did not; with everything it printed.
    pub fn ok(self) -> Result<Self> {
        self.exited(0)
    }

    /// The command ended with this code.
    ///
    /// # Errors
    /// It ended with another; with everything it printed.
    pub fn exited(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "exit code {code} was expected: {self:?}");
        Ok(self)
    }
}

fn clip(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    match text.char_indices().nth(4000) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], bytes.len()),
        None => text.trim_end().to_owned(),
    }
}

/// The shell's number for how a process ended.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .or_else(|| status.signal().map(|s| 128 + s))
        .unwrap_or(-1)
}

/// A command whose output is being collected.
pub struct Running {
    child: Child,
    what: String,
    stdout: Collected,
    stderr: Collected,
}

impl Running {
    /// Starts it with `/dev/null` or a pipe as its input.
    ///
    /// # Errors
    /// The program could not be started.
    pub fn start(command: &mut Command, stdin: bool) -> Result<Self> {
        let what = format!("{command:?}").replace('"', "");
        command
            .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting `{what}`"))?;
        let stdout = Collected::from(child.stdout.take());
        let stderr = Collected::from(child.stderr.take());
        Ok(Self {
            child,
            what,
            stdout,
            stderr,
        })
    }

    /// Its input, to be written when the time has come.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Writes to its input from a thread, and closes it after.
    pub fn feed(&mut self, bytes: Vec<u8>) {
        if let Some(mut pipe) = self.take_stdin() {
            thread::spawn(move || pipe.write_all(&bytes));
        }
    }

    /// What has come of standard output.
    pub fn text_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock()).into_owned()
    }

    /// Bytes of standard output that have come.
    pub fn stdout_len(&self) -> usize {
        self.stdout.lock().len()
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it ended?
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for its end and all its output.
    ///
    /// # Errors
    /// It hangs (it is killed then).
    pub fn finish(mut self) -> Result<Output> {
        drop(self.child.stdin.take());
        let waited = wait::until(&format!("the end of `{}`", self.what), || {
            self.child.try_wait().transpose()
        });
        if waited.is_err() {
            // Already gone is as good as killed.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let stdout = self.stdout.join();
        let stderr = self.stderr.join();
        match waited {
            Ok(status) => Ok(Output {
                code: exit_code(status?),
                stdout,
                stderr,
                what: self.what.clone(),
            }),
            Err(error) => bail!(
                "{error}\nstdout: {}\nstderr: {}",
                clip(&stdout),
                clip(&stderr)
            ),
        }
    }
}

/// An output that a thread reads to its end.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Collected {
    fn from(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&bytes);
        let reader = pipe.map(|mut pipe| {
            thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                // A broken pipe ends the output like its end does; what came before counts.
                while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    all.extend(buffer.iter().take(n));
                }
            })
        });
        Self { bytes, reader }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&mut self) -> Vec<u8> {
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has left what it had.
            let _ = reader.join();
        }
        std::mem::take(&mut self.lock())
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It could not be started, or hangs.
pub fn output(command: &mut Command) -> Result<Output> {
    Running::start(command, false)?.finish()
}

/// Runs a command to its end with this input.
///
/// # Errors
/// It could not be started, or hangs.
pub fn output_with_input(command: &mut Command, input: Vec<u8>) -> Result<Output> {
    let mut running = Running::start(command, true)?;
    running.feed(input);
    running.finish()
}
