//! What the serving shim knows from its start: who called it, for which pod, with which settings.

use std::path::PathBuf;

use crate::config::Config;
use crate::events::Publisher;
use crate::state::PodDir;

/// Handed to `service::serve` by the daemon, together with the listening socket.
#[derive(Debug, Clone)]
pub struct ShimContext {
    /// containerd namespace.
    pub namespace: String,
    /// Id of the container the shim was started for; the pod's sandbox container where there is one.
    pub id: String,
    /// Id of the pod: the group all its containers share. Equals `id` for a container without a pod.
    pub sandbox_id: String,
    /// The bundle of `id`, absolute.
    pub bundle: PathBuf,
    /// containerd's gRPC address, as given on the command line.
    pub address: String,
    /// containerd's ttrpc address; `None` where the engine takes no events (CRI-O).
    pub ttrpc_address: Option<String>,
    /// Where events go.
    pub publisher: Publisher,
    /// Settings of the node (see `deploy/config.toml`).
    pub config: Config,
    /// `-debug` was given.
    pub debug: bool,
    /// The pod's directory on the host, `share/` in it already made.
    pub pod: PodDir,
}
