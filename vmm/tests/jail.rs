//! The jail, from inside: processes that go in and try to get out, each beside one that has not gone in, for which the same succeeds.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    unsafe_code,
    reason = "a test; and what it tries are raw system calls, most of which fail"
)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, io, ptr, thread};

use command_fds::{CommandFdExt as _, FdMapping};
use husk_protocol::vm::CachePolicy;
use husk_vmm::jail::root::Root;
use husk_vmm::jail::seccomp::{self, Kind};
use husk_vmm::jail::{self, privileges};
use husk_vmm::parts::Share;
use husk_vmm::starter::Starter;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

/// What a child of this program is to be; the test `child` is its whole life.
const ROLE: &str = "HUSK_TEST_JAIL_ROLE";
/// Where it finds the share.
const SHARE_FD: i32 = 10;

fn start(role: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    command
}

/// Not a test by itself: what the others start. In a run of all it has no role, and nothing to do.
#[test]
fn child() {
    match env::var(ROLE).as_deref() {
        Err(_) => {}
        Ok("inside") if env::var("USERS").is_ok() => with_one_thread(inside),
        Ok("inside") => inside(),
        Ok("unconfined") => println!("\n{}", attempt(&env::var("CALL").unwrap())),
        Ok(kind) => {
            seccomp::arm();
            let kind = Kind::ALL.into_iter().find(|k| k.name() == kind).unwrap();
            kind.confine().unwrap();
            println!("\n{}", attempt(&env::var("CALL").unwrap()));
            // The harness' own end is none of a confined thread's calls.
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
    }
}

/// Does it as the first process of a PID namespace, as the VMM is, and with no thread of the harness', of which the kernel lets none into
/// another user namespace.
fn with_one_thread(act: fn()) {
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    // SAFETY: the child goes on with a copy of this thread, which holds no lock but that of the output, and ends without the harness.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            act();
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            nix::sys::wait::waitpid(child, None).unwrap();
        }
    }
}

/// Makes a system call that no thread of the VMM has a use for; what the kernel says.
fn attempt(call: &str) -> String {
    let zero: *const u8 = ptr::null();
    // SAFETY: integers, null where the kernel takes it or fails first, and strings with their NUL that live until the call is over. A child of
    // fork does nothing but end.
    let result = unsafe {
        match call {
            "execve" => libc::syscall(libc::SYS_execve, c"/nowhere".as_ptr(), zero, zero),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, 1, 0, 0),
            "unshare" => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUTS),
            "bpf" => libc::syscall(libc::SYS_bpf, 0, zero, 0),
            "io_uring_setup" => libc::syscall(libc::SYS_io_uring_setup, 0, zero),
            "open_by_handle_at" => libc::syscall(libc::SYS_open_by_handle_at, -1, zero, 0),
            "openat" => {
                let path = c"/proc/sys/vm/overcommit_memory";
                libc::syscall(
                    libc::SYS_openat,
                    libc::AT_FDCWD,
                    path.as_ptr(),
                    libc::O_RDONLY,
                )
            }
            "kill" => libc::syscall(libc::SYS_kill, libc::getpid(), 0),
            // Of other processes, to other effects.
            "fork" => match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                0 => libc::_exit(0),
                result => result,
            },
            "mmap an executable page" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let prot = libc::PROT_READ | libc::PROT_EXEC;
                libc::syscall(libc::SYS_mmap, 0, 4096, prot, flags, -1, 0)
            }
            // linux/if_tun.h, linux/kvm.h: of the devices that it has descriptors of.
            "ioctl TUNSETIFF" => libc::syscall(libc::SYS_ioctl, -1, 0x4004_54ca_u64, zero),
            "ioctl KVM_CREATE_VM" => libc::syscall(libc::SYS_ioctl, -1, 0xae01_u64, 0),
            "ioctl TIOCSTI" => libc::syscall(libc::SYS_ioctl, -1, libc::TIOCSTI, zero),
            other => panic!("{other}"),
        }
    };
    match result {
        -1 => format!("error {}", io::Error::last_os_error()),
        _ => "done".into(),
    }
}

