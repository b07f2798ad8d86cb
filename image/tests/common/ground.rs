//! A registry with an image to pull, and what a pull of it tells.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use husk_image::{
    layer::{Limits, Sha256Digest},
    manifest::Platform,
    name::ImageName,
    pull::{Event, Options, Progress, Pulled, pull},
    registry::{Patience, PullError, Settings},
    store::Store,
};

use crate::{
    common::{noise, tree},
    images::{layer, publish},
    registry::{Fault, Proxy, Registry, Request},
};

/// Bytes of the file that makes the upper layer long.
pub const LONG: usize = 3 << 20;

/// Short, as nothing here is far away, but longer than a busy machine takes to answer.
pub const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    idle: Duration::from_secs(6),
    answer: Duration::from_secs(20),
    attempts: 3,
    pause: Duration::from_millis(10),
};

/// A registry with the image `app:1`, and where it came from.
pub struct Ground {
    pub registry: Registry,
    pub dir: tempfile::TempDir,
    /// The image's blobs: its layers, the lowest first.
    pub layers: Vec<Sha256Digest>,
}

impl Ground {
    pub fn new(flags: &[&str]) -> Self {
        Self::on(Registry::new(), flags)
    }

    pub fn on(registry: Registry, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        let store = Store::open(&layout).unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        fs::create_dir(&lower).unwrap();
        tree(&lower);
        fs::create_dir(&upper).unwrap();
        fs::write(upper.join("long"), noise(0, LONG)).unwrap();
        publish(&store, "app", &[layer(&lower), layer(&upper)]);
        registry.push(&layout, "app", "app:1", flags);
        let image = store.image("app", &Platform::here()).unwrap().unwrap();
        Self {
            registry,
            dir,
            layers: image.layers.iter().map(|layer| layer.digest).collect(),
        }
    }

    pub fn store(&self, name: &str) -> Store {
        Store::open(&self.dir.path().join(name)).unwrap()
    }

    /// A proxy that has this fault for the upper layer's blob, as often as said.
    pub fn bad_blob(&self, times: usize, fault: Fault) -> Proxy {
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

/// What a pull tells, as words.
#[derive(Debug, Default)]
pub struct Told(pub Mutex<Vec<String>>);

impl Told {
    pub fn count(&self, word: &str) -> usize {
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
            Event::Again {
                digest,
                pause,
                error,
            } => format!("again {digest} in {pause:?}: {error}"),
            Event::Unpacked { digest } => format!("unpacked {digest}"),
        };
        self.0.lock().unwrap().push(said);
    }
}

pub fn options() -> Options {
    Options {
        platform: Platform::here(),
        limits: Limits::default(),
        settings: Settings {
            patience: PATIENCE,
            ..Settings::default()
        },
    }
}

pub fn pull_with(
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

pub fn pull_at(store: &Store, host: &str) -> Result<(Pulled, Arc<Told>), PullError> {
    let told = Arc::default();
    let pulled = pull_with(store, &format!("{host}/app:1"), &options(), &told)?;
    Ok((pulled, told))
}

/// The long file, as the topmost layer has it.
pub fn long(pulled: &Pulled) -> Vec<u8> {
    fs::read(pulled.layers[0].join("long")).unwrap()
}

pub fn ranges(proxy: &Proxy, digest: &Sha256Digest) -> Vec<String> {
    let blob = format!("blobs/{digest}");
    let is_it = |request: &&Request| request.path.contains(&blob);
    let seen = proxy.seen();
    let range = |request: &Request| request.header("range").unwrap_or_default().to_owned();
    seen.iter().filter(is_it).map(range).collect()
}

/// Is nothing left but what the store had before?
pub fn is_empty(store: &Store, dir: &Path) -> bool {
    let none = |name: &str| fs::read_dir(dir.join(name)).unwrap().next().is_none();
    store.names().unwrap().is_empty() && none("layers")
}
