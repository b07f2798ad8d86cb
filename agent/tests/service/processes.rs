//! A runtime that makes plain processes of the test's machine: a process group is the container, a FIFO the gate.

use std::fs::{self, File};
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use husk_agent::container::{Io, LaunchError, StdioFds};
use husk_agent::runtime::{Gate, Handle, Launched, Runtime};
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tempfile::TempDir;

/// "Specs" and "processes" are JSON lists: the program and its arguments.
pub struct Processes;

pub struct Group {
    leader: i32,
    dir: TempDir,
}

pub struct Fifo {
    /// Never closed: the shell may open its end only later, and a FIFO without an open end forgets its bytes.
    fifo: ManuallyDrop<File>,
    program: String,
    word: &'static [u8],
}

fn internal(error: impl ToString) -> LaunchError {
    LaunchError::Internal(error.to_string())
}

fn launch(
    dir: &Path,
    group: i32,
    argv_json: &[u8],
    io: Io,
) -> Result<Launched<Group>, LaunchError> {
    let argv: Vec<String> =
        serde_json::from_slice(argv_json).map_err(|e| LaunchError::InvalidSpec(e.to_string()))?;
    let program = argv.first().cloned().unwrap_or_default();
    let gate = tempfile::Builder::new()
        .tempdir_in(dir)
        .map_err(internal)?
        .keep()
        .join("gate");
    mkfifo(&gate, Mode::S_IRWXU).map_err(internal)?;
    let fifo = File::options()
        .read(true)
        .write(true)
        .open(&gate)
        .map_err(internal)?;
    let (stdio, console) = match io {
        Io::Pipes(stdio) => (stdio, None),
        Io::Terminal => {
            let pty = nix::pty::openpty(None, None).map_err(internal)?;
            let copy = || pty.slave.try_clone().map_err(internal);
            let stdio = StdioFds {
                stdin: copy()?,
                stdout: copy()?,
                stderr: copy()?,
            };
            (stdio, Some(pty.master))
        }
    };
    let child = Command::new("/bin/sh")
        .arg("-c")
        // As deaf as the init of a pid namespace, until it is the program.
        .arg(r#"trap '' INT TERM; read word <"$0"; [ "$word" = go ] || exit 1; trap - INT TERM; exec "$@""#)
        .arg(&gate)
        .args(&argv)
        .stdin(stdio.stdin)
        .stdout(stdio.stdout)
        .stderr(stdio.stderr)
        .process_group(group)
        .spawn()
        .map_err(internal)?;
    Ok(Launched {
        pid: i32::try_from(child.id()).unwrap(),
        console,
        gate: Fifo {
            fifo: ManuallyDrop::new(fifo),
            program,
            word: b"stop\n",
        },
    })
}

impl Runtime for Processes {
    type Container = Group;

    async fn create(
        &self,
        _id: &str,
        spec_json: &[u8],
        io: Io,
        _joined: Option<&Group>,
    ) -> Result<(Group, Launched<Group>), LaunchError> {
        let dir = tempfile::tempdir().map_err(internal)?;
        fs::write(dir.path().join("memory.events"), "oom_kill 0\n").map_err(internal)?;
        let launched = launch(dir.path(), 0, spec_json, io)?;
        let leader = launched.pid;
        Ok((Group { leader, dir }, launched))
    }
}

impl Group {
    fn signal(&self, signal: Signal) -> io::Result<()> {
        match killpg(Pid::from_raw(self.leader), signal) {
            Err(nix::errno::Errno::ESRCH) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Handle for Group {
    type Gate = Fifo;

    async fn exec(&self, process_json: &[u8], io: Io) -> Result<Launched<Self>, LaunchError> {
        launch(self.dir.path(), self.leader, process_json, io)
    }

    async fn update(&self, resources_json: &[u8]) -> Result<(), LaunchError> {
        fs::write(self.dir.path().join("pids.max"), resources_json).map_err(internal)
    }

    async fn freeze(&self) -> io::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    async fn thaw(&self) -> io::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn kill(&self) -> io::Result<()> {
        self.signal(Signal::SIGKILL)
    }

    fn procs(&self) -> io::Result<Vec<i32>> {
        let mut procs = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // After the name in parentheses: state, parent, process group.
            let fields: Vec<&str> = stat
                .rsplit(')')
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .collect();
            if let [state, _, group, ..] = fields[..]
                && state != "Z"
                && group.parse() == Ok(self.leader)
            {
                procs.push(pid);
            }
        }
        Ok(procs)
    }

    fn cgroup_dir(&self) -> &Path {
        self.dir.path()
    }

    async fn delete(&self) -> Result<(), LaunchError> {
        fs::remove_dir_all(self.dir.path()).map_err(internal)
    }
}

impl Gate for Fifo {
    async fn release(mut self) -> Result<(), LaunchError> {
        if self.program.starts_with("/nonexistent") {
            return Err(LaunchError::NotFound(format!(
                "exec: {:?}: not found",
                self.program
            )));
        }
        self.word = b"go\n";
        Ok(())
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        self.fifo.write_all(self.word).unwrap();
    }
}
