//! An image of Debian's packages, unpacked here and by umoci: the trees are the same, entry by entry.
//!
//! It is made as such images are: a lowest layer as debootstrap has it, packages upon it as they are (so do distroless images), and a last
//! layer that deletes, replaces and adds, and takes the directories below for granted.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

mod common;
#[path = "common/images.rs"]
mod images;
#[path = "common/mounted.rs"]
mod mounted;

use std::{
    ffi::CString,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use common::{in_memory, run};
use husk_image::{layer::Sha256Digest, store::Store};
use images::{compressed, layer, publish};
use mounted::as_umoci_has_it;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};

const NAME: &str = "debian";

/// What is in the lowest layer; the rest are layers of their own.
const LOWEST: [&str; 9] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "iputils-ping",
    "libc6",
    "libtinfo6",
    "login",
    "mount",
];

/// cap_net_raw+ep, as its postinst gives it to ping (Linux, uapi/linux/capability.h, vfs_cap_data).
const NET_RAW: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// The packages by name, which a script has fetched.
struct Packages(PathBuf);

impl Packages {
    fn new() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scripts/debian-packages");
        let path = String::from_utf8(run(&mut Command::new(script))).unwrap();
        Self(PathBuf::from(path.trim()))
    }

    fn path(&self, name: &str) -> PathBuf {
        let all = fs::read_dir(&self.0).unwrap();
        let mut paths = all.map(|entry| entry.unwrap().path());
        let start = format!("{name}_");
        let is_it = |path: &PathBuf| {
            path.file_name()
                .unwrap()
                .as_bytes()
                .starts_with(start.as_bytes())
        };
        paths
            .find(is_it)
            .unwrap_or_else(|| panic!("no package {name}"))
    }

    /// A package's files, as the tar archive that it has them in.
    fn tar(&self, name: &str, to: &Path) {
        fs::write(
            to,
            run(Command::new("dpkg-deb")
                .arg("--fsys-tarfile")
                .arg(self.path(name))),
        )
        .unwrap();
    }
}

fn lowest(packages: &Packages, root: &Path) {
    let path = |name: &str| root.join(name);
    for dir in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(path("usr").join(dir)).unwrap();
        symlink(format!("usr/{dir}"), path(dir)).unwrap();
    }
    let tar = root.with_extension("tar");
    for name in LOWEST {
        packages.tar(name, &tar);
        let mut extract = Command::new("tar");
        extract.args(["--extract", "--same-owner", "--preserve-permissions"]);
        extract
            .args(["--keep-directory-symlink", "--file"])
            .arg(&tar);
        run(extract.arg("--directory").arg(root));
    }
    // As the packages' scripts leave it.
    fs::copy(
        path("usr/share/base-passwd/passwd.master"),
        path("etc/passwd"),
    )
    .unwrap();
    fs::copy(
        path("usr/share/base-passwd/group.master"),
        path("etc/group"),
    )
    .unwrap();
    fs::write(path("etc/shadow"), "root:*:20000:0:99999:7:::\n").unwrap();
    chown(path("etc/shadow"), Some(0), Some(42)).unwrap();
    mode(&path("etc/shadow"), 0o640);
    let ping = ["usr/bin/ping", "bin/ping"]
        .map(path)
        .into_iter()
        .find(|p| p.exists());
    lsetxattr(
        ping.unwrap(),
        "security.capability",
        &NET_RAW,
        XattrFlags::empty(),
    )
    .unwrap();
    fs::create_dir_all(path("var/mail")).unwrap();
    chown(path("var/mail"), Some(0), Some(8)).unwrap();
    mode(&path("var/mail"), 0o2775);
    for (name, kind, numbers, bits) in [
        ("null", FileType::CharacterDevice, (1, 3), 0o666),
        ("console", FileType::CharacterDevice, (5, 1), 0o600),
        ("loop300", FileType::BlockDevice, (7, 300), 0o660),
        ("initctl", FileType::Fifo, (0, 0), 0o600),
    ] {
        let at = path("dev").join(name);
        let number = makedev(numbers.0, numbers.1);
        let name = CString::new(at.as_os_str().as_bytes()).unwrap();
        mknodat(CWD, name, kind, Mode::empty(), number).unwrap();
        chown(&at, Some(0), Some(5)).unwrap();
        mode(&at, bits);
    }
}

fn mode(path: &Path, bits: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(bits)).unwrap();
}

/// The last layer: these files alone, without the directories that they are in.
fn last(root: &Path, tar: &Path) {
    let deletions = [
        // A directory with all that is in it, a file, a link, and what a layer between had brought.
        "usr/share/.wh.doc",
        "etc/.wh.issue.net",
        ".wh.lib64",
        "usr/share/base-files/.wh..wh..opq",
        "usr/share/man/.wh.de",
    ];
    let files = [
        "etc/hostname",
        "etc/passwd",
        "var/mail/root",
        "root/.profile",
        "usr/bin/passwd",
        "usr/share/base-files/profile",
        // A directory that was a file, a file that was a directory.
        "etc/issue/is/a/directory",
        "usr/games",
    ];
    for name in deletions.iter().chain(&files) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, if name.contains(".wh.") { "" } else { name }).unwrap();
    }
    mode(&root.join("usr/bin/passwd"), 0o4755);
    chown(root.join("var/mail/root"), Some(0), Some(8)).unwrap();
    let mut pack = Command::new("tar");
    pack.args(["--create", "--format=posix", "--file"]).arg(tar);
    pack.arg("--directory").arg(root);
    // What is new is told.
    pack.args([
        "--no-recursion",
        "etc/issue",
        "etc/issue/is",
        "etc/issue/is/a",
    ]);
    run(pack.args(deletions).args(files));
}

/// The image's layers, the lowest first.
fn layers(dir: &Path) -> Vec<(Vec<u8>, Sha256Digest)> {
    let packages = Packages::new();
    let (lower, upper, tar) = (dir.join("lower"), dir.join("upper"), dir.join("layer.tar"));
    fs::create_dir(&lower).unwrap();
    lowest(&packages, &lower);
    let mut layers = vec![layer(&lower)];
    for name in ["passwd", "perl-base"] {
        packages.tar(name, &tar);
        layers.push(compressed(&tar));
    }
    last(&upper, &tar);
    layers.push(compressed(&tar));
    layers
}

#[test]
fn an_image_of_debians_is_the_tree_that_umoci_makes_of_it() {
    let dir = in_memory(512 << 20);
    let store = Store::open(&dir.path().join("store")).unwrap();
    publish(&store, NAME, &layers(dir.path()));
    let theirs = as_umoci_has_it(dir.path(), "store", NAME);
    // What it is about is in it.
    let about = |name: &str| theirs.get(Path::new(name)).map_or("", |about| about);
    assert!(theirs.len() > 1500, "{}", theirs.len());
    assert!(about("usr/bin/mount").starts_with("104755 0:0"));
    assert!(about("usr/bin/chage").starts_with("102755 0:42"));
    assert!(about("usr/bin/perl").contains("links 2"));
    assert!(about("var/mail").starts_with("42775 0:8"));
    assert!(
        theirs
            .values()
            .any(|about| about.contains("security.capability"))
    );
    for gone in ["usr/share/doc/bash", "lib64", "usr/share/base-files/motd"] {
        assert_eq!(about(gone), "", "{gone}");
    }
}
