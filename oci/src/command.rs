//! Does what the command line says, and ends as crun does.

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{
    Parser as _,
    error::{ContextKind, ErrorKind},
};
use rustix::process::geteuid;

use crate::{
    args::{Args, Command, LogFormat},
    create, delete, descriptors,
    exec::{self, NotRun},
    list, log, proxy,
    store::Store,
};

/// What an `exec` ends with that did not come to run, as with crun.
const NOT_RUN: u8 = 255;

/// What argp ends with for an option that there is not (sysexits.h, EX_USAGE).
const USAGE: u8 = 64;

/// The whole of the program.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    match run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            log::error(&format!("{error:#}"), args.log.as_deref(), args.log_format);
            ExitCode::from(if error.is::<NotRun>() { NOT_RUN } else { 1 })
        }
    }
}

fn run(args: &Args) -> Result<u8> {
    match &args.command {
        Command::Features => return list::features().map(|()| 0),
        Command::Proxy(proxy) => return proxy::run(proxy),
        _ => {}
    }
    if !geteuid().is_root() {
        bail!(
            "containers in their own VM take root: this is user {}",
            geteuid().as_raw()
        );
    }
    descriptors::keep_from_programs().context("keeping descriptors to ourselves")?;
    let store = Store::open(&args.root)?;
    match &args.command {
        Command::Create(create) => create::create(args, create)?,
        Command::Start(one) => create::start(&store, one)?,
        Command::State(one) => list::state(&store, one)?,
        Command::Kill(kill) => delete::kill(&store, kill)?,
        Command::Delete(delete) => delete::delete(&store, delete)?,
        Command::Exec(exec) => return exec::exec(args, exec),
        Command::Pause(one) => delete::freeze(&store, one, true)?,
        Command::Resume(one) => delete::freeze(&store, one, false)?,
        Command::Update(update) => list::update(&store, update)?,
        Command::Ps(ps) => list::ps(&store, ps)?,
        Command::Events(events) => list::events(&store, events)?,
        Command::List(list) => list::list(&store, list)?,
        // Above.
        Command::Features | Command::Proxy(_) => {}
    }
    Ok(0)
}

/// A command line that cannot be read, in crun's words where it has some.
fn refuse(error: &clap::Error) -> ExitCode {
    let word = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let (message, code) = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe has read enough.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::UnknownArgument => {
            let option = word(ContextKind::InvalidArg);
            (
                format!("unrecognized option '{option}' (--help shows what there is)"),
                USAGE,
            )
        }
        ErrorKind::InvalidSubcommand => (
            format!("unknown command {}", word(ContextKind::InvalidSubcommand)),
            1,
        ),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            ("please specify a command (--help shows them)".to_owned(), 1)
        }
        ErrorKind::MissingRequiredArgument => {
            ("please specify a ID for the container".to_owned(), 1)
        }
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            (first.trim_start_matches("error: ").to_owned(), 1)
        }
    };
    let line: Vec<OsString> = std::env::args_os().collect();
    let (log, format) = log_of(&line);
    log::error(&message, log.as_deref(), format);
    ExitCode::from(code)
}

/// The log that an unreadable command line asks for: an engine reads the reason there.
fn log_of(line: &[OsString]) -> (Option<std::path::PathBuf>, LogFormat) {
    let words: Vec<_> = line.iter().filter_map(|word| word.to_str()).collect();
    let value = |name: &str| {
        let inline = words
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let next = words.iter().position(|word| *word == name);
        inline.or_else(|| words.get(next? + 1).copied())
    };
    let format = match value("--log-format") {
        Some("json") => LogFormat::Json,
        _ => LogFormat::Text,
    };
    (
        value("--log").and_then(|text| log::destination(text).ok()),
        format,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_found_in_any_line() {
        let line = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let json = (Some("/l".into()), LogFormat::Json);
        assert_eq!(
            log_of(&line("x --what --log /l --log-format=json list")),
            json
        );
        assert_eq!(log_of(&line("x --log=/l --log-format json list")), json);
        assert_eq!(log_of(&line("x list --log")), (None, LogFormat::Text));
    }
}
