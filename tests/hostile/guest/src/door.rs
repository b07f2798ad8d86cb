//! "Assume one bug in the VMM": a back door of a weakened husk-vmm (`vmm/src/weakened.rs`) has one of its threads make any system
//! call. What of the host can be had by it is what the jail leaves.

use crate::check;
use crate::machine::{out_long, word, write};
use crate::start::Start;

/// The door's port, which takes the address of a [`BLOCK`].
const PORT: u16 = 0x700;
/// Thread, number, six arguments, which of them are addresses of ours (a bit each), and the result.
const BLOCK: u64 = 0x120_0000;
const RESULT: u64 = BLOCK + 9 * 8;
/// What stands there where nobody has opened.
const UNTOUCHED: u64 = 0x5a5a_5a5a;
const TEXT: u64 = 0x121_0000;
const BUFFER: u64 = 0x122_0000;

/// Threads, by their place in `seccomp::Kind::ALL`.
const VCPU: u64 = 2;
const FILE_SERVER: u64 = 9;

/// Numbers of x86-64.
const READ: u64 = 0;
const MMAP: u64 = 9;
const SOCKET: u64 = 41;
const EXECVE: u64 = 59;
const KILL: u64 = 62;
const PTRACE: u64 = 101;
const CHROOT: u64 = 161;
const MOUNT: u64 = 165;
const WRITE: u64 = 1;
const OPENAT: u64 = 257;
const MKDIRAT: u64 = 258;
const MKNODAT: u64 = 259;
const UNLINKAT: u64 = 263;
const OPEN_BY_HANDLE_AT: u64 = 304;
const SETNS: u64 = 308;
const PROCESS_VM_WRITEV: u64 = 311;
const BPF: u64 = 321;
const IO_URING_SETUP: u64 = 425;

/// `AT_FDCWD`.
const HERE: u64 = -100i64 as u64;
/// `O_WRONLY | O_TRUNC`.
const OVERWRITE: u64 = 0o1001;

/// Puts a C string where a call finds it.
fn text(slot: u64, pieces: &[&str]) -> u64 {
    let at = TEXT + slot * 4096;
    let mut end = at;
    for piece in pieces {
        write(end, piece.as_bytes());
        end += piece.len() as u64;
    }
    write(end, &[0]);
    at
}

/// Makes a system call; its result, or `None` where there is no door.
fn call(thread: u64, number: u64, arguments: [u64; 6], addresses: u64) -> Option<i64> {
    let fields = [thread, number]
        .into_iter()
        .chain(arguments)
        .chain([addresses, UNTOUCHED]);
    for (at, field) in (BLOCK..).step_by(8).zip(fields) {
        write(at, &field.to_le_bytes());
    }
    out_long(PORT, BLOCK as u32);
    let result = word::<8>(RESULT);
    (result != UNTOUCHED).then_some(result as i64)
}

fn told(what: &str, result: Option<i64>) {
    check!(
        result.is_none_or(|result| result < 0),
        "{what} ({result:?})"
    );
}

/// Does what `try` says: `files`, `second` (what stands behind the filter), or one call that the filter should end the VMM for.
pub fn attack(start: &Start) {
    let (canary, pid) = (start.word("canary"), start.word("victim"));
    let victim = pid.parse().unwrap_or(u64::MAX >> 1);
    match start.word("try") {
        "nothing" => {
            let result = call(VCPU, READ, [u64::MAX, 0, 0, 0, 0, 0], 0);
            check!(result.is_none(), "there is no door ({result:?})");
        }
        "files" => files(canary),
        "second" => {
            files(canary);
            for name in [
                "execve",
                "mount",
                "ptrace",
                "bpf",
                "chroot",
                "setns",
                "open_by_handle_at",
                "kill",
                "process_vm_writev",
            ] {
                told(name, by_name(name, canary, victim));
            }
        }
        name => told(name, by_name(name, canary, victim)),
    }
}

