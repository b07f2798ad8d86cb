//! Images from a registry as it should be, and cut off: Debian's docker-registry, filled by skopeo.

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

use std::{
    fs,
    process::Command,
    sync::{Arc, Mutex},
};

use common::{listing, noise, run};
use ground::{Ground, LONG, long, options, pull_at, pull_with, ranges};
use husk_image::{
    layer::Sha256Digest,
    manifest::Platform,
    registry::{PullError, Registry as Said},
    store::Store,
};
use images::{add, publish_as};
use registry::{Fault, Proxy, Registry, certificate};
use serde_json::json;

#[test]
fn an_image_comes_whole_by_tag_and_by_digest() {
    for flags in [&[][..], &["--format=v2s2"]] {
        let ground = Ground::new(flags);
        let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
        let store = ground.store("store");
        let (pulled, told) = pull_at(&store, &proxy.host).unwrap();
        assert_eq!(long(&pulled), noise(0, LONG));
        assert_eq!(
            listing(&pulled.layers[1]),
            listing(&ground.dir.path().join("lower")),
            "{flags:?}"
        );
        assert_eq!((told.count("layer"), told.count("unpacked")), (2, 2));
        let name = format!("{}/app:1", proxy.host);
        assert_eq!(store.names().unwrap()[0].0, name);
        // Another name for the same image: nothing but its manifest is asked for.
        let before = proxy.seen().len();
        let by_digest = format!("{}/app@{}", proxy.host, pulled.digest);
        let told = Arc::default();
        let again = pull_with(&store, &by_digest, &options(), &told).unwrap();
        assert_eq!(again.layers, pulled.layers);
        let after: Vec<_> = proxy.seen()[before..]
            .iter()
            .map(|r| r.path.clone())
            .collect();
        assert!(
            after
                .iter()
                .all(|path| path == "/v2/" || path.contains("/manifests/sha256:")),
            "{after:?}"
        );
        assert_eq!(told.count("there"), 2);
    }
}

#[test]
fn every_compression_is_understood() {
    let ground = Ground::new(&[]);
    let layout = ground.dir.path().join("other");
    let store = Store::open(&layout).unwrap();
    let upper = ground.dir.path().join("upper");
    let tar = run(Command::new("tar")
        .arg("--create")
        .arg("--directory")
        .arg(&upper)
        .arg("."));
    let diff_id = Sha256Digest::of(&tar);
    let zstd = zstd::encode_all(&*tar, 1).unwrap();
    for (tag, kind, blob) in [("zstd", "tar+zstd", zstd), ("plain", "tar", tar)] {
        publish_as(&store, tag, kind, &[(blob, diff_id)]);
        ground
            .registry
            .push(&layout, tag, &format!("app:{tag}"), &[]);
        let name = format!("{}/app:{tag}", ground.registry.host);
        let pulled = pull_with(&ground.store(tag), &name, &options(), &Arc::default()).unwrap();
        assert_eq!(long(&pulled), noise(0, LONG));
    }
}

#[test]
fn what_is_cut_off_goes_on() {
    let ground = Ground::new(&[]);
    let blob = &ground.layers[1];
    for fault in [Fault::CutOff(1_000_000), Fault::Stall(1_000_000)] {
        let proxy = ground.bad_blob(2, fault.clone());
        let store = ground.store(&format!("{fault:?}"));
        let (pulled, told) = pull_at(&store, &proxy.host).unwrap();
        assert_eq!(long(&pulled), noise(0, LONG));
        let asked = ["bytes=0-", "bytes=1000000-", "bytes=2000000-"];
        assert_eq!(ranges(&proxy, blob), asked, "{fault:?}");
        assert_eq!(told.count("again"), 2);
    }
    // Where it does not go on by range, it begins anew.
    let cut = Arc::new(Mutex::new(0));
    let part = format!("blobs/{blob}");
    let proxy = Proxy::new(&ground.registry.host, move |request, _| {
        let mut cut = cut.lock().unwrap();
        match request.path.contains(&part) {
            true if *cut == 0 => {
                *cut += 1;
                Fault::CutOff(1_000_000)
            }
            true => Fault::NoRange,
            false => Fault::None,
        }
    });
    let (pulled, _) = pull_at(&ground.store("no-range"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
}

#[test]
fn a_pull_that_was_given_up_is_gone_on_with_by_the_next() {
    let ground = Ground::new(&[]);
    let blob = &ground.layers[1];
    let store = ground.store("store");
    let proxy = ground.bad_blob(usize::MAX, Fault::CutOff(100_000));
    let dead = ground.bad_blob(usize::MAX, Fault::CutOff(0));
    let error = pull_at(&store, &dead.host).unwrap_err();
    assert!(matches!(&error, PullError::Registry { .. }), "{error}");
    assert_eq!(ranges(&dead, blob).len(), 3, "the attempts are bounded");
    // The lower layer may be unpacked, and nothing has the name.
    assert!(store.names().unwrap().is_empty());
    drop(dead);
    // Each attempt brings something, so it comes to its end.
    let (pulled, _) = pull_at(&store, &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
}

#[test]
fn a_rest_that_a_power_cut_has_spoilt_is_fetched_anew() {
    let ground = Ground::new(&[]);
    let store = ground.store("store");
    let rest = ground
        .dir
        .path()
        .join("store/ingest")
        .join(ground.layers[1].hex());
    fs::write(&rest, vec![0; 500_000]).unwrap();
    let proxy = ground.bad_blob(0, Fault::None);
    let (pulled, _) = pull_at(&store, &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    assert_eq!(
        ranges(&proxy, &ground.layers[1]),
        ["bytes=500000-", "bytes=0-"]
    );
    assert!(!rest.exists());
}

#[test]
fn mirrors_are_asked_first_and_failed_over() {
    let ground = Ground::new(&[]);
    let origin = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let mirror = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let empty = Registry::new();
    let closed = {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap().to_string()
    };
    let try_with = |mirrors: &[&String], store: &str| {
        let said = Said {
            mirrors: mirrors.iter().map(|host| (*host).clone()).collect(),
            ..Said::default()
        };
        let mut options = options();
        options.settings.registry.insert(origin.host.clone(), said);
        let told = Arc::default();
        let name = format!("{}/app:1", origin.host);
        let pulled = pull_with(&ground.store(store), &name, &options, &told).unwrap();
        assert_eq!(pulled.image.layers.len(), 2);
        told
    };
    let told = try_with(&[&mirror.host], "one");
    assert_eq!((told.count("asking"), origin.seen().len()), (1, 0));
    // Whose image it is.
    let asked = format!("?ns={}", origin.host);
    assert!(
        mirror
            .seen()
            .iter()
            .any(|request| request.path.ends_with(&asked))
    );
    let told = try_with(&[&closed, &empty.host], "two");
    assert_eq!((told.count("asking"), told.count("next after")), (3, 2));
    assert!(!origin.seen().is_empty());
}

#[test]
fn pulls_of_one_image_share_the_work() {
    let ground = Ground::new(&[]);
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let store = ground.store("store");
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| pull_at(&store, &proxy.host).unwrap().0))
            .collect();
        for pulled in pulls {
            assert_eq!(long(&pulled.join().unwrap()), noise(0, LONG));
        }
    });
    for digest in &ground.layers {
        assert_eq!(ranges(&proxy, digest).len(), 1, "each layer came once");
    }
}

