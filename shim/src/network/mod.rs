//! The pod's network: the namespace that CNI (or Docker) has set up on the host, brought into the guest.
//!
//! The engine's plugins know nothing of a VM: they put interfaces, addresses and routes into a network namespace and believe that
//! the pod's processes live there. [`scan`] reads what they left. For each interface a [`tap`] is made beside it, and [`redirect`]
//! hands every frame that arrives at one of the two out through the other: the guest is at the other end of the
//! interface's wire, and with the interface's MAC and IP addresses it is the pod, to whatever stands outside.
//! The host's own stack in the namespace still holds the addresses, but no frame reaches it any more.
//!
//! Nothing here changes the namespace of a thread that the shim goes on using (see [`namespace`]).

pub mod forward;
pub mod late;
pub mod model;
pub mod names;
pub mod namespace;
pub mod redirect;
mod routes;
pub mod scan;
pub mod steer;
pub mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod vhost;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use husk_protocol::vm::{MAX_NICS, NicConfig};
use tracing::{debug, instrument, warn};

use crate::{error::chain, pod::PodSpec, spec::NetworkNamespace};
use forward::Forwarder;
use model::Found;
use namespace::Namespace;
use tap::Queues;

/// Most pairs of queues of an interface: each pair has threads and memory of its own in the VMM, and four keep more vCPUs busy
/// than a pod's traffic does.
const MAX_PAIRS: u8 = 4;

/// Most interfaces of a pod that starts.
pub const LIMIT: usize = MAX_NICS;

/// A network that cannot be brought into the guest.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host's network was asked for.
    #[error(
        "hostNetwork is not possible for a container in a VM: the guest has a network stack of its own. Run it without (hostNetwork: false, no --net-host or --network host), or with another runtime"
    )]
    HostNetwork,
    /// The namespace cannot be used.
    #[error("cannot {doing} the pod's network namespace {path}: {source}")]
    Namespace {
        /// What was being done.
        doing: &'static str,
        /// The namespace's file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused to tell or change something in the namespace.
    #[error("cannot {doing} in the pod's network namespace: {source}")]
    Netlink {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// More interfaces than a VM can have.
    #[error(
        "the pod's network namespace has {count} interfaces ({names}), its VM can have {limit} now: attach the pod to fewer networks"
    )]
    TooMany {
        /// How many there are.
        count: usize,
        /// Their names.
        names: String,
        /// How many the VM has devices for.
        limit: usize,
    },
    /// Another pod's VM is on this network.
    #[error(
        "the pod's network namespace is in use by the VM of {pod}: two VMs cannot share one network namespace"
    )]
    InUse {
        /// That pod.
        pod: String,
    },
}

/// Wraps what rust-netlink reports, so that the errno's own words come through.
fn netlink(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| NetworkError::Netlink {
        doing: doing.into(),
        source: errno_of(error),
    }
}

