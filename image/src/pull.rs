//! From a registry into the store, as one stream: while the layers come, several at a time, they are taken apart, the lowest first.
//!
//! A layer is written to the store as it comes and read back from there, from the page cache, by whoever unpacks it; so a pull that is cut
//! off goes on where it was, and two pulls of one image share what each fetches. A name is given last.

mod arrival;
mod signed;

use std::{
    cell::RefCell, collections::BTreeMap, fs::File, io::Read, path::PathBuf, sync::Arc,
    time::Duration,
};

use oci_spec::image::MediaType;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    apply::Expected,
    layer::{Limits, Sha256Digest},
    manifest::{Document, ManifestError, Named, Platform, choose},
    name::ImageName,
    registry::{Endpoint, PullError, Settings, Sink},
    store::{Blobs, Image, Ingest, Partial, Store, StoreError, describe},
};
use arrival::{Arrival, Ticket};

/// Layers that come at once.
const AT_ONCE: usize = 4;

/// What a pull tells of itself. Called from several threads.
pub trait Progress: Send + Sync {
    /// Something has happened.
    fn event(&self, event: Event<'_>);
}

/// What may happen in a pull.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// This host is asked for the image.
    Asking {
        /// The host.
        registry: &'a str,
    },
    /// It did not give it; the next is asked.
    NextRegistry {
        /// The host.
        registry: &'a str,
        /// Why.
        error: &'a PullError,
    },
    /// The image has this layer. Told of all of them, the lowest first, before anything else of them.
    Layer {
        /// Its blob.
        digest: &'a Sha256Digest,
        /// The blob's bytes.
        size: u64,
    },
    /// So many of a layer's bytes are there; again fewer when it must be fetched anew.
    Fetched {
        /// The layer's blob.
        digest: &'a Sha256Digest,
        /// Of its bytes.
        bytes: u64,
    },
    /// The layer was in the store already, or another process has fetched it.
    There {
        /// The layer's blob.
        digest: &'a Sha256Digest,
    },
    /// An attempt failed, and the next will be made.
    Again {
        /// The layer's blob.
        digest: &'a Sha256Digest,
        /// After this pause.
        pause: Duration,
        /// Because of this.
        error: &'a PullError,
    },
    /// The layer is unpacked.
    Unpacked {
        /// The layer's blob.
        digest: &'a Sha256Digest,
    },
}

/// Nothing is told.
impl Progress for () {
    fn event(&self, _: Event<'_>) {}
}

/// How an image is pulled.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which of its images.
    pub platform: Platform,
    /// What its layers may be.
    pub limits: Limits,
    /// The registries.
    pub settings: Settings,
}

/// What a pull has brought.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image, under its name in the store.
    pub image: Image,
    /// What the name leads to: the digest of the index, or of the manifest.
    pub digest: Sha256Digest,
    /// The directories of its layers, the topmost first.
    pub layers: Vec<PathBuf>,
}

/// Pulls an image, unpacks its layers and gives it its name. Runs on tokio's multi-threaded runtime only.
///
/// # Errors
/// When no registry gives it, it is another than it should be, or the store does not take it. What has come stays for the next attempt.
pub async fn pull(
    store: &Store,
    name: &ImageName,
    options: &Options,
    progress: Arc<dyn Progress>,
) -> Result<Pulled, PullError> {
    let holder = store.clone();
    let _use = blocking(move || holder.begin().map_err(PullError::from)).await?;
    // What is rejected is not asked for.
    options.settings.signatures.of(name)?;
    let mut failed = None;
    for host in Endpoint::all(name, &options.settings) {
        progress.event(Event::Asking { registry: &host });
        let attempt = async {
            let endpoint = Endpoint::new(host.clone(), name, &options.settings).await?;
            pull_from(store, name, options, endpoint, Arc::clone(&progress)).await
        };
        match attempt.await {
            Ok(pulled) => return Ok(pulled),
            // The store is the same for all.
            Err(error @ PullError::Store(_)) => return Err(error),
            Err(error) => {
                if host != name.registry() {
                    let registry = &*host;
                    let error = &error;
                    progress.event(Event::NextRegistry { registry, error });
                }
                failed = Some(error);
            }
        }
    }
    Err(failed.unwrap_or_else(|| PullError::NotFound {
        registry: name.registry().to_owned(),
        name: name.to_string(),
    }))
}

