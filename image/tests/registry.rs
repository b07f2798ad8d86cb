//! Images from a registry, as it is and as it should not be: Debian's docker-registry, filled by skopeo, and a proxy that misbehaves.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

mod common;
#[path = "common/images.rs"]
mod images;
#[path = "common/registry.rs"]
mod registry;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{listing, run, tree};
use husk_image::{
    layer::{Limits, Sha256Digest},
    manifest::{ManifestError, Platform},
    name::ImageName,
    pull::{Event, Options, Progress, Pulled, pull},
    registry::{Patience, PullError, Registry as Said, Settings},
    store::{Store, StoreError},
};
use images::{add, layer, publish, publish_as};
use registry::{Fault, Proxy, Registry, Request};
use serde_json::json;

/// Bytes of the file that makes the upper layer long.
const LONG: usize = 3 << 20;

/// Short, as nothing here is far away, but longer than a busy machine takes to answer.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    idle: Duration::from_secs(6),
    answer: Duration::from_secs(20),
    attempts: 3,
    pause: Duration::from_millis(10),
};

/// A registry with the image `app:1`, and where it came from.
struct Ground {
    registry: Registry,
    dir: tempfile::TempDir,
    /// The image's blobs: its layers, the lowest first.
    layers: Vec<Sha256Digest>,
}

impl Ground {
    fn new(flags: &[&str]) -> Self {
        Self::on(Registry::new(), flags)
    }

    fn on(registry: Registry, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        let store = Store::open(&layout).unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        fs::create_dir(&lower).unwrap();
        tree(&lower);
        fs::create_dir(&upper).unwrap();
        fs::write(upper.join("long"), noise(LONG)).unwrap();
        publish(&store, "app", &[layer(&lower), layer(&upper)]);
        registry.push(&layout, "app", "app:1", flags);
        let image = store.image("app", &Platform::here()).unwrap().unwrap();
        Self {
            registry,
            dir,
            layers: image.layers.iter().map(|layer| layer.digest).collect(),
        }
    }

    fn store(&self, name: &str) -> Store {
        Store::open(&self.dir.path().join(name)).unwrap()
    }

    /// A proxy that has this fault for the upper layer's blob, as often as said.
    fn bad_blob(&self, times: usize, fault: Fault) -> Proxy {
        let blob = format!("blobs/{}", self.layers[1]);
        Proxy::new(&self.registry.host, move |request, before| {
            if request.path.contains(&blob) && before < times {
                fault.clone()
            } else {
                Fault::None
            }
        })
    }
}

/// Bytes that no compression shortens, always the same.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// What a pull tells, as words.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<String>>);

impl Told {
    fn count(&self, word: &str) -> usize {
        let told = self.0.lock().unwrap();
        told.iter().filter(|said| said.starts_with(word)).count()
    }
}

impl Progress for Told {
    fn event(&self, event: Event<'_>) {
        let said = match event {
            Event::Asking { registry } => format!("asking {registry}"),
            Event::NextRegistry { registry, error } => format!("next after {registry}: {error}"),
            Event::Layer { digest, size } => format!("layer {digest} of {size}"),
            Event::Fetched { digest, bytes } => format!("fetched {digest} {bytes}"),
            Event::There { digest } => format!("there {digest}"),
            Event::Again { digest, error, .. } => format!("again {digest}: {error}"),
            Event::Unpacked { digest } => format!("unpacked {digest}"),
        };
        self.0.lock().unwrap().push(said);
    }
}

fn options() -> Options {
    Options {
        platform: Platform::here(),
        limits: Limits::default(),
        settings: Settings {
            registry: BTreeMap::new(),
            patience: PATIENCE,
        },
    }
}

fn pull_with(
    store: &Store,
    name: &str,
    options: &Options,
    told: &Arc<Told>,
) -> Result<Pulled, PullError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let name: ImageName = name.parse().unwrap();
    runtime.block_on(pull(
        store,
        &name,
        options,
        Arc::clone(told) as Arc<dyn Progress>,
    ))
}

