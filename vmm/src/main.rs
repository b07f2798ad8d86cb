//! husk-vmm: wires the command line to the library.

mod standalone;

use std::io::IsTerminal as _;
use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use husk_vmm::control::{self, Channel};
use husk_vmm::parts::Inherited;

/// Runs one microVM.
///
/// husk's shim starts it with a control channel and already-open file descriptors, one process a pod. For
/// debugging, `husk-vmm run` starts a VM from files on its own.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    /// The control channel: an inherited SOCK_SEQPACKET socket that the shim speaks through
    #[arg(long, value_name = "N")]
    control_fd: Option<RawFd>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a VM from files, without a shim, and say how it ended
    Run(standalone::Options),
}

fn main() -> ExitCode {
    let started = husk_vmm::clock::monotonic();
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("HUSK_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let result = match (arguments.command, arguments.control_fd) {
        (Some(Command::Run(options)), _) => standalone::run(options, started),
        (None, Some(fd)) => serve(fd, started).map(|()| ExitCode::SUCCESS),
        (None, None) => Err(anyhow::anyhow!(
            "nothing to do: give --control-fd N or the command run (see --help)"
        )),
    };
    result.unwrap_or_else(|error| {
        tracing::error!("{error:#}");
        ExitCode::FAILURE
    })
}

fn serve(fd: RawFd, started: u64) -> anyhow::Result<()> {
    let mut fds = Inherited::default();
    let socket = fds
        .take("--control-fd", fd)
        .context("cannot use the control channel")?;
    control::serve(&Channel::new(socket), fds, started)?;
    Ok(())
}
