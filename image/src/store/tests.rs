use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Barrier},
    thread,
};

use oci_spec::image::Descriptor;
use serde_json::json;

use super::*;
use crate::{apply::Expected, layer::Limits, manifest::Platform};

struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    fn partial(&self, data: &[u8]) -> Partial {
        match self
            .store
            .ingest(&Sha256Digest::of(data), data.len() as u64)
            .unwrap()
        {
            Ingest::Partial(partial) => partial,
            Ingest::There => panic!("it is there"),
        }
    }

    fn add(&self, data: &[u8]) {
        let mut partial = self.partial(data);
        partial.write(data).unwrap();
        partial.commit().unwrap();
    }

    fn read(&self, data: &[u8]) -> Option<Vec<u8>> {
        let mut file = self.store.blob(&Sha256Digest::of(data)).unwrap()?;
        let mut read = Vec::new();
        io::Read::read_to_end(&mut file, &mut read).unwrap();
        Some(read)
    }

    fn count(&self, dir: &str) -> usize {
        fs::read_dir(self.store.root.join(dir)).unwrap().count()
    }
}

/// A layer with one file, as a plain tar stream.
fn layer(name: &str, data: &str) -> (Vec<u8>, Expected) {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, name, data.as_bytes())
        .unwrap();
    let blob = builder.into_inner().unwrap();
    let digest = Sha256Digest::of(&blob);
    let expected = Expected {
        digest,
        size: blob.len() as u64,
        diff_id: digest,
    };
    (blob, expected)
}

