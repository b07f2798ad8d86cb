//! What the serving shim knows from its start: who called it, for which pod, with which settings.

use std::path::PathBuf;

use crate::config::Config;
use crate::engine_mounts::EngineMounts;
use crate::events::Publisher;
use crate::pod::Keeper;
use crate::state::PodDir;

/// Handed to `service::serve` by the daemon, together with the listening socket.
#[derive(Debug, Clone)]
pub struct ShimContext {
    /// containerd namespace.
    pub namespace: String,
    /// Id of the pod: the group all its containers share; the container's own where it has no pod.
    pub sandbox_id: String,
    /// The bundle of the container that the shim was started for, absolute; the pod's sandbox (container) where there is one.
    pub bundle: PathBuf,
    /// Who brings the pod up.
    pub keeper: Keeper,
    /// Where events go.
    pub publisher: Publisher,
    /// Settings of the node (see `deploy/config.toml`).
    pub config: Config,
    /// The file that they were read from, where one was named: by the runtime options of the pod's `start`, or by the environment.
    pub settings: Option<PathBuf>,
    /// The pod's directory on the host, `share/` in it already published.
    pub pod: PodDir,
    /// Where the engine's files are found.
    pub engine: EngineMounts,
}
