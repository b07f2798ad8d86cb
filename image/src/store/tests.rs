use std::{
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Barrier},
    thread,
};

mod images;

use super::*;
use crate::{apply::Expected, layer::Limits};

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

#[test]
fn layers_below_a_refused_one_are_kept() {
    let place = Place::new();
    let mut layers = Vec::new();
    for number in 0..20 {
        // Each has a file in a directory that the layers below have told of.
        let (blob, expected) = layer(&format!("dir/{number}"), "data");
        place.add(&blob);
        layers.push(expected);
    }
    let missing = layer("dir/missing", "data").1;
    let all: Vec<_> = layers.iter().copied().chain([missing]).collect();
    let error = place.store.unpack(&all, Limits::default()).unwrap_err();
    assert!(matches!(error, StoreError::NoBlob(_)), "{error}");
    // More than are written out together, and none under an unfinished name.
    assert_eq!(place.count("layers"), layers.len());
    let names = fs::read_dir(place.store.root.join(LAYERS)).unwrap();
    for name in names.map(|entry| entry.unwrap().file_name()) {
        assert_eq!(name.len(), 64, "{name:?}");
    }
    let paths = place.store.unpack(&layers, Limits::default()).unwrap();
    assert!(paths[0].join("dir/19").exists());
}
