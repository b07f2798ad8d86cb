//! What each command does.

use std::{
    fmt,
    io::{self, Write as _},
};

use anyhow::Result;
use clap::CommandFactory as _;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    archives,
    args::{Args, Command},
    cp, doctor, exec, images, lifecycle, logs, look, monitor, network,
    place::Place,
    pull, run, stats, version,
};

/// Does what the command line says.
///
/// # Errors
/// When that fails; the error is a sentence for the user.
pub fn run(args: Args) -> Result<()> {
    let level = match args.debug {
        true => LevelFilter::DEBUG,
        false => LevelFilter::ERROR,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .init();
    let place = Place::new(args.root, args.registries);
    match args.command {
        Command::Run(args) => run::run(&place, &args),
        Command::Create(args) => run::create(&place, &args),
        Command::Start(args) => run::start(&place, &args),
        Command::Attach(args) => run::attach_to(&place, &args),
        Command::Exec(args) => exec::exec(&place, &args),
        Command::Logs(args) => logs::logs(&place, &args),
        Command::Cp(args) => cp::cp(&place, &args),
        Command::Ps(args) => look::list(&place, &args),
        Command::Inspect(args) => look::inspect(&place, &args),
        Command::Stop(args) => lifecycle::stop(&place, &args),
        Command::Kill(args) => lifecycle::kill(&place, &args),
        Command::Wait(args) => lifecycle::wait(&place, &args),
        Command::Pause(args) => lifecycle::pause(&place, &args),
        Command::Unpause(args) => lifecycle::unpause(&place, &args),
        Command::Rm(args) => lifecycle::remove(&place, &args),
        Command::Stats(args) => stats::stats(&place, &args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Network(args) => network::command(&place, &args),
        Command::Monitor(args) => monitor::run(&place, &args),
        Command::Pull(args) => pull::pull(&place, &args),
        Command::Images(args) => images::list(&place, &args),
        Command::Rmi(args) => images::remove(&place, &args),
        Command::Tag(args) => images::tag(&place, &args),
        Command::Prune(args) => images::prune(&place, &args),
        Command::Load(args) => archives::load(&place, &args),
        Command::Save(args) => archives::save(&place, &args),
        Command::Import(args) => archives::import(&place, &args),
        Command::Version(args) => version::print(&args),
        Command::Completion(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Args::command(), "husk", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
    }
}

/// An error with an exit code of its own.
#[derive(Debug)]
pub(crate) struct Code {
    code: u8,
    /// `None`: all has been said.
    error: Option<anyhow::Error>,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            Some(error) => write!(f, "{error:#}"),
            None => write!(f, "exit code {}", self.code),
        }
    }
}

impl std::error::Error for Code {}

impl Code {
    /// Ends with this code and says nothing.
    pub(crate) fn silent(code: u8) -> anyhow::Error {
        Self { code, error: None }.into()
    }

    /// Ends with this code.
    pub(crate) fn with(code: u8, error: anyhow::Error) -> anyhow::Error {
        let error = Some(error);
        Self { code, error }.into()
    }

    /// husk's own failure, where a container's exit code was expected: 125, as docker has it.
    pub(crate) fn own(error: anyhow::Error) -> anyhow::Error {
        if error.is::<Self>() {
            error
        } else {
            Self::with(125, error)
        }
    }
}

/// What the process ends with, and what is said before.
pub fn ending(error: &anyhow::Error) -> (u8, Option<String>) {
    match error.downcast_ref::<Code>() {
        Some(Code { code, error }) => (*code, error.as_ref().map(|error| format!("{error:#}"))),
        None => (1, Some(format!("{error:#}"))),
    }
}

/// Did the reader of the output go away?
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
