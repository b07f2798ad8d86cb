//! The `container-init` process: a fresh, single-threaded copy of the agent that turns into a container's
//! process. It reads as a recipe, in two stages.
//!
//! Stage one runs in the guest's namespaces with full rights: it enters the container's cgroup, so that everything after
//! counts there, opens what the container may not reach, joins or plans the namespaces, and forks into
//! them. Stage two, the child, is the container's process: it finishes the set-up inside, waits at the gate and becomes
//! the user's program.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, LinuxPersonality, LinuxSeccomp, Process, Spec};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;

use super::channel::{Channel, from_memfd};
use super::console::Console;
use super::error::{LaunchError, OsError, Step};
use super::hooks::State;
use super::identity::{self, Identity};
use super::job::{CreateJob, ExecJob, FromInit, HooksJob, Job, JobFollows, ToInit};
use super::seccomp::Filter;
use super::sys::{self, Forked};
use super::{
    StdioFds, exec_lookup, hooks, namespaces, pid1, pod_users, rootfs, scheduling, sysctl,
};
use crate::{cgroup, loopback};

/// Runs the job that the agent hands over on stdin. Never returns to the caller's program.
pub fn init_main() -> ! {
    let code = match open_channel() {
        Ok(channel) => match run(&channel) {
            Ok(()) => 0,
            Err(error) => {
                let code = error.exit_code();
                // The agent may be gone; then nobody wants to know.
                let _ = channel.send(&FromInit::Failed(error.shortened()));
                code
            }
        },
        Err(error) => {
            let _ = writeln!(
                io::stderr(),
                "container-init is the agent's to start: {error}"
            );
            1
        }
    };
    std::process::exit(code)
}

/// Moves the socket off stdin, which will be the container's.
fn open_channel() -> io::Result<Channel> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let null = fs::File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    Ok(Channel::new(socket))
}

fn run(channel: &Channel) -> Result<(), LaunchError> {
    let what = || "receiving the job".to_owned();
    let Some((JobFollows, fds)) = channel.receive_with().step(what)? else {
        return Ok(());
    };
    let mut fds = fds.into_iter();
    let memfd = fds.next().ok_or_else(|| LaunchError::internal(what()))?;
    match from_memfd(memfd).step(what)? {
        Job::Create(job) => {
            let joined = if job.joins { fds.next() } else { None };
            create(channel, &job, joined, streams(&mut fds))
        }
        Job::Exec(job) => {
            let init = fds.next().ok_or_else(|| LaunchError::internal(what()))?;
            exec(channel, &job, &init, streams(&mut fds))
        }
        Job::Hooks(HooksJob {
            kind,
            hooks,
            state,
            keep_going,
        }) => {
            set_oom_score_adj(0)?;
            hooks::run_all(&kind, &hooks, &State::new(&state)?, keep_going)?;
            done(channel)
        }
        Job::Users(uid_map, gid_map) => {
            pod_users::make(&uid_map, &gid_map)?;
            done(channel)
        }
    }
}

fn done(channel: &Channel) -> Result<(), LaunchError> {
    channel
        .send(&FromInit::Done)
        .step(|| "reporting".to_owned())
}

/// The standard streams; none means a terminal.
fn streams(fds: &mut impl Iterator<Item = OwnedFd>) -> Option<StdioFds> {
    Some(StdioFds {
        stdin: fds.next()?,
        stdout: fds.next()?,
        stderr: fds.next()?,
    })
}

