//! The command line, as crun and runc have it.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::{id::Id, log};

/// Runs containers in their own microVM, as an OCI runtime.
#[derive(Debug, Parser)]
#[command(name = "husk-oci", version, disable_version_flag = true)]
pub struct Args {
    /// Where the containers are
    #[arg(long, default_value = "/run/husk-oci")]
    pub root: PathBuf,
    /// A file that errors are appended to
    #[arg(long, value_parser = log::destination)]
    pub log: Option<PathBuf>,
    /// How they are written there
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// `debug` keeps the shim's log in the container's directory
    #[arg(long, value_enum, default_value = "error")]
    pub log_level: LogLevel,
    /// The same as --log-level debug
    #[arg(long)]
    pub debug: bool,
    /// The spec's cgroup is systemd's SLICE:PREFIX:NAME; husk tells it from a path by its colons
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// `disabled` leaves the VM in the caller's cgroup
    #[arg(long, value_enum)]
    pub cgroup_manager: Option<CgroupManager>,
    /// Without effect: containers take root
    #[arg(long, hide = true)]
    pub rootless: Option<String>,
    /// Print the version
    #[arg(short = 'v', short_alias = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The form of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line.
    Text,
    /// An object a line, with `msg`, `level` and `time`.
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// What went wrong.
    Error,
    /// The same here.
    Warning,
    /// The same here.
    Info,
    /// What the shim says, too.
    Debug,
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CgroupManager {
    /// husk.
    Cgroupfs,
    /// husk, at the place where systemd would.
    Systemd,
    /// Nobody.
    Disabled,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container, up to the point where its process waits
    Create(Create),
    /// Let a container's process begin
    Start(One),
    /// Print a container's state
    State(One),
    /// Send a signal to a container's process
    Kill(Kill),
    /// Remove a container
    Delete(Delete),
    /// Run one more process in a container
    Exec(Box<Exec>),
    /// Stop all of a container's processes
    Pause(One),
    /// Let them go on
    Resume(One),
    /// Change a container's limits
    Update(Box<Update>),
    /// Print the pids that a container has on this host
    Ps(Ps),
    /// Print what a container uses
    Events(Events),
    /// List the containers
    List(List),
    /// Print what this runtime can do
    Features,
    /// Stand for a container's process
    #[command(hide = true)]
    Proxy(Proxy),
}

/// A container.
#[derive(Debug, clap::Args)]
pub struct One {
    /// Its id
    pub id: Id,
}

/// `create`.
#[derive(Debug, clap::Args)]
pub struct Create {
    /// The directory of config.json
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// A socket that gets the terminal
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// A file for the pid
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// Descriptors to pass on beyond the three: none can be
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: u32,
    /// Without effect: the root file system is the guest's
    #[arg(long)]
    pub no_pivot: bool,
    /// Without effect: keyrings are the guest's
    #[arg(long)]
    pub no_new_keyring: bool,
    /// The container's id
    pub id: Id,
}

/// `kill`.
#[derive(Debug, clap::Args)]
pub struct Kill {
    /// All of the container's processes
    #[arg(short, long)]
    pub all: bool,
    /// The container's id
    pub id: Id,
    /// A name or a number
    #[arg(default_value = "TERM")]
    pub signal: String,
}

/// `delete`.
#[derive(Debug, clap::Args)]
pub struct Delete {
    /// Kill it if it runs
    #[arg(short, long)]
    pub force: bool,
    /// The container's id
    pub id: Id,
}

/// `exec`.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// A socket that gets the terminal
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// A file for the pid
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// A file with the process, as in config.json
    #[arg(short, long)]
    pub process: Option<PathBuf>,
    /// Do not wait for its end
    #[arg(short, long)]
    pub detach: bool,
    /// With a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// The working directory
    #[arg(long)]
    pub cwd: Option<String>,
    /// NAME=VALUE
    #[arg(short, long)]
    pub env: Vec<String>,
    /// UID[:GID]
    #[arg(short, long)]
    pub user: Option<String>,
    /// A capability
    #[arg(short, long)]
    pub cap: Vec<String>,
    /// The process can gain no privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// Descriptors to pass on beyond the three: none can be
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: u32,
    /// The container's id
    pub id: Id,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `update`.
#[derive(Debug, clap::Args)]
pub struct Update {
    /// A file with a spec's resources; `-`: standard input
    #[arg(short, long)]
    pub resources: Option<PathBuf>,
    /// Bytes
    #[arg(long, allow_hyphen_values = true)]
    pub memory: Option<i64>,
    /// Bytes
    #[arg(long, allow_hyphen_values = true)]
    pub memory_reservation: Option<i64>,
    /// Bytes of memory and swap together
    #[arg(long, allow_hyphen_values = true)]
    pub memory_swap: Option<i64>,
    /// Microseconds of CPU in a period
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// Microseconds
    #[arg(long)]
    pub cpu_period: Option<u64>,
    /// A weight
    #[arg(long, alias = "cpu-shares")]
    pub cpu_share: Option<u64>,
    /// A list of CPUs
    #[arg(long)]
    pub cpuset_cpus: Option<String>,
    /// The most processes
    #[arg(long, allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    /// The container's id
    pub id: Id,
}

/// The form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `ps`.
#[derive(Debug, clap::Args)]
pub struct Ps {
    /// How
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: Format,
    /// The container's id
    pub id: Id,
}

/// `events`.
#[derive(Debug, clap::Args)]
pub struct Events {
    /// Once
    #[arg(long)]
    pub stats: bool,
    /// Seconds between two
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub interval: u64,
    /// The container's id
    pub id: Id,
}

/// `list`.
#[derive(Debug, clap::Args)]
pub struct List {
    /// How
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: Format,
    /// Ids alone
    #[arg(short, long)]
    pub quiet: bool,
}

/// `proxy`, which `create` and `exec` start.
#[derive(Debug, clap::Args)]
pub struct Proxy {
    /// Of the process; empty for the container's first
    #[arg(long, default_value = "")]
    pub exec_id: String,
    /// The shim's
    #[arg(long)]
    pub address: String,
    /// Where the pipes are
    #[arg(long)]
    pub pipes: PathBuf,
    /// A socket that gets the terminal; there is none without
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// A network namespace to be in
    #[arg(long)]
    pub network: Option<PathBuf>,
    /// The spec of the container whose files it shows; none without
    #[arg(long)]
    pub spec: Option<PathBuf>,
    /// The container's id
    pub id: Id,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(["husk-oci"].into_iter().chain(line.split(' ')))
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    /// As conmon and podman write them.
    #[test]
    fn engines_own_lines() {
        let args = parse(
            "--systemd-cgroup --log-format=json --log /run/oci-log create --bundle /b --pid-file /p --no-new-keyring --console-socket /s c1",
        )
        .unwrap();
        assert_eq!(
            (args.log_format, args.log.unwrap()),
            (LogFormat::Json, "/run/oci-log".into())
        );
        let Command::Create(create) = args.command else {
            panic!("another command");
        };
        assert_eq!(
            (create.id.as_str(), create.bundle, create.console_socket),
            ("c1", "/b".into(), Some("/s".into()))
        );
        let args = parse("exec --pid-file /p --process /spec --detach --tty c1").unwrap();
        assert!(
            matches!(args.command, Command::Exec(e) if e.detach && e.tty && e.command.is_empty())
        );
        let args = parse("--cgroup-manager disabled kill --all c1 9").unwrap();
        assert!(matches!(args.command, Command::Kill(k) if k.all && k.signal == "9"));
        let args = parse("update --resources=/tmp/podman1 c1").unwrap();
        assert!(
            matches!(args.command, Command::Update(u) if u.resources == Some("/tmp/podman1".into()))
        );
        let args = parse("exec -e A=b --cwd / c1 sh -c true").unwrap();
        assert!(matches!(args.command, Command::Exec(e) if e.command == ["sh", "-c", "true"]));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "",
            "nothing",
            "--what list",
            "state",
            "state a/b",
            "create --preserve-fds x c",
            "events --interval 0 c",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
