//! The command line.

use std::{ffi::OsString, path::PathBuf};

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
    /// Where images and containers are kept [default: /var/lib/husk; for who is not root, husk in XDG_DATA_HOME or ~/.local/share].
    #[arg(long, global = true, env = "HUSK_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Mirrors, certificates and plain HTTP of registries, and who must have signed images.
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
    /// Create a container and run it.
    Run(Run),
    /// Create a container without running it.
    Create(Create),
    /// Run containers that were created or have ended.
    Start(Start),
    /// Run one more command in a container.
    Exec(Exec),
    /// Attach to a container's input and output.
    Attach(Attach),
    /// Show what a container has written.
    Logs(Logs),
    /// Copy files between the host and a container.
    Cp(Cp),
    /// List containers.
    Ps(Ps),
    /// Ask containers to end, and kill those that do not.
    Stop(Stop),
    /// Send containers a signal.
    Kill(Kill),
    /// Wait for containers to end; print their exit codes.
    Wait(Containers),
    /// Pause all processes of containers.
    Pause(Containers),
    /// Let paused containers go on.
    Unpause(Containers),
    /// Remove containers.
    Rm(Rm),
    /// Show all that is known of containers, as JSON.
    Inspect(Containers),
    /// Show what containers use.
    Stats(Stats),
    /// Say what this host can and cannot do, and what to do about it.
    Doctor(Doctor),
    /// Networks of containers.
    #[command(subcommand)]
    Network(NetworkCommand),
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
    /// Save images into an archive, which docker load, podman load and ctr image import read.
    Save(Save),
    /// Make an image of a root file system in a tar archive.
    Import(Import),
    /// Remove containers that have ended, and what no image's name leads to.
    Prune(Prune),
    /// Show versions.
    Version(Version),
    /// Print the completions for a shell.
    Completion(Completion),
    /// Look after one container.
    #[command(hide = true)]
    Monitor(Monitor),
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns.
    Table,
    /// One JSON object a line.
    Json,
}

/// `husk create`, and what `husk run` has of it.
#[derive(Debug, Clone, clap::Args)]
pub struct Create {
    /// The container's name; without it, one is made up.
    #[arg(long)]
    pub name: Option<String>,
    /// Keep its input open.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Remove it when it has ended.
    #[arg(long = "rm")]
    pub remove: bool,
    /// Set a variable: NAME=VALUE, or NAME for the caller's own value.
    #[arg(short, long, value_name = "VARIABLE")]
    pub env: Vec<String>,
    /// Set the variables of a file, a line each.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Mount a directory or a file of the host, or a named volume: SOURCE:TARGET[:ro].
    #[arg(short, long, value_name = "VOLUME")]
    pub volume: Vec<String>,
    /// Mount a file system in memory: TARGET[:OPTIONS].
    #[arg(long, value_name = "TARGET")]
    pub tmpfs: Vec<String>,
    /// The working directory.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// As whom: USER[:GROUP], names or numbers.
    #[arg(short, long)]
    pub user: Option<String>,
    /// Run this instead of the image's entry point.
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// The most memory, as 512m or 2g.
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// The most CPUs, as 1.5.
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<f64>,
    /// The most processes.
    #[arg(long, value_name = "NUMBER")]
    pub pids_limit: Option<i64>,
    /// Run an init as its first process, which takes orphans and hands signals on to the program.
    #[arg(long)]
    pub init: bool,
    /// Let nothing change its root file system.
    #[arg(long)]
    pub read_only: bool,
    /// Add a capability, or ALL.
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_add: Vec<String>,
    /// Take a capability away, or ALL.
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_drop: Vec<String>,
    /// seccomp=unconfined, seccomp=FILE, no-new-privileges.
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<String>,
    /// A resource limit: NAME=SOFT[:HARD].
    #[arg(long, value_name = "LIMIT")]
    pub ulimit: Vec<String>,
    /// The host name; without it, the id.
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// An annotation of its specification, io.husk.* among them: KEY=VALUE.
    #[arg(long, value_name = "ANNOTATION")]
    pub annotation: Vec<String>,
    /// The signal that asks it to end; without it, the image's, or SIGTERM.
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// The network: bridge, none, or one that `husk network create` has made.
    #[arg(long, value_name = "NETWORK", default_value = "bridge")]
    pub network: String,
    /// Publish a port on the host: [[ADDRESS:]HOSTPORT:]PORT[/tcp|/udp].
    #[arg(short, long, value_name = "PORT")]
    pub publish: Vec<String>,
    /// Pull the image: always, if it is missing, or never.
    #[arg(long, value_enum, default_value_t = PullPolicy::Missing)]
    pub pull: PullPolicy,
    /// Do not show the pull.
    #[arg(short, long)]
    pub quiet: bool,
    /// The image.
    pub image: String,
    /// What to run in place of the image's own command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// When `husk run` and `husk create` pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PullPolicy {
    /// Each time.
    Always,
    /// If the image is not there.
    Missing,
    /// Not at all.
    Never,
}