/// A container: both stages.
fn create(
    channel: &Channel,
    job: &CreateJob,
    joined: Option<OwnedFd>,
    streams: Option<StdioFds>,
) -> Result<(), LaunchError> {
    let CreateJob { id, spec, .. } = job;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| LaunchError::invalid("config.json has no linux"))?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| LaunchError::invalid("config.json has no process"))?;
    let wants_init = pid1::is_wanted(spec)?;

    enter_cgroup(&job.cgroup, None, process)?;
    let plan = namespaces::Plan::open(linux, joined)?;
    if plan.has_user() {
        identity::raise_hard_limits(process)?;
    }
    let shared_cgroup = (!plan.has(LinuxNamespaceType::Cgroup)).then_some(&*job.cgroup);
    namespaces::leave_agents_mounts()?;
    let prepared = rootfs::Prepare::open(spec, &plan, shared_cgroup)?;
    if let Some(streams) = streams.as_ref().filter(|_| plan.has_user()) {
        identity::hand_to_root(streams, namespaces::root_of(linux))?;
    }
    plan.enter(linux)?;
    let mut handshake = Handshake::new()?;
    if let Forked::Parent(pid) = fork(plan.create)? {
        if plan.creates(LinuxNamespaceType::User) {
            namespaces::write_id_maps(pid, linux)?;
        }
        return handshake.introduce(channel, pid);
    }

    let pid = handshake.wait();
    if plan.has_user() {
        namespaces::become_root()?;
    }
    new_session()?;
    if plan.creates(LinuxNamespaceType::Network) {
        loopback::up().step(|| "bringing the loopback interface up".to_owned())?;
    }
    set_names(spec)?;
    sysctl::apply(linux.sysctl().as_ref())?;
    let rootfs = prepared.assemble()?;
    create_hooks(channel, id, spec, pid)?;
    let entered = rootfs.enter(linux)?;
    let console = take_streams(channel, process, streams)?;
    if let Some(console) = console {
        console.bind_dev_console()?;
    }
    entered.finish(spec)?;
    // Before the filter, which need not allow what makes it.
    let created = State::new(&hooks::state_json(spec, id, "created", pid))?;
    let program = Program::prepare(
        process,
        job.user_name.as_deref(),
        linux.seccomp().as_ref(),
        linux.personality().as_ref(),
    )?;
    program.run(channel, wants_init, || start_hooks(spec, &created))
}

/// A further process of a container: both stages.
fn exec(
    channel: &Channel,
    job: &ExecJob,
    init: &OwnedFd,
    streams: Option<StdioFds>,
) -> Result<(), LaunchError> {
    let process = &job.process;
    let user_namespace = job.namespaces & libc::CLONE_NEWUSER != 0;

    enter_cgroup(&job.cgroup, Some(job.init), process)?;
    if user_namespace {
        identity::raise_hard_limits(process)?;
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    if let Some(list) = affinity.and_then(|affinity| affinity.initial().as_deref()) {
        scheduling::set_affinity(list)?;
    }
    if let Some(streams) = streams.as_ref().filter(|_| user_namespace) {
        identity::hand_to_root(streams, namespaces::root_in(job.init))?;
    }
    namespaces::join_all(init, job.namespaces)?;
    let mut handshake = Handshake::new()?;
    if let Forked::Parent(pid) = fork(0)? {
        return handshake.introduce(channel, pid);
    }

    handshake.wait();
    if user_namespace {
        namespaces::become_root()?;
    }
    new_session()?;
    take_streams(channel, process, streams)?;
    if let Some(list) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()) {
        scheduling::set_affinity(list)?;
    }
    let program = Program::prepare(
        process,
        job.user_name.as_deref(),
        job.seccomp.as_ref(),
        job.personality.as_ref(),
    )?;
    program.run(channel, false, || Ok(()))
}

/// From here on everything counts against the container, and the kernel may kill it for memory.
fn enter_cgroup(cgroup: &Path, init: Option<i32>, process: &Process) -> Result<(), LaunchError> {
    cgroup::join(cgroup, init)?;
    set_oom_score_adj(process.oom_score_adj().unwrap_or(0))?;
    // A process that is already inside could otherwise look into this one while it still holds the guest's
    // descriptors. execve undoes it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .step(|| "closing the process to others".to_owned())
}

/// Sets the process's chance to be killed for memory: the agent's own, which is none, must not be inherited.
fn set_oom_score_adj(adjustment: i32) -> Result<(), LaunchError> {
    fs::write("/proc/self/oom_score_adj", adjustment.to_string())
        .spec_step(|| format!("setting oomScoreAdj to {adjustment}"))
}

fn fork(namespaces: i32) -> Result<Forked, LaunchError> {
    sys::fork_into(namespaces).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOMEM) => LaunchError::NotRunning(format!(
            "cannot start a process in the container's pid namespace: its init has ended ({})",
            error.text()
        )),
        Some(libc::EAGAIN) => LaunchError::internal(format!(
            "starting a process in the container: {} (pids limit reached?)",
            error.text()
        )),
        _ => LaunchError::internal(format!(
            "making the container's namespaces: {}",
            error.text()
        )),
    })
}

