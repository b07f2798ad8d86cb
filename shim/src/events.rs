//! Task events on their way to containerd: one ordered queue a shim.
//!
//! containerd rebuilds a task's life from its events, so their order matters more than their speed: one worker
//! sends one event at a time over ttrpc and keeps at the same event until it is delivered. While containerd is away (a restart)
//! the queue holds them; only a queue that is full loses one, and says so in the log: an OOM kill where there is one, because the guest makes
//! as many of those as it likes, else the oldest.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tracing::{debug, error, info, warn};
use ttrpc::asynchronous::transport::Socket;

/// Events that wait at most. A pod makes a handful a container, so this is hours of an absent containerd.
const QUEUE_LIMIT: usize = 4096;
/// First pause after a failed attempt; it doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(50);
/// Longest pause between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How long containerd may take for one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts for an event that containerd answers with an error status: it is alive and refuses it.
const REFUSED_ATTEMPTS: u32 = 5;

/// A task event and the topic it is published under.
pub trait TaskEvent: MessageFull {
    /// containerd's topic.
    const TOPIC: &'static str;
}

macro_rules! topic {
    ($($event:ident => $topic:ident),* $(,)?) => {
        $(impl TaskEvent for task::$event { const TOPIC: &'static str = topics::$topic; })*
    };
}

topic! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

/// Sends events; clones share one queue.
#[derive(Debug, Clone)]
pub struct Publisher {
    namespace: Arc<str>,
    /// `None`: nobody listens.
    queue: Option<Arc<Queue>>,
}

#[derive(Debug)]
struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    added: Notify,
    /// Events accepted and not yet delivered or given up.
    pending: watch::Sender<usize>,
}

impl Publisher {
    /// A publisher to containerd's ttrpc address (a path, with or without `unix://`); without one, events go nowhere. Must be
    /// called within a tokio runtime.
    pub fn new(ttrpc_address: Option<&str>, namespace: &str) -> Self {
        let queue = ttrpc_address.map(|address| {
            let queue = Arc::new(Queue::new());
            let path = address
                .strip_prefix("unix://")
                .unwrap_or(address)
                .to_owned();
            tokio::spawn(deliver(Arc::clone(&queue), path));
            queue
        });
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Queues an event, stamped now. Events arrive in the order of these calls. Never waits.
    pub fn send<E: TaskEvent>(&self, event: E) {
        let Some(queue) = &self.queue else {
            debug!(
                topic = E::TOPIC,
                "event not sent: the engine gave no TTRPC_ADDRESS"
            );
            return;
        };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                error!(topic = E::TOPIC, %error, "cannot encode an event, it is lost");
                return;
            }
        };
        let any = Any {
            type_url: E::descriptor().full_name().to_owned(),
            value,
            ..Default::default()
        };
        let mut envelope = Envelope::new();
        envelope.set_timestamp(SystemTime::now().into());
        envelope.set_namespace(self.namespace.to_string());
        envelope.set_topic(E::TOPIC.to_owned());
        envelope.set_event(any);
        queue.push(envelope);
    }

    /// Waits until every event so far has been delivered, at most `limit`. Returns how many were still waiting then.
    pub async fn flush(&self, limit: Duration) -> usize {
        let Some(queue) = &self.queue else { return 0 };
        let mut pending = queue.pending.subscribe();
        let done = pending.wait_for(|&n| n == 0);
        if tokio::time::timeout(limit, done).await.is_ok() {
            return 0;
        }
        *queue.pending.borrow()
    }
}

