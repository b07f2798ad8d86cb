//! `containerd-shim-husk-v2`: reads the command line and hands over to the library.

use std::io::Write as _;
use std::process::ExitCode;

use containerd_shim_protos::protobuf::Message as _;
use husk_shim::args::{Action, Args, HELP};
use husk_shim::{bootstrap, daemon, delete, info, input};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // One line: containerd shows it to the person who ran the container.
            eprintln!(
                "{}",
                format!("containerd-shim-husk-v2: {e:#}").replace('\n', " ")
            );
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(std::env::args_os().skip(1))?;
    let mut stdout = std::io::stdout();
    match args.action {
        Action::Start => stdout.write_all(bootstrap::start(&args)?.as_bytes())?,
        Action::Delete => delete::delete(&args)?,
        Action::Serve => daemon::run(&args)?,
        Action::Info => {
            // The options on standard input change nothing in the answer; they are read so that containerd's write succeeds.
            drop(input::read_stdin());
            stdout.write_all(&info::info().write_to_bytes()?)?;
        }
        Action::Version => stdout.write_all(info::version().as_bytes())?,
        Action::Help => stdout.write_all(HELP.as_bytes())?,
    }
    stdout.flush()?;
    Ok(())
}
