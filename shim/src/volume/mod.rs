//! Volumes that the kubelet keeps up to date (ConfigMap, Secret, projected and downward-API ones), mirrored in the guest.
//!
//! Programs reload their configuration when inotify tells them that `..data` was swapped. Through virtio-fs a guest sees the new
//! contents and no event, for nothing on the host's side can tell its kernel. So such a volume is copied to a tmpfs of the guest, where the
//! containers' mounts bind it; the shim watches the directory on the host, and sends it again when it has changed; the agent
//! then does in the guest what the kubelet did on the host.
//!
//! A volume that cannot be mirrored (too large, something else in it than files, directories and symlinks, no inotify to be had, a guest that
//! does not take it) stays what it otherwise is, a bind mount through virtio-fs: contents follow, without events. So does one
//! that its container may write to: what it writes belongs on the host. (The kubelet mounts these read-only.)
//!
//! Each is mirrored once a pod, whatever the number of containers that mount it, and goes with the last of them. One task does all of
//! this, so that what the guest is asked comes in order; its calls are short and bounded.

mod tree;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    future::pending,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use husk_protocol::{
    agent::{SyncVolumeRequest, volume_entry::Content},
    guest_path,
};
use protobuf::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    agent::Agent,
    error::{TaskError, chain},
    phase::{Phase, PhaseWatch},
    spec::{KeptVolume, Owners},
};
use tree::TreeError;
use watch::{News, Watch, Watcher};

/// The kubelet's names of what it keeps up to date (`pkg/volume/*`: the plugin's name with `~` for `/`).
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// From the first sign of a change to the reading: the kubelet's swap is half a dozen steps.
const SETTLE: Duration = Duration::from_millis(100);

/// When a guest that did not take a change is asked again.
const RETRY: Duration = Duration::from_secs(5);

/// Whether the kubelet has made this directory for a volume that it keeps up to date:
/// `/var/lib/kubelet/pods/<uid>/volumes/<kind>/<name>`, wherever the kubelet's root is. A subPath lies elsewhere (`volume-subpaths`) and is
/// never updated.
pub fn is_kept_up_to_date(source: &Path) -> bool {
    let kind = source.parent();
    let name = |path: &Path| path.file_name().map(OsStr::to_owned);
    let is_kind = kind
        .and_then(name)
        .is_some_and(|name| KINDS.iter().any(|kind| name == *kind));
    let is_volume = kind
        .and_then(Path::parent)
        .and_then(name)
        .is_some_and(|name| name == "volumes");
    source.is_absolute() && source.file_name().is_some() && is_kind && is_volume
}

