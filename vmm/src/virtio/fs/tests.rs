//! FUSE requests from a driver to a real directory. The structures are those of <linux/fuse.h>, protocol 7.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Barrier;

use tempfile::TempDir;

use super::*;
use crate::virtio::testing::Guest;

mod hostile;
mod kept;

const HIPRIO: usize = 0;
const REQUEST: usize = 1;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const MKNOD: u32 = 8;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const GETXATTR: u32 = 22;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;

const ROOT: u64 = 1;

/// What Linux 6.12 offers, as far as it matters here: submounts, killpriv_v2, ACLs, extended flags.
const FLAGS: u32 =
    1 | 1 << 5 | 1 << 6 | 1 << 13 | 1 << 20 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30;

struct Client {
    guest: Guest,
    unique: u64,
}

/// A reply: the errno, 0 for success, and what follows the header.
#[derive(Debug)]
struct Reply {
    error: i32,
    body: Vec<u8>,
}

impl Reply {
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.body[at..at + 8].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.body[at..at + 4].try_into().unwrap())
    }

    fn ok(self) -> Self {
        assert_eq!(self.error, 0, "{self:?}");
        self
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

impl Client {
    fn mount(root: &Path, cache: CachePolicy) -> Self {
        Self::mount_settled(root, cache, SETTLED)
    }

    fn mount_settled(root: &Path, cache: CachePolicy, settled: Duration) -> Self {
        let fd = OwnedFd::from(fs::File::open(root).unwrap());
        let mut device = Fs::new("share", Root::outside(fd).unwrap(), cache, 1).unwrap();
        device.settled = settled;
        let mut client = Self {
            guest: Guest::start(Box::new(device), 128),
            unique: 0,
        };
        client.init();
        client
    }

    fn init(&mut self) -> Reply {
        let mut body = words(&[7, 39, 1 << 20, FLAGS, 0]);
        body.extend([0; 44]);
        self.call(INIT, ROOT, &[&body], 256).ok()
    }

    /// Queues a request; its parts are buffers of their own, as Linux has them.
    fn submit(&mut self, op: u32, node: u64, body: &[&[u8]], room: usize) -> u16 {
        let writable: &[usize] = if room > 0 { &[16, room] } else { &[16] };
        self.submit_with(op, node, body, writable)
    }

    /// Queues a request with these buffers for its answer.
    fn submit_with(&mut self, op: u32, node: u64, body: &[&[u8]], writable: &[usize]) -> u16 {
        self.unique += 1;
        let len = 40 + body.iter().map(|b| b.len()).sum::<usize>() as u32;
        let mut header = words(&[len, op]);
        header.extend(self.unique.to_le_bytes());
        header.extend(node.to_le_bytes());
        header.extend(words(&[0, 0, 1, 0]));
        let readable: Vec<&[u8]> = std::iter::once(&header[..])
            .chain(body.iter().copied())
            .collect();
        let head = self.guest.add(REQUEST, &readable, writable).unwrap();
        self.guest.kick(REQUEST);
        head
    }

    fn reply(&mut self) -> (u16, Reply) {
        let used = self.guest.next(REQUEST);
        let data = used.data;
        assert_eq!(
            u32::from_le_bytes(data[..4].try_into().unwrap()) as usize,
            data.len()
        );
        let error = -i32::from_le_bytes(data[4..8].try_into().unwrap());
        let body = data[16..].to_vec();
        (used.head, Reply { error, body })
    }

    fn call(&mut self, op: u32, node: u64, body: &[&[u8]], room: usize) -> Reply {
        let head = self.submit(op, node, body, room);
        let (answered, reply) = self.reply();
        assert_eq!(head, answered);
        reply
    }

    fn lookup(&mut self, parent: u64, entry: &str) -> Reply {
        self.call(LOOKUP, parent, &[&name(entry)], 128)
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        self.call(OPEN, node, &[&words(&[flags as u32, 0])], 16)
            .ok()
            .u64(0)
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Vec<u8> {
        let body = [
            &handle.to_le_bytes()[..],
            &offset.to_le_bytes(),
            &words(&[size, 0, 0, 0, 0, 0]),
        ]
        .concat();
        self.call(READ, node, &[&body], size as usize).ok().body
    }

    fn write(&mut self, node: u64, handle: u64, flags: u32, data: &[u8]) {
        let body = [
            &handle.to_le_bytes()[..],
            &0u64.to_le_bytes(),
            &words(&[data.len() as u32, flags, 0, 0, 0, 0]),
        ]
        .concat();
        self.call(WRITE, node, &[&body, data], 8).ok();
    }
}

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn the_tag_and_queues_are_in_the_configuration() {
    let dir = directory();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let mut config = [0; 8];
    client.guest.transport.read(0x100, &mut config);
    assert_eq!(&config, b"share\0\0\0");
    assert_eq!(client.guest.read32(0x124), 1);
    let fd = || Root::outside(fs::File::open("/").unwrap().into()).unwrap();
    assert!(Fs::new("", fd(), CachePolicy::Auto, 1).is_err());
    assert!(Fs::new(&"x".repeat(37), fd(), CachePolicy::Auto, 1).is_err());
    assert!(Fs::new(&"x".repeat(36), fd(), CachePolicy::Auto, 1).is_ok());
}

#[test]
fn look_up_open_read_write() {
    let dir = directory();
    let content: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/file"), &content).unwrap();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let sub = client.lookup(ROOT, "sub").ok().u64(0);
    let entry = client.lookup(sub, "file").ok();
    let (file, size) = (entry.u64(0), entry.u64(48));
    assert_eq!(size, content.len() as u64);
    let handle = client.open(file, libc::O_RDWR);
    assert_eq!(client.read(file, handle, 0, 1 << 17), content[..1 << 17]);
    assert_eq!(client.read(file, handle, 199_000, 4096), content[199_000..]);
    client.write(file, handle, 0, b"changed");
    assert_eq!(
        &fs::read(dir.path().join("sub/file")).unwrap()[..8],
        b"changed\x07"
    );
    assert_eq!(client.lookup(sub, "missing").error, libc::ENOENT);
}

#[test]
fn the_guest_learns_that_privileges_are_killed_here() {
    let dir = directory();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let flags = client.init().u32(12);
    // Submounts, killpriv_v2, ACLs with their extended setxattr, and large requests.
    for bit in [27, 28, 20, 29, 22] {
        assert_ne!(flags & 1 << bit, 0, "bit {bit}");
    }
    // Writeback is off.
    assert_eq!(flags & 1 << 16, 0);
    let path = dir.path().join("setuid");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    let file = client.lookup(ROOT, "setuid").ok().u64(0);
    let handle = client.open(file, libc::O_WRONLY);
    client.write(file, handle, 0, b"by root");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4755);
    // FUSE_WRITE_KILL_SUIDGID: the writer in the guest has no CAP_FSETID.
    client.write(file, handle, 1 << 2, b"by a user");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn xattrs_pass_through() {
    let dir = directory();
    fs::write(dir.path().join("file"), "x").unwrap();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    // security.capability: cap_net_raw=ep, as images have it.
    let value = words(&[0x0200_0001, 0x2000, 0, 0, 0]);
    let head = words(&[value.len() as u32, 0, 0, 0]);
    client
        .call(
            SETXATTR,
            file,
            &[&head, &name("security.capability"), &value],
            0,
        )
        .ok();
    let head = words(&[64, 0]);
    let got = client
        .call(GETXATTR, file, &[&head, &name("security.capability")], 64)
        .ok();
    assert_eq!(got.body, value);
}

#[test]
fn modes_are_the_guests_own_whatever_the_umask_here() {
    let dir = directory();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let body = words(&[libc::S_IFREG | 0o666, 0, 0, 0]);
    client.call(MKNOD, ROOT, &[&body, &name("file")], 128).ok();
    let mode = fs::metadata(dir.path().join("file")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o666);
}

/// A request that blocks keeps no other waiting. The blocking one opens a file on which there is a lease.
#[test]
fn requests_do_not_wait_for_each_other() {
    let dir = directory();
    fs::write(dir.path().join("file"), "here").unwrap();
    fs::write(dir.path().join("leased"), "x").unwrap();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let leased = client.lookup(ROOT, "leased").ok().u64(0);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    let lease = Lease::new(&dir.path().join("leased"));
    let flags = words(&[libc::O_RDONLY as u32, 0]);
    let blocked = client.submit(OPEN, leased, &[&flags], 16);
    for _ in 0..20 {
        let handle = client.open(file, libc::O_RDONLY);
        assert_eq!(client.read(file, handle, 0, 100), b"here");
    }
    drop(lease);
    let (head, reply) = client.reply();
    assert_eq!(head, blocked);
    reply.ok();
}

/// While it stands, opening the file elsewhere blocks (fcntl(2), `F_SETLEASE`).
struct Lease(#[expect(dead_code, reason = "the lease goes with the file")] fs::File);

/// <fcntl.h>; the libc crate has none for Linux.
const F_SETSIG: libc::c_int = 10;

impl Lease {
    #[allow(
        unsafe_code,
        reason = "fcntl(2) with operations that nix does not have"
    )]
    fn new(path: &Path) -> Self {
        let file = fs::File::options().write(true).open(path).unwrap();
        // SAFETY: the fd is open; neither operation takes a pointer. SIGURG is ignored unless handled, unlike SIGIO.
        unsafe {
            assert_eq!(libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG), 0);
            assert_eq!(
                libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK),
                0
            );
        }
        Self(file)
    }
}

