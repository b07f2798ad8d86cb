//! What a guest keeps of a file from one open to the next.

use std::thread::sleep;

use super::*;

const RELEASE: u32 = 18;

/// FOPEN_KEEP_CACHE (<linux/fuse.h>).
const KEEP_CACHE: u32 = 2;

impl Client {
    /// Opens a file as a program does that reads it: whether the guest kept what it had.
    fn keeps(&mut self, node: u64, flags: i32) -> bool {
        let opened = self
            .call(OPEN, node, &[&words(&[flags as u32, 0])], 16)
            .ok();
        let (handle, options) = (opened.u64(0), opened.u32(8));
        self.read(node, handle, 0, 1);
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 16]);
        self.call(RELEASE, node, &[&body], 0).ok();
        assert_eq!(options & !KEEP_CACHE, 0);
        options == KEEP_CACHE
    }
}

#[test]
fn a_guest_keeps_what_nobody_changes() {
    let dir = directory();
    let path = dir.path().join("file");
    fs::write(&path, "content").unwrap();
    let mut client = Client::mount_settled(dir.path(), CachePolicy::Auto, Duration::ZERO);
    let file = client.lookup(ROOT, "file").ok().u64(0);
    assert!(!client.keeps(file, libc::O_RDONLY));
    assert!(client.keeps(file, libc::O_RDONLY));
    // For anything but reading, it drops it.
    assert!(!client.keeps(file, libc::O_RDWR));
    assert!(client.keeps(file, libc::O_RDONLY));

    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let changes: [&dyn Fn(); 4] = [
        &|| fs::write(&path, "longer content").unwrap(),
        &|| fs::write(&path, "another longer").unwrap(),
        // As tar and rsync put times back.
        &|| {
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(b"A", 0).unwrap();
            file.set_modified(modified).unwrap();
        },
        &|| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap(),
    ];
    for (change, number) in changes.iter().zip(1..) {
        // Longer than a tick of the clock that files' times are taken from.
        sleep(Duration::from_millis(20));
        change();
        assert!(!client.keeps(file, libc::O_RDONLY), "change {number}");
        assert!(client.keeps(file, libc::O_RDONLY), "change {number}");
    }
    // By the guest itself, through a handle that stays open.
    let handle = client.open(file, libc::O_WRONLY);
    sleep(Duration::from_millis(20));
    client.write(file, handle, 0, b"from the guest");
    assert!(!client.keeps(file, libc::O_RDONLY));
}

/// Under [`CachePolicy::Auto`], what was just changed.
#[test]
fn how_long_things_are_good_for_follows_the_policy() {
    let dir = directory();
    fs::write(dir.path().join("file"), "content").unwrap();
    for (policy, seconds, options) in [
        (CachePolicy::Never, 0, 1),
        (CachePolicy::Auto, 1, 0),
        (CachePolicy::Always, 86400, KEEP_CACHE),
    ] {
        let mut client = Client::mount(dir.path(), policy);
        let entry = client.lookup(ROOT, "file").ok();
        let good_for = (entry.u64(16), entry.u64(24));
        assert_eq!(good_for, (seconds, seconds), "{policy:?}");
        let file = entry.u64(0);
        for _ in 0..3 {
            let opened = client.call(OPEN, file, &[&words(&[0, 0])], 16).ok();
            assert_eq!(opened.u32(8), options, "{policy:?}");
            client.read(file, opened.u64(0), 0, 1);
        }
    }
}

/// The kernel makes up what sysfs says, and no time there changes with it.
#[test]
fn nothing_is_kept_of_what_takes_no_room() {
    let dir = directory();
    let hole = fs::File::create(dir.path().join("hole")).unwrap();
    hole.set_len(4096).unwrap();
    for (root, name) in [
        (dir.path(), "hole"),
        ("/sys/kernel".as_ref(), "uevent_seqnum"),
    ] {
        let mut client = Client::mount_settled(root, CachePolicy::Auto, Duration::ZERO);
        let entry = client.lookup(ROOT, name).ok();
        let (file, size) = (entry.u64(0), entry.u64(48));
        assert_eq!(size, 4096, "{name}");
        for _ in 0..3 {
            assert!(!client.keeps(file, libc::O_RDONLY), "{name}");
        }
    }
}

/// Its pages are no file's, and a guest that asks for them so gets no more than an error.
#[test]
fn nothing_is_kept_of_a_directory() {
    let dir = directory();
    let mut client = Client::mount_settled(dir.path(), CachePolicy::Auto, Duration::ZERO);
    for _ in 0..2 {
        let opened = client.call(OPEN, ROOT, &[&words(&[0, 0])], 16).ok();
        assert_eq!(opened.u32(8), 0);
        let mut read = opened.u64(0).to_le_bytes().to_vec();
        read.extend([0; 32]);
        client.call(READ, ROOT, &[&read], 16);
    }
}
