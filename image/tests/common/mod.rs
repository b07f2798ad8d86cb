//! Trees to pack, and what is to be said of a tree.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use husk_image::layer::Sha256Digest;
use rustix::fs::{FileType, Mode, XattrFlags, lgetxattr, llistxattr, lsetxattr, statvfs};

/// What a command prints; it must succeed.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}; tests/scripts/deps installs what is missing")
    });
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {errors}");
    output.stdout
}

/// A directory in memory, if that has room for so many bytes: a disk has others to wait for where all is written out. It may have no
/// "user." attributes (before Linux 6.6).
pub fn in_memory(bytes: u64) -> tempfile::TempDir {
    let room = statvfs("/dev/shm").is_ok_and(|fs| fs.f_bavail * fs.f_frsize > bytes);
    let in_memory = room.then(|| tempfile::tempdir_in("/dev/shm"));
    in_memory.unwrap_or_else(tempfile::tempdir).unwrap()
}

/// A tree with one of everything.
pub fn tree(root: &Path) {
    let path = |name: &str| root.join(name);
    let deep = "directory-with-a-long-name/".repeat(12);
    fs::create_dir_all(path(&deep)).unwrap();
    fs::write(path(&format!("{deep}file")), "deep").unwrap();
    fs::write(path("file"), "content").unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path("größe \n odd"), vec![7; 70_000]).unwrap();
    chown(path("file"), Some(12), Some(3_000_000)).unwrap();
    fs::set_permissions(path("file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(path("file"), path("second-name")).unwrap();
    symlink("../nowhere", path("link")).unwrap();
    symlink("x".repeat(300), path("long-link")).unwrap();
    let sparse = fs::File::create(path("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 2 << 20).unwrap();
    let fifo = CString::new(path("fifo").as_os_str().as_bytes()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        fifo,
        FileType::Fifo,
        Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    let null = CString::new(path("null").as_os_str().as_bytes()).unwrap();
    let number = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        null,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        number,
    )
    .unwrap();
    lsetxattr(
        path("empty"),
        "user.note",
        b"a\nvalue\0",
        XattrFlags::empty(),
    )
    .unwrap();
    let net_raw = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    lsetxattr(
        path("empty"),
        "security.capability",
        &net_raw,
        XattrFlags::empty(),
    )
    .unwrap();
    fs::set_permissions(
        path("directory-with-a-long-name"),
        fs::Permissions::from_mode(0o1770),
    )
    .unwrap();
}

/// Everything that can be said of each entry, by its path.
pub fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let file = fs::symlink_metadata(&path).unwrap();
        let contents = if file.is_file() {
            Sha256Digest::of(&fs::read(&path).unwrap()).to_string()
        } else if file.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else {
            String::new()
        };
        if file.is_dir() {
            todo.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let links = if file.is_dir() { 0 } else { file.nlink() };
        let about = format!(
            "{:o} {}:{} {}.{:09} links {links} device {} {contents} {:?}",
            file.mode(),
            file.uid(),
            file.gid(),
            file.mtime(),
            file.mtime_nsec(),
            file.rdev(),
            xattrs(&path),
        );
        all.insert(path.strip_prefix(root).unwrap().to_owned(), about);
    }
    all
}

/// Two trees must be the same; shows where they are not, up to a point.
pub fn same(ours: &BTreeMap<PathBuf, String>, theirs: &BTreeMap<PathBuf, String>) {
    let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let others: Vec<_> = names
        .into_iter()
        .map(|name| (name, ours.get(name), theirs.get(name)))
        .filter(|(_, ours, theirs)| ours != theirs)
        .take(5)
        .collect();
    assert!(others.is_empty(), "{others:#?}");
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 1000];
    let length = llistxattr(path, &mut names).unwrap();
    let mut all: Vec<_> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 1000];
            let length = lgetxattr(path, name, &mut value).unwrap();
            value.truncate(length);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect();
    all.sort();
    all
}

/// Bytes that no compression shortens, of each seed always the same.
pub fn noise(seed: u8, length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64 ^ u64::from(seed);
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}
