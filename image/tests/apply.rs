//! Layers by GNU tar, unpacked here and by GNU tar: the trees are the same, entry by entry.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    io::Read as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use husk_image::{
    apply::{ApplyError, Expected, apply},
    layer::{Limits, Sha256Digest},
    unpack::{Options, Unpacked},
};
use rustix::fs::{FileType, Mode, XattrFlags, lgetxattr, llistxattr, lsetxattr};

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {errors}");
    output.stdout
}

/// A tree with one of everything.
fn tree(root: &Path) {
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
fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
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

fn expected(blob: &[u8], tar: &[u8]) -> Expected {
    Expected {
        digest: Sha256Digest::of(blob),
        size: blob.len() as u64,
        diff_id: Sha256Digest::of(tar),
    }
}

fn gzip(tar: &Path) -> Vec<u8> {
    run(Command::new("gzip").arg("-c").arg(tar))
}

#[test]
fn every_format_of_gnu_tar_unpacks_as_by_gnu_tar() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree(&source);
    for (format, more) in [
        ("posix", &["--xattrs", "--xattrs-include=*"][..]),
        ("posix", &["--sparse"]),
        ("posix", &["--sparse", "--sparse-version=0.1"]),
        ("posix", &["--sparse", "--sparse-version=0.0"]),
        ("gnu", &["--sparse"]),
        ("gnu", &[]),
    ] {
        let tar = dir.path().join("layer.tar");
        let mut pack = Command::new("tar");
        pack.arg("--create")
            .arg("--file")
            .arg(&tar)
            .arg(format!("--format={format}"))
            .args(more);
        run(pack.arg("--directory").arg(&source).arg("."));
        let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
        fs::create_dir(&theirs).unwrap();
        fs::create_dir(&ours).unwrap();
        let mut unpack = Command::new("tar");
        unpack
            .arg("--extract")
            .arg("--file")
            .arg(&tar)
            .args(["--same-owner", "--preserve-permissions"]);
        run(unpack
            .args(["--xattrs", "--xattrs-include=*"])
            .arg("--directory")
            .arg(&theirs));

        let (blob, tar) = (gzip(&tar), fs::read(&tar).unwrap());
        apply(
            &*blob,
            &expected(&blob, &tar),
            Limits::default(),
            &ours,
            Options::default(),
        )
        .unwrap();
        assert_eq!(listing(&ours), listing(&theirs), "{format} {more:?}");
        let blocks = fs::metadata(ours.join("sparse")).unwrap().blocks();
        assert!(
            blocks < 1000 || !more.contains(&"--sparse"),
            "{format} {more:?}"
        );
        fs::remove_dir_all(ours).unwrap();
        fs::remove_dir_all(theirs).unwrap();
    }
}

/// A small layer: the blob, and what it must be.
fn small() -> (Vec<u8>, Expected) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "content").unwrap();
    let tar = dir.path().join("layer.tar");
    run(Command::new("tar")
        .arg("--create")
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(dir.path())
        .arg("file"));
    let blob = gzip(&tar);
    let expected = expected(&blob, &fs::read(&tar).unwrap());
    (blob, expected)
}

fn applied(blob: &[u8], expected: &Expected) -> Result<Unpacked, ApplyError> {
    let dir = tempfile::tempdir().unwrap();
    apply(
        blob,
        expected,
        Limits::default(),
        dir.path(),
        Options::default(),
    )
}

#[test]
fn a_layer_must_be_the_one_that_the_image_names() {
    let (blob, good) = small();
    assert_eq!(applied(&blob, &good).unwrap().entries, 1);
    let other = Sha256Digest::of(b"other");
    let long = [&blob[..], &gzip(Path::new("/dev/null"))].concat();
    for (blob, expected, what) in [
        (
            &blob,
            Expected {
                digest: other,
                ..good
            },
            "digest",
        ),
        (
            &blob,
            Expected {
                diff_id: other,
                ..good
            },
            "diffID",
        ),
        (
            &blob,
            Expected {
                size: good.size + 1,
                ..good
            },
            "size",
        ),
        (&long, good, "more than"),
    ] {
        let error = applied(blob, &expected).unwrap_err();
        let (text, is_size) = (error.to_string(), what == "more than");
        // A gzip stream that is cut where it is too long does not end well either.
        assert!(
            text.contains(what) || is_size && matches!(error, ApplyError::Read(_)),
            "{text}"
        );
    }
}

#[test]
fn a_reader_that_fails_is_an_error() {
    let (blob, good) = small();
    let dir = tempfile::tempdir().unwrap();
    let half = blob[..blob.len() / 2].chain(Failing);
    let error = apply(
        half,
        &good,
        Limits::default(),
        dir.path(),
        Options::default(),
    )
    .unwrap_err();
    let mut causes = vec![error.to_string()];
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    assert!(
        causes
            .iter()
            .any(|text| text.contains("the network is down")),
        "{causes:?}"
    );
}

struct Failing;

impl std::io::Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other("the network is down"))
    }
}
