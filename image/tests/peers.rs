//! The store beside skopeo and umoci: they read what it writes, it reads what they write, and an image is the same tree to all.

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
    collections::BTreeSet,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::Path,
    process::Command,
};

use common::{run, tree};
use husk_image::{
    apply::Expected,
    layer::{Limits, Sha256Digest},
    manifest::Platform,
    store::{Store, StoreError},
};
use images::{layer, publish};
use mounted::as_umoci_has_it;

const NAME: &str = "two-layers";

/// An image of two layers, the second of which changes and deletes what the first has.
fn image(store: &Store) {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    let write = |root: &Path, name: &str, text: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    fs::create_dir(&lower).unwrap();
    tree(&lower);
    write(&lower, "etc/kept", "kept");
    write(&lower, "etc/changed", "before");
    write(&lower, "etc/deleted", "x");
    write(&lower, "gone/deep/er", "x");
    write(&lower, "hidden/by-opaque", "x");
    write(&lower, "file-to-directory", "x");
    write(&lower, "directory-to-file/x", "x");
    write(&upper, "etc/changed", "after");
    write(&upper, "etc/.wh.deleted", "");
    write(&upper, ".wh.gone", "");
    write(&upper, "hidden/.wh..wh..opq", "");
    write(&upper, "hidden/new", "new");
    write(&upper, "file-to-directory/in", "in");
    write(&upper, "directory-to-file", "file");
    symlink("kept", upper.join("etc/link")).unwrap();
    fs::hard_link(upper.join("etc/changed"), upper.join("etc/other-name")).unwrap();
    fs::set_permissions(upper.join("etc"), fs::Permissions::from_mode(0o2750)).unwrap();
    chown(upper.join("etc/changed"), Some(5), Some(6)).unwrap();

    publish(store, NAME, &[layer(&lower), layer(&upper)]);
}

#[test]
fn an_image_is_the_tree_that_umoci_makes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    image(&Store::open(&dir.path().join("store")).unwrap());
    as_umoci_has_it(dir.path(), "store", NAME);
}

#[test]
fn images_go_to_skopeo_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = Store::open(&root).unwrap();
    image(&store);
    let copy = |from: String, to: String| {
        let mut skopeo = Command::new("skopeo");
        run(skopeo
            .args(["--insecure-policy", "copy", "--quiet"])
            .arg(from)
            .arg(to));
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let look = |store: &Store, name: &str| {
        let image = store.image(name, &Platform::here()).unwrap();
        let image = image.unwrap_or_else(|| panic!("no {name} among {:?}", store.names()));
        (image.digest, image.layers)
    };
    let original = look(&store, NAME);

    // The directory itself, which it reads and writes.
    copy(
        format!("oci:{}:{NAME}", path("store")),
        format!("oci:{}:again", path("store")),
    );
    assert_eq!(look(&store, "again"), original);
    // Our archive, in its hands and back by its own.
    let archive = File::create(path("ours.tar")).unwrap();
    store.save(&[NAME], archive).unwrap();
    copy(
        format!("oci-archive:{}:{NAME}", path("ours.tar")),
        format!("oci-archive:{}:theirs", path("theirs.tar")),
    );
    let other = Store::open(&dir.path().join("other")).unwrap();
    let names = other.load(File::open(path("theirs.tar")).unwrap()).unwrap();
    assert_eq!(names, ["theirs"]);
    assert_eq!(look(&other, "theirs"), original);
    // Docker's older kind, in which layers are not compressed: another manifest, and the same files.
    copy(
        format!("oci:{}:{NAME}", path("store")),
        format!("docker-archive:{}:busybox:1", path("docker.tar")),
    );
    let names = other.load(File::open(path("docker.tar")).unwrap()).unwrap();
    assert_eq!(names, ["docker.io/library/busybox:1"]);
    let diff_ids = |layers: &[Expected]| layers.iter().map(|l| l.diff_id).collect::<Vec<_>>();
    let (_, layers) = look(&other, &names[0]);
    assert_eq!(diff_ids(&layers), diff_ids(&original.1));
    assert_eq!(other.unpack(&layers, Limits::default()).unwrap().len(), 2);
    // What it has deleted the name of goes.
    store.untag("again").unwrap();
    store.untag(NAME).unwrap();
    let swept = store
        .sweep(|| Ok::<_, StoreError>(BTreeSet::new()))
        .unwrap()
        .unwrap();
    assert_eq!(
        (
            swept.blobs,
            fs::read_dir(root.join("blobs/sha256")).unwrap().count()
        ),
        (4, 0)
    );
}