/// Why a volume is not, or not any more, what the host has.
#[derive(Debug, thiserror::Error)]
enum VolumeError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(
        "no inotify instance is to be had for it: {0}; is fs.inotify.max_user_instances used up?"
    )]
    Inotify(io::Error),
    #[error("the guest does not take it: {0}")]
    Guest(#[from] TaskError),
    #[error("the VM is not running")]
    NoGuest,
    #[error("reading it was given up: {0}")]
    GivenUp(#[from] tokio::task::JoinError),
}

impl VolumeError {
    /// It comes again until the volume is another.
    fn is_of_the_volume(&self) -> bool {
        match self {
            Self::Tree(_) => true,
            Self::Guest(error) => error.code() == ttrpc::Code::INVALID_ARGUMENT,
            Self::Inotify(_) | Self::NoGuest | Self::GivenUp(_) => false,
        }
    }
}

enum Order {
    Attach {
        container: String,
        volumes: Vec<KeptVolume>,
        reply: oneshot::Sender<HashMap<usize, String>>,
    },
    Detach {
        container: String,
    },
}

/// A pod's mirrored volumes.
pub struct Volumes {
    orders: mpsc::UnboundedSender<Order>,
}

impl Volumes {
    /// None yet. Must be called within a tokio runtime.
    pub fn start(pod: PhaseWatch) -> Self {
        let (orders, received) = mpsc::unbounded_channel();
        let mirrors = Mirrors {
            pod,
            watcher: None,
            mirrors: BTreeMap::new(),
            made: 0,
            due: None,
        };
        tokio::spawn(mirrors.run(received));
        Self { orders }
    }

    /// Mirrors a container's volumes. Returns the directories of the guest for those that are mirrored, by places in its list of mounts. [`Self::detach`] undoes it, also where nobody waited for this.
    pub async fn attach(
        &self,
        container: &str,
        volumes: Vec<KeptVolume>,
    ) -> HashMap<usize, String> {
        if volumes.is_empty() {
            return HashMap::new();
        }
        let (reply, answer) = oneshot::channel();
        let order = Order::Attach {
            container: container.to_owned(),
            volumes,
            reply,
        };
        // The task ends with the VM only.
        if self.orders.send(order).is_err() {
            return HashMap::new();
        }
        answer.await.unwrap_or_default()
    }

    /// The container has gone.
    pub fn detach(&self, container: &str) {
        let container = container.to_owned();
        // Nobody hears it where the VM has gone, and everything with it.
        let _ = self.orders.send(Order::Detach { container });
    }
}

/// The task behind [`Volumes`].
struct Mirrors {
    pod: PhaseWatch,
    /// From the first volume on.
    watcher: Option<Watcher>,
    /// By directory on the host.
    mirrors: BTreeMap<PathBuf, Mirror>,
    /// How many there have been: the next one's id.
    made: u64,
    /// When to look at those that are stale.
    due: Option<Instant>,
}

/// One volume.
struct Mirror {
    id: String,
    /// Whose the guest sees its files as.
    owners: Owners,
    /// Containers that mount it.
    users: BTreeSet<String>,
    watches: HashSet<Watch>,
    /// Digest of what the guest has.
    sent: Option<[u8; 32]>,
    /// The guest may have something of it.
    is_in_guest: bool,
    /// The host may have something else.
    is_stale: bool,
}

enum Step {
    Order(Option<Order>),
    News(io::Result<News>),
    Due,
}

impl Mirrors {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            let step = tokio::select! {
                biased;
                _ = self.pod.gone() => return,
                order = orders.recv() => Step::Order(order),
                () = until(self.due) => Step::Due,
                news = next_news(&mut self.watcher) => Step::News(news),
            };
            match step {
                Step::Order(None) => return,
                Step::Order(Some(Order::Attach {
                    container,
                    volumes,
                    reply,
                })) => {
                    let attached = self.attach(&container, volumes).await;
                    // Who does not wait for it any more detaches.
                    let _ = reply.send(attached);
                }
                Step::Order(Some(Order::Detach { container })) => self.detach(&container).await,
                Step::Due => self.refresh().await,
                Step::News(Ok(news)) => self.hear(&news),
                Step::News(Err(error)) => {
                    warn!(%error, "the pod's volumes do not follow the host's any more");
                    return;
                }
            }
        }
    }

    fn hear(&mut self, news: &News) {
        for mirror in self.mirrors.values_mut() {
            let concerned = match news {
                News::In(watch) => mirror.watches.contains(watch),
                News::Anywhere => true,
            };
            if concerned {
                mirror.is_stale = true;
                let soon = Instant::now() + SETTLE;
                self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
            }
        }
    }

    async fn attach(
        &mut self,
        container: &str,
        volumes: Vec<KeptVolume>,
    ) -> HashMap<usize, String> {
        let mut attached = HashMap::new();
        for KeptVolume {
            index,
            source,
            owners,
        } in volumes
        {
            match self.attach_one(container, &source, &owners).await {
                Ok(path) => drop(attached.insert(index, path)),
                Err(error) => {
                    let reason = chain(&error);
                    warn!(container, source = %source.display(), reason, "the volume stays on virtio-fs: its contents follow the host's, without inotify events");
                }
            }
        }
        attached
    }

    async fn attach_one(
        &mut self,
        container: &str,
        source: &Path,
        owners: &Owners,
    ) -> Result<String, VolumeError> {
        // Also one that is there: the container starts with what the host has now.
        let synced = self.sync(source, Some(owners)).await;
        let Some(mirror) = self.mirrors.get_mut(source) else {
            return Err(synced.err().unwrap_or(VolumeError::NoGuest));
        };
        match synced {
            Ok(()) => {
                mirror.users.insert(container.to_owned());
                Ok(format!("{}/{}", guest_path::VOLUMES, mirror.id))
            }
            Err(error) => {
                if mirror.users.is_empty() {
                    self.forget(source).await;
                }
                Err(error)
            }
        }
    }

    async fn detach(&mut self, container: &str) {
        let mut unused = Vec::new();
        for (source, mirror) in &mut self.mirrors {
            if mirror.users.remove(container) && mirror.users.is_empty() {
                unused.push(source.clone());
            }
        }
        for source in unused {
            self.forget(&source).await;
        }
    }

    /// Looks at what is stale.
    async fn refresh(&mut self) {
        self.due = None;
        let stale = |(source, mirror): (&PathBuf, &Mirror)| mirror.is_stale.then(|| source.clone());
        let stale: Vec<PathBuf> = self.mirrors.iter().filter_map(stale).collect();
        for source in stale {
            let Err(error) = self.sync(&source, None).await else {
                continue;
            };
            let reason = chain(&error);
            if error.is_of_the_volume() {
                // Tried again when something changes. The kubelet may be removing it.
                if let Some(mirror) = self.mirrors.get_mut(&source) {
                    mirror.is_stale = false;
                }
                warn!(source = %source.display(), reason, "a changed volume cannot be mirrored: the pod's containers keep what they have");
            } else {
                self.due = Some(Instant::now() + RETRY);
                warn!(source = %source.display(), reason, "a changed volume has not reached the guest, tried again in {RETRY:?}");
            }
        }
    }

    /// Sends the guest what a directory holds, where that is news. `owners` count where it is mirrored for the first time: users are the pod's,
    /// the same for all its containers.
    async fn sync(&mut self, source: &Path, owners: Option<&Owners>) -> Result<(), VolumeError> {
        let Phase::Running(agent) = self.pod.now() else {
            return Err(VolumeError::NoGuest);
        };
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            none => none.insert(Watcher::new().map_err(VolumeError::Inotify)?),
        };
        let mirror = self.mirrors.entry(source.to_owned()).or_insert_with(|| {
            self.made += 1;
            Mirror::new(self.made, owners.cloned().unwrap_or_default())
        });
        mirror.sync(source, watcher, &agent).await
    }

    async fn forget(&mut self, source: &Path) {
        let Some(mirror) = self.mirrors.remove(source) else {
            return;
        };
        if let Some(watcher) = &self.watcher {
            mirror
                .watches
                .iter()
                .for_each(|watch| watcher.remove(watch));
        }
        if let Phase::Running(agent) = self.pod.now()
            && mirror.is_in_guest
        {
            let nothing = mirror.request(Vec::new());
            if let Err(error) = agent.sync_volume(&nothing).await {
                debug!(%error, volume = mirror.id, "the guest keeps a volume that nobody mounts");
            }
        }
    }
}

