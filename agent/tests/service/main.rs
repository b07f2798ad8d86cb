//! The agent API over a socket pair, with plain processes for containers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod forward;
mod host;
mod processes;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use host::TestHost;
use husk_agent::polled::polled;
use husk_agent::reaper::Reaper;
use husk_agent::sandbox::Milestones;
use husk_agent::service::Service;
use husk_protocol::agent::{
    AgentClient, ContainerRequest, CreateContainerRequest, CreateSandboxRequest, Empty,
    ExecProcessRequest, Interface, Network, ProcessRequest, ResizeTerminalRequest,
    SignalProcessRequest, Stdio, SyncVolumeRequest, WaitProcessResponse,
};
use processes::Processes;
use protobuf::MessageField;
use tokio::sync::{Mutex, MutexGuard};
use ttrpc::Code;
use ttrpc::r#async::transport::Socket;
use ttrpc::context;

const STDIN: [u8; 32] = [1; 32];
const STDOUT: [u8; 32] = [2; 32];
const STDERR: [u8; 32] = [3; 32];

/// A reaper takes every child of the process: one service at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Guest {
    client: AgentClient,
    host: Arc<TestHost>,
    served: tokio::task::JoinHandle<ttrpc::Result<()>>,
    _turn: MutexGuard<'static, ()>,
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

impl Guest {
    async fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let reaper = Arc::new(Reaper::default());
        tokio::spawn(Arc::clone(&reaper).run());
        let host = Arc::new(TestHost::default());
        let milestones = Milestones {
            started_ns: 1,
            dialled_ns: 2,
        };
        let service = Service::new(Processes, host.clone(), reaper, milestones).unwrap();
        let (ours, agents) = UnixStream::pair().unwrap();
        let served = tokio::spawn(service.serve(polled(OwnedFd::from(agents)).unwrap()));
        ours.set_nonblocking(true).unwrap();
        let socket = Socket::new(tokio::net::UnixStream::from_std(ours).unwrap());
        Self {
            client: AgentClient::new(ttrpc::r#async::Client::new(socket)),
            host,
            served,
            _turn: turn,
        }
    }