#[test]
fn an_index_leads_to_this_machines_image() {
    let ground = Ground::new(&[]);
    let layout = ground.dir.path().join("index");
    let store = Store::open(&layout).unwrap();
    let source = ground.dir.path().join("layout");
    let ours = Store::open(&source).unwrap().names().unwrap().remove(0).1;
    for entry in fs::read_dir(source.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(
            &path,
            layout.join("blobs/sha256").join(path.file_name().unwrap()),
        )
        .unwrap();
    }
    let entry = |os: &str, architecture: &str, variant: Option<&str>| {
        let mut entry = json!({
            "mediaType": ours.media_type(), "digest": ours.digest(), "size": ours.size(),
            "platform": {"os": os, "architecture": architecture},
        });
        if let Some(variant) = variant {
            entry["platform"]["variant"] = json!(variant);
        }
        entry
    };
    let here = Platform::here();
    let put = |name: &str, manifests: Vec<serde_json::Value>| {
        let kind = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
        let (digest, size) = add(&store, index.to_string().as_bytes());
        let descriptor = json!({"mediaType": kind, "digest": digest, "size": size});
        store
            .tag(name, &serde_json::from_value(descriptor).unwrap())
            .unwrap();
        ground
            .registry
            .push(&layout, name, &format!("app:{name}"), &["--all"]);
    };
    put(
        "many",
        vec![
            entry("linux", "s390x", None),
            entry(
                "linux",
                &here.architecture.to_string(),
                here.variant.as_deref(),
            ),
        ],
    );
    put(
        "foreign",
        vec![
            entry("linux", "s390x", None),
            entry("windows", "amd64", None),
        ],
    );
    let told = Arc::default();
    let name = |tag: &str| format!("{}/app:{tag}", ground.registry.host);
    let store = ground.store("store");
    let pulled = pull_with(&store, &name("many"), &options(), &told).unwrap();
    assert_eq!(pulled.image.digest.to_string(), ours.digest().to_string());
    assert_ne!(pulled.digest, pulled.image.digest);
    let error = pull_with(&store, &name("foreign"), &options(), &told).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("s390x") && text.contains(&here.to_string()),
        "{text}"
    );
}

#[test]
fn tls_wants_a_certificate_that_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let (key, certificate) = certificate(dir.path());
    let tls = format!(
        "  tls:\n    certificate: {}\n    key: {}\n",
        certificate.display(),
        key.display()
    );
    let ground = Ground::on(Registry::with(&tls), &[]);
    let host = &ground.registry.host;
    let try_with = |said: Said| {
        let mut options = options();
        options.settings.registry.insert(host.clone(), said);
        let name = format!("{host}/app:1");
        pull_with(&ground.store("store"), &name, &options, &Arc::default())
    };
    let tls = |ca_file| Said {
        plain_http: Some(false),
        ca_file,
        ..Said::default()
    };
    let error = try_with(tls(None)).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("certificate"), "{error}");
    let error = try_with(tls(Some(key))).unwrap_err().to_string();
    assert!(
        error.contains("key.pem") && error.contains("no certificate"),
        "{error}"
    );
    let pulled = try_with(tls(Some(certificate))).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    // Spoken to without TLS, as loopback is, it does not speak HTTP.
    let error = try_with(Said::default()).unwrap_err().to_string();
    assert!(
        error.contains("manifest") || error.contains("token"),
        "{error}"
    );
}