impl Queue {
    fn new() -> Self {
        Self {
            waiting: Mutex::default(),
            added: Notify::new(),
            pending: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, envelope: Envelope) {
        let lost = {
            let mut waiting = self.lock();
            waiting.push_back(envelope);
            let lost = if waiting.len() > QUEUE_LIMIT {
                let least = waiting.iter().position(|e| e.topic == task::TaskOOM::TOPIC);
                waiting.remove(least.unwrap_or(0))
            } else {
                None
            };
            if lost.is_none() {
                self.pending.send_modify(|n| *n += 1);
            }
            lost
        };
        if let Some(lost) = lost {
            error!(
                topic = lost.topic,
                limit = QUEUE_LIMIT,
                "event queue full while containerd is away: this event is lost"
            );
        }
        self.added.notify_one();
    }

    async fn next(&self) -> Envelope {
        loop {
            if let Some(envelope) = self.lock().pop_front() {
                return envelope;
            }
            self.added.notified().await;
        }
    }

    fn done(&self) {
        self.pending.send_modify(|n| *n = n.saturating_sub(1));
    }
}

/// The worker: runs as long as the process.
async fn deliver(queue: Arc<Queue>, path: String) {
    let mut connection: Option<EventsClient> = None;
    loop {
        let envelope = queue.next().await;
        let mut backoff = MIN_BACKOFF;
        let mut refused = 0;
        loop {
            match forward(&mut connection, &path, &envelope).await {
                Ok(()) => {
                    if backoff > MIN_BACKOFF {
                        info!(topic = envelope.topic, "containerd takes events again");
                    }
                    break;
                }
                Err(ForwardError::Refused(reason)) => {
                    refused += 1;
                    if refused >= REFUSED_ATTEMPTS {
                        error!(
                            topic = envelope.topic,
                            reason, "containerd refuses an event, it is lost"
                        );
                        break;
                    }
                }
                Err(ForwardError::Unreachable(reason)) => {
                    connection = None;
                    if backoff == MIN_BACKOFF {
                        warn!(
                            topic = envelope.topic,
                            path, reason, "containerd does not take events, trying on"
                        );
                    }
                }
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
        queue.done();
    }
}

enum ForwardError {
    /// No answer: try the same event again on a new connection.
    Unreachable(String),
    /// containerd answered with an error.
    Refused(String),
}

async fn forward(
    connection: &mut Option<EventsClient>,
    path: &str,
    envelope: &Envelope,
) -> Result<(), ForwardError> {
    let client = match connection {
        Some(client) => client,
        None => {
            let socket = UnixStream::connect(path)
                .await
                .map_err(|e| ForwardError::Unreachable(e.to_string()))?;
            connection.insert(EventsClient::new(Client::new(Socket::from(socket))))
        }
    };
    let mut request = ForwardRequest::new();
    request.set_envelope(envelope.clone());
    let nanos = i64::try_from(FORWARD_TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    match client
        .forward(ttrpc::context::with_timeout(nanos), &request)
        .await
    {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) => match status.code() {
            ttrpc::Code::DEADLINE_EXCEEDED | ttrpc::Code::UNAVAILABLE | ttrpc::Code::CANCELLED => {
                Err(ForwardError::Unreachable(status.message))
            }
            code => Err(ForwardError::Refused(format!(
                "{code:?}: {}",
                status.message
            ))),
        },
        Err(other) => Err(ForwardError::Unreachable(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use std::path::{Path, PathBuf};
    use tokio::sync::mpsc;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    /// containerd's end: passes on what it gets, refuses topics as told.
    struct Containerd {
        got: mpsc::UnboundedSender<Envelope>,
        refuse: &'static str,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap_or_default();
            if envelope.topic == self.refuse {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                    ttrpc::Code::INVALID_ARGUMENT,
                    "no",
                )));
            }
            self.got.send(envelope).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(
        path: &Path,
        got: &mpsc::UnboundedSender<Envelope>,
        refuse: &'static str,
    ) -> Server {
        let _ = std::fs::remove_file(path);
        let service = create_events(Arc::new(Containerd {
            got: got.clone(),
            refuse,
        }));
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(service);
        server.start().await.unwrap();
        server
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        (dir, path)
    }

    fn exit(n: u32) -> task::TaskExit {
        task::TaskExit {
            container_id: "c".into(),
            exit_status: n,
            ..Default::default()
        }
    }

    fn status(envelope: &Envelope) -> u32 {
        use containerd_shim_protos::protobuf::Message as _;
        task::TaskExit::parse_from_bytes(&envelope.event.value)
            .unwrap()
            .exit_status
    }

    #[tokio::test]
    async fn an_event_arrives_as_containerd_wants_it() {
        let (_dir, path) = place();
        let (sender, mut got) = mpsc::unbounded_channel();
        let _server = serve(&path, &sender, "").await;
        let publisher = Publisher::new(path.to_str(), "ns");
        publisher.send(exit(42));
        let envelope = got.recv().await.unwrap();
        assert_eq!(
            (envelope.namespace.as_str(), envelope.topic.as_str()),
            ("ns", "/tasks/exit")
        );
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
        assert!(envelope.timestamp.seconds > 1_600_000_000);
        assert_eq!(publisher.flush(Duration::from_secs(10)).await, 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn order_survives_a_containerd_that_is_late_and_one_that_dies() {
        let (_dir, path) = place();
        let (sender, mut got) = mpsc::unbounded_channel();
        let publisher = Publisher::new(path.to_str(), "ns");
        // Nobody is there yet.
        (0..50).for_each(|n| publisher.send(exit(n)));
        assert_eq!(publisher.flush(Duration::from_millis(10)).await, 50);
        let mut server = serve(&path, &sender, "").await;
        let mut seen = vec![status(&got.recv().await.unwrap())];
        // It dies with the queue half sent, and comes back.
        server.disconnect().await;
        drop(server);
        std::fs::remove_file(&path).unwrap();
        (50..100).for_each(|n| publisher.send(exit(n)));
        let _server = serve(&path, &sender, "").await;
        assert_eq!(publisher.flush(Duration::from_secs(30)).await, 0);
        while let Ok(envelope) = got.try_recv() {
            seen.push(status(&envelope));
        }
        // One whose answer was lost may come twice; none may be missing or early.
        seen.dedup();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_refused_event_does_not_hold_up_the_others() {
        let (_dir, path) = place();
        let (sender, mut got) = mpsc::unbounded_channel();
        let _server = serve(&path, &sender, "/tasks/oom").await;
        let publisher = Publisher::new(Some(&format!("unix://{}", path.display())), "ns");
        publisher.send(task::TaskOOM {
            container_id: "c".into(),
            ..Default::default()
        });
        publisher.send(exit(1));
        assert_eq!(got.recv().await.unwrap().topic, "/tasks/exit");
    }

    #[tokio::test]
    async fn a_full_queue_loses_the_oldest() {
        let queue = Queue::new();
        for n in 0..=QUEUE_LIMIT {
            let mut envelope = Envelope::new();
            envelope.topic = n.to_string();
            queue.push(envelope);
        }
        assert_eq!(*queue.pending.borrow(), QUEUE_LIMIT);
        assert_eq!(queue.next().await.topic, "1");
    }

    #[tokio::test]
    async fn a_full_queue_loses_oom_kills_first() {
        let queue = Queue::new();
        let event = |topic: &str| {
            let mut envelope = Envelope::new();
            envelope.topic = topic.into();
            queue.push(envelope);
        };
        event("/tasks/exit");
        for _ in 0..QUEUE_LIMIT {
            event("/tasks/oom");
        }
        event("/tasks/delete");
        assert_eq!(*queue.pending.borrow(), QUEUE_LIMIT);
        assert_eq!(queue.next().await.topic, "/tasks/exit");
        assert_eq!(queue.lock().back().unwrap().topic, "/tasks/delete");
        // Nor does one push out what came before it.
        let queue = Queue::new();
        for topic in (0..QUEUE_LIMIT)
            .map(|_| "/tasks/exit")
            .chain(["/tasks/oom"])
        {
            let mut envelope = Envelope::new();
            envelope.topic = topic.into();
            queue.push(envelope);
        }
        assert!(queue.lock().iter().all(|e| e.topic == "/tasks/exit"));
    }

    #[tokio::test]
    async fn without_an_address_events_go_nowhere() {
        let publisher = Publisher::new(None, "ns");
        publisher.send(exit(0));
        assert_eq!(publisher.flush(Duration::from_secs(1)).await, 0);
    }
}