    async fn create(&self, id: &str, argv: &[&str], stdio: Stdio) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: serde_json::to_vec(argv).unwrap(),
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        Ok(self
            .client
            .create_container(context::Context::default(), &request)
            .await?
            .pid)
    }

    async fn start(&self, id: &str) -> ttrpc::Result<Empty> {
        self.client
            .start_container(context::Context::default(), &container(id))
            .await
    }

    async fn run(&self, id: &str, script: &str) {
        self.create(id, &["sh", "-c", script], Stdio::new())
            .await
            .unwrap();
        self.start(id).await.unwrap();
    }

    async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        argv: &[&str],
        stdio: Stdio,
    ) -> ttrpc::Result<u32> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process_json: serde_json::to_vec(argv).unwrap(),
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        Ok(self
            .client
            .exec_process(context::Context::default(), &request)
            .await?
            .pid)
    }

    async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitProcessResponse> {
        let request = ProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client
            .wait_process(context::Context::default(), &request)
            .await
    }

    async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<Empty> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        self.client
            .signal_process(context::Context::default(), &request)
            .await
    }

    async fn pause(&self, id: &str) -> ttrpc::Result<Empty> {
        self.client
            .pause_container(context::Context::default(), &container(id))
            .await
    }

    async fn delete(&self, id: &str) -> ttrpc::Result<Empty> {
        self.client
            .delete_container(context::Context::default(), &container(id))
            .await
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

fn stdio() -> Stdio {
    Stdio {
        stdin_token: STDIN.to_vec(),
        stdout_token: STDOUT.to_vec(),
        stderr_token: STDERR.to_vec(),
        ..Default::default()
    }
}

async fn read_to_end(mut stream: UnixStream) -> String {
    tokio::task::spawn_blocking(move || {
        let mut all = String::new();
        stream.read_to_string(&mut all).map(|_| all)
    })
    .await
    .unwrap()
    .unwrap()
}

#[tokio::test]
async fn a_container_lives_its_life() {
    let guest = Guest::new().await;
    let script = r#"read line; echo "got $line"; echo oops >&2; exit 42"#;
    let pid = guest
        .create("c", &["sh", "-c", script], stdio())
        .await
        .unwrap();
    assert!(pid > 0);
    assert_eq!(
        code(guest.create("c", &["true"], Stdio::new()).await).0,
        Code::ALREADY_EXISTS
    );
    guest.start("c").await.unwrap();
    let (refusal, words) = code(guest.start("c").await);
    assert_eq!(refusal, Code::FAILED_PRECONDITION, "{words}");

    let waits = tokio::spawn({
        let client = guest.client.clone();
        async move {
            let request = ProcessRequest {
                container_id: "c".into(),
                ..Default::default()
            };
            client
                .wait_process(context::Context::default(), &request)
                .await
        }
    });
    let mut stdin = guest.host.stream(&STDIN);
    stdin.write_all(b"me\n").unwrap();
    let ended = waits.await.unwrap().unwrap();
    assert_eq!(
        (ended.exit_status, ended.stdout_bytes, ended.stderr_bytes),
        (42, 7, 5)
    );
    assert!(ended.exited_at_ns > 0 && !ended.oom_killed);
    assert_eq!(read_to_end(guest.host.stream(&STDOUT)).await, "got me\n");
    assert_eq!(read_to_end(guest.host.stream(&STDERR)).await, "oops\n");
    assert_eq!(guest.wait("c", "").await.unwrap(), ended, "and again");

    assert_eq!(
        code(guest.signal("c", "", libc::SIGTERM, false).await),
        (Code::NOT_FOUND, "process already finished".into())
    );
    assert_eq!(
        code(guest.signal("c", "", libc::SIGKILL, true).await).0,
        Code::NOT_FOUND
    );
    let exec = guest.exec("c", "late", &["true"], Stdio::new()).await;
    assert_eq!(
        code(exec),
        (
            Code::FAILED_PRECONDITION,
            "cannot exec in a stopped container".into()
        )
    );
    guest.delete("c").await.unwrap();
    guest.delete("c").await.expect("a second time");
    assert_eq!(code(guest.wait("c", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn execs_come_and_go_beside_the_init() {
    let guest = Guest::new().await;
    guest.run("c", "exec sleep 600").await;
    guest
        .exec("c", "a", &["sleep", "600"], Stdio::new())
        .await
        .unwrap();
    let taken = guest.exec("c", "a", &["true"], Stdio::new()).await;
    assert_eq!(code(taken).0, Code::ALREADY_EXISTS);

    let missing = guest.exec("c", "b", &["/nonexistent"], Stdio::new()).await;
    let (refusal, words) = code(missing);
    assert_eq!(refusal, Code::INVALID_ARGUMENT);
    assert!(words.contains("/nonexistent"), "{words}");
    assert_eq!(code(guest.wait("c", "b").await).0, Code::NOT_FOUND);

    for _ in 0..3 {
        guest
            .exec("c", "b", &["sh", "-c", "exit 3"], Stdio::new())
            .await
            .unwrap();
        assert_eq!(guest.wait("c", "b").await.unwrap().exit_status, 3);
    }
    let listed = guest
        .client
        .list_processes(context::Context::default(), &container("c"))
        .await
        .unwrap();
    let execs: Vec<&str> = listed
        .processes
        .iter()
        .map(|p| p.exec_id.as_str())
        .collect();
    assert!(
        execs.len() == 2 && execs.contains(&"a") && execs.contains(&""),
        "{execs:?}"
    );

    let described = guest
        .client
        .describe_processes(context::Context::default(), &container("c"))
        .await
        .unwrap();
    for listed in &listed.processes {
        let told = described
            .processes
            .iter()
            .find(|told| told.pid == listed.pid);
        assert!(told.is_some_and(|told| !told.stat.is_empty()), "{listed:?}");
    }
    let missing = container("x");
    let missing = guest
        .client
        .describe_processes(context::Context::default(), &missing)
        .await;
    assert_eq!(code(missing).0, Code::NOT_FOUND);

    guest.signal("c", "a", libc::SIGUSR1, false).await.unwrap();
    assert_eq!(guest.wait("c", "a").await.unwrap().exit_status, 128 + 10);
    // The end of the init is the end of everything in the container.
    guest
        .exec("c", "d", &["sleep", "600"], Stdio::new())
        .await
        .unwrap();
    guest.signal("c", "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 143);
    assert_eq!(guest.wait("c", "d").await.unwrap().exit_status, 137);
    guest.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_container_is_paused_signalled_and_deleted_alive() {
    let guest = Guest::new().await;
    guest
        .create("c", &["sleep", "600"], Stdio::new())
        .await
        .unwrap();
    assert_eq!(
        code(guest.pause("c").await).0,
        Code::FAILED_PRECONDITION,
        "it has not started"
    );
    guest.start("c").await.unwrap();
    guest.pause("c").await.unwrap();
    assert_eq!(
        code(guest.exec("c", "e", &["true"], Stdio::new()).await).1,
        "cannot exec in a paused container"
    );
    guest
        .client
        .resume_container(context::Context::default(), &container("c"))
        .await
        .unwrap();
    assert_eq!(
        code(guest.signal("c", "", 65, false).await).0,
        Code::INVALID_ARGUMENT
    );
    guest.signal("c", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
    guest.delete("c").await.unwrap();

    guest.run("d", "exec sleep 600").await;
    guest.delete("d").await.unwrap();
    guest
        .create("e", &["sleep", "600"], Stdio::new())
        .await
        .unwrap();
    guest.delete("e").await.expect("one that never started");
    assert_eq!(code(guest.wait("e", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_signal_ends_what_has_not_started() {
    let guest = Guest::new().await;
    for (all, signal) in [(false, libc::SIGTERM), (true, libc::SIGINT)] {
        guest.create("c", &["true"], Stdio::new()).await.unwrap();
        // One that would end nobody ends nobody here either.
        guest.signal("c", "", libc::SIGWINCH, false).await.unwrap();
        guest.signal("c", "", signal, all).await.unwrap();
        let wait = guest.wait("c", "");
        let ended = tokio::time::timeout(Duration::from_secs(10), wait).await;
        let status = u32::try_from(128 + signal).unwrap();
        assert_eq!(ended.unwrap().unwrap().exit_status, status);
        guest.delete("c").await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_start_ends_the_process_with_the_reason() {
    let guest = Guest::new().await;
    guest
        .create("c", &["/nonexistent"], Stdio::new())
        .await
        .unwrap();
    assert_eq!(code(guest.start("c").await).0, Code::INVALID_ARGUMENT);
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 1);
    guest.delete("c").await.unwrap();
    let nonsense = CreateContainerRequest {
        container_id: "c".into(),
        spec_json: b"{".to_vec(),
        ..Default::default()
    };
    let refused = guest
        .client
        .create_container(context::Context::default(), &nonsense)
        .await;
    assert_eq!(code(refused).0, Code::INVALID_ARGUMENT);
    guest
        .create("c", &["true"], Stdio::new())
        .await
        .expect("its id is free again");
    guest.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let guest = Guest::new().await;
    let terminal = Stdio {
        stdin_token: STDIN.to_vec(),
        stdout_token: STDOUT.to_vec(),
        terminal: true,
        ..Default::default()
    };
    let both = Stdio {
        stderr_token: STDERR.to_vec(),
        ..terminal.clone()
    };
    assert_eq!(
        code(guest.create("c", &["true"], both).await).0,
        Code::INVALID_ARGUMENT
    );
    guest
        .create("c", &["sh", "-c", "read x; stty size"], terminal)
        .await
        .unwrap();
    guest.start("c").await.unwrap();
    let resize = ResizeTerminalRequest {
        container_id: "c".into(),
        width: 132,
        height: 43,
        ..Default::default()
    };
    guest
        .client
        .resize_terminal(context::Context::default(), &resize)
        .await
        .unwrap();
    let mut keys = guest.host.stream(&STDIN);
    keys.write_all(b"\n").unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
    let screen = read_to_end(guest.host.stream(&STDOUT)).await;
    assert!(screen.contains("43 132"), "{screen:?}");
    guest.delete("c").await.unwrap();

    guest.run("d", "exec sleep 600").await;
    let resize = ResizeTerminalRequest {
        container_id: "d".into(),
        ..resize
    };
    let refused = guest
        .client
        .resize_terminal(context::Context::default(), &resize)
        .await;
    assert_eq!(code(refused).0, Code::INVALID_ARGUMENT);
    guest.delete("d").await.unwrap();
}

#[tokio::test]
async fn unknown_ids_and_unsupported_requests_are_refused() {
    let guest = Guest::new().await;
    assert_eq!(code(guest.start("x").await).0, Code::NOT_FOUND);
    assert_eq!(
        code(guest.signal("x", "", 9, false).await).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        code(guest.exec("x", "e", &["true"], Stdio::new()).await).0,
        Code::NOT_FOUND
    );
    guest.delete("x").await.expect("not there is deleted");
    let misfit = Network {
        interfaces: vec![Interface::new()],
        ..Default::default()
    };
    let networked = CreateSandboxRequest {
        network: Some(misfit.clone()).into(),
        ..Default::default()
    };
    let create = async |request| {
        let context = context::Context::default();
        guest.client.create_sandbox(context, request).await
    };
    assert_eq!(code(create(&networked).await).0, Code::INVALID_ARGUMENT);
    let update = async |network| {
        let context = context::Context::default();
        guest.client.update_network(context, network).await
    };
    let nothing = Network::new();
    assert_eq!(code(update(&nothing).await).0, Code::FAILED_PRECONDITION);
    // One that asks for nothing can be carried out even here, once.
    let plain = CreateSandboxRequest::new();
    assert!(create(&plain).await.unwrap().online_cpus > 0);
    assert_eq!(code(create(&plain).await).0, Code::ALREADY_EXISTS);
    update(&nothing).await.unwrap();
    assert_eq!(code(update(&misfit).await).0, Code::INVALID_ARGUMENT);
    let short = Stdio {
        stdout_token: vec![1; 5],
        ..Default::default()
    };
    assert_eq!(
        code(guest.create("c", &["true"], short).await).0,
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn the_service_ends_with_the_sandbox_or_with_the_host() {
    let guest = Guest::new().await;
    guest.run("c", "exec sleep 600").await;
    guest
        .client
        .destroy_sandbox(context::Context::default(), &Empty::new())
        .await
        .unwrap();
    guest.served.await.unwrap().unwrap();
    drop(guest._turn);

    let guest = Guest::new().await;
    drop(guest.client);
    guest.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_volume_outside_its_place_is_refused() {
    let guest = Guest::new().await;
    for id in ["", "..", "a/b"] {
        let request = SyncVolumeRequest {
            volume_id: id.into(),
            ..Default::default()
        };
        let answer = guest
            .client
            .sync_volume(context::Context::default(), &request)
            .await;
        let (code, message) = code(answer);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    }
}