#[test]
fn a_store_is_an_image_layout() {
    let place = Place::new();
    let read = |name: &str| fs::read_to_string(place.store.root.join(name)).unwrap();
    assert_eq!(read("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#);
    assert_eq!(read("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#);
    // skopeo writes it with spaces, and what is in it stays.
    let write = |name: &str, text: &str| fs::write(place.store.root.join(name), text).unwrap();
    write("oci-layout", "{ \"imageLayoutVersion\": \"1.0.0\" }\n");
    write("index.json", "{}");
    Store::open(&place.store.root).unwrap();
    assert_eq!(read("index.json"), "{}");
    write("oci-layout", r#"{"imageLayoutVersion":"2.0.0"}"#);
    let error = Store::open(&place.store.root).unwrap_err();
    assert!(error.to_string().contains("2.0.0"), "{error}");
    let error = Store::open(Path::new("/dev/null/store")).unwrap_err();
    assert!(error.to_string().contains("/dev/null/store"), "{error}");
}

#[test]
fn a_blob_is_there_when_all_of_it_is() {
    let place = Place::new();
    assert_eq!(place.read(b"data"), None);
    let mut partial = place.partial(b"data");
    partial.write(b"da").unwrap();
    assert_eq!(place.read(b"data"), None);
    partial.write(b"ta").unwrap();
    partial.commit().unwrap();
    assert_eq!(place.read(b"data").unwrap(), b"data");
    assert_eq!(place.count("ingest"), 0);
    let again = place.store.ingest(&Sha256Digest::of(b"data"), 4).unwrap();
    assert!(matches!(again, Ingest::There));
    place.add(b"");
    assert_eq!(place.read(b"").unwrap(), b"");
}

#[test]
fn whoever_is_cut_off_is_gone_on_with() {
    let place = Place::new();
    place.partial(b"interrupted").write(b"inter").unwrap();
    let mut partial = place.partial(b"interrupted");
    assert_eq!(partial.written(), 5);
    partial.write(b"rupted").unwrap();
    partial.commit().unwrap();
    assert_eq!(place.read(b"interrupted").unwrap(), b"interrupted");
    // A registry that cannot go on from there.
    place.partial(b"restarted").write(b"re").unwrap();
    let mut partial = place.partial(b"restarted");
    partial.restart().unwrap();
    partial.write(b"restarted").unwrap();
    partial.commit().unwrap();
    assert_eq!(place.read(b"restarted").unwrap(), b"restarted");
}

#[test]
fn another_blob_than_promised_is_none() {
    let place = Place::new();
    let wrong = |partial: Partial| {
        let error = partial.commit().unwrap_err();
        assert!(matches!(error, StoreError::WrongBlob { .. }));
        error.to_string()
    };
    let mut partial = place.partial(b"right");
    partial.write(b"wrong").unwrap();
    assert!(wrong(partial).contains("its digest is"));
    assert_eq!(place.count("ingest"), 0, "there is nothing to go on with");
    let mut partial = place.partial(b"right");
    partial.write(b"ri").unwrap();
    assert!(wrong(partial).contains("2 of 5 bytes"));
    let mut partial = place.partial(b"right");
    assert_eq!(partial.written(), 2);
    assert!(partial.write(b"ght and more").is_err());
    drop(partial);
    assert_eq!(place.partial(b"right").written(), 0);
    // A rest that is longer than the blob is another's.
    fs::write(
        place.store.ingest_path(&Sha256Digest::of(b"right")),
        "much longer",
    )
    .unwrap();
    assert_eq!(place.partial(b"right").written(), 0);
    assert_eq!(place.read(b"right"), None);
}

#[test]
fn many_who_want_a_blob_share_the_work() {
    let place = Place::new();
    let start = Arc::new(Barrier::new(8));
    let fetched: usize = thread::scope(|scope| {
        let each = || {
            start.wait();
            match place.store.ingest(&Sha256Digest::of(b"shared"), 6).unwrap() {
                Ingest::There => 0,
                Ingest::Partial(mut partial) => {
                    partial.write(b"shared").unwrap();
                    partial.commit().unwrap();
                    1
                }
            }
        };
        let all: Vec<_> = (0..8).map(|_| scope.spawn(each)).collect();
        all.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert_eq!((fetched, place.count("ingest")), (1, 0));
    assert_eq!(place.read(b"shared").unwrap(), b"shared");
}

#[test]
fn layers_are_unpacked_once() {
    let place = Place::new();
    let (lower, upper) = (layer("etc/lower", "1"), layer("etc/upper", "2"));
    place.add(&lower.0);
    place.add(&upper.0);
    let layers = [lower.1, upper.1];
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                place.store.unpack(&layers, Limits::default()).unwrap();
            });
        }
    });
    let paths = place.store.unpack(&layers, Limits::default()).unwrap();
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    assert_eq!(read(&paths[0].join("etc/upper")), "2");
    assert_eq!(read(&paths[1].join("etc/lower")), "1");
    assert_eq!(place.count("layers"), 2);
    let made = fs::metadata(&paths[0]).unwrap().ino();
    let again = place.store.unpack(&layers, Limits::default()).unwrap();
    assert_eq!(fs::metadata(&again[0]).unwrap().ino(), made);
    // The same layer upon nothing is another's chain.
    place.store.unpack(&[upper.1], Limits::default()).unwrap();
    assert_eq!(place.count("layers"), 3);
}

#[test]
fn what_was_cut_off_is_made_anew() {
    let place = Place::new();
    let (blob, expected) = layer("file", "whole");
    place.add(&blob);
    let new = place
        .store
        .root
        .join(LAYERS)
        .join(expected.diff_id.hex() + ".new");
    fs::create_dir_all(new.join("half/of")).unwrap();
    fs::write(new.join("file"), "ha").unwrap();
    let paths = place.store.unpack(&[expected], Limits::default()).unwrap();
    assert_eq!(fs::read_to_string(paths[0].join("file")).unwrap(), "whole");
    assert!(!paths[0].join("half").exists() && !new.exists());
}

#[test]
fn a_layer_that_is_refused_is_not_there() {
    let place = Place::new();
    let (blob, expected) = layer("file", "data");
    let unpack = |layer| place.store.unpack(&[layer], Limits::default());
    assert!(matches!(unpack(expected), Err(StoreError::NoBlob(_))));
    place.add(&blob);
    let other = Expected {
        diff_id: Sha256Digest::of(b"other"),
        ..expected
    };
    let error = unpack(other).unwrap_err();
    assert!(matches!(error, StoreError::Apply { .. }), "{error}");
    assert_eq!(place.count("layers"), 0);
    unpack(expected).unwrap();
    // No trace of the store's own is in the way of a directory's user.
    assert_eq!(fs::read_dir(place.dir.path()).unwrap().count(), 1);
}

impl Place {
    fn descriptor(&self, document: &serde_json::Value) -> Descriptor {
        let text = document.to_string();
        self.add(text.as_bytes());
        let descriptor = json!({
            "mediaType": document["mediaType"], "size": text.len(),
            "digest": Sha256Digest::of(text.as_bytes()).to_string(),
        });
        serde_json::from_value(descriptor).unwrap()
    }

    /// An image of these layers; they have the configuration's digest for a mark.
    fn image(&self, mark: &str, layers: &[&(Vec<u8>, Expected)]) -> Descriptor {
        let diff_ids: Vec<_> = layers.iter().map(|(_, e)| e.diff_id.to_string()).collect();
        let config = json!({
            "mediaType": "application/vnd.oci.image.config.v1+json", "author": mark,
            "architecture": Platform::here().architecture, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let layers: Vec<_> = layers
            .iter()
            .map(|(blob, e)| {
                if self.store.blob(&e.digest).unwrap().is_none() {
                    self.add(blob);
                }
                json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar",
                    "digest": e.digest.to_string(), "size": e.size,
                })
            })
            .collect();
        self.descriptor(&json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.descriptor(&config), "layers": layers,
        }))
    }

    fn index(&self, images: &[Descriptor]) -> Descriptor {
        let manifests: Vec<_> = images
            .iter()
            .map(|image| {
                let mut entry = serde_json::to_value(image).unwrap();
                entry["platform"] =
                    json!({"os": "linux", "architecture": Platform::here().architecture});
                entry
            })
            .collect();
        self.descriptor(&json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
        }))
    }

    fn named(&self, name: &str) -> Option<Image> {
        self.store.image(name, &Platform::here()).unwrap()
    }
}

