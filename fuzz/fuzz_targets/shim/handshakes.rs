//! Connections to the stream port. One that says an expected token, whole and in time, is that stream, once; any other is closed.

use std::{
    io::ErrorKind,
    sync::{Arc, Mutex},
    time::Duration,
};

use husk_protocol::stream::TOKEN_LEN;
use tokio::{
    net::UnixStream,
    sync::oneshot,
    time::{Instant, sleep},
};

use crate::streams::{Expecting, Reserved, Sink, StreamKind, Streams};

/// What happens.
#[derive(arbitrary::Arbitrary, Debug)]
pub enum Step {
    Expect(u8),
    ExpectOne,
    Dial(Said),
    Say(u8, Said),
    HangUp(u8),
    Forget(u8),
    Wait(u8),
}

/// What a connection says.
#[derive(arbitrary::Arbitrary, Debug)]
pub enum Said {
    Token(u8),
    /// Of a token, from one byte to another.
    Part(u8, u8, u8),
    Bytes(Vec<u8>),
    TokenAndMore(u8, Vec<u8>),
}

const STEPS: usize = 48;
/// How long a connection has for its token.
const PATIENCE: Duration = Duration::from_secs(10);
const KINDS: [StreamKind; 3] = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr];

/// Streams that have come, by the number of what expects them.
#[derive(Default)]
struct Joined(Mutex<Vec<(usize, StreamKind, UnixStream)>>);

struct Recorder {
    number: usize,
    joined: Arc<Joined>,
}

impl Sink for Recorder {
    fn connect(&self, kind: StreamKind, stream: UnixStream) {
        let mut joined = self.joined.0.lock().unwrap();
        joined.push((self.number, kind, stream));
    }
}

enum Waiting {
    Process {
        _tokens: Expecting,
    },
    One {
        _token: Reserved,
        stream: oneshot::Receiver<UnixStream>,
        has_come: bool,
    },
    Forgotten,
}

struct Token {
    bytes: Vec<u8>,
    /// What expects it.
    number: usize,
    /// None: it is alone.
    kind: Option<StreamKind>,
    is_used: bool,
}

enum State {
    Unknown,
    Joined,
    Closed,
}

struct Dial {
    guest: UnixStream,
    said: Vec<u8>,
    at: Instant,
    state: State,
}

#[derive(Default)]
struct World {
    streams: Streams,
    joined: Arc<Joined>,
    waiting: Vec<Waiting>,
    tokens: Vec<Token>,
    dials: Vec<Dial>,
    /// Streams that are to have come.
    count: usize,
}

/// All of it, step by step.
pub async fn run(steps: &[Step]) {
    let mut world = World::default();
    for step in steps.iter().take(STEPS) {
        world.step(step).await;
        // All tasks have their turn before time passes.
        sleep(Duration::from_millis(1)).await;
        world.check();
    }
}

impl World {
    async fn step(&mut self, step: &Step) {
        match step {
            Step::Expect(which) => self.expect(*which),
            Step::ExpectOne => {
                let (reserved, stream) = self.streams.expect_one().unwrap();
                self.tokens.push(Token {
                    bytes: reserved.for_agent(),
                    number: self.waiting.len(),
                    kind: None,
                    is_used: false,
                });
                self.waiting.push(Waiting::One {
                    _token: reserved,
                    stream,
                    has_come: false,
                });
            }
            Step::Dial(said) => {
                let (guest, host) = UnixStream::pair().unwrap();
                self.streams.accept(host);
                self.dials.push(Dial {
                    guest,
                    said: Vec::new(),
                    at: Instant::now(),
                    state: State::Unknown,
                });
                self.say(self.dials.len() - 1, said);
            }
            Step::Say(which, said) => {
                if let Some(which) = usize::from(*which).checked_rem(self.dials.len()) {
                    self.say(which, said);
                }
            }
            Step::HangUp(which) => {
                if let Some(which) = usize::from(*which).checked_rem(self.dials.len()) {
                    self.dials.swap_remove(which);
                }
            }
            Step::Forget(which) => {
                if let Some(which) = usize::from(*which).checked_rem(self.waiting.len()) {
                    self.waiting[which] = Waiting::Forgotten;
                }
            }
            Step::Wait(seconds) => sleep(Duration::from_secs((seconds % 12).into())).await,
        }
    }