async fn pull_from(
    store: &Store,
    name: &ImageName,
    options: &Options,
    endpoint: Endpoint,
    progress: Arc<dyn Progress>,
) -> Result<Pulled, PullError> {
    let first = endpoint.document(None).await?;
    // An index names its images by their digests: who has signed it has signed them.
    let policy = &options.settings.signatures;
    signed::check(&endpoint, policy, name, &first.named.digest).await?;
    let (named, kind) = (first.named, first.media_type);
    keep(store, &first.named, first.text).await?;
    let manifest = match first.document {
        Document::Manifest(manifest) => manifest,
        Document::Index(index) => {
            let chosen = choose(&index, &options.platform)?;
            let second = endpoint.document(Some(&chosen.digest)).await?;
            if second.named != chosen {
                let found = format!("it has {} bytes", second.named.size);
                return Err(endpoint.other(chosen.digest, found));
            }
            keep(store, &second.named, second.text).await?;
            let Document::Manifest(manifest) = second.document else {
                let (what, why) = ("image's index", "leads to another".to_owned());
                return Err(ManifestError::Invalid { what, why }.into());
            };
            manifest
        }
    };
    let endpoint = Arc::new(endpoint);
    fetch(store, &endpoint, &manifest.config, &mut |_| {}).await?;
    let (reader, part) = (store.clone(), manifest.clone());
    let config = blocking(move || Ok(reader.config(&part)?)).await?;
    let layers = manifest.layers(&config, &options.platform)?;
    // What is not unpacked is not fetched either.
    if let Some(large) = layers
        .iter()
        .find(|layer| layer.size > options.limits.bytes)
    {
        let (size, most) = (large.size, options.limits.bytes);
        return Err(ManifestError::Invalid {
            what: "image's manifest",
            why: format!("has a layer of {size} bytes, the most is {most}"),
        }
        .into());
    }
    let paths = layers_from(store, &endpoint, &layers, options.limits, progress).await?;
    let descriptor = describe(MediaType::from(&*kind), &named)?;
    let (tagger, name) = (store.clone(), name.to_string());
    let platform = options.platform.clone();
    let image = blocking(move || {
        tagger.tag(&name, &descriptor)?;
        let image = tagger.image(&name, &platform)?;
        image.ok_or_else(|| StoreError::NoImage(name).into())
    })
    .await?;
    Ok(Pulled {
        image,
        digest: named.digest,
        layers: paths,
    })
}

/// Fetches what is missing of the layers, and unpacks them meanwhile.
async fn layers_from(
    store: &Store,
    endpoint: &Arc<Endpoint>,
    layers: &[Expected],
    limits: Limits,
    progress: Arc<dyn Progress>,
) -> Result<Vec<PathBuf>, PullError> {
    let mut arrivals = BTreeMap::new();
    let mut fetches = JoinSet::new();
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    for layer in layers {
        let (digest, size) = (layer.digest, layer.size);
        progress.event(Event::Layer {
            digest: &digest,
            size,
        });
        // An image may have the same layer twice.
        if arrivals.contains_key(&digest) {
            continue;
        }
        let arrival = Arrival::default();
        // Given up when the fetch ends without having come to its own end, whatever way it ends.
        let ticket = Ticket::new(&arrival);
        arrivals.insert(digest, arrival);
        let (store, endpoint) = (store.clone(), Arc::clone(endpoint));
        let (permits, progress) = (Arc::clone(&permits), Arc::clone(&progress));
        fetches.spawn(async move {
            // It is never closed.
            let _permit = permits.acquire_owned().await;
            fetch_layer(
                &store,
                &endpoint,
                &Named { digest, size },
                &ticket,
                &*progress,
            )
            .await?;
            ticket.arrived();
            Ok::<_, PullError>(())
        });
    }
    let unpacking = {
        let (store, layers) = (store.clone(), layers.to_vec());
        let coming = Coming {
            store: store.clone(),
            arrivals,
            read: RefCell::default(),
            progress,
        };
        blocking(move || Ok(store.unpack_from(&layers, limits, &coming)?))
    };
    let fetching = async {
        while let Some(ended) = fetches.join_next().await {
            // A panic of a fetch is one of the pull.
            ended.map_err(|e| StoreError::Task(e.to_string()))??;
        }
        Ok::<_, PullError>(())
    };
    tokio::pin!(unpacking, fetching);
    // A fetch that fails is the reason that the unpacking fails as well; an unpacking that fails by itself ends the fetches.
    tokio::select! {
        fetched = &mut fetching => {
            fetched?;
            unpacking.await
        }
        unpacked = &mut unpacking => match unpacked {
            Ok(paths) => fetching.await.map(|()| paths),
            Err(error @ PullError::Store(StoreError::GivenUp(_))) => {
                fetching.await?;
                Err(error)
            }
            Err(error) => Err(error),
        },
    }
}