fn by_name(name: &str, canary: &str, victim: u64) -> Option<i64> {
    let root = text(0, &["/"]);
    let thread = if name.starts_with("vcpu_") {
        VCPU
    } else {
        FILE_SERVER
    };
    match name {
        "execve" => {
            let program = text(1, &[canary, "/program"]);
            call(thread, EXECVE, [program, 0, 0, 0, 0, 0], 0b1)
        }
        // AF_INET, SOCK_STREAM
        "socket" => call(thread, SOCKET, [2, 1, 0, 0, 0, 0], 0),
        "mount" => {
            let kind = text(1, &["tmpfs"]);
            call(thread, MOUNT, [kind, root, kind, 0, 0, 0], 0b111)
        }
        // PTRACE_SEIZE
        "ptrace" => call(thread, PTRACE, [0x4206, victim, 0, 0, 0, 0], 0),
        // BPF_MAP_CREATE of an array.
        "bpf" => {
            for (at, field) in (BUFFER..)
                .step_by(4)
                .zip([2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0])
            {
                write(at, &field.to_le_bytes());
            }
            call(thread, BPF, [0, BUFFER, 48, 0, 0, 0], 0b10)
        }
        "chroot" => call(thread, CHROOT, [root, 0, 0, 0, 0, 0], 0b1),
        "setns" => (0..64)
            .map(|fd| call(thread, SETNS, [fd, 0, 0, 0, 0, 0], 0))
            .max()
            .flatten(),
        "open_by_handle_at" => {
            // A handle of the root of a file system like the host's: type 1, inode 2.
            for (at, field) in (BUFFER..).step_by(4).zip([8u32, 1, 2, 0]) {
                write(at, &field.to_le_bytes());
            }
            (0..64)
                .map(|fd| call(thread, OPEN_BY_HANDLE_AT, [fd, BUFFER, 0, 0, 0, 0], 0b10))
                .max()
                .flatten()
        }
        "kill" => call(thread, KILL, [victim, 9, 0, 0, 0, 0], 0),
        "process_vm_writev" => call(
            thread,
            PROCESS_VM_WRITEV,
            [victim, BUFFER, 1, BUFFER, 1, 0],
            0b1010,
        ),
        "io_uring" => call(thread, IO_URING_SETUP, [1, BUFFER, 0, 0, 0, 0], 0b10),
        // PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS
        "executable" => call(thread, MMAP, [0, 4096, 7, 0x22, u64::MAX, 0], 0),
        "vcpu_mkdir" => {
            let planted = text(1, &[canary, "/planted"]);
            call(thread, MKDIRAT, [HERE, planted, 0o755, 0, 0, 0], 0b10)
        }
        other => {
            check!(false, "no call is called {other:?}");
            None
        }
    }
}

/// The host's files by every way there is: their path, and `..` from every descriptor.
fn files(canary: &str) {
    const UP: &str = "../../../../../../../../../../../..";
    let open = |fd: u64, path: u64, flags: u64| {
        call(FILE_SERVER, OPENAT, [fd, path, flags, 0, 0, 0], 0b10)
    };
    for (what, pieces) in [
        ("its path", &[canary, "/secret"][..]),
        ("the root of PID 1", &["/proc/1/root", canary, "/secret"]),
        ("its own root", &["/proc/self/root", canary, "/secret"]),
        (
            "its working directory",
            &["/proc/self/cwd/", UP, canary, "/secret"],
        ),
    ] {
        let path = text(0, pieces);
        told_of_file(what, open(HERE, path, 0));
        told(
            what,
            open(HERE, path, OVERWRITE)
                .filter(|fd| *fd >= 0)
                .and_then(|fd| {
                    let words = text(1, &["moved"]);
                    call(FILE_SERVER, WRITE, [fd as u64, words, 5, 0, 0, 0], 0b10)
                }),
        );
    }
    for device in [
        "/dev/kvm",
        "/dev/mem",
        "/dev/vda",
        "/proc/kcore",
        "/etc/shadow",
        "/run/containerd/containerd.sock",
    ] {
        told(device, open(HERE, text(0, &[device]), 0));
    }
    let up = text(0, &[UP, canary, "/secret"]);
    let led = (0..256)
        .filter(|fd| open(*fd, up, 0).is_some_and(|result| result >= 0))
        .count();
    check!(led == 0, "'..' from each descriptor ({led} lead out)");
    let planted = text(0, &[canary, "/planted"]);
    told(
        "a directory",
        call(FILE_SERVER, MKDIRAT, [HERE, planted, 0o755, 0, 0, 0], 0b10),
    );
    let secret = text(0, &[canary, "/other"]);
    told(
        "a removal",
        call(FILE_SERVER, UNLINKAT, [HERE, secret, 0, 0, 0, 0], 0b10),
    );
    // A node of a disk can be made where the root is writable, which it is not; nor is one opened.
    let node = text(0, &["/disk"]);
    told(
        "a device node",
        call(
            FILE_SERVER,
            MKNODAT,
            [HERE, node, 0o060_600, 0xfe00, 0, 0],
            0b10,
        ),
    );
    told("its device", open(HERE, node, 0));
}

/// Tells what could be read.
fn told_of_file(what: &str, opened: Option<i64>) {
    told(what, opened);
    if let Some(fd @ 0..) = opened
        && let Some(1..) = call(FILE_SERVER, READ, [fd as u64, BUFFER, 32, 0, 0, 0], 0b10)
    {
        let mut bytes = [0; 32];
        crate::machine::read(BUFFER, &mut bytes);
        let text = core::str::from_utf8(&bytes).unwrap_or_default();
        check!(false, "read {:?} by {what}", text.trim_end_matches('\0'));
    }
}
