//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Images and containers, each container in its own microVM, without any daemon.
#[derive(Debug, Parser)]
#[command(
    name = "husk",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub struct Args {
    /// Where images are kept.
    #[arg(
        long,
        global = true,
        env = "HUSK_ROOT",
        default_value = "/var/lib/husk",
        value_name = "DIR"
    )]
    pub root: PathBuf,
    /// Mirrors, certificates and plain HTTP of registries.
    #[arg(long, global = true, default_value = husk_image::registry::FILE, value_name = "FILE")]
    pub registries: PathBuf,
    /// Tell more of what is being done, on standard error.
    #[arg(long, global = true)]
    pub debug: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Pull an image from a registry.
    Pull(Pull),
    /// List images.
    Images(Images),
    /// Remove names of images, and what nothing else needs.
    Rmi(Rmi),
    /// Give an image another name.
    Tag(Tag),
    /// Load images from an archive (OCI archive, or docker save).
    Load(Load),
    /// Save images into an OCI archive, which docker load, podman load and ctr image import read.
    Save(Save),
    /// Make an image of a root file system in a tar archive.
    Import(Import),
    /// Remove what no name leads to.
    Prune(Prune),
    /// Show versions.
    Version(Version),
    /// Print the completions for a shell.
    Completion(Completion),
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns.
    Table,
    /// One JSON object a line.
    Json,
}

/// `husk pull`.
#[derive(Debug, clap::Args)]
pub struct Pull {
    /// The image: [REGISTRY[:PORT]/]REPOSITORY[:TAG][@sha256:DIGEST].
    pub image: String,
    /// Print nothing but the image's name.
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print what happens as JSON, an object a line.
    #[arg(long)]
    pub json: bool,
    /// Of an image for several platforms, the one for this: OS/ARCH[/VARIANT].
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
}

/// `husk images`.
#[derive(Debug, clap::Args)]
pub struct Images {
    /// Only images of this repository, or this image.
    pub name: Option<String>,
    /// Print nothing but ids.
    #[arg(short, long)]
    pub quiet: bool,
    /// Print whole ids.
    #[arg(long)]
    pub no_trunc: bool,
    /// Print digests too.
    #[arg(long)]
    pub digests: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// `husk rmi`.
#[derive(Debug, clap::Args)]
pub struct Rmi {
    /// Names, or beginnings of ids.
    #[arg(required = true)]
    pub images: Vec<String>,
    /// An image that is not there is no error; an id that has several names goes with all of them.
    #[arg(short, long)]
    pub force: bool,
}

/// `husk tag`.
#[derive(Debug, clap::Args)]
pub struct Tag {
    /// Name, or beginning of the id.
    pub image: String,
    /// The other name.
    pub name: String,
}

/// `husk load`.
#[derive(Debug, clap::Args)]
pub struct Load {
    /// The archive; without it, standard input.
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Print nothing.
    #[arg(short, long)]
    pub quiet: bool,
}

/// `husk save`.
#[derive(Debug, clap::Args)]
pub struct Save {
    /// Names, or beginnings of ids.
    #[arg(required = true)]
    pub images: Vec<String>,
    /// The archive; without it, standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `husk import`.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// The tar archive, compressed or not; "-" is standard input.
    pub file: PathBuf,
    /// The image's name.
    pub name: String,
    /// For which platform: OS/ARCH[/VARIANT].
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
}

/// `husk prune`.
#[derive(Debug, clap::Args)]
pub struct Prune {
    /// Remove all images, with their names.
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask.
    #[arg(short, long)]
    pub force: bool,
}

/// `husk version`.
#[derive(Debug, clap::Args)]
pub struct Version {
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// `husk completion`.
#[derive(Debug, clap::Args)]
pub struct Completion {
    /// The shell.
    pub shell: Shell,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }
}
