//! Signatures of images, as the settings want them: made by openssl in cosign's form, and kept by Debian's docker-registry.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

mod common;
#[path = "common/ground.rs"]
mod ground;
#[path = "common/images.rs"]
mod images;
#[path = "common/registry.rs"]
mod registry;
#[path = "common/signer.rs"]
mod signer;

use std::{error::Error as _, fs, path::Path, sync::Arc};

use common::noise;
use ground::{Ground, LONG, PATIENCE, is_empty, long, options, pull_at, pull_with};
use husk_image::{
    layer::Sha256Digest,
    pull::{Options, Pulled},
    registry::{PullError, Registry as Said, Settings, SettingsError},
    signature::{SignatureError, key::KeyError, policy::PolicyError},
};
use registry::{Fault, Proxy};
use serde_json::{Value, json};
use signer::{Signer, attach, payload};

/// Options with settings as a file has them, and the file's name.
fn saying(ground: &Ground, text: &str) -> (Options, String) {
    let path = ground.dir.path().join("registries.toml");
    fs::write(&path, text).unwrap();
    let mut settings = Settings::read(&path).unwrap();
    settings.patience = PATIENCE;
    let options = Options {
        settings,
        ..options()
    };
    (options, path.display().to_string())
}

/// Every image of this host must be signed with one of these keys.
fn wanting(ground: &Ground, host: &str, keys: &[&Path]) -> (Options, String) {
    saying(ground, &format!("[signatures]\n{host:?} = {keys:?}\n"))
}

fn pull(ground: &Ground, store: &str, name: &str, options: &Options) -> Result<Pulled, PullError> {
    pull_with(&ground.store(store), name, options, &Arc::default())
}

/// What the tag leads to.
fn digest(ground: &Ground) -> Sha256Digest {
    pull_at(&ground.store("look"), &ground.registry.host)
        .unwrap()
        .0
        .digest
}

#[test]
fn an_image_that_is_signed_comes() {
    let ground = Ground::new(&[]);
    let (host, digest) = (&ground.registry.host, digest(&ground));
    let dir = ground.dir.path();
    let text = payload(&format!("{host}/app"), &digest).to_string();
    let other = Signer::new(dir, "other", "P-256");
    let third = Signer::new(dir, "third", "P-256");
    let stranger = Signer::new(dir, "stranger", "P-256");
    for kind in ["P-256", "P-384", "ed25519", "RSA"] {
        let signer = Signer::new(dir, kind, kind);
        // The second signature is the right one, and the second key of the second file.
        attach(&ground, &digest, &[stranger.sign("x"), signer.sign(&text)]);
        let both = dir.join("both.pub");
        let keys = [&other.public, &signer.public].map(|key| fs::read_to_string(key).unwrap());
        fs::write(&both, keys.concat()).unwrap();
        let (options, _) = wanting(&ground, host, &[&third.public, &both]);
        for name in [format!("{host}/app:1"), format!("{host}/app@{digest}")] {
            let pulled = pull(&ground, kind, &name, &options).unwrap();
            assert_eq!(long(&pulled), noise(0, LONG), "{kind}");
        }
    }
}

