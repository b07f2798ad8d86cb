//! The lists: what each kind of thread does, and by which calls.
//!
//! What stands here has been seen to be used (`strace`; the devices' own tests and husk's suites, which run under these lists), or follows
//! from the source of virtiofsd 1.14 and of glibc 2.36 to 2.41, which the kinds' threads run. Some calls of libraries come only now and then:
//! a second malloc arena, a thread's end, an abort.

use libc::c_uint;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::Test::{Is, Without};
use super::{Argument, Call, any, when};

const fn number(direction: c_uint, kind: u8, number: c_uint, size: usize) -> u32 {
    // The size has 14 bits of the number (asm-generic/ioctl.h); these are some hundred bytes at most.
    ioctl_expr(direction, kind as c_uint, number, size as c_uint) as u32
}

macro_rules! ioctls {
    ($($(#[$doc:meta])* $list:ident { $($name:ident = $number:expr;)* })*) => {
        $(
            $(#[$doc])*
            pub(super) const $list: &[Call] = &[$(when(libc::SYS_ioctl, &[&[Argument(1, Is($name))]])),*];
            $(const $name: u32 = $number;)*
        )*
    };
}

ioctls! {
    /// linux/kvm.h: running a vCPU, and saying where it was when it could not go on.
    VCPU_IOCTLS {
    KVM_RUN = number(_IOC_NONE, KVM, 0x80, 0);
    KVM_GET_REGS = number(_IOC_READ, KVM, 0x81, size_of::<kvm_bindings::kvm_regs>());
    KVM_GET_SREGS = number(_IOC_READ, KVM, 0x83, size_of::<kvm_bindings::kvm_sregs>());
    KVM_KVMCLOCK_CTRL = number(_IOC_NONE, KVM, 0xad, 0);
    }

    /// linux/kvm.h: where the first vCPU begins.
    START_IOCTLS {
    KVM_SET_REGS = number(_IOC_WRITE, KVM, 0x82, size_of::<kvm_bindings::kvm_regs>());
    KVM_SET_SREGS = number(_IOC_WRITE, KVM, 0x84, size_of::<kvm_bindings::kvm_sregs>());
    }

    /// linux/if_tun.h and linux/vhost.h: a tap's queues, and who carries their packets. `TUNSETIFF` is not here: nobody makes a tap.
    NIC_IOCTLS {
    TUNGETIFF = number(_IOC_READ, b'T', 210, size_of::<c_uint>());
    TUNSETOFFLOAD = number(_IOC_WRITE, b'T', 208, size_of::<c_uint>());
    TUNSETVNETHDRSZ = number(_IOC_WRITE, b'T', 216, size_of::<c_uint>());
    TUNSETQUEUE = number(_IOC_WRITE, b'T', 217, size_of::<c_uint>());
    TUNSETVNETLE = number(_IOC_WRITE, b'T', 220, size_of::<c_uint>());
    VHOST_GET_FEATURES = number(_IOC_READ, VHOST, 0x00, 8);
    VHOST_SET_FEATURES = number(_IOC_WRITE, VHOST, 0x00, 8);
    VHOST_SET_OWNER = number(_IOC_NONE, VHOST, 0x01, 0);
    VHOST_SET_MEM_TABLE = number(_IOC_WRITE, VHOST, 0x03, 8);
    VHOST_SET_VRING_NUM = number(_IOC_WRITE, VHOST, 0x10, 8);
    VHOST_SET_VRING_ADDR = number(_IOC_WRITE, VHOST, 0x11, 40);
    VHOST_SET_VRING_BASE = number(_IOC_WRITE, VHOST, 0x12, 8);
    VHOST_GET_VRING_BASE = number(_IOC_READ | _IOC_WRITE, VHOST, 0x12, 8);
    VHOST_SET_VRING_KICK = number(_IOC_WRITE, VHOST, 0x20, 8);
    VHOST_SET_VRING_CALL = number(_IOC_WRITE, VHOST, 0x21, 8);
    VHOST_SET_VRING_ERR = number(_IOC_WRITE, VHOST, 0x22, 8);
    VHOST_NET_SET_BACKEND = number(_IOC_WRITE, VHOST, 0x30, 8);
    }

    /// asm-generic/ioctls.h: a socket's or an event's mode.
    MODE_IOCTLS {
    FIONBIO = libc::FIONBIO as u32;
    }
}

/// `KVMIO` (linux/kvm.h).
const KVM: u8 = 0xae;
/// `VHOST_VIRTIO` (linux/vhost.h).
const VHOST: u8 = 0xaf;

/// What glibc's `pthread_create` asks of `clone` (sysdeps/unix/sysv/linux/createthread.c), and nothing else: a thread of this process.
const A_THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// No memory that is both data and program.
const NOT_EXECUTABLE: &[&[Argument]] = &[&[Argument(2, Without(libc::PROT_EXEC as u32))]];

/// Memory, locks, time, signals, events, the log, and a thread's or the process' end.
pub(super) const EVERYBODY: &[Call] = &[
    any(libc::SYS_brk),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_close),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
    // Rust's library, where it is built with its own assertions, before it closes a descriptor.
    when(libc::SYS_fcntl, &[&[Argument(1, Is(libc::F_GETFD as u32))]]),
    any(libc::SYS_futex),
    any(libc::SYS_getpid),
    any(libc::SYS_getrandom),
    any(libc::SYS_gettid),
    any(libc::SYS_madvise),
    when(libc::SYS_mmap, NOT_EXECUTABLE),
    when(libc::SYS_mprotect, NOT_EXECUTABLE),
    any(libc::SYS_mremap),
    any(libc::SYS_munmap),
    any(libc::SYS_read),
    any(libc::SYS_restart_syscall),
    // Only what ends the process takes a handler off: abort(3), and the handler of Rust's library that has found a fault to be no overflow of
    // a stack. Then the fault is what the process ends by.
    when(
        libc::SYS_rt_sigaction,
        &[
            &[Argument(0, Is(libc::SIGABRT as u32))],
            &[Argument(0, Is(libc::SIGSEGV as u32))],
            &[Argument(0, Is(libc::SIGBUS as u32))],
        ],
    ),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    // glibc asks how many processors there are when it makes another malloc arena.
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_sched_yield),
    any(libc::SYS_sigaltstack),
    // In a process whose PID is 1: it reaches nobody else.
    when(
        libc::SYS_tgkill,
        &[&[Argument(2, Is(libc::SIGABRT as u32))]],
    ),
    any(libc::SYS_write),
    any(libc::SYS_writev),
];

pub(super) const CONTROL: &[Call] = &[
    any(libc::SYS_mincore),
    any(libc::SYS_poll),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    KICK,
];

/// Gets a vCPU out of the guest: the signal of `vcpu::kick_signal`, SIGRTMIN of glibc.
const KICK: Call = when(libc::SYS_tgkill, &[&[Argument(2, Is(34))]]);

/// A network device gets its tap, or other settings of it.
pub(super) const NIC: &[Call] = &[any(libc::SYS_eventfd2), any(libc::SYS_fcntl)];

pub(super) const STARTER: &[Call] = &[
    when(libc::SYS_clone, &[&[Argument(0, Is(A_THREAD))]]),
    any(libc::SYS_clone3),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_eventfd2),
    any(libc::SYS_fcntl),
    when(
        libc::SYS_prctl,
        &[
            &[Argument(0, Is(libc::PR_SET_NAME as u32))],
            &[Argument(0, Is(libc::PR_SET_NO_NEW_PRIVS as u32))],
        ],
    ),
    any(libc::SYS_prlimit64),
    any(libc::SYS_rseq),
    any(libc::SYS_rt_sigaction),
    when(
        libc::SYS_seccomp,
        &[&[Argument(0, Is(libc::SECCOMP_SET_MODE_FILTER))]],
    ),
    any(libc::SYS_set_robust_list),
];