    fn expect(&mut self, which: u8) {
        let number = self.waiting.len();
        let sink = Arc::new(Recorder {
            number,
            joined: Arc::clone(&self.joined),
        });
        let kinds: Vec<_> = (0..3)
            .filter(|bit| which & 1 << bit != 0)
            .map(|bit| KINDS[bit])
            .collect();
        let expecting = self.streams.expect(&sink, &kinds).unwrap();
        let fields = expecting.for_agent(false);
        let fields = [fields.stdin_token, fields.stdout_token, fields.stderr_token];
        for (kind, bytes) in KINDS.into_iter().zip(fields) {
            assert_eq!(bytes.is_empty(), !kinds.contains(&kind));
            if !bytes.is_empty() {
                self.tokens.push(Token {
                    bytes,
                    number,
                    kind: Some(kind),
                    is_used: false,
                });
            }
        }
        self.waiting.push(Waiting::Process { _tokens: expecting });
    }

    fn bytes(&self, said: &Said) -> Vec<u8> {
        let token = |which: u8| {
            let which = usize::from(which).checked_rem(self.tokens.len());
            which.map_or(vec![0; TOKEN_LEN], |which| self.tokens[which].bytes.clone())
        };
        match said {
            Said::Token(which) => token(*which),
            Said::Part(which, from, to) => {
                let (from, to) = (usize::from(from % 33), usize::from(to % 33));
                token(*which)[from.min(to)..to.max(from)].to_vec()
            }
            Said::Bytes(bytes) => bytes.clone(),
            Said::TokenAndMore(which, more) => [token(*which), more.clone()].concat(),
        }
    }

    fn say(&mut self, which: usize, said: &Said) {
        let bytes = self.bytes(said);
        let dial = &mut self.dials[which];
        match dial.guest.try_write(&bytes) {
            Ok(len) => assert_eq!(len, bytes.len()),
            // It has been closed.
            Err(_) => return,
        }
        let was_unknown = dial.said.len() < TOKEN_LEN;
        dial.said.extend(bytes);
        if !was_unknown || dial.said.len() < TOKEN_LEN || !matches!(dial.state, State::Unknown) {
            return;
        }
        let said = &dial.said[..TOKEN_LEN];
        let is_expected = |token: &&mut Token| {
            let is_forgotten = matches!(self.waiting[token.number], Waiting::Forgotten);
            !token.is_used && !is_forgotten && token.bytes == said
        };
        dial.state = match self.tokens.iter_mut().find(is_expected) {
            Some(token) => {
                token.is_used = true;
                self.count += usize::from(token.kind.is_some());
                State::Joined
            }
            None => State::Closed,
        };
    }

    fn check(&mut self) {
        let mut joined = self.joined.0.lock().unwrap();
        assert_eq!(joined.len(), self.count, "streams that have come");
        for (number, kind, _) in joined.iter() {
            let is_it = |token: &Token| (token.number, token.kind) == (*number, Some(*kind));
            let token = self.tokens.iter().find(|token| is_it(token)).unwrap();
            assert!(token.is_used, "a stream that nobody has said the token of");
        }
        // Whose process has gone is closed.
        joined.retain(|(number, ..)| !matches!(self.waiting[*number], Waiting::Forgotten));
        self.count = joined.len();
        drop(joined);
        for token in self.tokens.iter().filter(|token| token.kind.is_none()) {
            if let Waiting::One {
                stream, has_come, ..
            } = &mut self.waiting[token.number]
            {
                *has_come |= stream.try_recv().is_ok();
                assert_eq!(*has_come, token.is_used, "a stream for one");
            }
        }
        for dial in &mut self.dials {
            if matches!(dial.state, State::Unknown) && dial.at.elapsed() >= PATIENCE {
                dial.state = State::Closed;
            }
            let read = dial.guest.try_read(&mut [0; 1]);
            let is_open = matches!(&read, Err(error) if error.kind() == ErrorKind::WouldBlock);
            match dial.state {
                State::Unknown => assert!(is_open, "closed before its time: {read:?}"),
                State::Closed => assert!(!is_open, "open, though it said no token"),
                State::Joined => {}
            }
        }
    }
}