#[test]
fn an_image_that_is_not_signed_as_it_should_be_is_refused() {
    let ground = Ground::new(&[]);
    let (host, digest) = (&ground.registry.host, digest(&ground));
    let signer = Signer::new(ground.dir.path(), "right", "P-256");
    let other = Signer::new(ground.dir.path(), "wrong", "P-256");
    let (options, file) = wanting(&ground, host, &[&signer.public]);
    let key = signer.public.display().to_string();
    let refused = |words: &str| {
        let store = ground.store("store");
        let name = format!("{host}/app:1");
        let error = pull_with(&store, &name, &options, &Arc::default()).unwrap_err();
        assert!(matches!(error, PullError::Signature(_)), "{error}");
        let text = match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        for word in [words, &*file, &*key, &*name] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(is_empty(&store, &ground.dir.path().join("store")));
    };
    refused("is not signed");
    let right = payload(&format!("{host}/app"), &digest);
    let with = |pointer: &str, value: Value| {
        let mut changed = right.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string()
    };
    let mut more = right.clone();
    more["critical"]["only-on"] = json!("mondays");
    let mut altered = signer.sign(&right.to_string());
    altered.payload = with("/optional", json!({"a": 1}));
    let mut odd = signer.sign(&right.to_string());
    odd.signature = "?".to_owned();
    let another = Sha256Digest::of(b"another").to_string();
    let image = "/critical/image/docker-manifest-digest";
    let place = "/critical/identity/docker-reference";
    for (signatures, words) in [
        (vec![], "there is none"),
        (vec![other.sign(&right.to_string())], "by another key"),
        (vec![altered], "by another key"),
        (vec![odd], "base64"),
        (vec![signer.sign(&with(image, json!(another)))], &*another),
        (
            vec![signer.sign(&with(place, json!(format!("{host}/other"))))],
            "another name",
        ),
        (
            vec![signer.sign(&with(place, json!("docker.io/library/app")))],
            "another name",
        ),
        (
            vec![signer.sign(&with(place, json!(format!("{host}/app:2"))))],
            "another name",
        ),
        (vec![signer.sign(&with(place, json!("")))], "another name"),
        (
            vec![signer.sign(&with("/critical/type", json!("a promise")))],
            "another kind",
        ),
        (vec![signer.sign(&more.to_string())], "only-on"),
        (
            vec![signer.sign("a letter")],
            "something else than an image",
        ),
        (
            vec![signer.sign(&with("/optional", json!("x".repeat(70_000))))],
            "the most is 65536",
        ),
        (vec![other.sign("x"); 65], "the most is 64"),
    ] {
        attach(&ground, &digest, &signatures);
        refused(words);
    }
    attach(&ground, &digest, &[signer.sign(&right.to_string())]);
    pull(&ground, "store", &format!("{host}/app:1"), &options).unwrap();
}

#[test]
fn signatures_without_an_end_are_refused() {
    let ground = Ground::new(&[]);
    let digest = digest(&ground);
    let signer = Signer::new(ground.dir.path(), "key", "P-256");
    let signed = signer.sign("what is signed");
    let blob = format!("blobs/{}", Sha256Digest::of(signed.payload.as_bytes()));
    attach(&ground, &digest, &[signed]);
    for (part, fault) in [
        (".sig".to_owned(), Fault::Endless),
        (blob.clone(), Fault::Endless),
        (blob.clone(), Fault::Corrupt(3)),
        (blob, Fault::CutOff(0)),
        (
            ".sig".to_owned(),
            Fault::Answer(200, String::new(), b"<html>".into()),
        ),
        (
            ".sig".to_owned(),
            Fault::Answer(500, String::new(), Vec::new()),
        ),
    ] {
        let shown = format!("{part}: {fault:?}");
        let proxy = Proxy::new(&ground.registry.host, move |request, _| {
            match request.path.contains(&part) {
                true => fault.clone(),
                false => Fault::None,
            }
        });
        let (options, file) = wanting(&ground, &proxy.host, &[&signer.public]);
        let store = ground.store("store");
        let name = format!("{}/app:1", proxy.host);
        let error = pull_with(&store, &name, &options, &Arc::default()).unwrap_err();
        let is_told = matches!(
            &error,
            PullError::Signature(SignatureError::Unreadable { .. })
        );
        assert!(is_told, "{shown}: {error}");
        assert!(error.to_string().contains(&file), "{error}");
        assert!(is_empty(&store, &ground.dir.path().join("store")));
    }
}

#[test]
fn an_image_that_was_there_before_is_looked_at_again() {
    let ground = Ground::new(&[]);
    let host = &ground.registry.host;
    pull_at(&ground.store("store"), host).unwrap();
    let signer = Signer::new(ground.dir.path(), "key", "P-256");
    let (options, _) = wanting(&ground, "*", &[&signer.public]);
    let error = pull(&ground, "store", &format!("{host}/app:1"), &options).unwrap_err();
    let is_told = matches!(
        &error,
        PullError::Signature(SignatureError::Unsigned { .. })
    );
    assert!(is_told, "{error}");
}