/// Holds the child back until the agent knows its pid and its ids are mapped.
struct Handshake {
    reader: io::PipeReader,
    writer: Option<io::PipeWriter>,
}

impl Handshake {
    fn new() -> Result<Self, LaunchError> {
        let (reader, writer) = io::pipe().step(|| "making a pipe".to_owned())?;
        Ok(Self {
            reader,
            writer: Some(writer),
        })
    }

    /// In the parent: tells the agent who the child is and lets the child go on.
    fn introduce(&mut self, channel: &Channel, pid: i32) -> Result<(), LaunchError> {
        let what = || "introducing the container's process".to_owned();
        channel.send(&FromInit::Pid(pid)).step(what)?;
        match &mut self.writer {
            Some(writer) => writer.write_all(&pid.to_ne_bytes()).step(what),
            None => Ok(()),
        }
    }

    /// In the child: waits, and returns its pid as the agent sees it. Ends the process without a word where the parent
    /// has failed, and said why.
    fn wait(&mut self) -> i32 {
        drop(self.writer.take());
        let mut pid = [0; 4];
        if self.reader.read_exact(&mut pid).is_err() {
            std::process::exit(1);
        }
        i32::from_ne_bytes(pid)
    }
}

/// A session and keyring of its own: nothing of the agent's is in them.
fn new_session() -> Result<(), LaunchError> {
    rustix::process::setsid().step(|| "starting a session".to_owned())?;
    match sys::join_session_keyring() {
        // A kernel without keyrings has none to share.
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => {
            Err(error).step(|| "joining a session keyring".to_owned())
        }
        _ => Ok(()),
    }
}

fn set_names(spec: &Spec) -> Result<(), LaunchError> {
    let given = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    if let Some(name) = given(spec.hostname()) {
        rustix::system::sethostname(name.as_bytes())
            .spec_step(|| format!("setting the hostname {name:?}"))?;
    }
    if let Some(name) = given(spec.domainname()) {
        rustix::system::setdomainname(name.as_bytes())
            .spec_step(|| format!("setting the domainname {name:?}"))?;
    }
    Ok(())
}

/// The hooks between the mounts and pivot_root: the runtime's by the agent, the container's here.
#[allow(
    deprecated,
    reason = "prestart is deprecated in the spec, and still part of it"
)]
fn create_hooks(channel: &Channel, id: &str, spec: &Spec, pid: i32) -> Result<(), LaunchError> {
    let Some(all) = spec.hooks() else {
        return Ok(());
    };
    let any = |hooks: &Option<Vec<_>>| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
    if any(all.prestart()) || any(all.create_runtime()) {
        let what = || "waiting for the agent to run hooks".to_owned();
        channel.send(&FromInit::RunHooks).step(what)?;
        if channel.receive::<ToInit>().step(what)? != Some(ToInit::Continue) {
            // A hook failed, and the agent has given up on this container.
            std::process::exit(1);
        }
    }
    let own = all.create_container().as_deref().unwrap_or_default();
    let state = State::new(&hooks::state_json(spec, id, "creating", pid))?;
    hooks::run_all("createContainer", own, &state, false)
}

fn start_hooks(spec: &Spec, state: &State) -> Result<(), LaunchError> {
    let own = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.start_container().as_deref())
        .unwrap_or_default();
    hooks::run_all("startContainer", own, state, false)
}

/// Puts the standard streams, or a terminal, on descriptors 0 to 2.
fn take_streams(
    channel: &Channel,
    process: &Process,
    streams: Option<StdioFds>,
) -> Result<Option<Console>, LaunchError> {
    let what = || "setting up the standard streams".to_owned();
    if let Some(streams) = streams {
        nix::unistd::dup2_stdin(&streams.stdin).step(what)?;
        nix::unistd::dup2_stdout(&streams.stdout).step(what)?;
        nix::unistd::dup2_stderr(&streams.stderr).step(what)?;
        return Ok(None);
    }
    let console = Console::open(process)?;
    channel
        .send_with(&FromInit::Console, &[console.master.as_fd()])
        .step(what)?;
    nix::unistd::dup2_stdin(&console.slave).step(what)?;
    nix::unistd::dup2_stdout(&console.slave).step(what)?;
    nix::unistd::dup2_stderr(&console.slave).step(what)?;
    console.control()?;
    Ok(Some(console))
}

