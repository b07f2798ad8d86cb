//! What a layer takes for granted, and what those below it have.

use super::*;

#[test]
fn a_directory_taken_for_granted_is_as_below() {
    let (lowest, lower) = (
        unpacked(Layer::new().dir("tmp", 0o700).dir("var", 0o710)),
        unpacked(
            Layer::new()
                .xattr("user.k", b"v")
                .dir("tmp", 0o1777)
                .file("var", "hidden"),
        ),
    );
    let dirs = Dirs::new();
    let layer = Layer::new()
        .file("tmp/x/f", "f")
        .file("new/f", "f")
        .file(".wh.var", "")
        .file("var/f", "f");
    layer
        .unpack_to(&dirs.path(""), &[&lower.path(""), &lowest.path("")])
        .unwrap();
    let tmp = fs::metadata(dirs.path("tmp")).unwrap();
    assert_eq!(
        (dirs.mode("tmp"), tmp.uid(), tmp.gid(), tmp.mtime()),
        (0o1777, 7, 8, 1_000_000_000)
    );
    assert_eq!(xattr(&dirs.path("tmp"), "user.k").unwrap(), b"v");
    for name in ["tmp/x", "new", "var"] {
        assert_eq!(
            (
                dirs.mode(name),
                fs::metadata(dirs.path(name)).unwrap().uid()
            ),
            (0o755, 0),
            "{name}"
        );
    }
}

#[test]
fn the_root_is_as_below_where_a_layer_does_not_tell_of_it() {
    let lower = unpacked(Layer::new().xattr("user.k", b"v").dir(".", 0o711));
    let dirs = Dirs::new();
    // What somebody left who was cut off, or whose blob was another's.
    for key in ["user.left", "trusted.overlay.opaque"] {
        lsetxattr(dirs.path(""), key, b"y", XattrFlags::empty()).unwrap();
    }
    let layer = Layer::new().file("f", "");
    layer.unpack_to(&dirs.path(""), &[&lower.path("")]).unwrap();
    let root = fs::metadata(dirs.path("")).unwrap();
    assert_eq!(
        (dirs.mode(""), root.uid(), root.gid(), root.mtime()),
        (0o711, 7, 8, 1_000_000_000)
    );
    assert_eq!(xattr(&dirs.path(""), "user.k").unwrap(), b"v");
    assert_eq!(xattr(&dirs.path(""), "user.left"), None);
    assert!(!dirs.is_opaque(""));
    let alone = Dirs::new();
    fs::set_permissions(
        alone.path(""),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    alone.unpack(Layer::new().file("f", "")).unwrap();
    assert_eq!(alone.mode(""), 0o755);
}

/// As containerd and Docker have it; umoci would follow the link.
#[test]
fn a_link_below_becomes_a_directory() {
    let lowest = unpacked(Layer::new().dir("usr", 0o755).dir("usr/lib", 0o751));
    let lower = unpacked(
        Layer::new()
            .dir("usr", 0o755)
            .dir("usr/bin", 0o711)
            .symlink("bin", "usr/bin")
            .symlink("lib", "/usr/lib")
            .symlink("out", "/../../../../etc")
            .symlink("loop", "loop"),
    );
    let dirs = Dirs::new();
    let layer = Layer::new()
        .file("bin/f", "f")
        .file("lib/f", "f")
        .file("out/f", "f")
        .file("loop/f", "f");
    layer
        .unpack_to(&dirs.path(""), &[&lower.path(""), &lowest.path("")])
        .unwrap();
    for (name, mode) in [
        ("bin", 0o711),
        ("lib", 0o755),
        ("out", 0o755),
        ("loop", 0o755),
    ] {
        assert!(fs::symlink_metadata(dirs.path(name)).unwrap().is_dir());
        assert_eq!(
            (dirs.mode(name), dirs.read(&format!("{name}/f"))),
            (mode, "f".to_owned()),
            "{name}"
        );
    }
    assert!(!dirs.path("usr").exists());
}

#[test]
fn what_a_layer_below_has_replaced_or_hidden_counts_for_nothing() {
    let lowest = unpacked(
        Layer::new()
            .dir("file", 0o700)
            .dir("gone", 0o700)
            .dir("opaque", 0o700)
            .dir("opaque/in", 0o700)
            .dir("opaque/in/deep", 0o700),
    );
    let lower = unpacked(
        Layer::new()
            .file("file", "")
            .file(".wh.gone", "")
            .dir("opaque", 0o701)
            .file("opaque/.wh..wh..opq", ""),
    );
    let dirs = Dirs::new();
    let layer = Layer::new()
        .file("file/f", "")
        .file("gone/f", "")
        .file("opaque/in/deep/f", "");
    layer
        .unpack_to(&dirs.path(""), &[&lower.path(""), &lowest.path("")])
        .unwrap();
    let modes =
        ["file", "gone", "opaque", "opaque/in", "opaque/in/deep"].map(|name| dirs.mode(name));
    assert_eq!(modes, [0o755, 0o755, 0o701, 0o755, 0o755]);
}
