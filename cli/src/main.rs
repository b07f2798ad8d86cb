//! `husk`: reads the command line and hands over to the library.

use std::process::ExitCode;

use clap::Parser as _;
use husk_cli::{args::Args, command};

fn main() -> ExitCode {
    match command::run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough.
        Err(error) if command::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let (code, said) = command::ending(&error);
            if let Some(said) = said {
                eprintln!("husk: {said}");
            }
            ExitCode::from(code)
        }
    }
}
