//! A network that comes after the start.
//!
//! Docker 26 and later fill the network namespace of a task once it is there, as containerd 1.7 does for a pod with users of its own. A VM cannot be given a device then, so it has a spare one
//! without a link; here is who looks for the interface that it stands for. One task owns the matter: it looks when it is asked to, before a
//! container starts, and when the kernel tells of changes. It ends with the pod.

use std::{future, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{Instrument as _, info, info_span, warn};

use super::{
    Network,
    model::{Found, Interface},
    namespace::{Namespace, Notices},
};
use crate::{
    agent::Agent,
    error::{TaskError, chain},
    phase::PhaseWatch,
    streams::Streams,
    vm::Machine,
};

/// Network devices that a VM has for what comes late.
pub const SPARE_NICS: usize = 1;

/// The same for Docker, which has containers in several networks, and connects them to more while they run.
pub const DOCKERS_NICS: usize = 4;

/// An interface is set up in several steps. No news for this long, and it is taken to be complete.
const SETTLED: Duration = Duration::from_millis(100);

type Answer = oneshot::Sender<Result<(), TaskError>>;

/// What listens on the loopback interface of the namespace, and is there with the network.
pub enum Loopback {
    /// husk, for port-forwards.
    Forwards(Streams),
    /// Docker's resolver, for the pod to ask.
    Resolver(Streams),
}

/// Asks the task to look.
pub struct Late(mpsc::Sender<Answer>);

/// How sure we are that the interface is complete.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// A container starts: what is there now is what it gets.
    ByTheEngine,
    /// Something has changed. An interface without an address is still being set up.
    ByTheKernel,
}

impl Late {
    /// Looks out from now on, until the pod is gone. `loopback`: what is served once the network is there. Must be called within a tokio runtime.
    pub fn look_out(
        network: Arc<Network>,
        machine: Arc<dyn Machine>,
        agent: Agent,
        vcpus: u8,
        phase: PhaseWatch,
        loopback: Loopback,
    ) -> Self {
        let (sender, requests) = mpsc::channel(1);
        let span = info_span!("late_network", pod = network.pod);
        let plugger = Plugger {
            network,
            machine,
            agent,
            vcpus,
            phase,
            loopback: Some(loopback),
            plugged: Vec::new(),
            given: Found::default(),
        };
        tokio::spawn(plugger.run(requests).instrument(span));
        Self(sender)
    }

    /// Returns when the guest has what is in the namespace now.
    ///
    /// # Errors
    /// Why the guest cannot have it.
    pub async fn look(&self) -> Result<(), TaskError> {
        let (answer, answered) = oneshot::channel();
        // Where nobody is there to answer, the pod has gone: what asks for this will hear of it from the guest.
        let _ = self.0.send(answer).await;
        answered.await.unwrap_or(Ok(()))
    }
}

/// Plugs an interface into a running VM.
struct Plugger {
    network: Arc<Network>,
    machine: Arc<dyn Machine>,
    agent: Agent,
    vcpus: u8,
    phase: PhaseWatch,
    /// Until it is served.
    loopback: Option<Loopback>,
    /// The interfaces, by index, whose taps the spare devices have, in the devices' order: one is given once.
    plugged: Vec<u32>,
    /// What the guest has been told. There may be more to tell: routes come last.
    given: Found,
}

impl Plugger {
    async fn run(mut self, mut requests: mpsc::Receiver<Answer>) {
        let phase = self.phase.clone();
        let mut watch = match &self.network.namespace {
            Some(namespace) => Watch::open(namespace).await,
            None => return,
        };
        // The first look is nobody's: it may have come before the watch was open.
        let mut request: Option<Answer> = None;
        loop {
            match request {
                // Nobody waits any more: the start was given up.
                Some(answer) => drop(answer.send(self.look(Asked::ByTheEngine).await)),
                None => {
                    if let Err(error) = self.look(Asked::ByTheKernel).await {
                        warn!(%error, "the guest cannot have the network that has come");
                    }
                }
            }
            request = tokio::select! {
                _ = phase.gone() => return,
                answer = requests.recv() => match answer {
                    Some(answer) => Some(answer),
                    None => return,
                },
                () = watch.changed() => None,
            };
        }
    }

    async fn look(&mut self, asked: Asked) -> Result<(), TaskError> {
        let failed = |error: &dyn std::error::Error| TaskError::failed(chain(error));
        let scan = self.network.scan(self.network.spare_nics()).await;
        let found = scan.map_err(|e| failed(&e))?;
        let is_there = match asked {
            Asked::ByTheEngine => !found.interfaces.is_empty(),
            Asked::ByTheKernel => found.interfaces.iter().any(Interface::is_addressed),
        };
        if !is_there || found == self.given {
            return Ok(());
        }
        let now: Vec<u32> = found.interfaces.iter().map(|i| i.index).collect();
        if !now.starts_with(&self.plugged) {
            info!(
                "the pod was taken out of a network while it runs: the guest keeps what it has until it starts anew"
            );
            self.given = found;
            return Ok(());
        }
        let first = self.plugged.len();
        let plugged = self.network.plug_from(first, &found, self.vcpus).await;
        let taps = plugged.map_err(|e| failed(&e))?;
        self.plugged = now;
        for (nic, queues) in (first..).zip(taps) {
            let nic = u8::try_from(nic).unwrap_or(u8::MAX);
            let attached = self.machine.attach_nic(nic, queues).await;
            attached.map_err(|e| failed(&e))?;
        }
        self.agent.update_network(&(&found).into()).await?;
        info!("the pod's network has come after its start, and the guest has it");
        self.serve_loopback(&found).await;
        self.given = found;
        Ok(())
    }

    /// The pod works without, so that is told in the log alone.
    async fn serve_loopback(&mut self, found: &Found) {
        let phase = self.phase.clone();
        match self.loopback.take() {
            None => {}
            Some(Loopback::Forwards(streams)) => {
                if let Some(forwarder) = self.network.forwarder(found).await {
                    forwarder.serve(&self.network.pod, self.agent.clone(), streams, phase);
                }
            }
            Some(Loopback::Resolver(streams)) => {
                let served = self.network.serve_names(&self.agent, &streams, phase);
                if let Err(error) = served.await {
                    warn!(
                        error = error.message(),
                        "Docker's names of containers are unknown to the pod"
                    );
                }
            }
        }
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
