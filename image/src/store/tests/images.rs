//! Images of the store: their names, archives, and what no name leads to.

use std::collections::BTreeSet;

use oci_spec::image::Descriptor;
use serde_json::json;

use super::*;
use crate::manifest::Platform;

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
    let sweep = |kept| {
        let kept = || Ok::<_, StoreError>(BTreeSet::from_iter(kept));
        place.store.sweep(kept).unwrap()
    };
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

/// No container stands on anything.
fn sweep(place: &Place) -> Option<Swept> {
    let kept = || Ok::<_, StoreError>(BTreeSet::new());
    place.store.sweep(kept).unwrap()
}

#[test]
fn nothing_goes_while_somebody_adds() {
    let place = Place::new();
    place.add(b"blob");
    let (a, b) = (place.store.begin().unwrap(), place.store.begin().unwrap());
    assert_eq!(sweep(&place), None);
    drop(a);
    assert_eq!(sweep(&place), None);
    drop(b);
    assert_eq!(sweep(&place).unwrap().blobs, 1);
    // Nor where one cannot know what is wanted.
    place.add(b"blob");
    let image = place.image("one", &[]);
    place.store.tag("name", &image).unwrap();
    let digest: Sha256Digest = image.digest().as_ref().parse().unwrap();
    fs::write(place.store.blob_path(&digest), "{}").unwrap();
    assert!(
        place
            .store
            .sweep(|| Ok::<_, StoreError>(BTreeSet::new()))
            .is_err()
    );
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
        assert_eq!(
            to.store
                .sweep(|| Ok::<_, StoreError>(BTreeSet::new()))
                .unwrap()
                .unwrap()
                .blobs,
            0
        );
        // Again, it is all there.
        assert_eq!(to.store.load(&*archive).unwrap().len(), 2);
        assert_eq!(to.store.names().unwrap().len(), 2);
    }
    let error = from.store.save(&["none"], Vec::new()).unwrap_err();
    assert!(error.to_string().contains("no image \"none\""), "{error}");
}

/// An archive of these files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn of_dockers_archive_only_what_it_names_is_kept() {
    let (layer, _) = layer("file", "data");
    let config = br#"{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}"#;
    let manifest = br#"[{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["blobs/sha256/L", "a/layer.tar"]}]"#;
    let digest = Sha256Digest::of(b"named by its digest");
    let manifest = String::from_utf8_lossy(manifest).replace("/L", &format!("/{}", digest.hex()));
    let blob = format!("blobs/sha256/{}", digest.hex());
    let mut files: Vec<(&str, &[u8])> = vec![
        ("unnamed.json", b"{}"),
        ("c.json", config),
        ("a/layer.tar", &layer),
        ("unnamed/layer.tar", b"unnamed"),
        (&blob, b"named by its digest"),
        ("manifest.json", manifest.as_bytes()),
    ];
    for _ in 0..2 {
        let place = Place::new();
        let names = place.store.load(&*archive(&files)).unwrap();
        assert_eq!(names, ["docker.io/library/x:1"]);
        assert_eq!((place.count("blobs/sha256"), place.count("ingest")), (4, 0));
        assert_eq!(place.read(&layer).unwrap(), layer);
        assert_eq!(sweep(&place).unwrap().blobs, 0);
        // The manifest may be the first.
        files.reverse();
    }
    // What lacks something leaves nothing.
    files.retain(|(name, _)| *name != "a/layer.tar");
    let place = Place::new();
    let error = place.store.load(&*archive(&files)).unwrap_err();
    assert!(error.to_string().contains("\"a/layer.tar\""), "{error}");
    // Only what had a digest for its name, until the next sweep.
    assert_eq!((place.count("blobs/sha256"), place.count("ingest")), (1, 0));
}

#[test]
fn for_docker_an_image_is_one_that_can_be_written() {
    let place = Place::new();
    let one = layer("file", "data");
    let compressed = |digest| {
        let blob = zstd::encode_all(&*one.0, 3).unwrap();
        let expected = Expected {
            digest: Sha256Digest::of(&blob),
            size: blob.len() as u64,
            diff_id: digest,
        };
        (blob, expected)
    };
    let save = |name: &str| {
        let mut archive = Vec::new();
        let here = Platform::here();
        place.store.save_for_docker(&[name], &here, &mut archive)?;
        Ok::<_, StoreError>(archive)
    };
    let good = place.image("good", &[&compressed(one.1.diff_id)]);
    place.store.tag("good", &good).unwrap();
    place.store.tag("index", &place.index(&[good])).unwrap();
    assert!(save("good").unwrap() == save("good").unwrap());
    let to = Place::new();
    to.store.load(&*save("index").unwrap()).unwrap();
    assert_eq!(to.read(&one.0).unwrap(), one.0);
    let wrong = place.image("wrong", &[&compressed(Sha256Digest::of(b"other"))]);
    place.store.tag("wrong", &wrong).unwrap();
    let error = save("wrong").unwrap_err();
    assert!(error.to_string().contains("its diffID is"), "{error}");
    let error = save("none").unwrap_err();
    assert!(matches!(error, StoreError::NoImage(_)), "{error}");
    fs::remove_file(place.store.blob_path(&compressed(one.1.diff_id).1.digest)).unwrap();
    assert!(matches!(save("good").unwrap_err(), StoreError::NoBlob(_)));
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
    assert!(load(&one.0).contains("no archive of images"));
    assert!(load(b"").contains("no archive of images"));
    // Its blob is another's.
    let text = String::from_utf8_lossy(&archive).replace("one", "two");
    assert!(load(text.as_bytes()).contains("is another"));
    assert!(to.store.names().unwrap().is_empty());
    to.store.load(&*archive).unwrap();
    assert!(to.named("one").is_some());
}

#[test]
fn a_root_file_system_becomes_an_image() {
    let place = Place::new();
    let (tar, expected) = layer("etc/file", "data");
    let here = Platform::here();
    let import = |blob: &[u8]| place.store.import(blob, "rootfs", &here, Limits::default());
    let compressed = zstd::encode_all(&*tar, 3).unwrap();
    for blob in [&tar, &compressed] {
        let digest = import(blob).unwrap();
        let image = place.named("rootfs").unwrap();
        assert_eq!(
            (image.digest, image.layers[0].diff_id),
            (digest, expected.diff_id)
        );
        assert_eq!(image.layers[0].digest, Sha256Digest::of(blob));
        let dirs = place
            .store
            .unpack(&image.layers, Limits::default())
            .unwrap();
        assert_eq!(
            fs::read_to_string(dirs[0].join("etc/file")).unwrap(),
            "data"
        );
    }
    assert_eq!((place.count("layers"), place.count("ingest")), (1, 0));
    for wrong in [&b""[..], b"no archive", &tar[..700]] {
        assert!(import(wrong).is_err());
    }
    assert_eq!(place.count("ingest"), 0);
    assert_eq!(
        place.named("rootfs").unwrap().layers[0].digest,
        Sha256Digest::of(&compressed)
    );
}