impl Mirror {
    fn new(number: u64, owners: Owners) -> Self {
        Self {
            id: number.to_string(),
            owners,
            users: BTreeSet::new(),
            watches: HashSet::new(),
            sent: None,
            is_in_guest: false,
            is_stale: true,
        }
    }

    fn request(&self, entries: Vec<husk_protocol::agent::VolumeEntry>) -> SyncVolumeRequest {
        SyncVolumeRequest {
            volume_id: self.id.clone(),
            entries,
            ..Default::default()
        }
    }

    async fn sync(
        &mut self,
        source: &Path,
        watcher: &Watcher,
        agent: &Agent,
    ) -> Result<(), VolumeError> {
        let (mut adder, from) = (watcher.adder(), source.to_owned());
        let reading = tokio::task::spawn_blocking(move || {
            let mut watches = HashSet::new();
            // Watched first: what changes after the reading is told.
            let entries = tree::read(&from, |dir| {
                watches.insert(adder.add(dir)?);
                Ok(())
            });
            (watches, entries)
        });
        let (watches, entries) = reading.await?;
        if entries.is_ok() {
            let old = self.watches.difference(&watches);
            old.for_each(|watch| watcher.remove(watch));
            self.watches.clear();
        }
        self.watches.extend(watches);
        let mut entries = entries?;
        for entry in &mut entries {
            // A link has no owner.
            if !matches!(entry.content, Some(Content::Link(_))) {
                (entry.uid, entry.gid) =
                    (self.owners.user(entry.uid), self.owners.group(entry.gid));
            }
        }
        let request = self.request(entries);
        let digest = digest(&request);
        if digest.is_none() || self.sent != digest {
            self.is_in_guest = true;
            agent.sync_volume(&request).await?;
            info!(source = %source.display(), volume = self.id, entries = request.entries.len(), "mirrored in the guest");
            self.sent = digest;
        }
        self.is_stale = false;
        Ok(())
    }
}

/// `None` only for what cannot be sent either.
fn digest(request: &SyncVolumeRequest) -> Option<[u8; 32]> {
    let mut hash = Sha256::new();
    request.write_to_writer(&mut hash).ok()?;
    Some(hash.finalize().into())
}

async fn next_news(watcher: &mut Option<Watcher>) -> io::Result<News> {
    match watcher {
        Some(watcher) => watcher.news().await,
        None => pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_of_the_kubelet_are_known_by_their_place() {
        let of = |path: &str| is_kept_up_to_date(Path::new(path));
        let pod = "/var/lib/kubelet/pods/0b6a/";
        for kind in KINDS {
            assert!(of(&format!("{pod}volumes/{kind}/name")));
            assert!(of(&format!("/data/k/pods/0b6a/volumes/{kind}/name/")));
            assert!(!of(&format!("{pod}volumes/{kind}")));
            assert!(!of(&format!("{pod}volumes/{kind}/name/..2024/key")));
            assert!(!of(&format!("{pod}volumes/{kind}/..")));
            assert!(!of(&format!("{pod}volume-subpaths/{kind}/name")));
            assert!(!of(&format!("volumes/{kind}/name")));
        }
        assert!(!of(&format!("{pod}volumes/kubernetes.io~empty-dir/name")));
        assert!(!of(&format!("{pod}volume-subpaths/config/app/0")));
        assert!(!of("/srv/data") && !of("/") && !of(""));
    }
}