#[test]
fn what_is_rejected_is_not_asked_for() {
    let ground = Ground::new(&[]);
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let host = &proxy.host;
    let rules = format!("[signatures]\n\"*\" = \"reject\"\n\"{host}/team\" = \"accept\"\n");
    let (options, file) = saying(&ground, &rules);
    let error = pull(&ground, "store", &format!("{host}/app:1"), &options).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&file) && text.contains("\"*\""), "{text}");
    assert!(proxy.seen().is_empty());
    let error = pull(&ground, "store", &format!("{host}/team/app:1"), &options).unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
}

#[test]
fn who_signs_an_index_signs_its_images() {
    let ground = Ground::new(&[]);
    let (host, one) = (&ground.registry.host, digest(&ground));
    let many = signer::index(&ground, "many");
    let signer = Signer::new(ground.dir.path(), "key", "P-256");
    let (options, _) = wanting(&ground, host, &[&signer.public]);
    let name = format!("{host}/app:many");
    let signed = |digest| signer.sign(&payload(&format!("{host}/app"), digest).to_string());
    // The image's own is not the index's.
    attach(&ground, &one, &[signed(&one)]);
    let error = pull(&ground, "store", &name, &options).unwrap_err();
    assert!(error.to_string().contains("is not signed"), "{error}");
    attach(&ground, &many, &[signed(&many)]);
    let pulled = pull(&ground, "store", &name, &options).unwrap();
    assert_eq!((pulled.digest, pulled.image.digest), (many, one));
}

#[test]
fn a_mirror_has_signatures_for_the_name_asked_for() {
    let ground = Ground::new(&[]);
    let digest = digest(&ground);
    let origin = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let mirror = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let without = Proxy::new(&ground.registry.host, |request, _| {
        match request.path.contains(".sig") {
            true => Fault::Answer(404, String::new(), Vec::new()),
            false => Fault::None,
        }
    });
    let signer = Signer::new(ground.dir.path(), "key", "P-256");
    let attempt = |at: &Proxy, store: &str| {
        let (mut options, _) = wanting(&ground, &origin.host, &[&signer.public]);
        let said = Said {
            mirrors: vec![at.host.clone()],
            ..Said::default()
        };
        options.settings.registry.insert(origin.host.clone(), said);
        pull(&ground, store, &format!("{}/app:1", origin.host), &options)
    };
    let signed = |host: &str| signer.sign(&payload(&format!("{host}/app"), &digest).to_string());
    attach(&ground, &digest, &[signed(&mirror.host)]);
    let error = attempt(&mirror, "a").unwrap_err();
    assert!(error.to_string().contains("another name"), "{error}");
    attach(&ground, &digest, &[signed(&origin.host)]);
    let before = origin.seen().len();
    attempt(&mirror, "b").unwrap();
    assert_eq!(origin.seen().len(), before, "the mirror is enough");
    // One that has none: the registry itself may.
    attempt(&without, "c").unwrap();
    assert!(origin.seen().len() > before);
}

#[test]
fn a_key_that_cannot_be_used_is_told_at_once() {
    let ground = Ground::new(&[]);
    let dir = ground.dir.path();
    let unknown = Signer::new(dir, "unknown", "P-521");
    let private = dir.join("unknown.key");
    let path = dir.join("registries.toml");
    let read = |key: &Path| {
        fs::write(&path, format!("[signatures]\n\"*\" = [{key:?}]\n")).unwrap();
        let error = Settings::read(&path).unwrap_err();
        assert!(error.to_string().contains("registries.toml"), "{error}");
        let SettingsError::Signatures { source, .. } = error else {
            panic!("{error}");
        };
        let PolicyError::Key { source, .. } = source else {
            panic!("{source}");
        };
        assert!(source.to_string().contains(key.to_str().unwrap()));
        source
    };
    assert!(matches!(read(&unknown.public), KeyError::Kind(_)));
    assert!(matches!(read(&private), KeyError::Pem { .. }));
    assert!(matches!(read(&dir.join("none")), KeyError::Read { .. }));
    assert!(matches!(read(Path::new("x.pub")), KeyError::Relative(_)));
}
