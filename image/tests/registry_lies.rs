//! Registries that are busy, or that send something else than was asked for.

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

use std::{process::Command, sync::Arc};

use common::{noise, run};
use ground::{Ground, LONG, is_empty, long, options, pull_at, pull_with, ranges};
use husk_image::{
    layer::Sha256Digest,
    manifest::ManifestError,
    registry::PullError,
    store::{Store, StoreError},
};
use images::{layer, publish};
use registry::{Fault, Proxy};

/// How often somebody has asked for a manifest.
fn asked_for_manifests(proxy: &Proxy) -> usize {
    let seen = proxy.seen();
    seen.iter().filter(|r| r.path.contains("manifests")).count()
}

#[test]
fn another_blob_than_promised_is_refused() {
    let ground = Ground::new(&[]);
    for (at, fault) in [
        Fault::Corrupt(2_000_000),
        Fault::Corrupt(3),
        Fault::Longer(vec![0; 100]),
    ]
    .into_iter()
    .enumerate()
    {
        let proxy = ground.bad_blob(usize::MAX, fault.clone());
        let store = ground.store(&at.to_string());
        let error = pull_at(&store, &proxy.host).unwrap_err();
        let is_told =
            matches!(&error, PullError::Other { expected, .. } if *expected == ground.layers[1]);
        assert!(is_told, "{fault:?}: {error}");
        // It is not there under any name, and the right one can be had.
        assert!(store.names().unwrap().is_empty());
        let (pulled, _) = pull_at(&store, &ground.registry.host).unwrap();
        assert_eq!(long(&pulled), noise(0, LONG));
    }
}

