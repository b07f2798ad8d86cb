//! Where a pod's VM stands, and how to wait for it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::agent::Agent;

/// One pod's VM. It moves down this list and never back.
#[derive(Clone)]
pub enum Phase {
    /// Nobody has asked for the VM yet.
    Idle,
    /// The VM is being started.
    Starting,
    /// The agent serves.
    Running(Agent),
    /// The pod is being taken down on purpose.
    Stopping,
    /// The VM has ended and its process has been reaped, or it was never started.
    Gone {
        /// A sentence.
        reason: Arc<str>,
    },
}

impl Phase {
    /// How far down the list.
    fn rank(&self) -> u8 {
        match self {
            Self::Idle => 0,
            Self::Starting => 1,
            Self::Running(_) => 2,
            Self::Stopping => 3,
            Self::Gone { .. } => 4,
        }
    }
}

/// The owner's end: changes the state.
#[derive(Clone)]
pub struct PhaseSender(Arc<watch::Sender<Phase>>);

impl Default for PhaseSender {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Phase::Idle)))
    }
}

impl PhaseSender {
    /// Moves on to `next`; a move back (an agent that reports when the pod is already being stopped) is refused. Returns whether it was made.
    pub fn advance(&self, next: Phase) -> bool {
        self.leave_for(next).is_some()
    }

    /// [`Self::advance`] that tells which state was left; `None` where the move was refused.
    pub fn leave_for(&self, next: Phase) -> Option<Phase> {
        let mut left = None;
        self.0.send_if_modified(|state| {
            let forward = next.rank() > state.rank();
            if forward {
                left = Some(std::mem::replace(state, next));
            }
            forward
        });
        left
    }

    /// Sees the state.
    pub fn watch(&self) -> PhaseWatch {
        PhaseWatch(self.0.subscribe())
    }
}

/// Sees a pod's state.
#[derive(Clone)]
pub struct PhaseWatch(watch::Receiver<Phase>);

impl PhaseWatch {
    /// The state now.
    pub fn now(&self) -> Phase {
        self.0.borrow().clone()
    }

    /// Resolves with the reason when the VM has gone; at once if that is past.
    pub async fn gone(&self) -> Arc<str> {
        let mut watch = self.0.clone();
        let seen = watch
            .wait_for(|state| matches!(state, Phase::Gone { .. }))
            .await;
        match seen.as_deref() {
            Ok(Phase::Gone { reason }) => Arc::clone(reason),
            // The owner went without a word.
            _ => "the shim is ending".into(),
        }
    }

    /// Does something until it is done, or the VM has gone.
    pub async fn while_there(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            () = work => {}
            _ = self.gone() => {}
        }
    }

    /// Resolves with the agent once it serves, or with why it does not.
    ///
    /// # Errors
    /// The reason, a sentence.
    pub async fn agent(&self) -> Result<Agent, Arc<str>> {
        let mut watch = self.0.clone();
        let seen = watch
            .wait_for(|state| !matches!(state, Phase::Idle | Phase::Starting))
            .await;
        match seen.as_deref() {
            Ok(Phase::Running(agent)) => Ok(agent.clone()),
            Ok(Phase::Gone { reason }) => Err(Arc::clone(reason)),
            _ => Err("the pod is being stopped".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pod_never_comes_back() {
        let sender = PhaseSender::default();
        let watch = sender.watch();
        assert!(matches!(
            sender.leave_for(Phase::Starting),
            Some(Phase::Idle)
        ));
        assert!(sender.advance(Phase::Stopping));
        assert!(!sender.advance(Phase::Starting));
        assert!(watch.agent().await.is_err());
        assert!(sender.advance(Phase::Gone {
            reason: "first".into()
        }));
        assert!(!sender.advance(Phase::Gone {
            reason: "second".into()
        }));
        assert_eq!(&*watch.gone().await, "first");
        assert_eq!(watch.agent().await.err().as_deref(), Some("first"));
    }
}
