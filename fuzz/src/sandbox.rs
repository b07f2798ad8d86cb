//! A small world for code that must change nothing but one directory.
//!
//! One thread of the fuzzer gets a mount namespace and a root of its own, on a tmpfs: what breaks out of its directory finds that world and
//! not this machine, and all of it is gone with the process. `/outside` is there to be hit, by paths that a fuzzer comes upon soon.

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::chroot,
};

/// Where it is made; any directory that every machine has.
const PLACE: &str = "/dev/shm";
/// Bytes and files that the tmpfs takes: bounded, as the fuzzer is.
const SIZE: &str = "size=64m,nr_inodes=65536,mode=755";
/// Where the directories are made that may change.
const INSIDE: &str = "/inside";

/// What each thing outside is like: all of stat(2) that a change of it, of its data or of its links shows in.
type Look = BTreeMap<PathBuf, [i64; 9]>;

/// A thread in a world of its own, to which inputs are given one at a time.
pub struct Sandbox<T> {
    inputs: Sender<T>,
    done: Mutex<Receiver<()>>,
}

impl<T: Send + 'static> Sandbox<T> {
    /// Makes the world. The function gets an empty directory anew for each input, and may change nothing else. Takes root's rights.
    pub fn new(mut work: impl FnMut(&Path, T) + Send + 'static) -> Self {
        let (inputs, next) = channel::<T>();
        let (tell, done) = channel();
        // A panic in the thread ends the process, as libfuzzer-sys has it.
        thread::spawn(move || {
            enter();
            let before = look(&["/", "/outside"]);
            for (number, input) in next.iter().enumerate() {
                let inside = Path::new(INSIDE).join(number.to_string());
                fs::create_dir(&inside).unwrap();
                work(&inside, input);
                assert_eq!(
                    look(&["/", "/outside"]),
                    before,
                    "it changed what is outside"
                );
                let beside: Vec<_> = names(INSIDE);
                assert_eq!(
                    beside,
                    std::slice::from_ref(&inside),
                    "it left something beside its directory"
                );
                fs::remove_dir_all(inside).unwrap();
                if tell.send(()).is_err() {
                    break;
                }
            }
        });
        Self {
            inputs,
            done: Mutex::new(done),
        }
    }

    /// Has an input done.
    pub fn give(&self, input: T) {
        self.inputs.send(input).unwrap();
        self.done.lock().unwrap().recv().unwrap();
    }
}

/// What files outside hold. Another in each process, so that no input has it.
pub fn secret() -> &'static str {
    static SECRET: OnceLock<String> = OnceLock::new();
    SECRET.get_or_init(|| format!("{:016x}", RandomState::new().hash_one("secret")))
}

fn enter() {
    let none = None::<&str>;
    // CLONE_NEWNS takes CLONE_FS along: the root of the other threads, which write the corpus, stays.
    unshare(CloneFlags::CLONE_NEWNS)
        .expect("fuzzing this takes root: a mount namespace of its own");
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("husk-fuzz"), PLACE, Some("tmpfs"), flags, Some(SIZE)).unwrap();
    let proc = Path::new(PLACE).join("proc");
    fs::create_dir(&proc).unwrap();
    mount(
        Some("/proc"),
        &proc,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .unwrap();
    chroot(PLACE).unwrap();
    std::env::set_current_dir("/").unwrap();
    fs::create_dir_all("/outside/dir").unwrap();
    fs::write("/outside/file", secret()).unwrap();
    fs::write("/outside/dir/a", secret()).unwrap();
    symlink("file", "/outside/link").unwrap();
    fs::create_dir(INSIDE).unwrap();
}

/// What these directories and all that is in them look like; `/proc` and what is inside may change.
fn look(roots: &[&str]) -> Look {
    let mut all = Look::new();
    for root in roots {
        add(Path::new(root), &mut all);
        for name in names(root) {
            if !matches!(name.to_str(), Some("/proc" | INSIDE | "/outside")) {
                tree(&name, &mut all);
            }
        }
    }
    all
}

/// What a tree looks like.
pub fn look_at(root: &Path) -> Look {
    let mut all = Look::new();
    tree(root, &mut all);
    all
}

fn tree(path: &Path, all: &mut Look) {
    if add(path, all) {
        for name in names(path) {
            tree(&name, all);
        }
    }
}

fn add(path: &Path, all: &mut Look) -> bool {
    let stat = fs::symlink_metadata(path).unwrap();
    let ids = [stat.ino(), stat.nlink(), stat.size(), stat.rdev()].map(|value| value as i64);
    let [ino, nlink, size, rdev] = ids;
    let (mode, uid, gid) = (stat.mode().into(), stat.uid().into(), stat.gid().into());
    // The time of the last change also of what stat(2) does not tell, as attributes.
    let changed = (stat.ctime(), stat.ctime_nsec());
    all.insert(
        path.to_owned(),
        [ino, nlink, size, rdev, mode, uid, gid, changed.0, changed.1],
    );
    stat.is_dir()
}

fn names(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}
