//! An agent that answers nothing, or what is no answer.

use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use ttrpc::{
    Code,
    proto::{MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader},
};

use super::*;
use crate::phase::{Phase, PhaseSender};

/// A pod whose VM runs, with the guest's end of the agent's connection.
fn pod() -> (Agent, UnixStream, PhaseSender) {
    let (ours, guest) = UnixStream::pair().unwrap();
    let phase = PhaseSender::default();
    (Agent::new(ours, phase.watch()), guest, phase)
}

fn frame(kind: u8, stream_id: u32, length: usize) -> Vec<u8> {
    let header = MessageHeader {
        length: length as u32,
        stream_id,
        type_: kind,
        flags: 0,
    };
    Vec::from(header)
}

#[tokio::test(start_paused = true)]
async fn every_call_has_an_end_though_nobody_answers() {
    let (agent, _guest, phase) = pod();
    let code = |result: Result<(), TaskError>| result.unwrap_err().code();
    let sandbox = CreateSandboxRequest::default();
    let volume = SyncVolumeRequest::default();
    let network = Network::default();
    let outcomes = [
        agent.create_sandbox(&sandbox).await.map(drop),
        agent.destroy_sandbox().await,
        agent.update_network(&network).await,
        agent.adjust_clock(0).await.map(drop),
        agent.bring_online(2).await.map(drop),
        agent
            .create_container("c", vec![], String::new(), Stdio::default())
            .await,
        agent.start_container("c").await,
        agent.delete_container("c").await,
        agent.freeze("c", true).await,
        agent.freeze("c", false).await,
        agent.update_container("c", vec![]).await,
        agent.stats("c").await.map(drop),
        agent.count_processes("c").await.map(drop),
        agent.describe_processes("c").await.map(drop),
        agent.exec("c", "e", vec![], Stdio::default()).await,
        agent.signal("c", "", 9, true).await,
        agent.resize("c", "", 1, 1).await,
        agent.sync_volume(&volume).await,
        agent.forward_port(80, vec![]).await,
    ];
    for (number, outcome) in outcomes.into_iter().enumerate() {
        assert_eq!(code(outcome), Code::DEADLINE_EXCEEDED, "call {number}");
    }
    // Those that may take for ever end with the VM.
    let end = async {
        tokio::time::sleep(Duration::from_secs(100_000)).await;
        phase.advance(Phase::Gone {
            reason: "over".into(),
        });
    };
    let (wait, event, ()) = tokio::join!(agent.wait("c", ""), agent.next_event(), end);
    assert!(wait.unwrap_err().message().contains("the VM has ended"));
    assert!(event.unwrap_err().message().contains("the VM has ended"));
}

/// Of a call's first frame of data ttrpc's client would keep the call for good, once an event.
#[tokio::test(start_paused = true)]
async fn a_frame_that_is_no_answer_breaks_the_connection() {
    let (agent, mut guest, _phase) = pod();
    let talk = async {
        let mut request = [0; 10];
        guest.read_exact(&mut request).await.unwrap();
        let stream_id = MessageHeader::from(request).stream_id;
        let frame = frame(MESSAGE_TYPE_DATA, stream_id, 0);
        guest.write_all(&frame).await.unwrap();
    };
    let (event, ()) = tokio::join!(agent.next_event(), talk);
    let error = event.unwrap_err();
    assert!(error.message().contains("no answer"), "{error}");
    assert!(agent.stats("c").await.is_err());
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_too_long_or_to_no_question_are_passed_over() {
    let (agent, mut guest, _phase) = pod();
    let talk = async {
        let mut request = [0; 10];
        guest.read_exact(&mut request).await.unwrap();
        let stream_id = MessageHeader::from(request).stream_id;
        for stream_id in [stream_id + 2, stream_id + 1, 0, u32::MAX] {
            let frame = frame(MESSAGE_TYPE_RESPONSE, stream_id, 0);
            guest.write_all(&frame).await.unwrap();
        }
        let length = MESSAGE_LENGTH_MAX + 1;
        let frame = frame(MESSAGE_TYPE_RESPONSE, stream_id, length);
        guest.write_all(&frame).await.unwrap();
        guest.write_all(&vec![0; length]).await.unwrap();
    };
    let (stats, ()) = tokio::join!(agent.stats("c"), talk);
    let error = stats.unwrap_err();
    assert!(error.message().contains("exceed"), "{error}");
}
