//! The users of a pod that has its own (`hostUsers: false`): one user namespace for all of its containers.
//!
//! What a root may do with a network depends on the user namespace that the network namespace belongs to, and the guest's first one belongs
//! to the guest's. So with its users such a pod gets a network namespace, made in theirs; the VM's devices move there before they are
//! configured, and the agent moves along: the thread that starts containers and connects to their ports for good, one that
//! configures the network when it does. (vsock, which leads to the host, has no part in network namespaces.)
//!
//! A thread cannot make the namespaces while there are others, so a `container-init` process does.

use std::fs::File;
use std::sync::OnceLock;

use husk_protocol::guest_path;
use nix::sched::{CloneFlags, setns};

use crate::container;
use crate::error::AgentError;
use crate::loopback;

/// The pod's network namespace, where it is not the guest's first one.
static NETWORK: OnceLock<File> = OnceLock::new();

/// Maps of users and groups, as user_namespaces(7) has them.
#[derive(Debug)]
pub struct Users {
    uid_map: String,
    gid_map: String,
}

impl Users {
    pub(crate) fn new(uid_map: &str, gid_map: &str) -> Self {
        Self {
            uid_map: uid_map.to_owned(),
            gid_map: gid_map.to_owned(),
        }
    }

    /// Makes the namespaces, once, and moves the calling thread into the network's.
    ///
    /// # Errors
    /// [`AgentError::Launch`], [`AgentError::Guest`] naming the step that failed.
    pub async fn make(self) -> Result<(), AgentError> {
        container::make_users(self.uid_map, self.gid_map).await?;
        let network = File::open(guest_path::NETWORK)
            .map_err(|e| AgentError::guest("opening the pod's network namespace", e))?;
        NETWORK.get_or_init(|| network);
        enter_network()?;
        loopback::up().map_err(|e| AgentError::guest("bringing the loopback interface up", e))
    }
}

/// Moves the calling thread to where the pod's network is.
///
/// # Errors
/// [`AgentError::Guest`]; not where that is the guest's first namespace.
pub fn enter_network() -> Result<(), AgentError> {
    match NETWORK.get() {
        None => Ok(()),
        Some(network) => setns(network, CloneFlags::CLONE_NEWNET)
            .map_err(|e| AgentError::guest("entering the pod's network namespace", e)),
    }
}
