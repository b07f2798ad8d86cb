//! Layers by GNU tar, unpacked here and by GNU tar: the trees are the same, entry by entry.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

mod common;

use std::{fs, io::Read as _, path::Path, process::Command};

use common::{listing, run, tree};
use husk_image::{
    apply::{ApplyError, Expected, apply},
    layer::{Limits, Sha256Digest},
    unpack::{Options, Unpacked},
};

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
        let blocks =
            std::os::unix::fs::MetadataExt::blocks(&fs::metadata(ours.join("sparse")).unwrap());
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