/// A device that starts gets an event of its own for each queue.
pub(super) const VCPU: &[Call] = &[when(
    libc::SYS_fcntl,
    &[&[Argument(1, Is(libc::F_DUPFD_CLOEXEC as u32))]],
)];

/// Waiting for kicks.
pub(super) const DEVICE: &[Call] = &[
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_wait),
];

/// Packets, with their headers beside them.
pub(super) const NET: &[Call] = &[any(libc::SYS_readv)];

/// A pair of sockets for each connection, of which the shim gets one.
pub(super) const VSOCK: &[Call] = &[
    any(libc::SYS_fcntl),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_shutdown),
    when(
        libc::SYS_socketpair,
        &[&[Argument(0, Is(libc::AF_UNIX as u32))]],
    ),
];

/// The share's files, and acting for their users. `openat` and its like reach no further than the root that the thread has.
pub(super) const FS: &[Call] = &[
    any(libc::SYS_capget),
    any(libc::SYS_capset),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_dup),
    any(libc::SYS_fallocate),
    any(libc::SYS_fchdir),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_fcntl),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fgetxattr),
    any(libc::SYS_flistxattr),
    any(libc::SYS_flock),
    any(libc::SYS_fremovexattr),
    any(libc::SYS_fsetxattr),
    any(libc::SYS_fstat),
    any(libc::SYS_fstatfs),
    any(libc::SYS_fsync),
    any(libc::SYS_ftruncate),
    any(libc::SYS_getdents64),
    any(libc::SYS_getegid),
    any(libc::SYS_geteuid),
    any(libc::SYS_getxattr),
    any(libc::SYS_linkat),
    any(libc::SYS_listxattr),
    any(libc::SYS_lseek),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_openat),
    any(libc::SYS_openat2),
    // libcap-ng looks at all sets before it changes one; at these in place of /proc.
    when(
        libc::SYS_prctl,
        &[
            &[Argument(0, Is(libc::PR_CAPBSET_READ as u32))],
            &[
                Argument(0, Is(libc::PR_CAP_AMBIENT as u32)),
                Argument(1, Is(libc::PR_CAP_AMBIENT_IS_SET as u32)),
            ],
        ],
    ),
    any(libc::SYS_pread64),
    any(libc::SYS_preadv),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwrite64),
    any(libc::SYS_pwritev),
    any(libc::SYS_pwritev2),
    any(libc::SYS_readlinkat),
    any(libc::SYS_readv),
    any(libc::SYS_removexattr),
    any(libc::SYS_renameat),
    any(libc::SYS_renameat2),
    any(libc::SYS_setgroups),
    any(libc::SYS_setresgid),
    any(libc::SYS_setresuid),
    any(libc::SYS_setxattr),
    any(libc::SYS_statx),
    any(libc::SYS_symlinkat),
    any(libc::SYS_syncfs),
    any(libc::SYS_umask),
    any(libc::SYS_unlinkat),
    when(
        libc::SYS_unshare,
        &[&[Argument(0, Is(libc::CLONE_FS as u32))]],
    ),
    any(libc::SYS_utimensat),
];

/// Answered with `EACCES` where there is no business with files: glibc's malloc looks into /proc/sys/vm/overcommit_memory before it gives
/// memory back, and can do without.
pub(super) const FILES: &[Call] = &[any(libc::SYS_openat)];

/// Answered with `ENOSYS`: the flags of `clone3` lie in memory, where a filter cannot look; `clone` says them.
pub(super) const UNSEEN: &[Call] = &[any(libc::SYS_clone3)];
