//! Makes the guest a place to run containers in: the first thing PID 1 does.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use husk_protocol::guest_path;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::set_cad_enabled;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot};

use crate::{cgroup, loopback};

/// Where cgroup v2 is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The guest's own /etc/resolv.conf, where it can be written.
pub(crate) const RESOLV_CONF: &str = "/run/resolv.conf";

/// Open files of the agent at most: a few for each stream of each process.
const OPEN_FILES: u64 = 1 << 20;

/// A step that failed, without which no container runs.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub struct BootError {
    doing: String,
    source: io::Error,
}

trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|e| BootError {
            doing: what(),
            source: e.into(),
        })
    }
}

/// A file system that every guest has.
struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NOTHING_SPECIAL: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// In this order: each may be a mount point of the next.
const MOUNTS: [Mount; 10] = [
    Mount {
        kind: "proc",
        at: "/proc",
        flags: NOTHING_SPECIAL,
        data: "",
    },
    Mount {
        kind: "sysfs",
        at: "/sys",
        flags: NOTHING_SPECIAL,
        data: "",
    },
    Mount {
        kind: "devtmpfs",
        at: "/dev",
        flags: MsFlags::MS_NOSUID,
        data: "mode=0755",
    },
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,ptmxmode=0666,gid=5",
    },
    Mount {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    Mount {
        kind: "mqueue",
        at: "/dev/mqueue",
        flags: NOTHING_SPECIAL,
        data: "",
    },
    Mount {
        kind: "tmpfs",
        at: "/run",
        // Container file systems are put together below it: they need their programs and devices.
        flags: MsFlags::empty(),
        data: "mode=0755",
    },
    Mount {
        kind: "tmpfs",
        at: guest_path::VOLUMES,
        // Containers see it: the agent must not come upon a device there. A program may well be in a ConfigMap.
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=0755",
    },
    Mount {
        kind: "tmpfs",
        at: "/tmp",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    Mount {
        kind: "cgroup2",
        at: CGROUP_ROOT,
        flags: NOTHING_SPECIAL,
        // A memory.min or memory.low covers what is below it without being repeated there.
        data: "nsdelegate,memory_recursiveprot",
    },
];

/// What distributions set for every machine and programs therefore expect.
const SYSCTLS: [(&str, &str); 11] = [
    // As systemd sets it: the largest, bounded by threads-max anyway.
    ("kernel/pid_max", "4194304"),
    ("fs/nr_open", "1073741816"),
    ("fs/file-max", "9223372036854775807"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_regular", "2"),
    ("fs/protected_fifos", "1"),
    // Debian's; databases and JVMs map much.
    ("vm/max_map_count", "1048576"),
    // Containers read neither the kernel's log nor its addresses.
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "1"),
];

/// Prepares the guest, in the order in which the steps need each other.
///
/// # Errors
/// The first step that failed without which no container runs; the others are logged.
pub fn prepare() -> Result<(), BootError> {
    umask(Mode::from_bits_truncate(0o022));
    leave_rootfs().doing(|| "mounting the root file system over itself".into())?;
    for one in &MOUNTS {
        one.mount()
            .doing(|| format!("mounting {} at {}", one.kind, one.at))?;
    }
    crate::log::init();
    // PID 1 stays in the root cgroup, which no limit of the containers' covers.
    cgroup::hand_down_controllers(Path::new(CGROUP_ROOT));

    optional(
        "keeping the out-of-memory killer off PID 1",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    optional("room for the agent's own threads", reserve_threads());
    optional("ignoring ctrl-alt-del", set_cad_enabled(false));
    for (name, value) in SYSCTLS {
        optional(name, fs::write(Path::new("/proc/sys").join(name), value));
    }
    // After fs.nr_open, which bounds it.
    optional(
        "raising the limit of open files",
        setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
    );
    optional("linking /dev/fd", dev_links());
    optional("bringing the loopback interface up", loopback::up());
    close_root().doing(|| "making the root file system read-only".into())
}

/// From here on nobody changes the root file system, which is the agent's own binary: a container whose process runs that, by
/// `/proc/self/exe`, could otherwise take its permissions away from all the others'. The whole of it, as PID 1 runs from the kernel's first
/// mount of it, which no flags of a later one bind.
fn close_root() -> io::Result<()> {
    // What a pod's DNS is comes later, and is written elsewhere.
    fs::create_dir_all("/etc")?;
    symlink(RESOLV_CONF, "/etc/resolv.conf")?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?)
}

fn optional<T, E: std::fmt::Display>(what: &str, done: Result<T, E>) {
    if let Err(e) = done {
        tracing::warn!(error = %e, "the guest goes on without {what}");
    }
}

impl Mount {
    fn mount(&self) -> io::Result<()> {
        fs::create_dir_all(self.at)?;
        mount(
            Some(self.kind),
            self.at,
            Some(self.kind),
            self.flags,
            Some(self.data),
        )?;
        Ok(())
    }
}

/// Puts the initramfs as an ordinary mount over the root it was unpacked into. `pivot_root`, which is how a container
/// gets its own root, refuses to leave the kernel's first mount: that one has no parent.
fn leave_rootfs() -> io::Result<()> {
    let bind = "/run";
    fs::create_dir_all(bind)?;
    mount(
        Some("/"),
        bind,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    chdir(bind)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    fs::set_permissions("/", fs::Permissions::from_mode(0o755))
}

/// Leaves the containers nine tenths of the threads that the kernel makes: a fork bomb without a limit of its own must not
/// keep the agent from starting what ends it. (Memory needs nothing like it: the kernel kills the containers' processes
/// and not the agent.)
fn reserve_threads() -> io::Result<()> {
    let threads = fs::read_to_string("/proc/sys/kernel/threads-max")?;
    let threads: u64 = threads.trim().parse().map_err(io::Error::other)?;
    let containers = Path::new(CGROUP_ROOT).join(cgroup::PARENT);
    fs::create_dir_all(&containers)?;
    fs::write(containers.join("pids.max"), (threads / 10 * 9).to_string())
}

/// The links that a guest-side hook may use.
fn dev_links() -> io::Result<()> {
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link)?;
    }
    Ok(())
}