/// A hostile kernel's names and offsets do not get through.
#[test]
fn names_do_not_leave_the_share() {
    let dir = directory();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(dir.path().join("outside"), "x").unwrap();
    let mut client = Client::mount(&share, CachePolicy::Auto);
    assert_eq!(
        client.call(UNLINK, ROOT, &[&name("../outside")], 0).error,
        libc::EINVAL
    );
    assert_eq!(client.lookup(ROOT, "..").error, libc::EINVAL);
    assert!(dir.path().join("outside").exists());
    fs::write(share.join("file"), "x").unwrap();
    let file = client.lookup(ROOT, "file").ok().u64(0);
    let handle = client.open(file, libc::O_RDONLY);
    let body = [
        &handle.to_le_bytes()[..],
        &u64::MAX.to_le_bytes(),
        &words(&[1, 0, 0, 0, 0, 0]),
    ]
    .concat();
    assert_eq!(client.call(READ, file, &[&body], 16).error, libc::EINVAL);
}

/// Many requests at once come back each with its own answer.
#[test]
fn a_full_queue_is_answered() {
    let dir = directory();
    let file = fs::File::create(dir.path().join("file")).unwrap();
    for block in 0..32u8 {
        file.write_all_at(&[block; 4096], u64::from(block) * 4096)
            .unwrap();
    }
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let node = client.lookup(ROOT, "file").ok().u64(0);
    let handle = client.open(node, libc::O_RDONLY);
    for round in 0..20u64 {
        let mut expected = std::collections::HashMap::new();
        for block in 0..32u64 {
            let offset = block * 4096;
            let body = [
                &handle.to_le_bytes()[..],
                &offset.to_le_bytes(),
                &words(&[4096, 0, 0, 0, 0, 0]),
            ]
            .concat();
            let head = client.submit(READ, node, &[&body], 4096);
            expected.insert(head, block as u8);
        }
        while !expected.is_empty() {
            let (head, reply) = client.reply();
            let block = expected.remove(&head).unwrap();
            assert_eq!(reply.ok().body, [block; 4096], "round {round}");
        }
    }
}

