//! Lets a running pod's VM grow with what its containers may use.
//!
//! Each container's limits are noted here ([`Demands`]). When they need more than the VM has, and the pod may have more, one task of
//! the pod ([`Growth::follow`]) gives the VM memory and vCPUs; whoever asked waits for that task and never for another's turn at a lock.
//! A VM is not made smaller again: memory that the guest has no use for goes back to the host page by page anyway, and a vCPU
//! without work costs nothing.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    agent::Agent,
    cgroup::PodCgroup,
    demand::{Demand, Demands},
    error::chain,
    sizing::{self, Hints, Size},
    vm::Machine,
};

/// The size of one pod's VM, and what it should be.
pub struct Growth {
    /// What a container without limits counts as, at most.
    default: Size,
    /// Known once the VM is planned.
    bounds: OnceLock<Bounds>,
    demands: Mutex<Demands>,
    /// What the VM has.
    has: watch::Sender<Size>,
    wanted: watch::Sender<Wish>,
    /// Number of the last wish that was carried out, as far as it could be.
    done: watch::Sender<u64>,
}

#[derive(Debug)]
struct Bounds {
    /// What the VM is started with.
    start: Size,
    /// How far it may grow.
    max: Size,
    /// What bounds its memory on the host.
    cgroup: Option<PodCgroup>,
    /// Bytes of huge pages that the pod may use, where its cgroup says so.
    huge_pages: Option<u64>,
}

impl Bounds {
    /// How far it may grow now: the engine may have changed the limits.
    fn max(&self) -> Size {
        if self.max == self.start {
            return self.max;
        }
        let limit = self.cgroup.as_ref().and_then(PodCgroup::memory_limit);
        Size {
            memory_mib: sizing::within(self.max.memory_mib, limit),
            ..self.max
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Wish {
    number: u64,
    size: Size,
}

/// The VM has less than its containers may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the pod's containers may use {} MiB and {} vCPUs with the guest's own needs, its VM has {} MiB and {} vCPUs",
    needs.memory_mib, needs.vcpus, has.memory_mib, has.vcpus
)]
pub struct TooSmall {
    /// What they may use.
    pub needs: Size,
    /// What there is.
    pub has: Size,
}

impl Growth {
    /// Of a VM that is not planned yet; `default` is what it is taken for until then.
    pub fn new(default: Size) -> Self {
        let wish = Wish {
            number: 0,
            size: default,
        };
        Self {
            default,
            bounds: OnceLock::new(),
            demands: Mutex::default(),
            has: watch::Sender::new(default),
            wanted: watch::Sender::new(wish),
            done: watch::Sender::new(0),
        }
    }

    /// The VM is started with this size, and may grow up to `max`, as far as the limits of its cgroup let it then.
    pub fn planned(&self, size: Size, max: Size, cgroup: Option<PodCgroup>) {
        self.has.send_replace(size);
        // Planned once.
        let _ = self.bounds.set(Bounds {
            start: size,
            max,
            huge_pages: cgroup.as_ref().and_then(PodCgroup::huge_pages_limit),
            cgroup,
        });
    }

    /// What the VM has, once it is planned.
    pub fn size(&self) -> Option<Size> {
        self.bounds.get().map(|_| self.has())
    }

    /// What the VM has; before it is planned, what it is taken for.
    pub fn has(&self) -> Size {
        *self.has.borrow()
    }

    /// Bytes of huge pages that the pod may use, where its cgroup on the host says so.
    pub fn huge_pages(&self) -> Option<u64> {
        self.bounds.get()?.huge_pages
    }

    fn demands(&self) -> MutexGuard<'_, Demands> {
        self.demands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a container may use.
    pub fn set(&self, id: &str, demand: Demand) {
        self.demands().set(id, demand);
    }

    /// Changes what a container may use; returns what it was before, where the container is known.
    pub fn change(&self, id: &str, change: impl FnOnce(Hints) -> Hints) -> Option<Demand> {
        let mut demands = self.demands();
        let before = demands.get(id)?;
        let hints = change(before.hints);
        demands.set(id, Demand { hints, ..before })
    }

    /// The container uses nothing any more.
    pub fn forget(&self, id: &str) {
        self.demands().remove(id);
    }

    /// Makes the VM fit what its containers may use, as far as it may grow. Returns when it does, or cannot; not to be waited for
    /// beyond the end of the VM.
    ///
    /// # Errors
    /// [`TooSmall`]: it still does not fit.
    pub async fn fit(&self) -> Result<(), TooSmall> {
        let (needs, number) = self.wish();
        if let Some(number) = number {
            // The sender lives as long as this.
            let _ = self.done.subscribe().wait_for(|done| *done >= number).await;
        }
        let has = self.has();
        if needs.at_most(has) == needs {
            Ok(())
        } else {
            Err(TooSmall { needs, has })
        }
    }

    /// What is needed, and the number of the wish where it was worth one.
    fn wish(&self) -> (Size, Option<u64>) {
        // Held until the wish is out: a later one is made from later demands.
        let demands = self.demands();
        let has = self.has();
        let (start, max) = self
            .bounds
            .get()
            .map_or((has, has), |bounds| (bounds.start, bounds.max()));
        let needs = demands.need(self.default.at_most(start), self.huge_pages());
        let size = needs.at_most(max).at_least(has);
        if size == has {
            return (needs, None);
        }
        let mut number = 0;
        self.wanted.send_modify(|wish| {
            number = wish.number + 1;
            *wish = Wish { number, size };
        });
        (needs, Some(number))
    }

    /// Carries wishes out, one after another, for as long as it is polled. Nothing to do where the VM cannot grow.
    pub async fn follow(&self, machine: Arc<dyn Machine>, agent: Agent) {
        if self.bounds.get().is_none_or(|b| b.max == b.start) {
            return;
        }
        let mut wanted = self.wanted.subscribe();
        let mut done = 0;
        // Also one that came before.
        while let Ok(wish) = wanted.wait_for(|wish| wish.number > done).await.map(|w| *w) {
            self.grow(wish.size, &*machine, &agent).await;
            done = wish.number;
            self.done.send_replace(done);
        }
    }

    async fn grow(&self, wanted: Size, machine: &dyn Machine, agent: &Agent) {
        let has = self.has();
        if wanted.memory_mib > has.memory_mib {
            match machine.set_memory(has.memory_mib, wanted.memory_mib).await {
                Ok(()) => self
                    .has
                    .send_modify(|size| size.memory_mib = wanted.memory_mib),
                Err(error) => {
                    let reason = chain(&error);
                    warn!(
                        reason,
                        mib = wanted.memory_mib,
                        "the VM gets no more memory"
                    );
                }
            }
        }
        if wanted.vcpus > has.vcpus {
            match agent.bring_online(wanted.vcpus).await {
                // The guest's word, within what it can be.
                Ok(online) => self.has.send_modify(|size| {
                    size.vcpus = u8::try_from(online)
                        .unwrap_or(wanted.vcpus)
                        .clamp(has.vcpus, wanted.vcpus);
                }),
                Err(error) => {
                    warn!(%error, vcpus = wanted.vcpus, "the guest brings no more vCPUs online");
                }
            }
        }
        let now = self.has();
        if now != has {
            info!(
                vcpus = now.vcpus,
                memory_mib = now.memory_mib,
                "the VM has grown"
            );
        }
    }
}
