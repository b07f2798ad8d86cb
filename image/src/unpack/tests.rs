use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink},
};

use proptest::prelude::*;
use rustix::fs::{XattrFlags, lsetxattr, makedev};
use tar::EntryType;

mod lower;
mod without_root;
mod world;

use super::*;
use world::{Dirs, Layer, refusal, unpacked, xattr};

#[test]
fn everything_is_as_the_archive_has_it() {
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let layer = Layer::new()
        .dir("./", 0o751)
        .dir("bin", 0o755)
        .xattr("security.capability", &capability)
        .entry(
            EntryType::Regular,
            "bin/ping",
            |h| h.set_mode(0o755),
            b"ping",
        )
        .entry(EntryType::Regular, "bin/su", |h| h.set_mode(0o6755), b"su")
        .hard_link("bin/other", "bin/su")
        .symlink("sh", "/bin/none")
        .xattr("user.note", b"n")
        .dir("tmp", 0o1777)
        .device("null", (1, 3))
        .entry(EntryType::Fifo, "pipe", |_| {}, &[])
        .dir("readonly", 0o555)
        .file("readonly/f", "x");
    let dirs = Dirs::new();
    let done = dirs.unpack(layer).unwrap();
    assert_eq!(
        done,
        Unpacked {
            entries: 11,
            bytes: 7,
            left_out: 0
        }
    );
    assert_eq!(dirs.read("bin/ping"), "ping");
    assert_eq!(
        xattr(&dirs.path("bin/ping"), "security.capability").unwrap(),
        capability
    );
    assert_eq!(xattr(&dirs.path("tmp"), "user.note").unwrap(), b"n");
    let modes = ["", "bin/su", "tmp", "readonly"].map(|name| dirs.mode(name));
    assert_eq!(modes, [0o751, 0o6755, 0o1777, 0o555]);
    let (su, other) = (
        fs::metadata(dirs.path("bin/su")).unwrap(),
        fs::metadata(dirs.path("bin/other")).unwrap(),
    );
    assert_eq!((su.ino(), su.nlink()), (other.ino(), 2));
    assert_eq!(
        fs::read_link(dirs.path("sh")).unwrap(),
        Path::new("/bin/none")
    );
    let null = fs::metadata(dirs.path("null")).unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == makedev(1, 3));
    assert!(
        fs::metadata(dirs.path("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    for name in [
        "", "bin", "bin/ping", "sh", "tmp", "null", "pipe", "readonly",
    ] {
        let file = fs::symlink_metadata(dirs.path(name)).unwrap();
        assert_eq!(
            (file.uid(), file.gid(), file.mtime()),
            (7, 8, 1_000_000_000),
            "{name}"
        );
    }
}

#[test]
fn later_entries_take_the_place_of_earlier_ones() {
    let dirs = unpacked(
        Layer::new()
            .file("f", "first")
            .file("f", "second")
            .file("file-then-dir", "x")
            .dir("file-then-dir", 0o755)
            .file("file-then-dir/in", "in")
            .dir("dir-then-file", 0o755)
            .file("dir-then-file/a", "a")
            .dir("dir-then-file/b", 0o755)
            .file("dir-then-file/b/c", "c")
            .file("dir-then-file", "x")
            .dir("twice", 0o700)
            .file("twice/kept", "kept")
            .dir("twice", 0o711)
            .symlink("link", "twice")
            .file("link", "no link"),
    );
    assert_eq!(dirs.read("f"), "second");
    assert_eq!(dirs.read("file-then-dir/in"), "in");
    // The file hid what is below, so the directory does.
    assert!(dirs.is_opaque("file-then-dir"));
    assert_eq!(dirs.read("dir-then-file"), "x");
    assert_eq!(dirs.read("twice/kept"), "kept");
    assert_eq!(
        (dirs.mode("twice"), dirs.is_opaque("twice")),
        (0o711, false)
    );
    assert_eq!(dirs.read("link"), "no link");
}

#[test]
fn a_directory_that_went_leaves_its_time_to_no_other() {
    let mut layer = Layer::new();
    for (name, time) in [
        ("m", 1),
        ("m/b", 2),
        ("m/b/c", 3),
        ("m.b", 4),
        ("m.b/d", 5),
        ("a", 6),
        ("a/b", 7),
        ("a/b/c", 8),
    ] {
        layer = layer.entry(EntryType::Directory, name, |h| h.set_mtime(time), &[]);
    }
    let dirs = unpacked(layer.symlink("m", "a"));
    let time = |name| fs::metadata(dirs.path(name)).unwrap().mtime();
    let times = ["m.b", "m.b/d", "a", "a/b", "a/b/c"].map(time);
    assert_eq!(times, [4, 5, 6, 7, 8]);
}

#[test]
fn a_link_changes_what_it_names_and_not_where_it_leads() {
    let dirs = unpacked(
        Layer::new()
            .file("target", "target")
            .symlink("link", "target")
            .hard_link("link2", "link")
            .file("link", "new"),
    );
    assert_eq!(dirs.read("target"), "target");
    assert_eq!(
        fs::read_link(dirs.path("link2")).unwrap(),
        Path::new("target")
    );
}

#[test]
fn links_above_lead_as_they_will_in_the_container() {
    let dirs = Dirs::new();
    let outside = dirs.outside().to_string_lossy().into_owned();
    let up = "../".repeat(20);
    dirs.unpack(
        Layer::new()
            .dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .file("lib/a", "a")
            .symlink("abs", "/usr/lib")
            .file("abs/b", "b")
            .symlink("up", &format!("{up}usr/lib"))
            .file("up/c", "c"),
    )
    .unwrap();
    assert_eq!(
        ["a", "b", "c"].map(|n| dirs.read(&format!("usr/lib/{n}"))),
        ["a", "b", "c"]
    );
    for (link, name) in [
        (&*outside, "file"),
        (&format!("{up}{outside}"), "new"),
        ("/proc/self/cwd", "x"),
    ] {
        let layer = Layer::new()
            .symlink("out", link)
            .file(&format!("out/{name}"), "evil");
        let why = Dirs::new().unpack(layer).unwrap_err().to_string();
        assert!(why.contains("no directory"), "{why}");
    }
    let why = refusal(
        Layer::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", ""),
    );
    assert!(why.contains("circle"), "{why}");
}

#[test]
fn what_leads_out_is_refused_by_name() {
    let dirs = Dirs::new();
    let outside = dirs.outside().join("file").to_string_lossy().into_owned();
    for name in ["../x", "a/../../x", "/etc/x", ".."] {
        let why = refusal(Layer::new().file(name, "evil"));
        assert!(why.contains(name) && why.contains("refused"), "{why}");
    }
    for target in [&*outside, "../outside/file", "/etc/passwd"] {
        let layer = Layer::new().hard_link("l", target);
        let why = dirs.unpack(layer).unwrap_err().to_string();
        assert!(why.contains("\"l\"") && why.contains("hard link"), "{why}");
    }
    // Through a symbolic link, there is nothing either.
    let layer = Layer::new()
        .symlink("out", &dirs.outside().to_string_lossy())
        .hard_link("l2", "out/file");
    let why = dirs.unpack(layer).unwrap_err().to_string();
    assert!(why.contains("does not have"), "{why}");
}

#[test]
fn what_cannot_be_is_refused() {
    for (layer, part) in [
        (Layer::new().file("./", "x"), "root is a directory"),
        (
            Layer::new().file("f", "").file("f/x", ""),
            "\"f\" above it is no directory",
        ),
        (Layer::new().hard_link("a", "b"), "does not have"),
        (Layer::new().file("a", "").hard_link("a", "./a"), "itself"),
        (
            Layer::new().dir("d", 0o755).hard_link("a", "d"),
            "a directory",
        ),
        (Layer::new().hard_link("a", "."), "the root"),
        (Layer::new().device("d", (0, 0)), "deletion"),
        (Layer::new().file(".wh.", ""), "deletes nothing"),
        (Layer::new().file(".wh...", ""), "deletes nothing"),
        (Layer::new().file("d/.wh..", ""), "deletes nothing"),
        (Layer::new().symlink("s", ""), "to nothing"),
    ] {
        let why = refusal(layer);
        assert!(why.contains(part), "{why}");
    }
}

#[test]
fn deletions_are_overlayfs_own() {
    let dirs = unpacked(
        Layer::new()
            .dir("d", 0o755)
            .file("d/.wh.gone", "")
            .file("d/.wh..wh..opq", "")
            .file("implied/.wh.x", "")
            .file(".wh.back", "")
            .dir("back", 0o755)
            .file(".wh.deep", "")
            .file("deep/er/f", "f")
            .file(".wh.again", "")
            .file("again", "again")
            // It is of the layers below that they speak.
            .file("kept", "kept")
            .file(".wh.kept", "")
            .dir("own", 0o755)
            .file("own/f", "f")
            .file(".wh.own", "")
            .file(".wh..wh.plnk", ""),
    );
    assert!(dirs.is_whiteout("d/gone") && dirs.is_whiteout("implied/x"));
    assert!(["d", "back", "deep", "own"].map(|name| dirs.is_opaque(name)) == [true; 4]);
    assert!(!dirs.is_opaque("implied") && !dirs.is_opaque("deep/er"));
    assert_eq!(
        ["deep/er/f", "own/f"].map(|name| dirs.read(name)),
        ["f", "f"]
    );
    assert_eq!(dirs.read("again"), "again");
    assert_eq!(dirs.read("kept"), "kept");
    // AUFS's note is none.
    assert_eq!(fs::read_dir(dirs.path("")).unwrap().count(), 7);
}

#[test]
fn attributes_of_overlayfs_are_not_an_images() {
    let layer = Layer::new()
        .xattr("trusted.overlay.redirect", b"/etc")
        .dir("a", 0o755)
        .xattr("user.overlay.opaque", b"y")
        .dir("b", 0o755)
        .xattr("security.selinux", b"s")
        .dir("c", 0o755);
    let dirs = Dirs::new();
    assert_eq!(dirs.unpack(layer).unwrap().left_out, 3);
    assert_eq!(xattr(&dirs.path("a"), "trusted.overlay.redirect"), None);
    assert_eq!(xattr(&dirs.path("b"), "user.overlay.opaque"), None);
}

#[test]
fn holes_stay_holes() {
    let mut layer = Layer::new();
    layer
        .0
        .append_pax_extensions([
            ("GNU.sparse.size", &b"10000000"[..]),
            ("GNU.sparse.map", b"4096,2,9000000,2"),
        ])
        .unwrap();
    let dirs = unpacked(layer.file("sparse", "abcd"));
    let data = fs::read(dirs.path("sparse")).unwrap();
    assert_eq!(data.len(), 10_000_000);
    assert_eq!(
        (&data[4096..4098], &data[9_000_000..9_000_002]),
        (&b"ab"[..], &b"cd"[..])
    );
    assert!(fs::metadata(dirs.path("sparse")).unwrap().blocks() < 1000);
}

#[test]
fn an_archive_that_breaks_off_is_an_error() {
    let bytes = Layer::new()
        .file("f", &"x".repeat(2000))
        .0
        .into_inner()
        .unwrap();
    let dirs = Dirs::new();
    let mut archive = Archive::new(&bytes[..1000]);
    let error = unpack(&mut archive, &dirs.path(""), Options::default()).unwrap_err();
    assert!(error.to_string().contains("incomplete"), "{error}");
}

#[test]
fn a_directory_told_again_has_what_is_told_last() {
    let layer = Layer::new()
        .xattr("user.first", b"1")
        .dir("d", 0o755)
        .file("d/.wh..wh..opq", "")
        .xattr("user.second", b"2")
        .dir("d", 0o755)
        .xattr("user.first", b"1")
        .dir(".", 0o755)
        .dir(".", 0o700);
    let dirs = unpacked(layer);
    assert_eq!(xattr(&dirs.path("d"), "user.first"), None);
    assert_eq!(xattr(&dirs.path("d"), "user.second").unwrap(), b"2");
    assert!(dirs.is_opaque("d"));
    assert_eq!(xattr(&dirs.path(""), "user.first"), None);
    assert_eq!(dirs.mode(""), 0o700);
}

#[derive(Debug, Clone)]
enum Any {
    File(String),
    Dir(String),
    Symlink(String, String),
    HardLink(String, String),
}

fn any_name() -> impl Strategy<Value = String> {
    let part = prop::sample::select(&["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq"][..]);
    proptest::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
}

fn any_entry() -> impl Strategy<Value = Any> {
    let target = prop_oneof![
        any_name(),
        any_name().prop_map(|name| format!("/{name}")),
        any_name().prop_map(|name| format!("../../../../../../../../{name}")),
        Just("OUTSIDE".to_owned()),
    ];
    prop_oneof![
        any_name().prop_map(Any::File),
        any_name().prop_map(Any::Dir),
        (any_name(), target.clone()).prop_map(|(a, b)| Any::Symlink(a, b)),
        (any_name(), target).prop_map(|(a, b)| Any::HardLink(a, b)),
    ]
}

proptest! {
    /// Whatever an archive says, nothing beside the root changes: what is outside is compared after each.
    #[test]
    fn nothing_outside_is_touched(entries in proptest::collection::vec(any_entry(), 1..12)) {
        let dirs = Dirs::new();
        let outside = dirs.outside().to_string_lossy().into_owned();
        let before = fs::metadata(dirs.outside()).unwrap().permissions();
        let place = |target: String| target.replace("OUTSIDE", &outside);
        // One by one: a refusal ends an archive.
        for entry in entries {
            let layer = Layer::new();
            let layer = match entry {
                Any::File(name) => layer.file(&name, "x"),
                Any::Dir(name) => layer.dir(&name, 0o755),
                Any::Symlink(name, target) => layer.symlink(&name, &place(target)),
                Any::HardLink(name, target) => layer.hard_link(&name, &place(target)),
            };
            let _ = dirs.unpack(layer);
        }
        prop_assert_eq!(fs::metadata(dirs.outside()).unwrap().permissions(), before);
    }
}
