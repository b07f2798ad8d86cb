//! The agent's end of its connection. Each call has one end: the answer that came for it, or an error; nothing is taken for an answer that is
//! none, and once a frame has come that is no answer there are no more.

use std::time::Duration;

use husk_protocol::agent::{
    AdjustClockResponse, ContainerStatsResponse, Event, ListProcessesResponse, WaitProcessResponse,
};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_RESPONSE, MessageHeader,
    Response, Status,
};

use crate::{
    agent::Agent,
    error::TaskError,
    phase::{Phase, PhaseSender},
};

/// Calls that are waiting together, and then frames for them.
#[derive(arbitrary::Arbitrary, Debug)]
pub struct Talk {
    calls: Vec<Call>,
    frames: Vec<Frame>,
    /// Bytes that come at once.
    piece: u16,
    /// The agent hangs up; else it falls silent.
    hangs_up: bool,
}

#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
enum Call {
    Stats,
    Wait,
    Event,
    Clock,
    Count,
    Start,
    Signal,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Frame {
    Answer(u8, Body),
    AnswerToo(u8, Body),
    Stray(u32, Body),
    Kind(u8, u8, u8),
    /// About as long as a frame may be, or short.
    Long(u8, u8),
    /// Said to be as long, and cut short.
    Cut(u8, u32),
    Bytes(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Body {
    Number(u64),
    Nothing,
    Payload(Vec<u8>),
    Refusal(u8, String),
    LongRefusal(char, u16),
    Bytes(Vec<u8>),
}

const MOST_CALLS: usize = 8;
/// How long the news of the VM's end may take.
const NEWS: Duration = Duration::from_secs(2);
/// Characters of an error at most: the agent's own, and what the shim says about them.
const MAX_WORDS: usize = 6000 + 200;

impl Body {
    fn bytes(&self) -> Vec<u8> {
        let response = |payload: Vec<u8>| Response {
            status: Some(status(Code::OK, "")).into(),
            payload,
            ..Default::default()
        };
        let refusal = |code: Code, words: &str| Response {
            status: Some(status(code, words)).into(),
            ..Default::default()
        };
        let response = match self {
            // The first field of the most answers.
            Self::Number(number) => {
                let answer = AdjustClockResponse {
                    wall_clock_ns: *number,
                    ..Default::default()
                };
                response(answer.write_to_bytes().unwrap())
            }
            Self::Nothing => response(Vec::new()),
            Self::Payload(bytes) => response(bytes.clone()),
            Self::Refusal(code, words) => {
                let codes = [
                    Code::NOT_FOUND,
                    Code::INTERNAL,
                    Code::UNKNOWN,
                    Code::ABORTED,
                ];
                refusal(codes[usize::from(code % 4)], words)
            }
            Self::LongRefusal(word, times) => {
                let words = word.to_string().repeat(usize::from(*times));
                refusal(Code::INTERNAL, &words)
            }
            Self::Bytes(bytes) => return bytes.clone(),
        };
        response.write_to_bytes().unwrap()
    }
}

fn status(code: Code, words: &str) -> Status {
    let mut status = Status::new();
    status.set_code(code);
    status.set_message(words.to_owned());
    status
}

fn frame(kind: u8, stream_id: u32, length: usize, body: &[u8]) -> Vec<u8> {
    let header = MessageHeader {
        length: length as u32,
        stream_id,
        type_: kind,
        flags: 0,
    };
    [&Vec::from(header)[..], body].concat()
}

impl Frame {
    /// On streams that have these numbers.
    fn bytes(&self, ids: &[u32]) -> Vec<u8> {
        let id = |which: u8| match ids.len() {
            0 => 1,
            count => ids[usize::from(which) % count],
        };
        let answer = |id, body: &[u8]| frame(MESSAGE_TYPE_RESPONSE, id, body.len(), body);
        match self {
            Self::Answer(which, body) | Self::AnswerToo(which, body) => {
                answer(id(*which), &body.bytes())
            }
            Self::Stray(id, body) => answer(*id, &body.bytes()),
            Self::Kind(kind, which, len) => {
                let body = vec![0; usize::from(*len)];
                frame(*kind, id(*which), body.len(), &body)
            }
            // Seldom: they take their time.
            Self::Long(which, by @ 224..) => {
                let body = vec![0; MESSAGE_LENGTH_MAX + usize::from(*by) - 240];
                answer(id(*which), &body)
            }
            Self::Long(which, by) => answer(id(*which), &vec![0; usize::from(*by)]),
            Self::Cut(which, len) => frame(MESSAGE_TYPE_RESPONSE, id(*which), *len as usize, &[]),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// What is to become of a call.
#[derive(Debug, Clone)]
enum End {
    /// This answer.
    Answer(Vec<u8>),
    Refusal,
    /// No answer has come.
    None,
}

/// What the bytes say about each stream, and whether they end in what is no answer.
fn read(mut bytes: &[u8], ids: &[u32]) -> (Vec<End>, bool) {
    let mut ends = vec![End::None; ids.len()];
    while let Some((header, rest)) = bytes.split_first_chunk::<MESSAGE_HEADER_LENGTH>() {
        let length = u32::from_be_bytes(header[..4].try_into().unwrap()) as usize;
        let id = u32::from_be_bytes(header[4..8].try_into().unwrap());
        if header[8] != MESSAGE_TYPE_RESPONSE {
            return (ends, true);
        }
        let Some((body, rest)) = rest.split_at_checked(length) else {
            break;
        };
        bytes = rest;
        let Some(call) = ids.iter().position(|one| *one == id) else {
            continue;
        };
        // The first is the answer.
        if let End::None = ends[call] {
            let response = Response::parse_from_bytes(body);
            ends[call] = match response {
                Ok(response) if length <= MESSAGE_LENGTH_MAX => {
                    let is_ok = response
                        .status
                        .as_ref()
                        .is_none_or(|status| status.code() == Code::OK);
                    if is_ok {
                        End::Answer(response.payload)
                    } else {
                        End::Refusal
                    }
                }
                _ => End::Refusal,
            };
        }
    }
    (ends, false)
}

impl Call {
    async fn make(self, agent: Agent) -> Result<Vec<u8>, TaskError> {
        let bytes = |message: &dyn protobuf::MessageDyn| message.write_to_bytes_dyn().unwrap();
        match self {
            Self::Stats => agent.stats("c").await.map(|answer| bytes(&answer)),
            Self::Wait => agent.wait("c", "").await.map(|answer| bytes(&answer)),
            Self::Event => agent.next_event().await.map(|answer| bytes(&answer)),
            Self::Clock => agent
                .adjust_clock(0)
                .await
                .map(|ns| ns.to_le_bytes().into()),
            Self::Count => agent
                .count_processes("c")
                .await
                .map(|count| count.to_le_bytes().into()),
            Self::Start => agent.start_container("c").await.map(|()| Vec::new()),
            Self::Signal => agent.signal("c", "", 9, true).await.map(|()| Vec::new()),
        }
    }

    /// What it returns for an answer; none where that cannot be read.
    fn result(self, payload: &[u8]) -> Option<Vec<u8>> {
        fn again<T: Message>(payload: &[u8]) -> Option<Vec<u8>> {
            Some(T::parse_from_bytes(payload).ok()?.write_to_bytes().unwrap())
        }
        match self {
            Self::Stats => again::<ContainerStatsResponse>(payload),
            Self::Wait => again::<WaitProcessResponse>(payload),
            Self::Event => again::<Event>(payload),
            Self::Clock => {
                let answer = AdjustClockResponse::parse_from_bytes(payload).ok()?;
                Some(answer.wall_clock_ns.to_le_bytes().into())
            }
            Self::Count => {
                let answer = ListProcessesResponse::parse_from_bytes(payload).ok()?;
                Some(answer.processes.len().to_le_bytes().into())
            }
            Self::Start | Self::Signal => {
                husk_protocol::agent::Empty::parse_from_bytes(payload).ok()?;
                Some(Vec::new())
            }
        }
    }
}

/// Reads a call; its stream.
async fn request(guest: &mut UnixStream) -> u32 {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    guest.read_exact(&mut header).await.unwrap();
    let header = MessageHeader::from(header);
    let mut payload = vec![0; header.length as usize];
    guest.read_exact(&mut payload).await.unwrap();
    header.stream_id
}

/// A talk from its calls to their ends.
pub async fn run(talk: Talk) {
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let phase = PhaseSender::default();
    let agent = Agent::new(ours, phase.watch());
    let mut calls = Vec::new();
    let mut ids = Vec::new();
    for call in talk.calls.iter().copied().take(MOST_CALLS) {
        calls.push((call, tokio::spawn(call.make(agent.clone()))));
        ids.push(request(&mut guest).await);
    }
    let frames = talk.frames.iter().take(24);
    let bytes: Vec<u8> = frames.flat_map(|frame| frame.bytes(&ids)).collect();
    let (ends, is_broken) = read(&bytes, &ids);
    let piece = usize::from(talk.piece).max(1 + bytes.len() / 256);
    for piece in bytes.chunks(piece) {
        // It may have been cut off.
        if guest.write_all(piece).await.is_err() {
            break;
        }
    }
    // All of it is read before there are more calls, which it would else answer.
    tokio::time::sleep(Duration::from_millis(1)).await;
    let guest = if talk.hangs_up { None } else { Some(guest) };
    let gone = async {
        // Longer than any call waits on its own account.
        tokio::time::sleep(Duration::from_secs(100_000)).await;
        let reason = "over".into();
        phase.advance(Phase::Gone { reason });
    };
    tokio::pin!(gone);
    let begin = Instant::now();
    for ((call, task), end) in calls.into_iter().zip(ends) {
        let mut task = task;
        let result = tokio::select! {
            biased;
            result = &mut task => result,
            () = &mut gone => task.await,
        };
        check(call, result.unwrap(), end, is_broken);
    }
    if is_broken {
        assert!(
            agent.stats("c").await.is_err(),
            "it goes on behind a frame that is no answer"
        );
        // Nobody waits for more, but for a while for the news of the VM's end.
        assert!(
            begin.elapsed() < 3 * NEWS,
            "it waits for an answer behind a frame that is none"
        );
    }
    drop(guest);
}

fn check(call: Call, result: Result<Vec<u8>, TaskError>, end: End, is_broken: bool) {
    match (&result, end) {
        (Ok(got), End::Answer(payload)) => {
            assert_eq!(Some(got), call.result(&payload).as_ref(), "{call:?}");
        }
        (Ok(got), end) => panic!("{call:?} has {got:?} of {end:?}"),
        // What came just before the end may be lost with it.
        (Err(error), End::Answer(payload)) => assert!(
            is_broken || call.result(&payload).is_none(),
            "{call:?} failed though it was answered: {error}"
        ),
        (Err(_), End::Refusal | End::None) => {}
    }
    if let Err(error) = result {
        let words = error.message();
        assert!(words.chars().count() <= MAX_WORDS, "{}", words.len());
        let is_clean = |c: char| matches!(c, '\n' | '\t') || !c.is_control();
        assert!(
            !error.is_of_guest() || words.chars().all(is_clean),
            "{words:?}"
        );
    }
}