/// What the guest forgets is closed, and so no longer keeps a mount busy; a reset closes everything.
#[test]
fn forgetting_and_resetting_close_files() {
    let dir = directory();
    let path = dir.path().canonicalize().unwrap();
    fs::write(path.join("file"), "x").unwrap();
    fs::write(path.join("other"), "x").unwrap();
    let open = |name: &str| {
        let target = path.join(name);
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == target))
            .count()
    };
    let mut client = Client::mount(&path, CachePolicy::Auto);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    client.lookup(ROOT, "other").ok();
    assert_eq!((open("file"), open("other")), (1, 1));
    let mut forget = words(&[48, FORGET]);
    forget.extend(0u64.to_le_bytes());
    forget.extend(file.to_le_bytes());
    forget.extend(words(&[0, 0, 1, 0]));
    forget.extend(1u64.to_le_bytes());
    client.guest.add(HIPRIO, &[&forget], &[]).unwrap();
    client.guest.kick(HIPRIO);
    client.guest.next(HIPRIO);
    assert_eq!((open("file"), open("other")), (0, 1));
    client.guest.write32(0x70, 0);
    assert_eq!(open("other"), 0);
    client.guest.bring_up(128);
    client.init();
    client.call(GETATTR, ROOT, &[&[0; 16]], 104).ok();
}