const CALLS: [&str; 13] = [
    "execve",
    "socket",
    "ptrace",
    "unshare",
    "bpf",
    "io_uring_setup",
    "open_by_handle_at",
    "kill",
    "fork",
    "mmap an executable page",
    "ioctl TUNSETIFF",
    "ioctl KVM_CREATE_VM",
    "ioctl TIOCSTI",
];

#[test]
fn a_call_that_is_on_no_list_ends_the_process() {
    for call in CALLS {
        let unconfined = start("unconfined").env("CALL", call).output().unwrap();
        assert!(unconfined.status.success(), "{call}: {unconfined:?}");
        for kind in Kind::ALL {
            let confined = start(kind.name()).env("CALL", call).output().unwrap();
            let told = String::from_utf8_lossy(&confined.stdout);
            assert_eq!(
                confined.status.signal(),
                Some(libc::SIGSYS),
                "{kind:?} {call}: {told}"
            );
        }
    }
}

/// As glibc's malloc does before it gives memory back, in whichever thread frees it.
#[test]
fn a_thread_without_business_with_files_opens_none() {
    let unconfined = start("unconfined").env("CALL", "openat").output().unwrap();
    assert!(String::from_utf8_lossy(&unconfined.stdout).contains("\ndone"));
    for kind in Kind::ALL {
        let confined = start(kind.name()).env("CALL", "openat").output().unwrap();
        let told = String::from_utf8_lossy(&confined.stdout);
        let expected = match kind {
            Kind::Starter | Kind::Fs => "\ndone",
            _ => "\nerror Permission denied",
        };
        assert!(
            told.contains(expected),
            "{kind:?}: {told} {:?}",
            confined.status
        );
    }
}

/// The starter's threads, and theirs: what the C library does for a thread is on the lists.
#[test]
fn the_starter_starts_confined_threads() {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "starter_child", "--nocapture"])
        .env(ROLE, "starter")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("filters: 2, then 4"), "{told}");
}

#[test]
fn starter_child() {
    if env::var(ROLE).as_deref() != Ok("starter") {
        return;
    }
    // No thread may open it once it is confined, but this one is not.
    let filters = |tid: i32| {
        let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
        let line = status.lines().find(|l| l.starts_with("Seccomp_filters"));
        line.unwrap().split_whitespace().last().unwrap().to_owned()
    };
    seccomp::arm();
    let starter = Starter::new().unwrap();
    let (up, is_up) = std::sync::mpsc::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let own = starter
        .run(|| rustix::thread::gettid().as_raw_nonzero().get())
        .unwrap();
    let thread = starter.run(move || {
        thread::Builder::new().spawn(move || {
            Kind::Net.confine().unwrap();
            // Another arena of malloc's, and more than its first piece.
            let much = vec![1u8; 1 << 20];
            up.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            ends.recv().unwrap();
            drop(much);
        })
    });
    let thread = thread.unwrap().unwrap();
    let tid = is_up.recv().unwrap();
    println!("\nfilters: {}, then {}", filters(own), filters(tid));
    end.send(()).unwrap();
    thread.join().unwrap();
}

