//! A network that comes after the start.
//!
//! Docker 26 and later fill the pod's network namespace once the task is there. A VM cannot be given a device then, so it has a spare one
//! without a link; here is who looks for the interface that it stands for. One task owns the matter: it looks when it is asked to, before a
//! container starts, and when the kernel tells of changes. It ends with its work done, or with the pod.

use std::{future, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{Instrument as _, info, info_span, warn};

use super::{
    Network,
    namespace::{Namespace, Notices},
};
use crate::{
    agent::Agent,
    error::{TaskError, chain},
    phase::PhaseWatch,
    vm::Machine,
};

/// Network devices that a VM has for what comes late.
pub const SPARE_NICS: usize = 1;

/// An interface is set up in several steps. No news for this long, and it is taken to be complete.
const SETTLED: Duration = Duration::from_millis(100);

type Answer = oneshot::Sender<Result<(), TaskError>>;

/// Asks the task to look.
pub struct Late(mpsc::Sender<Answer>);

/// What it takes to plug an interface into a running VM.
pub struct Plugger {
    /// The pod's network.
    pub network: Arc<Network>,
    /// The VM.
    pub machine: Arc<dyn Machine>,
    /// Its agent.
    pub agent: Agent,
    /// vCPUs of the VM.
    pub vcpus: u8,
}

/// How sure we are that the interface is complete.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// A container starts: what is there now is what it gets.
    ByTheEngine,
    /// Something has changed. An interface without an address is still being set up.
    ByTheKernel,
}

impl Late {
    /// Looks out from now on, until the pod is gone. Must be called within a tokio runtime.
    pub fn look_out(plugger: Plugger, phase: PhaseWatch) -> Self {
        let (sender, requests) = mpsc::channel(1);
        let span = info_span!("late_network", pod = plugger.network.pod);
        tokio::spawn(run(plugger, phase, requests).instrument(span));
        Self(sender)
    }

    /// Returns when the guest has what is in the namespace now.
    ///
    /// # Errors
    /// Why the guest cannot have it.
    pub async fn look(&self) -> Result<(), TaskError> {
        let (answer, answered) = oneshot::channel();
        if self.0.send(answer).await.is_err() {
            // Plugged already.
            return Ok(());
        }
        answered.await.unwrap_or(Ok(()))
    }
}

async fn run(mut plugger: Plugger, phase: PhaseWatch, mut requests: mpsc::Receiver<Answer>) {
    let mut attached = false;
    let mut watch = match &plugger.network.namespace {
        Some(namespace) => Watch::open(namespace).await,
        None => return,
    };
    // It may have come before the watch was open.
    let mut next = Some(None);
    loop {
        let request = match next.take() {
            Some(first) => first,
            None => tokio::select! {
                _ = phase.gone() => return,
                request = requests.recv() => match request {
                    Some(answer) => Some(answer),
                    None => return,
                },
                () = watch.changed() => None,
            },
        };
        let asked = match &request {
            Some(_) => Asked::ByTheEngine,
            None => Asked::ByTheKernel,
        };
        let plugged = plugger.plug(asked, &mut attached).await;
        let is_done = matches!(plugged, Ok(true));
        match (request, plugged) {
            // Nobody waits any more: the start was given up.
            (Some(answer), plugged) => drop(answer.send(plugged.map(drop))),
            (None, Err(error)) => {
                warn!(%error, "the pod's network has come and the guest cannot have it");
            }
            (None, Ok(_)) => {}
        }
        if is_done {
            return;
        }
    }
}

impl Plugger {
    /// Returns whether the guest has its network now.
    async fn plug(&mut self, asked: Asked, attached: &mut bool) -> Result<bool, TaskError> {
        let failed = |error: &dyn std::error::Error| TaskError::failed(chain(error));
        let scan = self.network.scan(SPARE_NICS).await;
        let found = scan.map_err(|e| failed(&e))?;
        let is_there = match asked {
            Asked::ByTheEngine => !found.interfaces.is_empty(),
            Asked::ByTheKernel => found.interfaces.iter().any(|i| !i.addresses.is_empty()),
        };
        if !is_there {
            return Ok(false);
        }
        // Not twice, where the guest refused it the first time: the device has its link already.
        if !*attached {
            let plugged = self.network.plug(&found, self.vcpus).await;
            let taps = plugged.map_err(|e| failed(&e))?;
            for (nic, fds) in (0..).zip(taps) {
                let attached = self.machine.attach_nic(nic, fds).await;
                attached.map_err(|e| failed(&e))?;
            }
            *attached = true;
        }
        self.agent.update_network(&(&found).into()).await?;
        info!("the pod's network has come after its start, and the guest has it");
        Ok(true)
    }
}

/// News of the namespace; none ever, where they cannot be had.
struct Watch(Option<(rtnetlink::Handle, Notices)>);

impl Watch {
    async fn open(namespace: &Namespace) -> Self {
        match namespace.watch().await {
            Ok(watch) => Self(Some(watch)),
            Err(error) => {
                let error = chain(&error);
                warn!(
                    error,
                    "changes of the pod's network are only seen when a container starts"
                );
                Self(None)
            }
        }
    }

    /// Resolves when something has changed and nothing more changes for a while.
    async fn changed(&mut self) {
        let Some((_, notices)) = &mut self.0 else {
            return future::pending().await;
        };
        let mut more = notices.next().await;
        while more.is_some() {
            match timeout(SETTLED, notices.next()).await {
                Ok(next) => more = next,
                Err(_) => return,
            }
        }
        self.0 = None;
        future::pending().await
    }
}
