//! The system calls that neither nix nor rustix wraps, and nothing else.
#![allow(
    unsafe_code,
    reason = "raw system calls; each wrapper checks what the kernel does not"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Which side of [`fork_into`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forked {
    /// The caller; the pid is the child's, in the caller's pid namespace.
    Parent(i32),
    /// The new process.
    Child,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Forks, the child inside new namespaces (CLONE_NEW* bits). Only for the single-threaded
/// `container-init`: the child shares no lock with a thread that no longer exists.
pub(crate) fn fork_into(namespaces: i32) -> io::Result<Forked> {
    let mut args = libc::clone_args {
        flags: u64::from(namespaces.cast_unsigned()),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: the arguments outlive the call and their size is passed. Without CLONE_VM and with no
    // stack the child is a copy of this process, as after fork; the process has one thread.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    })?;
    Ok(match i32::try_from(pid) {
        Ok(0) => Forked::Child,
        Ok(pid) => Forked::Parent(pid),
        Err(_) => return Err(io::Error::from_raw_os_error(libc::EOVERFLOW)),
    })
}

/// Forks as fork(2) does: seccomp profiles let that through where they refuse the clone3(2) of [`fork_into`]. Only for the single-threaded
/// `container-init`, too.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: the process has one thread, so the child finds no lock held by another.
    match check(unsafe { libc::fork() }.into())? {
        0 => Ok(Forked::Child),
        pid => i32::try_from(pid)
            .map(Forked::Parent)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW)),
    }
}

/// A change of mount attributes: MOUNT_ATTR_* to set and to clear, and MS_PRIVATE, MS_SLAVE, MS_SHARED or
/// MS_UNBINDABLE as the new propagation (0 leaves it).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns_fd: u64,
}

/// mount_setattr(2) on the mount that `mount` refers to, and on those below it where `recursive`.
pub(crate) fn mount_setattr(
    mount: impl AsFd,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the attributes are a mount_attr of the size passed; the kernel only
    // reads both.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// One classic BPF instruction, as seccomp(2) takes it.
pub(crate) type BpfInstruction = libc::sock_filter;

/// Installs a seccomp filter on this (the only) thread.
pub(crate) fn seccomp_set_filter(filter: &[BpfInstruction], flags: u64) -> io::Result<()> {
    let length =
        u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog {
        len: length,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program points to `length` instructions that outlive the call; the kernel copies them.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
    .map(drop)
}

/// Gives this process a new session keyring of its own: one without a name, which nobody else can join.
pub(crate) fn join_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    let anonymous = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name is one that the call does not read.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) })
        .map(drop)
}

/// `struct sched_attr` of sched_setattr(2), first version with utilisation clamps.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SchedulerAttributes {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    pub(crate) util_min: u32,
    pub(crate) util_max: u32,
}

/// Sets this process's scheduling policy.
pub(crate) fn sched_setattr(attributes: SchedulerAttributes) -> io::Result<()> {
    let mut attributes = attributes;
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: the attributes carry their own size and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attributes, 0) }).map(drop)
}

/// Sets this process's I/O priority; `class` is IOPRIO_CLASS_*.
pub(crate) fn ioprio_set(class: u32, level: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_long = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let value = libc::c_long::from(class << IOPRIO_CLASS_SHIFT | level);
    // SAFETY: three integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// The kernel's `struct sigaction` on x86_64, all zeroes of which mean the default effect.
#[repr(C)]
#[derive(Default)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Undoes what a Rust program inherits or sets up: every signal has its default effect and none is blocked. By the
/// system call, since the C library keeps two signals to itself, and its posix_spawn ignores them in the child.
pub(crate) fn reset_signals() -> io::Result<()> {
    let default = KernelSigaction::default();
    for signal in 1..=64 {
        // SAFETY: the action is the kernel's structure, its mask has the size passed, and the default effect is no
        // code of ours. SIGKILL and SIGSTOP refuse, rightly.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                std::ptr::null_mut::<KernelSigaction>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: the set is initialised by sigemptyset before it is used, and outlives both calls.
    let result = unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    check(result.into()).map(drop)
}

/// Every signal but those that nobody can block.
fn all_signals() -> libc::sigset_t {
    // SAFETY: a set is plain data, and sigfillset initialises it.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        all
    }
}

/// Blocks all signals, so that [`next_signal`] gets them.
pub(crate) fn block_signals() -> io::Result<()> {
    let all = all_signals();
    // SAFETY: the set outlives the call, which only reads it.
    check(
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) }
            .into(),
    )
    .map(drop)
}

/// Waits for one of the signals that [`block_signals`] has blocked.
pub(crate) fn next_signal() -> io::Result<i32> {
    let all = all_signals();
    // SAFETY: the set outlives the call, and no details are asked for.
    let signal = check(unsafe { libc::sigwaitinfo(&raw const all, std::ptr::null_mut()) }.into())?;
    i32::try_from(signal).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Sends a process a signal, a real-time one too.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: two integers.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Closes every descriptor of a process that opens and uses none from here on.
pub(crate) fn close_all() {
    // SAFETY: integers; the caller uses no descriptor afterwards, whoever thinks to own one.
    if unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) } == 0 {
        return;
    }
    // A seccomp profile that is older than the call. A container-init has a dozen.
    for fd in 0..256 {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
}

/// Marks every descriptor from `first` on as close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: three integers; descriptors stay open until execve, so no owner loses its own.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// bpf(2)'s attributes for BPF_PROG_LOAD: the start of `union bpf_attr`, the rest counts as zero.
#[repr(C)]
struct BpfLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// bpf(2)'s attributes for BPF_PROG_ATTACH.
#[repr(C)]
struct BpfAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

/// Loads an eBPF program; each instruction is its eight bytes as a little-endian number. `attach_type`: where it is to be attached.
pub(crate) fn bpf_load(
    program_type: u32,
    attach_type: u32,
    instructions: &[u64],
) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    let license = c"Apache-2.0";
    let attributes = BpfLoad {
        program_type,
        instruction_count: u32::try_from(instructions.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach_type,
    };
    // SAFETY: the attributes are of the size passed, point to as many instructions as they say and to a C
    // string, and all of these outlive the call, which only reads them.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<BpfLoad>(),
        )
    })?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just opened it for this call, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches an eBPF program to a cgroup, in the place of `replaced` where there is one.
pub(crate) fn bpf_attach(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    attach_type: u32,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
    const BPF_F_REPLACE: u32 = 1 << 2;
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let attributes = BpfAttach {
        target: number(cgroup),
        program: number(program),
        attach_type,
        flags: BPF_F_ALLOW_MULTI | if replaced.is_some() { BPF_F_REPLACE } else { 0 },
        replaced: replaced.map_or(0, number),
    };
    // SAFETY: the attributes are of the size passed and outlive the call, which only reads them.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<BpfAttach>(),
        )
    })
    .map(drop)
}

/// The kernel's number for the network namespace of a socket.
pub(crate) fn network_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes to a u64, and the length; both outlive the call.
    check(i64::from(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    }))?;
    Ok(cookie)
}