fn pull_at(store: &Store, host: &str) -> Result<(Pulled, Arc<Told>), PullError> {
    let told = Arc::default();
    let pulled = pull_with(store, &format!("{host}/app:1"), &options(), &told)?;
    Ok((pulled, told))
}

/// The long file, as the topmost layer has it.
fn long(pulled: &Pulled) -> Vec<u8> {
    fs::read(pulled.layers[0].join("long")).unwrap()
}

fn ranges(proxy: &Proxy, digest: &Sha256Digest) -> Vec<String> {
    let blob = format!("blobs/{digest}");
    let is_it = |request: &&Request| request.path.contains(&blob);
    let seen = proxy.seen();
    let range = |request: &Request| request.header("range").unwrap_or_default().to_owned();
    seen.iter().filter(is_it).map(range).collect()
}

/// Is nothing left but what the store had before?
fn is_empty(store: &Store, dir: &Path) -> bool {
    let none = |name: &str| fs::read_dir(dir.join(name)).unwrap().next().is_none();
    store.names().unwrap().is_empty() && none("layers")
}

#[test]
fn an_image_comes_whole_by_tag_and_by_digest() {
    for flags in [&[][..], &["--format=v2s2"]] {
        let ground = Ground::new(flags);
        let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
        let store = ground.store("store");
        let (pulled, told) = pull_at(&store, &proxy.host).unwrap();
        assert_eq!(long(&pulled), noise(LONG));
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
        assert_eq!(long(&pulled), noise(LONG));
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
        assert_eq!(long(&pulled), noise(LONG));
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
    assert_eq!(long(&pulled), noise(LONG));
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
    assert_eq!(long(&pulled), noise(LONG));
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
        assert_eq!(long(&pulled), noise(LONG));
    }
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
    assert_eq!(long(&pulled), noise(LONG));
    assert_eq!(
        ranges(&proxy, &ground.layers[1]),
        ["bytes=500000-", "bytes=0-"]
    );
    assert!(!rest.exists());
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
    assert_eq!(
        proxy
            .seen()
            .iter()
            .filter(|r| r.path.contains("manifests"))
            .count(),
        3
    );
    // What no attempt changes.
    let told = Arc::default();
    let proxy = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    for name in ["app:2", "nobody/none:1"] {
        let name = format!("{}/{name}", proxy.host);
        let error = pull_with(&ground.store("none"), &name, &options(), &told).unwrap_err();
        assert!(matches!(error, PullError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert_eq!(
        proxy
            .seen()
            .iter()
            .filter(|r| r.path.contains("manifests"))
            .count(),
        2
    );
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
            assert_eq!(long(&pulled.join().unwrap()), noise(LONG));
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
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (key, certificate) = (path("key.pem"), path("cert.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]);
    openssl.args([
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]);
    run(openssl.args(["-keyout", &key, "-out", &certificate]));
    let tls = format!("  tls:\n    certificate: {certificate}\n    key: {key}\n");
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
    let error = try_with(tls(Some(PathBuf::from(&key))))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("key.pem") && error.contains("no certificate"),
        "{error}"
    );
    let pulled = try_with(tls(Some(PathBuf::from(&certificate)))).unwrap();
    assert_eq!(long(&pulled), noise(LONG));
    // Spoken to without TLS, as loopback is, it does not speak HTTP.
    let error = try_with(Said::default()).unwrap_err().to_string();
    assert!(
        error.contains("manifest") || error.contains("token"),
        "{error}"
    );
}

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let ground = Ground::new(&[]);
    let proxy = Proxy::new(&ground.registry.host, |request, _| {
        let host = request.header("host").unwrap().to_owned();
        if request.path.starts_with("/token?") {
            let text = match request.path.contains("scope=repository%3Aapp%3Apull") {
                true => &br#"{"token": "let-me-in", "expires_in": 300}"#[..],
                false => b"{}",
            };
            return Fault::Answer(200, String::new(), text.to_vec());
        }
        if request.header("authorization") == Some("Bearer let-me-in") {
            return Fault::None;
        }
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
        Fault::Answer(401, challenge, Vec::new())
    });
    let (pulled, _) = pull_at(&ground.store("store"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(LONG));
}
