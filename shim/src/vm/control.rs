//! The control channel to husk-vmm: requests with an id, replies in any order, and the news that the VM is over.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use husk_protocol::vm::{Answer, Call, Event, FromVmm, MAX_PACKET, Request, VmExit};
use tokio::sync::{oneshot, watch};
use tracing::{debug, warn};

use super::seqpacket::Seqpacket;
use crate::few::Few;

/// Why a call got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// husk-vmm answered with its reason.
    #[error("{0}")]
    Refused(String),
    /// husk-vmm has closed the channel.
    #[error("husk-vmm has ended")]
    Closed,
}

/// The channel, once closed, and what the VMM said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Why the VM ended, where the VMM could still say so.
    pub exit: Option<VmExit>,
}

type Waiting = HashMap<u64, oneshot::Sender<Result<Answer, String>>>;

/// One VMM's control channel.
pub struct Control {
    socket: Seqpacket,
    /// `None` once the channel is closed.
    waiting: Mutex<Option<Waiting>>,
    next_id: AtomicU64,
    closed: watch::Sender<Option<Closed>>,
    /// MiB that the guest had when it last reached a target.
    memory_set: watch::Sender<u64>,
}

impl Control {
    /// Takes the channel over and reads it from now on. Must be called within a tokio runtime.
    pub fn new(socket: Seqpacket) -> Arc<Self> {
        let control = Arc::new(Self {
            socket,
            waiting: Mutex::new(Some(HashMap::new())),
            next_id: AtomicU64::new(1),
            closed: watch::Sender::new(None),
            memory_set: watch::Sender::new(0),
        });
        tokio::spawn(Arc::clone(&control).read());
        control
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn call(&self, call: Call) -> Result<Answer, ControlError> {
        self.call_with(call, Vec::new()).await
    }

    /// Asks, with fds beside the request, and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn call_with(&self, call: Call, fds: Vec<OwnedFd>) -> Result<Answer, ControlError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        match self.waiting().as_mut() {
            Some(waiting) => drop(waiting.insert(id, sender)),
            None => return Err(ControlError::Closed),
        }
        let packet = serde_json::to_vec(&Request { id, call })
            .map_err(|e| ControlError::Refused(e.to_string()))?;
        let sent = {
            let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
            self.socket.send(&packet, &borrowed).await
        };
        // The VMM has its own by now.
        drop(fds);
        sent.map_err(|_| ControlError::Closed)?;
        match receiver.await {
            Ok(result) => result.map_err(ControlError::Refused),
            Err(_) => Err(ControlError::Closed),
        }
    }

    /// Resolves when the guest has got as much memory as this, in MiB.
    ///
    /// # Errors
    /// [`ControlError::Closed`]: the VM has ended.
    pub async fn memory_set(&self, mib: u64) -> Result<(), ControlError> {
        let mut memory = self.memory_set.subscribe();
        tokio::select! {
            // The sender lives as long as this.
            _ = memory.wait_for(|has| *has >= mib) => Ok(()),
            _ = self.closed() => Err(ControlError::Closed),
        }
    }

    /// Resolves when the VMM has closed the channel.
    pub async fn closed(&self) -> Closed {
        let mut closed = self.closed.subscribe();
        let seen = closed.wait_for(Option::is_some).await.ok();
        seen.and_then(|closed| closed.clone())
            .unwrap_or(Closed { exit: None })
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(self: Arc<Self>) {
        let mut buffer = vec![0; MAX_PACKET];
        let mut exit = None;
        let lines = Few::default();
        loop {
            let length = match self.socket.receive(&mut buffer).await {
                Ok((0, _)) => break,
                Ok((length, _)) => length,
                Err(error) => {
                    debug!(%error, "the VMM's control channel is gone");
                    break;
                }
            };
            match serde_json::from_slice(buffer.get(..length).unwrap_or_default()) {
                Ok(FromVmm::Reply(reply)) => {
                    let waiter = self.waiting().as_mut().and_then(|w| w.remove(&reply.id));
                    if let Some(waiter) = waiter {
                        // Nobody waits any more: the caller gave up.
                        let _ = waiter.send(reply.result);
                    }
                }
                Ok(FromVmm::Event(Event::Exited(why))) => exit = Some(why),
                Ok(FromVmm::Event(Event::MemorySet { memory_mib })) => {
                    self.memory_set.send_replace(memory_mib);
                }
                Err(error) if lines.more() => warn!(%error, "husk-vmm sent a message that is none"),
                Err(_) => {}
            }
        }
        // Dropping the senders tells every caller.
        self.waiting().take();
        self.closed.send_replace(Some(Closed { exit }));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSliceMut, Write as _},
        mem::MaybeUninit,
    };

    use husk_protocol::vm::Reply;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};

    use super::*;

    fn receive(vmm: &OwnedFd) -> Request {
        let mut buffer = vec![0; MAX_PACKET];
        let (length, _) = rustix::net::recv(vmm, &mut buffer[..], RecvFlags::empty()).unwrap();
        serde_json::from_slice(&buffer[..length]).unwrap()
    }

    fn post(vmm: &OwnedFd, message: &FromVmm) {
        let packet = serde_json::to_vec(message).unwrap();
        rustix::net::send(vmm, &packet, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn the_guests_memory_is_waited_for_until_the_vm_ends() {
        let (ours, vmm) = Seqpacket::pair().unwrap();
        let control = Control::new(ours);
        post(&vmm, &FromVmm::Event(Event::MemorySet { memory_mib: 1024 }));
        assert_eq!(control.memory_set(1023).await, Ok(()));
        drop(vmm);
        assert_eq!(control.memory_set(1025).await, Err(ControlError::Closed));
    }

    #[tokio::test]
    async fn fds_arrive_beside_their_request() {
        let (ours, vmm) = Seqpacket::pair().unwrap();
        let control = Control::new(ours);
        let (reader, writer) = std::io::pipe().unwrap();
        let asked = tokio::spawn(async move {
            let call = Call::AttachNic {
                nic: 3,
                vhost: false,
            };
            control.call_with(call, vec![writer.into()]).await
        });
        let vmm_side = tokio::task::spawn_blocking(move || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = vec![0; MAX_PACKET];
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let message = recvmsg(&vmm, &mut parts, &mut ancillary, RecvFlags::empty()).unwrap();
            let mut fds = ancillary.drain().flat_map(|part| match part {
                RecvAncillaryMessage::ScmRights(fds) => fds,
                _ => panic!("fds were expected"),
            });
            let mut pipe = std::fs::File::from(fds.next().unwrap());
            assert!(fds.next().is_none());
            let request: Request = serde_json::from_slice(&buffer[..message.bytes]).unwrap();
            assert_eq!(
                request.call,
                Call::AttachNic {
                    nic: 3,
                    vhost: false
                }
            );
            pipe.write_all(b"tap").unwrap();
            drop(pipe);
            let result = Ok(Answer::Done);
            let id = request.id;
            post(&vmm, &FromVmm::Reply(Reply { id, result }));
        });
        assert_eq!(asked.await.unwrap(), Ok(Answer::Done));
        vmm_side.await.unwrap();
        // To its end: the shim holds no end of its own any more.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "tap");
    }

    #[tokio::test]
    async fn replies_find_their_callers_and_the_end_is_told() {
        let (ours, vmm) = Seqpacket::pair().unwrap();
        let control = Control::new(ours);
        let vmm_side = tokio::task::spawn_blocking(move || {
            let requests = [receive(&vmm), receive(&vmm)];
            for request in requests.into_iter().rev() {
                let result = match request.call {
                    Call::Pause => Ok(Answer::Done),
                    _ => Err("not now".to_owned()),
                };
                post(
                    &vmm,
                    &FromVmm::Reply(Reply {
                        id: request.id,
                        result,
                    }),
                );
            }
            rustix::net::send(&vmm, b"{}", SendFlags::empty()).unwrap();
            receive(&vmm);
            post(&vmm, &FromVmm::Event(Event::Exited(VmExit::PowerOff)));
        });
        let (pause, info) = tokio::join!(control.call(Call::Pause), control.call(Call::Info));
        assert_eq!(pause, Ok(Answer::Done));
        assert_eq!(info, Err(ControlError::Refused("not now".into())));
        assert_eq!(control.call(Call::Stop).await, Err(ControlError::Closed));
        vmm_side.await.unwrap();
        assert_eq!(
            control.closed().await,
            Closed {
                exit: Some(VmExit::PowerOff)
            }
        );
        assert_eq!(control.call(Call::Info).await, Err(ControlError::Closed));
    }
}
