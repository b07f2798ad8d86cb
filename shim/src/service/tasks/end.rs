//! The pod's end, and with it the shim's: by its last container, or by the Sandbox API.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{Creation, Progress, Slot, Tasks};
use crate::{container::Container, delete, pod::Keeper};

/// How long the end of the pod waits for a start or delete of its namespace.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// How long containers that were being created may take to be cleared away; without a VM only a mount of the host can.
const CREATIONS_END: Duration = Duration::from_secs(5);

/// The signal that asks a process to end.
const SIGTERM: u32 = 15;

impl Tasks {
    /// With its last container a pod ends that they keep; the VM goes down while containerd is on its way with Shutdown.
    pub(super) fn stop_if_empty(&self) {
        if self.context.keeper == Keeper::Containers && self.slots().is_empty() {
            let sandbox = Arc::clone(&self.sandbox);
            tokio::spawn(async move { sandbox.stop().await });
        }
    }

    /// Shutdown: nothing while a container remains, or containerd keeps the pod. Returns when everything of the pod has gone, so that its
    /// id can be used again.
    pub async fn shutdown(&self) {
        let left = self.slots().len();
        if left > 0 || self.context.keeper == Keeper::SandboxApi {
            debug!(left, "not shutting down: the pod goes on");
            return;
        }
        self.end().await;
    }

    /// Lets what runs end, for as long, then takes the pod's VM down. What is left of its containers can still be asked for.
    pub async fn stop(&self, patience: Duration) {
        let all = self.containers();
        if !patience.is_zero() {
            let ended = async {
                for container in &all {
                    // Over already, or without an answer: it goes with the VM.
                    if let Err(error) = container.kill("", SIGTERM, false).await {
                        debug!(container = container.id(), %error, "not asked to end");
                    }
                }
                for container in &all {
                    if let Ok(mut over) = container.watch("") {
                        let _ = over.wait_for(Option::is_some).await;
                    }
                }
            };
            if timeout(patience, ended).await.is_err() {
                info!(?patience, "containers that run on are ended with their VM");
            }
        }
        self.sandbox.stop().await;
    }

    /// Ends the pod with whatever it still holds, and the shim. Returns when everything has gone. Idempotent.
    pub async fn end(&self) {
        self.cleared.get_or_init(|| self.clear()).await;
        self.done.send_replace(true);
    }

    async fn clear(&self) {
        let creations: Vec<Creation> = self
            .slots()
            .values()
            .filter_map(|slot| match slot {
                Slot::Creating(creation) => Some(creation.clone()),
                Slot::Ready(_) => None,
            })
            .collect();
        creations
            .iter()
            .for_each(|creation| creation.advance(Progress::Cancelled));
        self.sandbox.stop().await;
        // They clear away what they have made, in the directory that goes next.
        let over = async {
            for creation in creations {
                creation.reached(Progress::Over).await;
            }
        };
        if timeout(CREATIONS_END, over).await.is_err() {
            warn!("a container's files are still being prepared, not waited for");
        }
        let pod = self.context.pod.clone();
        let cleared = tokio::task::spawn_blocking(move || {
            let _lock = pod.lock_namespace(LOCK_PATIENCE);
            delete::clear_pod(&pod)
        });
        match cleared.await {
            Ok(problems) if problems.is_empty() => info!("the pod has been cleared away"),
            outcome => warn!(?outcome, "the pod has not been cleared away completely"),
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        let slots = self.slots();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(Arc::clone(container)),
            Slot::Creating(_) => None,
        });
        ready.collect()
    }

    /// Resolves when the shim has nothing left to do.
    pub async fn shut_down(&self) {
        // The sender lives as long as this.
        let _ = self.done.subscribe().wait_for(|&done| done).await;
    }
}