async fn fetch_layer(
    store: &Store,
    endpoint: &Endpoint,
    named: &Named,
    ticket: &Ticket,
    progress: &dyn Progress,
) -> Result<(), PullError> {
    let digest = &named.digest;
    let came = fetch(store, endpoint, named, &mut |step| match step {
        Step::Begun(partial) => ticket.begun(partial),
        Step::Written(bytes) => {
            ticket.written(bytes);
            progress.event(Event::Fetched { digest, bytes });
        }
        Step::Restarted => {
            ticket.restarted();
            progress.event(Event::Fetched { digest, bytes: 0 });
        }
        Step::Again(pause, error) => progress.event(Event::Again {
            digest,
            pause,
            error,
        }),
    })
    .await?;
    if !came {
        progress.event(Event::There { digest });
    }
    Ok(())
}

/// What happens to a blob on its way.
enum Step<'a> {
    /// It is this process' to fetch.
    Begun(&'a Partial),
    Written(u64),
    Restarted,
    Again(Duration, &'a PullError),
}

/// Fetches a blob into the store, unless it is there: says whether it was fetched.
async fn fetch(
    store: &Store,
    endpoint: &Endpoint,
    named: &Named,
    told: &mut (dyn FnMut(Step<'_>) + Send),
) -> Result<bool, PullError> {
    // What is another blob than its digest says is thrown away; a proxy that mixes up ranges may do right with all of it.
    let mut was_wrong = false;
    loop {
        let (ingester, wanted) = (store.clone(), *named);
        let ingest = blocking(move || Ok(ingester.ingest(&wanted.digest, wanted.size)?)).await?;
        let Ingest::Partial(partial) = ingest else {
            return Ok(false);
        };
        told(Step::Begun(&partial));
        let resumed = partial.written() > 0;
        told(Step::Written(partial.written()));
        let mut sink = Writing { partial, told };
        endpoint.blob(named, &mut sink).await?;
        let partial = sink.partial;
        match blocking(move || Ok(partial.commit()?)).await {
            Err(PullError::Store(StoreError::WrongBlob { expected, found })) => {
                if was_wrong || !resumed {
                    return Err(endpoint.other(expected, found));
                }
                was_wrong = true;
                told(Step::Restarted);
            }
            ended => return ended.map(|()| true),
        }
    }
}

/// Layers that are read while they come.
struct Coming {
    store: Store,
    arrivals: BTreeMap<Sha256Digest, Arrival>,
    /// What the last one is read from, if it was not there yet.
    read: RefCell<Option<Arc<File>>>,
    progress: Arc<dyn Progress>,
}

impl Blobs for Coming {
    fn open(&self, digest: &Sha256Digest) -> Result<Box<dyn Read>, StoreError> {
        let arrival = self.arrivals.get(digest);
        let arrival = arrival.ok_or(StoreError::NoBlob(*digest))?;
        let (reader, file) = arrival.reader(&self.store, digest)?;
        self.read.replace(file);
        Ok(reader)
    }

    fn was_void(&self, digest: &Sha256Digest) -> bool {
        let arrival = self.arrivals.get(digest);
        arrival.is_some_and(|arrival| arrival.was_void(self.read.borrow().as_ref()))
    }

    fn unpacked(&self, digest: &Sha256Digest) {
        self.progress.event(Event::Unpacked { digest });
    }
}

struct Writing<'a> {
    partial: Partial,
    told: &'a mut (dyn FnMut(Step<'_>) + Send),
}

impl Sink for Writing<'_> {
    fn written(&self) -> u64 {
        self.partial.written()
    }

    fn write(&mut self, data: &[u8]) -> Result<(), PullError> {
        let written = self.partial.write(data);
        if written.is_err() {
            // More came than the blob has: all of it is gone.
            (self.told)(Step::Restarted);
        }
        written?;
        (self.told)(Step::Written(self.partial.written()));
        Ok(())
    }

    fn restart(&mut self) -> Result<(), PullError> {
        self.partial.restart()?;
        (self.told)(Step::Restarted);
        Ok(())
    }

    fn again(&mut self, pause: Duration, error: &PullError) {
        (self.told)(Step::Again(pause, error));
    }
}

/// Makes a document a blob of the store.
async fn keep(store: &Store, named: &Named, text: Vec<u8>) -> Result<(), PullError> {
    let (store, named) = (store.clone(), *named);
    blocking(move || {
        if let Some(mut partial) = store.ingest_anew(&named.digest, named.size)? {
            partial.write(&text)?;
            partial.commit()?;
        }
        Ok(())
    })
    .await
}

/// What blocks has a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(StoreError::Task(error.to_string()).into()),
    }
}