fn errno_of(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// One pod's network on the host.
#[derive(Debug)]
pub struct Network {
    /// `None`: the pod has nothing but loopback.
    namespace: Option<Namespace>,
    pod: String,
    /// The host's kernel carries the packets, where it can.
    vhost: bool,
    /// Docker has a resolver in the namespace.
    resolver: bool,
    /// Interfaces whose frames were taken from the host's stack, by index.
    taken: Mutex<Vec<u32>>,
}

impl Network {
    /// The network that a pod asks for. `of_task` is the namespace of the process that stands for
    /// the task on the host, where the engine is one that fills the new one that it has asked for ([`fills_new_namespace`], and
    /// containerd 1.7 for a pod with users of its own).
    ///
    /// # Errors
    /// [`NetworkError::HostNetwork`] where that is the host's own; [`NetworkError::Namespace`] where it is not there.
    pub fn of_pod(spec: &PodSpec, pod: &str, of_task: Option<&Path>) -> Result<Self, NetworkError> {
        let path = match &spec.network {
            NetworkNamespace::Host => return Err(NetworkError::HostNetwork),
            NetworkNamespace::New => of_task,
            NetworkNamespace::At(path) => Some(path.as_path()),
        };
        let namespace = path.map(Namespace::find).transpose()?;
        Ok(Self {
            namespace,
            pod: pod.to_owned(),
            vhost: true,
            resolver: false,
            taken: Mutex::default(),
        })
    }

    /// The same, with or without the host's vhost-net.
    #[must_use]
    pub fn with_vhost(self, vhost: bool) -> Self {
        Self { vhost, ..self }
    }

    /// The same, with or without a resolver of Docker's in it.
    #[must_use]
    pub fn with_resolver(self, resolver: bool) -> Self {
        Self { resolver, ..self }
    }

    /// What is there now, for a VM with `limit` network devices.
    ///
    /// # Errors
    /// [`NetworkError`]: also when there is more than the VM has devices for.
    #[instrument(name = "network_scan", skip_all)]
    pub async fn scan(&self, limit: usize) -> Result<Found, NetworkError> {
        let Some(namespace) = &self.namespace else {
            return Ok(Found::default());
        };
        let found = scan::scan(&namespace.connect().await?).await?;
        let count = found.interfaces.len();
        if count > limit {
            let names: Vec<&str> = found.interfaces.iter().map(|i| i.name.as_str()).collect();
            return Err(NetworkError::TooMany {
                count,
                names: names.join(", "),
                limit,
            });
        }
        Ok(found)
    }

    /// The devices that the VM gets: one an interface, and a spare one where the pod has a namespace that is still empty: whoever
    /// made it fills it later.
    pub fn nics(&self, found: &Found, vcpus: u8) -> Vec<NicConfig> {
        let nic = NicConfig {
            queue_pairs: queue_pairs(vcpus),
        };
        let spare = if self.waits(found) {
            self.spare_nics()
        } else {
            0
        };
        vec![nic; found.interfaces.len() + spare]
    }

    /// Network devices that a VM has for what comes late.
    pub(super) fn spare_nics(&self) -> usize {
        if self.resolver {
            late::DOCKERS_NICS
        } else {
            late::SPARE_NICS
        }
    }

    /// Whether something may still come.
    pub fn waits(&self, found: &Found) -> bool {
        self.namespace.is_some() && found.interfaces.is_empty()
    }

    /// Gives each interface a tap and joins the two: the taps' fds, in the order of the interfaces, one for each pair of queues, and those
    /// by which the host's kernel carries the packets.
    /// The fds hold the taps: they vanish with the last one.
    ///
    /// # Errors
    /// [`NetworkError`]. What was made until then goes with [`Self::release`].
    pub async fn plug(&self, found: &Found, vcpus: u8) -> Result<Vec<Queues>, NetworkError> {
        self.plug_from(0, found, vcpus).await
    }

    /// The same, for those from this place in the list on.
    ///
    /// # Errors
    /// As [`Self::plug`].
    #[instrument(name = "network_plug", skip_all)]
    pub(super) async fn plug_from(
        &self,
        first: usize,
        found: &Found,
        vcpus: u8,
    ) -> Result<Vec<Queues>, NetworkError> {
        let Some(namespace) = &self.namespace else {
            return Ok(Vec::new());
        };
        if found.interfaces.len() <= first {
            return Ok(Vec::new());
        }
        let handle = namespace.connect().await?;
        let mut taps = Vec::new();
        for (number, interface) in found.interfaces.iter().enumerate().skip(first) {
            let tap = tap::make(
                namespace,
                &handle,
                number,
                interface.mtu,
                queue_pairs(vcpus),
                self.vhost,
                &self.pod,
            )
            .await?;
            // Before it is: half a redirection is taken away as well.
            self.taken().push(interface.index);
            redirect::join(&handle, interface, &tap).await?;
            if self.resolver {
                self.spare_resolver(namespace, &handle, interface, &tap)
                    .await;
            }
            debug!(
                interface = interface.name,
                kind = interface.kind,
                tap = tap.name,
                "plugged into the VM"
            );
            taps.push(tap.queues);
        }
        Ok(taps)
    }

    /// Listens for port-forwards. `None` where there is no network, or none yet ([`forward`] says why), or where the host does not
    /// let us: the pod works without.
    pub async fn forwarder(&self, found: &Found) -> Option<Forwarder> {
        let namespace = self.namespace.as_ref().filter(|_| !self.waits(found))?;
        match Forwarder::open(namespace).await {
            Ok(forwarder) => Some(forwarder),
            Err(error) => {
                let error = chain(&error);
                warn!(
                    error,
                    "no port-forwards to this pod: they need Linux 5.9, CAP_BPF and a loopback interface that is up"
                );
                None
            }
        }
    }

    /// Gives the interfaces back to the host's stack. Does what it can: mostly the engine has taken the namespace away already, or
    /// is about to. Idempotent.
    pub async fn release(&self) {
        let taken = std::mem::take(&mut *self.taken());
        let Some(namespace) = self.namespace.as_ref().filter(|_| !taken.is_empty()) else {
            return;
        };
        match namespace.connect().await {
            Ok(handle) => {
                for interface in taken {
                    redirect::undo(&handle, interface).await;
                }
            }
            Err(error) => debug!(%error, "the pod's network is not given back"),
        }
    }

    fn taken(&self) -> MutexGuard<'_, Vec<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this is an engine that asks for a new network namespace and then, between Create and Start, configures that of the
/// task's pid: Docker 26 and later (moby, daemon/start_linux.go), and buildah, for which husk-oci calls; by the name that each has here.
pub fn fills_new_namespace(containerd_namespace: &str) -> bool {
    has_resolver(containerd_namespace) || containerd_namespace.starts_with("oci-")
}

/// Whether it has a resolver in that namespace, and may put several interfaces there: Docker.
pub fn has_resolver(containerd_namespace: &str) -> bool {
    containerd_namespace == "moby"
}

/// One pair with one vCPU, which can serve no second one; else one for each up to [`MAX_PAIRS`].
fn queue_pairs(vcpus: u8) -> u16 {
    u16::from(vcpus.clamp(1, MAX_PAIRS))
}