#[test]
fn a_busy_registry_is_asked_again_and_one_that_refuses_is_not() {
    let ground = Ground::new(&[]);
    let busy = |status, headers: &'static str, times: usize, part: &'static str| {
        Proxy::new(&ground.registry.host, move |request, before| {
            if request.path.contains(part) && before < times {
                let text = br#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}"#;
                Fault::Answer(status, headers.to_owned(), text.to_vec())
            } else {
                Fault::None
            }
        })
    };
    for (status, headers) in [(429, "Retry-After: 1\r\n"), (429, ""), (503, ""), (500, "")] {
        for part in ["/manifests/", "/blobs/"] {
            let proxy = busy(status, headers, 2, part);
            let store = ground.store(&format!("{status}{}{}", headers.len(), &part[1..4]));
            pull_at(&store, &proxy.host).unwrap();
        }
    }
    let proxy = busy(429, "", usize::MAX, "/manifests/");
    let error = pull_at(&ground.store("never"), &proxy.host).unwrap_err();
    assert!(error.to_string().contains("slow down"), "{error}");
    assert_eq!(asked_for_manifests(&proxy), 3);
    // What no attempt changes.
    let told = Arc::default();
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    for name in ["app:2", "nobody/none:1"] {
        let name = format!("{}/{name}", proxy.host);
        let error = pull_with(&ground.store("none"), &name, &options(), &told).unwrap_err();
        assert!(matches!(error, PullError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert_eq!(asked_for_manifests(&proxy), 2);
}

#[test]
fn a_registry_that_lies_about_a_manifest_is_found_out() {
    let ground = Ground::new(&[]);
    let store = ground.store("store");
    let (right, _) = pull_at(&store, &ground.registry.host).unwrap();
    let manifests = |fault: Fault| {
        Proxy::new(&ground.registry.host, move |request, _| {
            if request.path.contains("/manifests/") {
                fault.clone()
            } else {
                Fault::None
            }
        })
    };
    let fresh = ground.store("fresh");
    let told = Arc::default();
    // One that never ends is not waited for.
    let proxy = manifests(Fault::Endless);
    let error = pull_at(&fresh, &proxy.host).unwrap_err();
    assert!(
        matches!(error, PullError::Image(ManifestError::TooLarge { .. })),
        "{error}"
    );
    // Another than the digest asked for.
    let proxy = manifests(Fault::Corrupt(30));
    let name = format!("{}/app@{}", proxy.host, right.digest);
    let error = pull_with(&fresh, &name, &options(), &told).unwrap_err();
    assert!(
        matches!(error, PullError::Other { expected, .. } if expected == right.digest),
        "{error}"
    );
    // No manifest at all, and one that says what is not so.
    let text = br#"<html>log in to the hotel's network</html>"#.to_vec();
    let html = "Content-Type: text/html\r\n".to_owned();
    let proxy = manifests(Fault::Answer(200, html, text));
    let error = pull_at(&fresh, &proxy.host).unwrap_err();
    assert!(
        matches!(error, PullError::Image(ManifestError::Parse { .. })),
        "{error}"
    );
    assert!(is_empty(&fresh, &ground.dir.path().join("fresh")));
}

#[test]
fn a_layer_that_is_not_the_configurations_is_refused() {
    let ground = Ground::new(&[]);
    let layout = ground.dir.path().join("lying");
    let store = Store::open(&layout).unwrap();
    let (blob, _) = layer(&ground.dir.path().join("upper"));
    publish(
        &store,
        "liar",
        &[(blob, Sha256Digest::of(b"something else"))],
    );
    ground.registry.push(&layout, "liar", "app:liar", &[]);
    let bomb = run(Command::new("sh").args(["-c", "head -c 300M /dev/zero | gzip -9"]));
    publish(&store, "bomb", &[(bomb, Sha256Digest::of(b""))]);
    ground.registry.push(&layout, "bomb", "app:bomb", &[]);
    for (tag, words) in [("liar", "diffID"), ("bomb", "")] {
        let store = ground.store(tag);
        let name = format!("{}/app:{tag}", ground.registry.host);
        let error = pull_with(&store, &name, &options(), &Arc::default()).unwrap_err();
        let PullError::Store(StoreError::Apply { source, .. }) = &error else {
            panic!("{tag}: {error}");
        };
        assert!(source.to_string().contains(words), "{source}");
        assert!(is_empty(&store, &ground.dir.path().join(tag)));
    }
}

#[test]
fn a_registry_says_when_to_ask_for_a_blob_again() {
    let ground = Ground::new(&[]);
    let later = Fault::Answer(429, "Retry-After: 1\r\n".to_owned(), Vec::new());
    let proxy = ground.bad_blob(1, later);
    let (pulled, told) = pull_at(&ground.store("store"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    // Unasked it would be a hundredth of that.
    let told = told.0.lock().unwrap().join("\n");
    assert!(
        told.contains(&format!("again {} in 1s: ", ground.layers[1])),
        "{told}"
    );
}

#[test]
fn an_error_without_an_end_is_told() {
    let ground = Ground::new(&[]);
    for (status, part) in [(500, "/manifests/"), (500, "/blobs/"), (418, "/blobs/")] {
        let proxy = Proxy::new(&ground.registry.host, move |request, _| {
            match request.path.contains(part) {
                true => Fault::EndlessAnswer(status, String::new()),
                false => Fault::None,
            }
        });
        let error = pull_at(&ground.store("store"), &proxy.host).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("status {status}")), "{text}");
    }
}

#[test]
fn a_part_that_begins_elsewhere_is_not_taken() {
    let ground = Ground::new(&[]);
    let part = format!("blobs/{}", ground.layers[1]);
    let proxy = Proxy::new(&ground.registry.host, move |request, before| {
        if !request.path.contains(&part) {
            return Fault::None;
        }
        match before {
            0 => Fault::CutOff(1_000_000),
            1 => {
                let header = "Content-Range: bytes 5-8/9\r\n".to_owned();
                Fault::Answer(206, header, b"else".to_vec())
            }
            _ => Fault::None,
        }
    });
    let (pulled, told) = pull_at(&ground.store("store"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    assert_eq!(told.count("again"), 2);
    let asked = ["bytes=0-", "bytes=1000000-", "bytes=0-"];
    assert_eq!(ranges(&proxy, &ground.layers[1]), asked);
}