#[test]
fn dockers_kind_of_archive_is_read_by_skopeo_and_by_husk() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let store = Store::open(&dir.path().join("store")).unwrap();
    image(&store);
    let (one, two) = ("example.org/one:1", "example.org/two:2");
    let names = store.names().unwrap();
    store.tag(one, &names[0].1).unwrap();
    // Another image with the same lower layer, which is there once.
    let shared = store.image(one, &Platform::here()).unwrap().unwrap().layers[0];
    let mut blob = Vec::new();
    let mut file = store.blob(&shared.digest).unwrap().unwrap();
    file.read_to_end(&mut blob).unwrap();
    fs::create_dir_all(dir.path().join("own")).unwrap();
    let own = layer(&dir.path().join("own"));
    publish(&store, two, &[(blob, shared.diff_id), own]);
    // Two names of one image.
    let archive = File::create(path("docker.tar")).unwrap();
    let names = [one, two, NAME];
    store
        .save_for_docker(&names, &Platform::here(), archive)
        .unwrap();
    let listed = run(Command::new("tar").args(["-tf", &path("docker.tar")]));
    // A manifest, two configurations, three layers.
    assert_eq!(String::from_utf8(listed).unwrap().lines().count(), 6);

    let other = Store::open(&dir.path().join("other")).unwrap();
    let mut loaded = other.load(File::open(path("docker.tar")).unwrap()).unwrap();
    loaded.sort();
    let short = format!("docker.io/library/{NAME}:latest");
    assert_eq!(loaded, [&*short, one, two]);
    for name in [one, two] {
        let (ours, theirs) = (config_of(&store, name), config_of(&other, name));
        assert_eq!(ours, theirs);
        let skopeos = |what: &[&str]| {
            let mut skopeo = Command::new("skopeo");
            skopeo.arg("inspect").args(what);
            run(skopeo.arg(format!("docker-archive:{}:{name}", path("docker.tar"))))
        };
        let config = skopeos(&["--config", "--raw"]);
        assert_eq!(Sha256Digest::of(&config).to_string(), ours);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet"]);
        run(skopeo
            .arg(format!("docker-archive:{}:{name}", path("docker.tar")))
            .arg(format!("oci:{}:{name}", path("skopeos"))));
        let skopeos = Store::open(&dir.path().join("skopeos")).unwrap();
        let layers = |store: &Store| {
            let image = store.image(name, &Platform::here()).unwrap().unwrap();
            let ids = image.layers.iter().map(|l| l.diff_id).collect::<Vec<_>>();
            (ids, image.layers)
        };
        assert_eq!(layers(&skopeos).0, layers(&store).0);
        let unpacked = other.unpack(&layers(&other).1, Limits::default());
        assert_eq!(unpacked.unwrap().len(), 2);
    }
}

/// The digest of an image's configuration, which Docker knows the image by.
fn config_of(store: &Store, name: &str) -> String {
    let image = store.image(name, &Platform::here()).unwrap().unwrap();
    let mut manifest = Vec::new();
    let mut file = store.blob(&image.digest).unwrap().unwrap();
    file.read_to_end(&mut manifest).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    manifest["config"]["digest"].as_str().unwrap().to_owned()
}