/// The life of a process that goes into the jail with the share at [`SHARE_FD`], and tells what it finds there.
fn inside() {
    // SAFETY: whoever started this program has put it there for this, and nothing else here knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(SHARE_FD) };
    let outside = fd.as_raw_fd();
    let mut shares = [Share {
        tag: "share".into(),
        root: Root::outside(fd).unwrap(),
        cache: CachePolicy::Auto,
    }];
    let tell = |what: &str, value: &dyn std::fmt::Display| println!("\n{what}: {value}");
    let status = File::open("/proc/thread-self/status").unwrap();
    // As a login has them.
    let groups = [0, 4, 6].map(rustix::process::Gid::from_raw);
    rustix::thread::set_thread_groups(&groups).unwrap();
    tell("above from outside", &above(&shares[0].root));
    let users = env::var("USERS")
        .ok()
        .map(|path| File::open(path).unwrap().into());
    // A mistake: a directory outside that is not closed.
    let stray = File::open("/etc").unwrap();
    let strays_file = || {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        said(openat(&stray, "passwd", flags, Mode::empty()).map_err(io::Error::from))
    };
    tell("a stray directory from outside", &strays_file());
    if let Err(error) = jail::enter(&mut shares, users) {
        tell("refused", &husk_vmm::sentence(&error));
        return;
    }
    let [share] = &shares;
    for line in BufReader::new(status).lines().map(Result::unwrap) {
        if ["Cap", "NoNewPrivs", "Groups", "Uid", "Gid"]
            .iter()
            .any(|name| line.starts_with(name))
        {
            println!("\n{line}");
        }
    }
    // As the file server does for a user: this thread alone.
    let become_user = |user: u32| {
        // SAFETY: integers.
        unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) }
    };
    let as_user = (become_user(1000), rustix::thread::capabilities(None));
    become_user(0);
    let (0, Ok(sets)) = as_user else {
        panic!("{as_user:?}");
    };
    tell("as a user", &format!("{:016x}", sets.effective.bits()));
    let names = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names.join(" ")
    };
    let there = ["/share0", "/etc", "/proc", "/dev", "/fd", "/usr"]
        .into_iter()
        .filter(|path| Path::new(path).exists());
    tell("root", &there.collect::<Vec<_>>().join(" "));
    tell("share", &names(share.root.path()));
    tell("write", &said(File::create("/file")));
    // SAFETY: only asks about the number.
    let closed = unsafe { libc::fcntl(outside, libc::F_GETFD) } == -1;
    tell("outside is closed", &closed);
    tell("above", &above(&share.root));
    tell("a stray directory", &strays_file());
    let none = None::<&str>;
    let mounted = mount(
        none,
        share.root.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    );
    tell("mount", &said(mounted.map_err(io::Error::from)));
    tell(
        "namespaces",
        &said(unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from)),
    );
    tell(
        "chroot",
        &said(nix::unistd::chroot("/share0").map_err(io::Error::from)),
    );
    let core = rustix::process::getrlimit(rustix::process::Resource::Core);
    tell("core", &format!("{:?}", core.maximum));
    tell("in", &"");
    io::stdout().flush().unwrap();
    io::stdin().read_line(&mut String::new()).unwrap();
    tell("later", &names("/share0/later"));
}

/// Whether the host's /proc can be reached from the descriptors that the file server opens files by.
fn above(root: &Root) -> String {
    let paths = ["../status", "../../sys/kernel/core_pattern", "../../uptime"];
    let tried = paths.map(|path| {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let fd = openat(root.descriptors(), path, flags, Mode::empty());
        said(fd.map_err(io::Error::from))
    });
    tried.join(" ")
}

/// landlock(7), "Landlock ABI versions".
fn has_landlock() -> bool {
    let version = 1;
    // SAFETY: asks for a number, without a ruleset.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<u8>(),
            0,
            version,
        ) > 0
    }
}

fn said<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "done".into(),
        Err(error) => format!("{:?}", error.kind()),
    }
}

fn flags(at: &Path, flags: MsFlags) {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>).unwrap();
}

fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

/// Starts a child as the shim does, with its share as the shim makes it; what it told until it was in, and all that it told after
/// the shim had mounted something else. `users`: its user namespace, if it has one.
fn told_from_inside(namespaces: CloneFlags, users: Option<&Users>) -> (Vec<String>, String) {
    let dir = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        // The thread's own namespace, which ends with it and with the child.
        let shim = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            flags(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            let (share, served) = (dir.path().join("share"), dir.path().join("served"));
            fs::create_dir(&share).unwrap();
            fs::create_dir(&served).unwrap();
            bind(&share, &share);
            flags(&share, MsFlags::MS_SHARED);
            bind(&share, &served);
            flags(&served, MsFlags::MS_SLAVE);
            fs::create_dir(share.join("later")).unwrap();
            let flag = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let fd = open(&served, flag, Mode::empty()).unwrap();
            unshare(namespaces).unwrap();
            let mut command = start("inside");
            if let Some(users) = users {
                command.env("USERS", users.path());
            }
            let mapping = FdMapping {
                parent_fd: fd,
                child_fd: SHARE_FD,
            };
            let mut process = command.fd_mappings(vec![mapping]).unwrap().spawn().unwrap();
            let mut lines = BufReader::new(process.stdout.take().unwrap())
                .lines()
                .map(Result::unwrap);
            let before = lines.by_ref().take_while(|line| line != "in: ").collect();
            let tmpfs = Some("tmpfs");
            let later = share.join("later");
            mount(tmpfs, &later, tmpfs, MsFlags::empty(), None::<&str>).unwrap();
            File::create(later.join("mounted-later")).unwrap();
            drop(process.stdin.take());
            let after = lines.find(|line| line.starts_with("later: "));
            process.wait().unwrap();
            (before, after.unwrap_or_default())
        });
        shim.join().unwrap()
    })
}