#[test]
fn an_image_is_found_by_its_name_and_unpacked() {
    let place = Place::new();
    let (lower, upper) = (layer("lower", "1"), layer("upper", "2"));
    let image = place.image("one", &[&lower, &upper]);
    place.store.tag("example.org/one:1", &image).unwrap();
    let index = place.index(std::slice::from_ref(&image));
    place.store.tag("example.org/all:1", &index).unwrap();
    for name in ["example.org/one:1", "example.org/all:1"] {
        let found = place.named(name).unwrap();
        assert_eq!(found.digest.to_string(), image.digest().to_string());
        assert_eq!(found.config.author().as_deref(), Some("one"));
        let dirs = place
            .store
            .unpack(&found.layers, Limits::default())
            .unwrap();
        assert_eq!(fs::read_to_string(dirs[0].join("upper")).unwrap(), "2");
        assert_eq!(fs::read_to_string(dirs[1].join("lower")).unwrap(), "1");
    }
    assert!(place.named("example.org/none").is_none());
    // A name is one image's.
    let other = place.image("other", &[&lower]);
    place.store.tag("example.org/one:1", &other).unwrap();
    assert_eq!(place.named("example.org/one:1").unwrap().layers.len(), 1);
    assert_eq!(place.store.names().unwrap().len(), 2);
    assert!(place.store.untag("example.org/one:1").unwrap());
    assert!(!place.store.untag("example.org/one:1").unwrap());
}

#[test]
fn names_given_at_once_are_all_there() {
    let place = Place::new();
    let image = place.image("one", &[]);
    thread::scope(|scope| {
        for n in 0..8 {
            let (store, image) = (&place.store, &image);
            scope.spawn(move || store.tag(&format!("name:{n}"), image).unwrap());
        }
    });
    assert_eq!(place.store.names().unwrap().len(), 8);
}