/// The user's program, ready to run but for the last step.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    /// To install right before execve, where the process cannot gain privileges anyway.
    late_filter: Option<Filter>,
}

impl Program {
    /// Takes on everything that the process is to be, and finds its executable as the user would.
    fn prepare(
        process: &Process,
        user_name: Option<&str>,
        seccomp: Option<&LinuxSeccomp>,
        personality: Option<&LinuxPersonality>,
    ) -> Result<Self, LaunchError> {
        // Only the standard streams go on; what is opened from here on is close-on-exec anyway. Before the filter:
        // allow-lists that are older than close_range(2) refuse it.
        sys::close_on_exec_from(3).step(|| "closing descriptors".to_owned())?;
        let filter = seccomp.map(Filter::compile).transpose()?;
        let identity = Identity::of(process, user_name)?;
        let env = identity.complete_environment(process);
        scheduling::apply(process, personality)?;
        identity::set_limits(process)?;
        identity.own_streams()?;
        let no_new_privileges = process.no_new_privileges() == Some(true);
        if no_new_privileges {
            set_no_new_privs(true).step(|| "setting no_new_privs".to_owned())?;
        }
        // A directory that only root may enter is fine as a working directory, as with runc.
        let entered = std::env::set_current_dir(process.cwd()).is_ok();
        identity::limit_bounding_set(process.capabilities().as_ref())?;
        let late_filter = match filter {
            // Without no_new_privs a filter takes CAP_SYS_ADMIN, which goes next.
            Some(filter) if !no_new_privileges => {
                filter.install()?;
                None
            }
            other => other,
        };
        identity.assume()?;
        identity::apply_capabilities(process.capabilities().as_ref())?;
        if !entered {
            std::env::set_current_dir(process.cwd()).map_err(|error| {
                LaunchError::InvalidSpec(format!(
                    "chdir to cwd ({:?}) set in config.json failed: {}",
                    process.cwd(),
                    error.text()
                ))
            })?;
        }
        check_inside()?;
        let args = process.args().as_deref().unwrap_or_default();
        let name = args.first().map(String::as_str).unwrap_or_default();
        let path = exec_lookup::find(name, &env)?;
        Ok(Self {
            path: c_string(path.as_os_str().as_bytes())?,
            args: args
                .iter()
                .map(|arg| c_string(arg.as_bytes()))
                .collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|variable| c_string(variable.as_bytes()))
                .collect::<Result<_, _>>()?,
            late_filter,
        })
    }

    /// Waits at the gate and becomes the program, or its init and the program. Returns with an error, or when the gate has been given up.
    fn run(
        self,
        channel: &Channel,
        wants_init: bool,
        start_hooks: impl FnOnce() -> Result<(), LaunchError>,
    ) -> Result<(), LaunchError> {
        let what = || "waiting to be started".to_owned();
        channel.send(&FromInit::Ready).step(what)?;
        if channel.receive::<ToInit>().step(what)? != Some(ToInit::Start) {
            return Ok(());
        }
        start_hooks()?;
        channel.send(&FromInit::Executing).step(what)?;
        if wants_init {
            pid1::stay_behind(self.late_filter.as_ref())?;
        }
        sys::reset_signals().step(|| "resetting signals".to_owned())?;
        if let Some(filter) = &self.late_filter {
            filter.install()?;
        }
        let failed = nix::unistd::execve(&self.path, &self.args, &self.env);
        let path = std::ffi::OsStr::from_bytes(self.path.as_bytes());
        match failed {
            Err(errno) => Err(exec_lookup::exec_failed(Path::new(path), errno)),
            Ok(never) => match never {},
        }
    }
}

fn c_string(bytes: &[u8]) -> Result<CString, LaunchError> {
    CString::new(bytes)
        .map_err(|_| LaunchError::invalid("an argument or variable contains a NUL byte"))
}

/// A working directory outside of the container's root would be a way out of it.
fn check_inside() -> Result<(), LaunchError> {
    let inside =
        rustix::process::getcwd(Vec::new()).is_ok_and(|path| path.as_bytes().starts_with(b"/"));
    if inside {
        Ok(())
    } else {
        Err(LaunchError::invalid(
            "current working directory is outside of container mount namespace root -- possible container breakout detected",
        ))
    }
}
