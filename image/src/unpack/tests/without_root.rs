//! Unpacked by somebody who is not root.

use super::*;

/// Unpacked as by who is not root.
fn as_the_callers(layer: Layer, dirs: &Dirs, lowers: &[&Path]) -> Unpacked {
    let bytes = layer.0.into_inner().unwrap();
    let options = Options {
        owners: Owners::Caller,
        user_xattrs: true,
        lowers,
    };
    unpack(&mut Archive::new(&*bytes), &dirs.path(""), options).unwrap()
}

#[test]
fn without_root_files_are_the_callers() {
    let owned = |layer: Layer, name: &str, kind, uid, gid| {
        let set = |h: &mut tar::Header| {
            h.set_uid(uid);
            h.set_gid(gid);
        };
        layer.entry(kind, name, set, &[])
    };
    // What an image says of owners itself is not believed.
    let layer = Layer::new()
        .xattr("user.rootlesscontainers", b"x")
        .dir("d", 0o500)
        .file("d/f", "f")
        .file("d/.wh.x", "")
        .dir("d/opaque", 0)
        .file("d/opaque/.wh..wh..opq", "")
        .device("d/null", (1, 3))
        .symlink("d/link", "f");
    let layer = owned(layer, "roots", EntryType::Regular, 0, 0);
    let layer = owned(layer, "group", EntryType::Regular, 0, 300);
    let layer = owned(layer, "d", EntryType::Directory, 0, 0);
    let layer = owned(layer, "e", EntryType::Directory, 5, 6);
    let dirs = Dirs::new();
    assert_eq!(as_the_callers(layer, &dirs, &[]).left_out, 1);
    let own = fs::metadata(dirs.path("")).unwrap().uid();
    let about = |name: &str| {
        let file = fs::symlink_metadata(dirs.path(name)).unwrap();
        assert_eq!(file.uid(), own, "{name}");
        let owner = xattr(&dirs.path(name), "user.rootlesscontainers");
        (file.mode() & 0o7777, owner)
    };
    let record = |uid: &[u8], gid: &[u8]| Some([&[8], uid, &[16], gid].concat());
    assert_eq!(about("d/f"), (0o644, record(&[7], &[8])));
    assert_eq!(about("d/opaque"), (0, record(&[7], &[8])));
    assert_eq!(about("d/null"), (0o644, record(&[7], &[8])));
    assert!(fs::metadata(dirs.path("d/null")).unwrap().is_file());
    let nobodys: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0xf];
    assert_eq!(about("group"), (0o644, record(nobodys, &[0xac, 2])));
    // Told again, it is another's.
    assert_eq!(about("d"), (0o644, None));
    assert_eq!(about("roots"), (0o644, None));
    assert!(dirs.is_whiteout("d/x"));
    assert_eq!(
        xattr(&dirs.path("d/opaque"), "user.overlay.opaque").unwrap(),
        b"y"
    );
    // Taken for granted above, they are as they were.
    let upper = Dirs::new();
    as_the_callers(
        Layer::new().file("d/new", "").file("e/new", ""),
        &upper,
        &[&dirs.path("")],
    );
    let owner = |name: &str| xattr(&upper.path(name), "user.rootlesscontainers");
    assert_eq!(
        (owner("d"), owner("e")),
        (None, record(&[5], &[6])),
        "as below"
    );
}

#[test]
fn a_directory_that_is_there_may_be_the_callers_link() {
    let dirs = Dirs::new();
    let link = dirs.all.path().join("link");
    symlink(dirs.path(""), &link).unwrap();
    Layer::new().file("f", "f").unpack_to(&link, &[]).unwrap();
    assert_eq!(dirs.read("f"), "f");
    let gone = dirs.all.path().join("gone");
    let error = Layer::new().unpack_to(&gone, &[]).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
}