/// `husk run`.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// Print its id and leave it running.
    #[arg(short, long)]
    pub detach: bool,
    /// The container.
    #[command(flatten)]
    pub create: Create,
}

/// `husk start`.
#[derive(Debug, clap::Args)]
pub struct Start {
    /// Attach to its output.
    #[arg(short, long)]
    pub attach: bool,
    /// Attach to its input too.
    #[arg(short, long)]
    pub interactive: bool,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `husk exec`.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// Leave it running.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep its input open.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable: NAME=VALUE.
    #[arg(short, long, value_name = "VARIABLE")]
    pub env: Vec<String>,
    /// The working directory.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// As whom: USER[:GROUP], names or numbers.
    #[arg(short, long)]
    pub user: Option<String>,
    /// All capabilities.
    #[arg(long)]
    pub privileged: bool,
    /// The container.
    pub container: String,
    /// What to run.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `husk attach`.
#[derive(Debug, clap::Args)]
pub struct Attach {
    /// Do not attach to its input.
    #[arg(long)]
    pub no_stdin: bool,
    /// The container.
    pub container: String,
}

/// `husk logs`.
#[derive(Debug, clap::Args)]
pub struct Logs {
    /// Go on as long as it runs.
    #[arg(short, long)]
    pub follow: bool,
    /// Only so many lines of the end.
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// With the time of each line.
    #[arg(short, long)]
    pub timestamps: bool,
    /// The container.
    pub container: String,
}

/// `husk cp`.
#[derive(Debug, clap::Args)]
pub struct Cp {
    /// Keep owners; of a container's files, also what gives a program its owner's rights.
    #[arg(short, long)]
    pub archive: bool,
    /// Copy what a link SOURCE leads to, not the link.
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// CONTAINER:PATH, a path of the host, or "-" for a tar archive on standard input.
    pub source: OsString,
    /// CONTAINER:PATH, a path of the host, or "-" for a tar archive on standard output.
    pub destination: OsString,
}

/// `husk ps`.
#[derive(Debug, clap::Args)]
pub struct Ps {
    /// Those too that do not run.
    #[arg(short, long)]
    pub all: bool,
    /// Print nothing but ids.
    #[arg(short, long)]
    pub quiet: bool,
    /// Print whole ids and commands.
    #[arg(long)]
    pub no_trunc: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// `husk stop`.
#[derive(Debug, clap::Args)]
pub struct Stop {
    /// Seconds until it is killed.
    #[arg(
        short,
        long,
        alias = "timeout",
        default_value_t = 10,
        value_name = "SECONDS"
    )]
    pub time: u64,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `husk kill`.
#[derive(Debug, clap::Args)]
pub struct Kill {
    /// A name or a number.
    #[arg(short, long, default_value = "KILL")]
    pub signal: String,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `husk rm`.
#[derive(Debug, clap::Args)]
pub struct Rm {
    /// Kill it if it runs; one that is not there is no error.
    #[arg(short, long)]
    pub force: bool,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// Commands that take containers and nothing else.
#[derive(Debug, clap::Args)]
pub struct Containers {
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `husk stats`.
#[derive(Debug, clap::Args)]
pub struct Stats {
    /// Once, not again and again.
    #[arg(long)]
    pub no_stream: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Names, ids, or beginnings of ids; without any, all that run.
    pub containers: Vec<String>,
}

/// `husk doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Of a running pod or container instead: the jail that its VMM is in (docs/security.md).
    #[arg(long, value_name = "ID")]
    pub pod: Option<String>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// `husk network`.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// List networks.
    Ls(NetworkLs),
    /// Make a network: a bridge that hides its containers behind the host's address.
    Create(NetworkCreate),
    /// Remove networks.
    Rm(NetworkRm),
}

/// `husk network ls`.
#[derive(Debug, clap::Args)]
pub struct NetworkLs {
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// `husk network create`.
#[derive(Debug, clap::Args)]
pub struct NetworkCreate {
    /// Its name.
    pub name: String,
    /// Its addresses, as 10.1.2.0/24.
    #[arg(long, value_name = "SUBNET")]
    pub subnet: Option<String>,
}

/// `husk network rm`.
#[derive(Debug, clap::Args)]
pub struct NetworkRm {
    /// Names.
    #[arg(required = true)]
    pub networks: Vec<String>,
}

/// The process that looks after one container; started by `husk start`, not by hand.
#[derive(Debug, clap::Args)]
pub struct Monitor {
    /// The container's id.
    pub id: String,
    /// Start it when somebody has attached.
    #[arg(long)]
    pub attached: bool,
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
    /// Which kind of archive.
    #[arg(long, value_enum, default_value_t = ArchiveFormat::Oci)]
    pub format: ArchiveFormat,
}

/// A kind of archive, by the name that skopeo and podman have for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArchiveFormat {
    /// An OCI image layout; Docker reads it from version 25 on.
    #[value(name = "oci-archive")]
    Oci,
    /// What docker save wrote before: of each image this machine's platform, with its layers as plain tar archives.
    #[value(name = "docker-archive")]
    Docker,
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
    /// Remove all images that no container has, with their names.
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
