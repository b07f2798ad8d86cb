//! Wires a new process's standard streams: tokens to connections, connections to pipes or to a terminal.

use std::io;
use std::os::fd::OwnedFd;

use husk_protocol::agent::Stdio;
use husk_protocol::stream::Token;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use rustix::fs::OFlags;

use crate::container::{Io, StdioFds, open_null};
use crate::dial::Host;
use crate::error::AgentError;
use crate::polled::{Polled, polled};
use crate::stream::{InputKind, Output, Outputs, start_input};

/// The streams that the host asks for.
#[derive(Debug)]
pub struct Plan {
    terminal: bool,
    stdin: Option<Token>,
    stdout: Option<Token>,
    stderr: Option<Token>,
}

/// The agent's side of the streams, while the process is being made.
#[derive(Debug)]
pub enum Wiring {
    /// A connection and the agent's end of the pipe, for each stream that is not `/dev/null`.
    Pipes {
        /// Written by the agent.
        stdin: Option<(Polled, OwnedFd)>,
        /// Read by the agent.
        stdout: Option<(Polled, OwnedFd)>,
        /// Read by the agent.
        stderr: Option<(Polled, OwnedFd)>,
    },
    /// The connections of a terminal, whose master is still to come.
    Terminal {
        /// Keys.
        input: Option<Polled>,
        /// Screen.
        output: Option<Polled>,
    },
}

impl Plan {
    /// Reads the request.
    ///
    /// # Errors
    /// [`AgentError::Token`] and [`AgentError::Invalid`] for what makes no sense.
    pub fn new(stdio: &Stdio) -> Result<Self, AgentError> {
        let plan = Self {
            terminal: stdio.terminal,
            stdin: Token::from_field(&stdio.stdin_token)?,
            stdout: Token::from_field(&stdio.stdout_token)?,
            stderr: Token::from_field(&stdio.stderr_token)?,
        };
        if plan.terminal && plan.stderr.is_some() {
            return Err(AgentError::Invalid(
                "a process with a terminal has no stderr of its own: its stdout carries both"
                    .into(),
            ));
        }
        Ok(plan)
    }

    /// Connects to the host and makes the pipes: the container's side and the agent's.
    ///
    /// # Errors
    /// [`AgentError::Guest`] naming the stream that could not be opened.
    pub async fn open(self, host: &dyn Host) -> Result<(Io, Wiring), AgentError> {
        let (stdin, stdout, stderr) = tokio::try_join!(
            connect(host, self.stdin, "stdin"),
            connect(host, self.stdout, "stdout"),
            connect(host, self.stderr, "stderr"),
        )?;
        if self.terminal {
            return Ok((
                Io::Terminal,
                Wiring::Terminal {
                    input: stdin,
                    output: stdout,
                },
            ));
        }
        let failed = |e: io::Error| AgentError::guest("making the pipes of a process", e);
        let (stdin_fd, stdin) = input_pipe(stdin).map_err(failed)?;
        let (stdout_fd, stdout) = output_pipe(stdout).map_err(failed)?;
        let (stderr_fd, stderr) = output_pipe(stderr).map_err(failed)?;
        Ok((
            Io::Pipes(StdioFds {
                stdin: stdin_fd,
                stdout: stdout_fd,
                stderr: stderr_fd,
            }),
            Wiring::Pipes {
                stdin,
                stdout,
                stderr,
            },
        ))
    }
}

impl Wiring {
    /// Starts the copiers. Returns those of the output, and the terminal where there is one.
    ///
    /// # Errors
    /// Where an fd cannot be polled, or a terminal was asked for and none came.
    pub fn attach(self, console: Option<OwnedFd>) -> io::Result<(Outputs, Option<Polled>)> {
        match self {
            Self::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                // Everything that can fail comes before the first copier starts.
                let ends =
                    |wire: Option<(Polled, OwnedFd)>| -> io::Result<Option<(Polled, Polled)>> {
                        wire.map(|(connection, end)| Ok((connection, polled(end)?)))
                            .transpose()
                    };
                let (stdin, stdout, stderr) = (ends(stdin)?, ends(stdout)?, ends(stderr)?);
                if let Some((connection, end)) = stdin {
                    start_input(connection, end, InputKind::Pipe);
                }
                let output = |(connection, end)| Output::start(end, Some(connection));
                let outputs = Outputs {
                    stdout: stdout.map(output),
                    stderr: stderr.map(output),
                };
                Ok((outputs, None))
            }
            Self::Terminal { input, output } => {
                let console =
                    console.ok_or_else(|| io::Error::other("the container sent no terminal"))?;
                let console = polled(console)?;
                if let Some(connection) = input {
                    start_input(connection, Polled::clone(&console), InputKind::Terminal);
                }
                // Read even if nobody wants it: a full terminal would stop the process.
                let outputs = Outputs {
                    stdout: Some(Output::start(Polled::clone(&console), output)),
                    stderr: None,
                };
                Ok((outputs, Some(console)))
            }
        }
    }
}

async fn connect(
    host: &dyn Host,
    token: Option<Token>,
    stream: &str,
) -> Result<Option<Polled>, AgentError> {
    match token {
        None => Ok(None),
        Some(token) => host
            .open_stream(token)
            .await
            .map(Some)
            .map_err(|e| AgentError::guest(format!("connecting {stream} to the host"), e)),
    }
}

type Wire = Option<(Polled, OwnedFd)>;

fn input_pipe(connection: Option<Polled>) -> io::Result<(OwnedFd, Wire)> {
    let Some(connection) = connection else {
        return Ok((open_null(OFlags::RDONLY)?, None));
    };
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((reader, Some((connection, writer))))
}

fn output_pipe(connection: Option<Polled>) -> io::Result<(OwnedFd, Wire)> {
    let Some(connection) = connection else {
        return Ok((open_null(OFlags::WRONLY)?, None));
    };
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((writer, Some((connection, reader))))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// Mode, owner and device of the machine's /dev/null must survive a container that holds it.
    #[test]
    fn a_stream_to_nowhere_is_no_handle_on_the_guests_device() {
        let (reader, _) = input_pipe(None).unwrap();
        let (writer, _) = output_pipe(None).unwrap();
        assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0));
        assert_eq!(nix::unistd::write(&writer, b"x"), Ok(1));
        for fd in [&reader, &writer] {
            let mode = rustix::fs::Mode::from_raw_mode(0o666);
            assert_eq!(rustix::fs::fchmod(fd, mode), Err(rustix::io::Errno::ROFS));
            // Opening it again by its link leads to the same mount.
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let path = rustix::fs::chmod(link, mode);
            assert_eq!(path, Err(rustix::io::Errno::ROFS));
        }
    }
}
