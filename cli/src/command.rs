//! What each command does.

use std::io::{self, Write as _};

use anyhow::Result;
use clap::CommandFactory as _;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    archives,
    args::{Args, Command},
    images,
    place::Place,
    pull, version,
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

/// Did the reader of the output go away?
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