/// No request, however malformed, stops the server.
#[test]
fn nonsense_is_answered_or_dropped() {
    let dir = directory();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    for body in [&b""[..], b"\x28", &[0xff; 40], &[0; 41], &[7; 5000]] {
        if !body.is_empty() {
            client.guest.add(REQUEST, &[body], &[16, 128]).unwrap();
        }
        client.guest.add(REQUEST, &[&[0; 8]], &[]).unwrap();
    }
    client.guest.kick(REQUEST);
    for _ in 0..9 {
        client.guest.next(REQUEST);
    }
    // A name without its end, a node that does not exist, an operation nobody knows.
    client.submit(LOOKUP, ROOT, &[b"abc"], 128);
    client.guest.next(REQUEST);
    assert_eq!(client.lookup(99, "x").error, libc::EBADF);
    assert_eq!(client.call(4000, ROOT, &[], 0).error, libc::ENOSYS);
    client.call(GETATTR, ROOT, &[&[0; 16]], 104).ok();
    assert_eq!(client.guest.status(), 15);
}

/// An answer whose very header finds no room is not asked of virtiofsd, which would panic; nor is anything done for it.
#[test]
fn requests_without_room_for_an_answer_are_dropped() {
    let dir = directory();
    fs::write(dir.path().join("file"), "here").unwrap();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    let open = client.open(file, libc::O_RDONLY);
    let listing = client.call(OPENDIR, ROOT, &[&words(&[0, 0])], 16);
    let listing = listing.ok().u64(0);
    let body = |handle: u64, size: u32| {
        let rest = words(&[0, 0, size, 0, 0, 0, 0, 0]);
        [&handle.to_le_bytes()[..], &rest].concat()
    };
    for (op, node, handle) in [
        (READ, file, open),
        (READDIR, ROOT, listing),
        (READDIRPLUS, ROOT, listing),
    ] {
        for writable in [&[][..], &[1], &[15], &[8, 7]] {
            for size in [0, 1, 15, 16, 4096] {
                let head = client.submit_with(op, node, &[&body(handle, size)], writable);
                let used = client.guest.next(REQUEST);
                assert_eq!((used.head, used.data.len()), (head, 0), "{op} {writable:?}");
            }
        }
        // Room for the header, and hardly any for what follows.
        for room in [0, 1, 15] {
            client.call(op, node, &[&body(handle, room)], room as usize);
        }
    }
    client.submit_with(UNLINK, ROOT, &[&name("file")], &[15]);
    client.guest.next(REQUEST);
    assert!(dir.path().join("file").exists());
    assert_eq!(client.read(file, open, 0, 100), b"here");
    assert_eq!(client.guest.status(), 15);
}

/// However many shares there are, what is reserved for the process itself is left.
#[test]
fn shares_divide_what_fds_there_are() {
    for limit in [0, 1000, 4096, 1_000_000] {
        for shares in [1, 2, 3, 100] {
            let all = fd_limit(limit, shares) * shares;
            assert!(
                all + RESERVED_FDS.min(limit / 2) <= limit,
                "{limit} {shares}"
            );
        }
    }
    assert_eq!(fd_limit(1_000_000, 1), 1_000_000 - RESERVED_FDS);
}

/// Two shares in one process do not disturb each other, nor do their threads' working directories.
#[test]
fn two_shares_at_once() {
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let dir = directory();
                fs::write(dir.path().join("file"), "x").unwrap();
                let mut client = Client::mount(dir.path(), CachePolicy::Auto);
                barrier.wait();
                let file = client.lookup(ROOT, "file").ok().u64(0);
                for _ in 0..50 {
                    let head = words(&[64, 0]);
                    let reply = client.call(GETXATTR, file, &[&head, &name("user.none")], 64);
                    assert_eq!(reply.error, libc::ENODATA);
                }
            });
        }
    });
}
