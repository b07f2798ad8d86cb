//! Which of the guest's connections is which stream: a process's standard stream, or a port-forward.
//!
//! Everything in the guest can dial the host, containers included. A stream is known by the token that the agent was given for it
//! and by nothing else: a connection that does not open with an expected token within a short time is closed, unread.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use husk_protocol::{
    agent,
    stream::{TOKEN_LEN, Token},
};
use tokio::{
    io::AsyncReadExt as _, net::UnixStream, sync::oneshot, task::AbortHandle, time::timeout,
};
use tracing::{debug, warn};

use crate::few::Few;

/// How long a connection may take to say its token. Generous: the agent sends it at once, but the guest may be starved of CPU.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that may owe us a token at the same time; one more, and the oldest is closed. So a container that dials and says nothing
/// keeps nobody waiting: the agent says its tokens at once. Twice what the guest's vsock queue holds: however fast a container
/// dials, it pushes no token out that was sent at once.
const MAX_UNKNOWN: usize = 512;

/// One of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// Host to guest.
    Stdin,
    /// Guest to host; with a terminal, all its output.
    Stdout,
    /// Guest to host.
    Stderr,
}

/// Where a joined stream goes.
pub trait Sink: Send + Sync {
    /// Takes the stream, its token already read.
    fn connect(&self, kind: StreamKind, stream: UnixStream);
}

/// Takes the stream of a token.
type Join = Box<dyn FnOnce(UnixStream) + Send>;

type Expected = HashMap<Token, Join>;

/// The streams that the shim waits for.
#[derive(Clone, Default)]
pub struct Streams {
    expected: Arc<Mutex<Expected>>,
    unknown: Arc<Mutex<VecDeque<AbortHandle>>>,
    lines: Arc<Few>,
}

/// Tokens handed to the agent for one process. Those not used are forgotten with this value.
pub struct Expecting(HashMap<StreamKind, Reserved>);

/// A token handed to the agent. Where it is not used, it is forgotten with this value.
pub struct Reserved {
    streams: Streams,
    token: Token,
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes tokens for these streams of a process.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn expect(
        &self,
        sink: &Arc<impl Sink + 'static>,
        kinds: &[StreamKind],
    ) -> io::Result<Expecting> {
        let mut tokens = HashMap::new();
        for &kind in kinds {
            let sink = Arc::clone(sink);
            let join = move |stream| sink.connect(kind, stream);
            tokens.insert(kind, self.reserve(Box::new(join))?);
        }
        Ok(Expecting(tokens))
    }

    /// Makes the token of a stream that comes out of the receiver.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn expect_one(&self) -> io::Result<(Reserved, oneshot::Receiver<UnixStream>)> {
        let (sender, stream) = oneshot::channel();
        // Nobody may wait any more: then it is closed.
        let join = move |stream| drop(sender.send(stream));
        Ok((self.reserve(Box::new(join))?, stream))
    }

    fn reserve(&self, join: Join) -> io::Result<Reserved> {
        let mut bytes = [0; TOKEN_LEN];
        random(&mut bytes)?;
        let token = Token::new(bytes);
        self.lock().insert(token.clone(), join);
        Ok(Reserved {
            streams: self.clone(),
            token,
        })
    }

    /// Takes a connection to the stream port: reads its token and joins it, in the background.
    pub fn accept(&self, mut stream: UnixStream) {
        let streams = self.clone();
        let introduced = tokio::spawn(async move {
            let mut token = [0; TOKEN_LEN];
            match timeout(TOKEN_TIMEOUT, stream.read_exact(&mut token)).await {
                Ok(Ok(_)) => {}
                outcome => {
                    debug!(?outcome, "a stream connection gave no token, closed");
                    return;
                }
            }
            // A token opens one stream, once.
            let taken = streams.lock().remove(&Token::new(token));
            match taken {
                Some(join) => join(stream),
                None if streams.lines.more() => {
                    warn!("a stream connection with a token that nobody waits for, closed");
                }
                None => {}
            }
        });
        self.make_room(introduced.abort_handle());
    }

    fn make_room(&self, newest: AbortHandle) {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        unknown.retain(|one| !one.is_finished());
        unknown.push_back(newest);
        if unknown.len() > MAX_UNKNOWN
            && let Some(oldest) = unknown.pop_front()
        {
            oldest.abort();
        }
    }
}

