//! Paths in a container's root file system, and volumes.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{MetadataExt as _, symlink},
        },
    },
    path::{Path, PathBuf},
};

use husk_agent::{
    container::fuzzing,
    volume::{Plan, Volumes},
};
use husk_protocol::agent::{SyncVolumeRequest, VolumeEntry, volume_entry::Content};
use nix::{sys::stat::Mode, unistd::mkfifo};

/// What is asked for in a directory.
#[derive(arbitrary::Arbitrary, Debug)]
pub struct Files(Asked);

#[derive(arbitrary::Arbitrary, Debug)]
enum Asked {
    Walk {
        /// What a container has put where.
        made: Vec<Made>,
        paths: Vec<(Text, Make)>,
    },
    Volume {
        made: Vec<Made>,
        syncs: Vec<Sync>,
    },
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Make {
    Nothing,
    Directory,
    File,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Made {
    dir: u8,
    name: u8,
    what: What,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum What {
    Link(Text),
    File(u8),
    Directory,
    Fifo,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Sync {
    id: Text,
    entries: Vec<Entry>,
    made: Vec<Made>,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Entry {
    path: Text,
    mode: u16,
    owner: u8,
    kind: Kind,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Link(Text),
}

/// A path.
#[derive(arbitrary::Arbitrary, Debug)]
enum Text {
    One(u8),
    Two(u8, u8),
    Three(u8, u8, u8),
    Absolute(u8, u8),
    Out(u8),
    Empty,
    Any(Vec<u8>),
}

const NAMES: [&str; 16] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "..data",
    "a",
    "b",
    "..",
    ".",
    "d",
    "..data_tmp",
    "..2024",
    "d",
    "e",
    "c",
];

impl Text {
    fn bytes(&self) -> Vec<u8> {
        let name = |which: &u8| NAMES[usize::from(which % 16)];
        match self {
            Self::One(one) => name(one).into(),
            Self::Two(one, two) => format!("{}/{}", name(one), name(two)).into(),
            Self::Three(one, two, three) => {
                format!("{}/{}/{}", name(one), name(two), name(three)).into()
            }
            Self::Absolute(one, two) => format!("/{}/{}", name(one), name(two)).into(),
            Self::Out(which) => {
                let out = [
                    "/outside",
                    "/outside/file",
                    "../../outside/dir",
                    "../../../beside",
                ];
                out[usize::from(which % 4)].into()
            }
            Self::Empty => Vec::new(),
            Self::Any(bytes) => bytes.clone(),
        }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(std::ffi::OsString::from_vec(self.bytes()))
    }
}

/// What of it one directory gets.
pub fn work(dir: &Path, Files(files): Files) {
    // `/inside/N/beside` is there to be hit as well.
    fs::create_dir(dir.join("beside")).unwrap();
    let root = dir.join("root");
    match files {
        Asked::Walk { made, paths } => {
            make(&root, &made);
            walk(&root, &paths);
        }
        Asked::Volume { made, syncs } => {
            for sync in syncs.iter().take(8) {
                volume(&root, sync, &made);
            }
        }
    }
    let beside = fs::read_dir(dir.join("beside")).unwrap().count();
    assert_eq!(beside, 0, "it made something beside its root");
}

/// What a container has made of its directory. Nothing here follows a link.
fn make(root: &Path, all: &[Made]) {
    let _ = fs::create_dir_all(root.join("d/e"));
    for Made { dir, name, what } in all.iter().take(24) {
        let dir = root.join(["", "d", "d/e"][usize::from(dir % 3)]);
        let is_real = dir
            .ancestors()
            .take_while(|dir| *dir != root)
            .all(|dir| fs::symlink_metadata(dir).is_ok_and(|stat| stat.is_dir()));
        if !is_real || fs::symlink_metadata(&dir).is_err() {
            continue;
        }
        let path =
            dir.join(["a", "b", "c", "d", "e", "..data", "..data_tmp"][usize::from(name % 7)]);
        let _ = match what {
            What::Link(target) => symlink(target.path(), path),
            What::File(size) => match fs::symlink_metadata(&path) {
                Ok(_) => Ok(()),
                Err(_) => fs::write(path, vec![1; usize::from(*size)]),
            },
            What::Directory => fs::create_dir(path),
            What::Fifo => mkfifo(&path, Mode::S_IRWXU).map_err(Into::into),
        };
    }
}

fn walk(root: &Path, paths: &[(Text, Make)]) {
    let base = fs::File::open(root).unwrap();
    for (path, make) in paths.iter().take(16) {
        let path = path.path();
        if path.as_os_str().as_bytes().contains(&0) {
            continue;
        }
        let make = match make {
            Make::Nothing => None,
            Make::Directory => Some(true),
            Make::File => Some(false),
        };
        if let Ok(found) = fuzzing::walk(base.as_fd(), &path, make) {
            let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap();
            assert!(real.starts_with(root), "{path:?} leads to {real:?}");
            let stat = fs::metadata(format!("/proc/self/fd/{}", found.as_raw_fd()));
            assert!(stat.is_ok());
        }
    }
}

fn volume(base: &Path, sync: &Sync, before: &[Made]) {
    let id = String::from_utf8_lossy(&sync.id.bytes()).into_owned();
    let mut request = SyncVolumeRequest {
        volume_id: id.clone(),
        ..Default::default()
    };
    request.entries.push(VolumeEntry {
        mode: 0o755,
        ..Default::default()
    });
    for entry in sync.entries.iter().take(32) {
        let content = match &entry.kind {
            Kind::Directory => None,
            Kind::File(bytes) => Some(Content::File(bytes.clone())),
            Kind::Link(text) => Some(Content::Link(text.bytes())),
        };
        request.entries.push(VolumeEntry {
            path: entry.path.bytes(),
            mode: u32::from(entry.mode),
            uid: u32::from(entry.owner),
            gid: u32::from(entry.owner),
            content,
            ..Default::default()
        });
    }
    let plan = match Plan::new(request.clone()) {
        Ok(plan) => plan,
        Err(error) => return drop(error.to_string()),
    };
    let root = base.join(&id);
    assert_eq!(root.parent(), Some(base), "an id that is no name");
    let _ = fs::create_dir_all(base);
    if fs::symlink_metadata(&root).is_ok_and(|stat| stat.is_dir()) {
        make(&root, before);
        make(&root, &sync.made);
    }
    match Volumes::new(base).sync(&plan) {
        Ok(()) => is_so(&root, &request),
        Err(error) => drop(error.to_string()),
    }
}

/// The volume is what was asked for, and nothing else is in it.
fn is_so(root: &Path, request: &SyncVolumeRequest) {
    let mut wanted: BTreeMap<PathBuf, &VolumeEntry> = BTreeMap::new();
    for entry in &request.entries {
        let path = std::ffi::OsStr::from_bytes(&entry.path);
        wanted.insert(root.join(path), entry);
    }
    let mut dirs = vec![root.to_owned()];
    let mut count = 1;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            assert!(wanted.contains_key(&path), "{path:?} is there as well");
            count += 1;
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                dirs.push(path);
            }
        }
    }
    assert_eq!(count, request.entries.len());
    for (path, entry) in wanted {
        let stat = fs::symlink_metadata(&path).unwrap();
        match &entry.content {
            Some(Content::Link(text)) => {
                assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), text);
                continue;
            }
            Some(Content::File(bytes)) => assert_eq!(&fs::read(&path).unwrap(), bytes),
            _ => assert!(stat.is_dir()),
        }
        assert_eq!(stat.mode() & 0o7777, entry.mode);
        assert_eq!((stat.uid(), stat.gid()), (entry.uid, entry.gid));
    }
}
