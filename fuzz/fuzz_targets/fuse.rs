//! A guest's requests to the file server on a real directory: nothing outside of it changes, and nothing from outside is in an answer.
#![no_main]

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
    sync::OnceLock,
};

use husk_fuzz::{
    fuse::{self, Known, Request, Room},
    guest::{Guest, QUEUE_SIZE},
    sandbox::{Sandbox, look_at, secret},
};
use husk_protocol::vm::CachePolicy;
use husk_vmm::{jail::root::Root, virtio::fs::Fs};
use libfuzzer_sys::fuzz_target;
use nix::{sys::stat::Mode, unistd::mkfifo};

#[derive(arbitrary::Arbitrary, Debug)]
struct Session {
    cache: Cache,
    flags: Option<u32>,
    is_indirect: bool,
    requests: Vec<Request>,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Cache {
    Never,
    Auto,
    Always,
}

/// What Linux 6.12 offers, as far as it matters here.
const FLAGS: u32 =
    1 | 1 << 5 | 1 << 6 | 1 << 13 | 1 << 20 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30;
/// The queue of requests, behind that of forgets.
const REQUESTS: usize = 1;

fuzz_target!(|session: Session| {
    static SANDBOX: OnceLock<Sandbox<Session>> = OnceLock::new();
    SANDBOX.get_or_init(|| Sandbox::new(serve)).give(session);
});

fn serve(dir: &Path, session: Session) {
    let share = dir.join("share");
    let beside = dir.join("beside");
    make(&share, &beside);
    let before = look_at(&beside);

    let cache = match session.cache {
        Cache::Never => CachePolicy::Never,
        Cache::Auto => CachePolicy::Auto,
        Cache::Always => CachePolicy::Always,
    };
    let root = Root::outside(File::open(&share).unwrap().into()).unwrap();
    let mut guest = Guest::new(Box::new(Fs::new("share", root, cache, 1).unwrap()));
    guest.bring_up(0, QUEUE_SIZE);
    let first = fuse::first(session.flags.unwrap_or(FLAGS));
    guest.add(REQUESTS, &[&first], &[16, 256], false);
    guest.kick(REQUESTS as u32);
    guest.settle();
    guest.used(REQUESTS);

    let mut known = Known::default();
    for (request, unique) in session.requests.iter().take(64).zip(2..) {
        ask(&mut guest, &mut known, request, unique, session.is_indirect);
    }
    guest.end();

    assert_eq!(
        look_at(&beside),
        before,
        "it changed what is beside the share"
    );
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["beside", "share"]);
}

/// A directory to share, with ways out of it, and one beside it.
fn make(share: &Path, beside: &Path) {
    fs::create_dir_all(share.join("d/d")).unwrap();
    fs::write(share.join("a"), "inside").unwrap();
    fs::write(share.join("d/b"), "inside too").unwrap();
    symlink("../beside", share.join("up")).unwrap();
    symlink("../beside/kept", share.join("link")).unwrap();
    symlink("/outside/file", share.join("out")).unwrap();
    mkfifo(&share.join("fifo"), Mode::S_IRWXU).unwrap();
    fs::create_dir(beside).unwrap();
    fs::write(beside.join("kept"), secret()).unwrap();
    fs::write(beside.join(secret()), "its name is one").unwrap();
}

fn ask(guest: &mut Guest, known: &mut Known, request: &Request, unique: u64, is_indirect: bool) {
    let bytes = request.bytes(known, unique);
    let (first, second) = bytes.split_at(bytes.len().min(usize::from(request.split)));
    let parts: Vec<_> = [first, second]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect();
    let room: &[usize] = match request.room {
        Room::Enough => &[16, 4096],
        Room::Bytes(0) | Room::None => &[],
        Room::Bytes(count) => &[usize::from(count)],
    };
    if guest.add(REQUESTS, &parts, room, is_indirect).is_none() {
        return;
    }
    guest.kick(REQUESTS as u32);
    guest.settle();
    for used in guest.used(REQUESTS) {
        if used.data.is_empty() {
            continue;
        }
        assert!(!request.has_no_answer(), "an answer that nobody wants");
        let found = used
            .data
            .windows(secret().len())
            .any(|bytes| bytes == secret().as_bytes());
        assert!(!found, "what is outside of the share, in an answer");
        let (header, body) = used.data.split_at(16);
        let word = |at: usize| i32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(
            word(0) as usize,
            used.data.len(),
            "an answer of another length"
        );
        assert!((-4095..=0).contains(&word(4)), "{}", word(4));
        assert_eq!(header[8..], unique.to_le_bytes(), "another's answer");
        if word(4) == 0 {
            known.learn(request, body);
        } else {
            assert!(body.is_empty());
        }
    }
}