impl Expecting {
    /// The tokens as the agent gets them.
    pub fn for_agent(&self, terminal: bool) -> agent::Stdio {
        let field = |kind: StreamKind| {
            self.0
                .get(&kind)
                .map(|reserved| reserved.token.as_bytes().to_vec())
                .unwrap_or_default()
        };
        agent::Stdio {
            stdin_token: field(StreamKind::Stdin),
            stdout_token: field(StreamKind::Stdout),
            stderr_token: field(StreamKind::Stderr),
            terminal,
            ..Default::default()
        }
    }
}

impl Reserved {
    /// The token as the agent gets it.
    pub fn for_agent(&self) -> Vec<u8> {
        self.token.as_bytes().to_vec()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.streams.lock().remove(&self.token);
    }
}

/// Fills a buffer from the kernel's generator.
///
/// # Errors
/// When the kernel has none.
pub fn random(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, sync::mpsc};

    use super::*;

    struct Recorder(mpsc::UnboundedSender<(StreamKind, UnixStream)>);

    impl Sink for Recorder {
        fn connect(&self, kind: StreamKind, stream: UnixStream) {
            self.0.send((kind, stream)).unwrap();
        }
    }

    async fn dial(streams: &Streams, token: &[u8]) -> UnixStream {
        let (mut guest, host) = UnixStream::pair().unwrap();
        streams.accept(host);
        guest.write_all(token).await.unwrap();
        guest
    }

    async fn is_closed(mut guest: UnixStream) -> bool {
        let mut byte = [0; 1];
        matches!(guest.read(&mut byte).await, Ok(0) | Err(_))
    }

    #[tokio::test]
    async fn only_an_expected_token_joins_and_only_once() {
        let streams = Streams::default();
        let (sender, mut joined) = mpsc::unbounded_channel();
        let sink = Arc::new(Recorder(sender));
        let expecting = streams
            .expect(&sink, &[StreamKind::Stdout, StreamKind::Stdin])
            .unwrap();
        let fields = expecting.for_agent(false);
        assert_eq!(fields.stdout_token.len(), TOKEN_LEN);
        assert!(fields.stderr_token.is_empty());
        assert_ne!(fields.stdin_token, fields.stdout_token);

        assert!(is_closed(dial(&streams, &[0; TOKEN_LEN]).await).await);
        let mut guest = dial(&streams, &fields.stdout_token).await;
        guest.write_all(b"out").await.unwrap();
        let (kind, mut stream) = joined.recv().await.unwrap();
        assert_eq!(kind, StreamKind::Stdout);
        let mut text = [0; 3];
        stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"out");
        assert!(is_closed(dial(&streams, &fields.stdout_token).await).await);
        drop(expecting);
        assert!(is_closed(dial(&streams, &fields.stdin_token).await).await);
    }

    /// As a container dials that wants the others to wait.
    #[tokio::test(start_paused = true)]
    async fn those_that_say_nothing_keep_nobody_waiting() {
        let streams = Streams::default();
        let (sender, mut joined) = mpsc::unbounded_channel();
        let sink = Arc::new(Recorder(sender));
        let expecting = streams.expect(&sink, &[StreamKind::Stdout]).unwrap();
        let begin = tokio::time::Instant::now();
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_UNKNOWN {
            silent.push(dial(&streams, b"").await);
        }
        let _guest = dial(&streams, &expecting.for_agent(false).stdout_token).await;
        joined.recv().await.unwrap();
        assert_eq!(begin.elapsed(), Duration::ZERO);
        // The newest may still say something.
        let newest = silent.pop().unwrap();
        assert!(is_closed(silent.swap_remove(0)).await);
        assert_eq!(begin.elapsed(), Duration::ZERO);
        assert!(is_closed(newest).await);
        assert_eq!(begin.elapsed(), TOKEN_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_closed() {
        let streams = Streams::default();
        let guest = dial(&streams, b"half a token").await;
        assert!(is_closed(guest).await);
    }
}