#[test]
fn documents_of_the_store_are_checked() {
    let place = Place::new();
    let image = place.image("one", &[]);
    place.store.tag("name", &image).unwrap();
    let digest: Sha256Digest = image.digest().as_ref().parse().unwrap();
    let path = place.store.blob_path(&digest);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("2", "3")).unwrap();
    let look = || place.store.image("name", &Platform::here()).unwrap_err();
    assert!(matches!(look(), StoreError::WrongBlob { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(look(), StoreError::NoBlob(_)));
    fs::write(place.store.root.join("index.json"), "[").unwrap();
    assert!(look().to_string().contains("index.json"));
}

#[test]
fn what_no_name_leads_to_goes() {
    let place = Place::new();
    let sweep = |kept| place.store.sweep(&BTreeSet::from_iter(kept)).unwrap();
    let (shared, own, gone) = (layer("shared", "s"), layer("own", "o"), layer("gone", "g"));
    let stays = place.index(&[place.image("stays", &[&shared, &own])]);
    place.store.tag("stays", &stays).unwrap();
    let goes = place.image("goes", &[&shared, &gone]);
    place.store.tag("goes", &goes).unwrap();
    for name in ["stays", "goes"] {
        let image = place.named(name).unwrap();
        place
            .store
            .unpack(&image.layers, Limits::default())
            .unwrap();
    }
    place.partial(b"unfinished").write(b"un").unwrap();
    let before = place.count("blobs/sha256");
    let whole = sweep(vec![]).unwrap();
    assert_eq!(
        (whole.blobs, whole.bytes, whole.layers),
        (1, 2, 0),
        "all but what is unfinished is wanted"
    );
    assert_eq!(place.count("blobs/sha256"), before);

    place.store.untag("goes").unwrap();
    // A container has it still.
    let top = layers::chain(&[shared.1.diff_id, gone.1.diff_id])[1];
    assert_eq!(sweep(vec![top]).unwrap().layers, 0);
    let swept = sweep(vec![]).unwrap();
    assert_eq!((swept.blobs, swept.layers), (0, 1), "the blobs went before");
    assert_eq!(place.count("blobs/sha256"), before - 3);
    let image = place.named("stays").unwrap();
    let dirs = place
        .store
        .unpack(&image.layers, Limits::default())
        .unwrap();
    assert!(dirs[0].join("own").exists() && dirs[1].join("shared").exists());
    // A sweep that was cut off left half of one.
    fs::create_dir(place.store.root.join(LAYERS).join(top.hex() + ".new")).unwrap();
    assert_eq!(sweep(vec![]).unwrap().layers, 1);
    assert_eq!(place.count("layers"), 2);
}

#[test]
fn nothing_goes_while_somebody_adds() {
    let place = Place::new();
    place.add(b"blob");
    let (a, b) = (place.store.begin().unwrap(), place.store.begin().unwrap());
    assert_eq!(place.store.sweep(&BTreeSet::new()).unwrap(), None);
    drop(a);
    assert_eq!(place.store.sweep(&BTreeSet::new()).unwrap(), None);
    drop(b);
    assert_eq!(
        place.store.sweep(&BTreeSet::new()).unwrap().unwrap().blobs,
        1
    );
    // Nor where one cannot know what is wanted.
    place.add(b"blob");
    let image = place.image("one", &[]);
    place.store.tag("name", &image).unwrap();
    let digest: Sha256Digest = image.digest().as_ref().parse().unwrap();
    fs::write(place.store.blob_path(&digest), "{}").unwrap();
    assert!(place.store.sweep(&BTreeSet::new()).is_err());
    assert!(place.read(b"blob").is_some());
}

impl Place {
    fn saved(&self, names: &[&str]) -> Vec<u8> {
        let mut archive = Vec::new();
        self.store.save(names, &mut archive).unwrap();
        archive
    }
}

#[test]
fn images_travel_in_archives() {
    let from = Place::new();
    let (lower, upper) = (layer("lower", "1"), layer("upper", "2"));
    let index = from.index(&[from.image("one", &[&lower, &upper])]);
    from.store.tag("example.org/one:1", &index).unwrap();
    from.store
        .tag("two", &from.image("two", &[&lower]))
        .unwrap();
    from.store.tag("three", &from.image("three", &[])).unwrap();
    let archive = from.saved(&["two", "example.org/one:1"]);
    let again = from.saved(&["two", "example.org/one:1"]);
    assert!(archive == again, "the same images make the same bytes");
    let compressed = zstd::encode_all(&*archive, 3).unwrap();
    for archive in [archive, compressed] {
        let to = Place::new();
        // Somebody began with something else under this digest.
        to.partial(&lower.0).write(b"other").unwrap();
        assert_eq!(
            to.store.load(&*archive).unwrap(),
            ["two", "example.org/one:1"]
        );
        let image = to.named("example.org/one:1").unwrap();
        let dirs = to.store.unpack(&image.layers, Limits::default()).unwrap();
        assert_eq!(fs::read_to_string(dirs[0].join("upper")).unwrap(), "2");
        assert!(to.named("two").is_some() && to.named("three").is_none());
        assert_eq!(to.store.sweep(&BTreeSet::new()).unwrap().unwrap().blobs, 0);
        // Again, it is all there.
        assert_eq!(to.store.load(&*archive).unwrap().len(), 2);
        assert_eq!(to.store.names().unwrap().len(), 2);
    }
    let error = from.store.save(&["none"], Vec::new()).unwrap_err();
    assert!(error.to_string().contains("no image \"none\""), "{error}");
}

#[test]
fn an_archive_is_taken_whole_or_not_at_all() {
    let from = Place::new();
    let one = layer("file", "data");
    from.store.tag("one", &from.image("one", &[&one])).unwrap();
    let archive = from.saved(&["one"]);
    let to = Place::new();
    let load = |archive: &[u8]| to.store.load(archive).unwrap_err().to_string();
    assert!(load(&archive[..archive.len() - 2000]).contains("incomplete"));
    assert!(load(&one.0).contains("no OCI archive"));
    assert!(load(b"").contains("no OCI archive"));
    // Its blob is another's.
    let text = String::from_utf8_lossy(&archive).replace("one", "two");
    assert!(load(text.as_bytes()).contains("is another"));
    assert!(to.store.names().unwrap().is_empty());
    to.store.load(&*archive).unwrap();
    assert!(to.named("one").is_some());
}
