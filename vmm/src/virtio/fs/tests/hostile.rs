//! What other file servers have let a guest do.

use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::process::{Resource, Rlimit, setrlimit};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::virtio::testing::elsewhere;

const SETATTR: u32 = 4;
const CREATE: u32 = 35;

/// CVE-2020-35517: what is no file or directory is not opened, whichever way the guest asks, so that nothing happens to a device of the
/// host's, and nobody waits for the other end of a FIFO.
#[test]
fn device_nodes_fifos_and_sockets_are_not_opened() {
    let dir = directory();
    let mode = Mode::from_bits_truncate(0o666);
    let nodes = [
        ("zero", SFlag::S_IFCHR, makedev(1, 5)),
        ("disk", SFlag::S_IFBLK, makedev(8, 0)),
        ("fifo", SFlag::S_IFIFO, 0),
        ("socket", SFlag::S_IFSOCK, 0),
    ];
    for (name, kind, device) in nodes {
        mknod(&dir.path().join(name), kind, mode, device).unwrap();
    }
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    for (entry, ..) in nodes {
        let node = client.lookup(ROOT, entry).ok().u64(0);
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDONLY | libc::O_NONBLOCK,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_RDONLY | libc::O_DIRECTORY,
            libc::O_PATH,
        ] {
            let words = words(&[flags as u32, 0]);
            for op in [OPEN, OPENDIR] {
                let reply = client.call(op, node, &[&words], 16);
                assert_eq!(reply.error, libc::EBADF, "{entry} {op} {flags:#o}");
            }
        }
        // Created once more, and so opened, and cut by its name.
        for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
            let body = super::words(&[(flags | libc::O_CREAT) as u32, 0o666, 0, 0]);
            let reply = client.call(CREATE, ROOT, &[&body, &name(entry)], 144);
            assert_eq!(reply.error, libc::EBADF, "{entry} {flags:#o}");
        }
        let mut size = words(&[1 << 3, 0]);
        size.resize(88, 0);
        let reply = client.call(SETATTR, node, &[&size], 104);
        assert_ne!(reply.error, 0, "{entry}");
    }
    assert_eq!(client.guest.status(), 15);
    client.call(GETATTR, ROOT, &[&[0; 16]], 104).ok();
}

/// CVE-2020-10717: a guest that holds all the files that it may has left the process what it needs, and gets more when it gives some back.
#[test]
fn files_that_the_guest_holds_are_bounded() {
    if let Some(status) = elsewhere() {
        assert!(status.success(), "{status}");
        return;
    }
    const LIMIT: u64 = 600;
    let limit = Rlimit {
        current: Some(LIMIT),
        maximum: Some(LIMIT),
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    let dir = directory();
    for number in 0..LIMIT {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let mut held = Vec::new();
    let refused = (0..LIMIT).find_map(|number| {
        let reply = client.lookup(ROOT, &number.to_string());
        if reply.error != 0 {
            return Some(reply.error);
        }
        held.push(reply.u64(0));
        None
    });
    assert_eq!(refused, Some(libc::ENFILE));
    assert!(held.len() as u64 <= fd_limit(LIMIT, 1), "{}", held.len());
    // Nor is a file opened, or a directory.
    let reply = client.call(OPEN, held[0], &[&words(&[0, 0])], 16);
    assert_eq!(reply.error, libc::ENFILE);
    let reply = client.call(OPENDIR, ROOT, &[&words(&[0, 0])], 16);
    assert_eq!(reply.error, libc::ENFILE);
    let left: Vec<_> = (0..100)
        .map(|_| fs::File::open("/dev/null").unwrap())
        .collect();
    drop(left);
    client.call(GETATTR, ROOT, &[&[0; 16]], 104).ok();
    client.submit_with(FORGET, held[1], &[&1u64.to_le_bytes()], &[]);
    client.guest.next(REQUEST);
    client.open(held[0], libc::O_RDONLY);
}

/// CVE-2026-45782: one head, made available again and again while its request is under way. Each is a request of its own.
#[test]
fn a_head_that_is_offered_many_times_is_answered_as_often() {
    const TIMES: u16 = 16;
    let dir = directory();
    fs::write(dir.path().join("file"), "").unwrap();
    let mut client = Client::mount(dir.path(), CachePolicy::Auto);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    let handle = client.open(file, libc::O_RDWR);
    let used_at = client.guest.queues[REQUEST].used;
    let index = |client: &Client| -> u16 {
        let at = GuestAddress(used_at + 2);
        client.guest.memory.read_obj(at).unwrap()
    };
    let before = index(&client);
    // Long enough for others to begin meanwhile.
    let data = vec![7; 1 << 20];
    let fixed = words(&[data.len() as u32, 0, 0, 0, 0, 0]);
    let body = [&handle.to_le_bytes()[..], &[0; 8], &fixed].concat();
    let head = client.submit(WRITE, file, &[&body, &data], 8);
    for _ in 1..TIMES {
        let guest = &mut client.guest;
        guest.queues[REQUEST].publish(&guest.memory, head);
        guest.kick(REQUEST);
    }
    let start = Instant::now();
    while index(&client).wrapping_sub(before) < TIMES {
        assert!(start.elapsed() < Duration::from_secs(60), "no answer");
        std::thread::yield_now();
    }
    assert_eq!(index(&client).wrapping_sub(before), TIMES);
    for number in 0..TIMES {
        let slot = before.wrapping_add(number) % client.guest.queues[REQUEST].size;
        let at = GuestAddress(used_at + 4 + 8 * u64::from(slot));
        let entry: [u32; 2] = client.guest.memory.read_obj(at).unwrap();
        assert_eq!(entry, [head.into(), 24]);
    }
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), data);
    assert_eq!(client.guest.status(), 15);
    client.guest.bring_up(128);
    client.init();
}