#[test]
fn inside_there_is_the_share_and_nothing_else() {
    let (told, later) = told_from_inside(CloneFlags::CLONE_NEWPID, None);
    let said = |what: &str| {
        told.iter()
            .find_map(|line| line.strip_prefix(what)?.strip_prefix(':'))
            .map(str::trim)
            .unwrap_or_else(|| panic!("{what}: {told:#?}"))
    };
    assert_eq!(said("root"), "/share0");
    assert_eq!(said("share"), "later");
    // Landlock may come first.
    assert!(["ReadOnlyFilesystem", "PermissionDenied"].contains(&said("write")));
    assert_eq!(said("outside is closed"), "true");
    assert_eq!(said("above from outside"), "done done done");
    assert_eq!(said("above"), "NotFound NotFound NotFound");
    assert_eq!(said("a stray directory from outside"), "done");
    let landlock = if has_landlock() {
        "PermissionDenied"
    } else {
        "done"
    };
    assert_eq!(said("a stray directory"), landlock);
    for act in ["mount", "namespaces", "chroot"] {
        assert_eq!(said(act), "PermissionDenied", "{act}");
    }
    let kept = format!("{:016x}", privileges::KEPT.bits());
    for (set, value) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", &*kept),
        ("CapEff", &kept),
        ("as a user", &kept),
        ("CapBnd", &kept),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Groups", ""),
        ("core", "Some(0)"),
    ] {
        assert_eq!(said(set), value, "{set}");
    }
    assert_eq!(later, "later: mounted-later");
}

/// A user namespace, as long as the process lives that it was made with.
struct Users(std::process::Child);

impl Users {
    fn new(map: &str) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "sh", "-c", "echo in; exec sleep 60"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut said).unwrap();
        for file in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{file}", child.id()), map).unwrap();
        }
        Self(child)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/user", self.0.id())
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn with_users_of_its_own_root_is_nobody() {
    let (told, later) = {
        let users = Users::new("0 4026531847 1\n1 1 4026531846\n");
        told_from_inside(CloneFlags::empty(), Some(&users))
    };
    let has = |line: &str| assert!(told.iter().any(|said| said == line), "{line}: {told:#?}");
    // The status was opened outside, and tells whom the host sees.
    for ids in ["Uid", "Gid"] {
        has(&format!("{ids}:{}", "\t4026531847".repeat(4)));
    }
    has(&format!("CapEff:\t{:016x}", privileges::KEPT.bits()));
    has("Groups:\t ");
    has("share: later");
    has("namespaces: PermissionDenied");
    assert_eq!(later, "later: mounted-later");
    // A namespace that knows no user 0 is none to be root of.
    let users = Users::new("7 7 1\n");
    let (told, _) = told_from_inside(CloneFlags::empty(), Some(&users));
    let refused = told.iter().find(|line| line.starts_with("refused: "));
    assert!(
        refused.is_some_and(|line| line.contains("of the VMM's user namespace")),
        "{told:#?}"
    );
}

#[test]
fn who_is_in_no_pid_namespace_of_its_own_does_not_go_in() {
    let (told, _) = told_from_inside(CloneFlags::empty(), None);
    let refused = told.iter().find(|line| line.starts_with("refused: "));
    assert!(
        refused.is_some_and(|line| line.contains("first process of a PID namespace")),
        "{told:#?}"
    );
}
