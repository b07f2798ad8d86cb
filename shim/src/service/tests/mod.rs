//! The Task API against a fake guest: what engines rely on.

mod clock;
mod forward;
mod growth;
mod guest;
mod network;
mod sandbox_api;
mod volumes;
mod world;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
        ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StateRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    protobuf::{Message as _, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::Task as _,
};
use husk_protocol::agent::{Event, OomKill, event::Kind};
use nix::fcntl::{Flock, FlockArg};
use tokio::{
    io::AsyncReadExt as _,
    sync::mpsc,
    time::{sleep, timeout},
};
use ttrpc::Code;
use world::{Fault, Guest, LIMIT, VMM_PID, World, context};

/// Shorthands for the calls, with the one container's id filled in.
impl World {
    async fn start(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: "c".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.service
            .start(&context(), request)
            .await
            .map(|answer| answer.pid)
    }
    async fn wait(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            id: "c".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer = timeout(LIMIT, self.service.wait(&context(), request))
            .await
            .unwrap();
        answer.map(|answer| answer.exit_status)
    }
    async fn kill(&self, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: "c".into(),
            exec_id: exec.into(),
            signal,
            ..Default::default()
        };
        self.service.kill(&context(), request).await.map(drop)
    }
    async fn delete(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: "c".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.service
            .delete(&context(), request)
            .await
            .map(|answer| answer.exit_status)
    }
    async fn exec(&self, exec: &str) -> ttrpc::Result<()> {
        self.exec_with(exec, "", "").await
    }
    async fn exec_with(&self, exec: &str, stdin: &str, stdout: &str) -> ttrpc::Result<()> {
        let spec = Any {
            value: br#"{"cwd": "/", "args": ["true"]}"#.to_vec(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: "c".into(),
            exec_id: exec.into(),
            spec: Some(spec).into(),
            stdin: stdin.into(),
            stdout: stdout.into(),
            ..Default::default()
        };
        self.service.exec(&context(), request).await.map(drop)
    }
    async fn close_stdin(&self, exec: &str) {
        let request = CloseIORequest {
            id: "c".into(),
            exec_id: exec.into(),
            stdin: true,
            ..Default::default()
        };
        self.service.close_io(&context(), request).await.unwrap();
    }
    /// What the last exec reads from its stdin, to its end.
    async fn input(&self) -> String {
        let token = self.guest.stdio.lock().unwrap().stdin_token.clone();
        let mut stream = self.vmm.dial(&token).await;
        let mut text = String::new();
        let read = timeout(LIMIT, stream.read_to_string(&mut text)).await;
        read.expect("stdin never ends").unwrap();
        text
    }
    async fn status(&self, exec: &str) -> ttrpc::Result<Status> {
        let request = StateRequest {
            id: "c".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let answer = self.service.state(&context(), request).await?;
        assert_ne!(answer.pid, 0);
        Ok(answer.status.unwrap())
    }
    async fn pids(&self) -> Vec<String> {
        let request = PidsRequest {
            id: "c".into(),
            ..Default::default()
        };
        let answer = self.service.pids(&context(), request).await.unwrap();
        let execs = answer.processes.iter().map(|process| {
            assert_ne!(process.pid, 0);
            process.info.as_ref().map(|any| {
                ProcessDetails::parse_from_bytes(&any.value)
                    .unwrap()
                    .exec_id
            })
        });
        execs.map(Option::unwrap_or_default).collect()
    }
    async fn shutdown(&self) {
        self.service
            .shutdown(&context(), ShutdownRequest::new())
            .await
            .unwrap();
    }
    async fn is_shut_down(&self) -> bool {
        timeout(Duration::ZERO, self.tasks.shut_down())
            .await
            .is_ok()
    }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("an error status was expected: {other:?}"),
    }
}

#[tokio::test]
async fn a_whole_life_in_order() {
    let w = World::new().await;
    assert_eq!(code(w.start("").await).0, Code::NOT_FOUND);
    assert_eq!(w.create().await.unwrap(), VMM_PID);
    assert_eq!(code(w.create().await).0, Code::ALREADY_EXISTS);
    assert_eq!(w.status("").await.unwrap(), Status::CREATED);
    assert_eq!(w.start("").await.unwrap(), VMM_PID);
    assert_eq!(w.status("").await.unwrap(), Status::RUNNING);
    assert_eq!(code(w.start("").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(w.delete("").await).0, Code::FAILED_PRECONDITION);
    w.exec("e").await.unwrap();
    assert_eq!(code(w.exec("e").await).0, Code::ALREADY_EXISTS);
    assert_eq!(w.pids().await, [""]);
    w.start("e").await.unwrap();
    assert_eq!(w.pids().await, ["", "e"]);
    *w.guest.processes.lock().unwrap() = 4;
    assert_eq!(
        w.pids().await,
        ["", "e", "", ""],
        "those of the guest count"
    );
    *w.guest.processes.lock().unwrap() = 0;
    w.guest.end("c", "e", 5);
    assert_eq!(w.wait("e").await.unwrap(), 5);
    assert_eq!(
        w.wait("e").await.unwrap(),
        5,
        "Wait works again after the exit"
    );
    assert_eq!(w.delete("e").await.unwrap(), 5);
    assert_eq!(code(w.wait("e").await).0, Code::NOT_FOUND);
    w.shutdown().await;
    assert!(
        !w.is_shut_down().await,
        "nothing happens while a container remains"
    );
    w.guest.end("c", "", 42);
    assert_eq!(w.wait("").await.unwrap(), 42);
    assert_eq!(w.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(w.pids().await, [""], "a task that is still there has a pid");
    let (kind, message) = code(w.kill("", 15).await);
    assert_eq!(kind, Code::NOT_FOUND);
    assert!(message.contains("process already finished"), "{message}");
    assert_eq!(code(w.exec("late").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(w.delete("").await.unwrap(), 42);
    assert_eq!(code(w.delete("").await).0, Code::NOT_FOUND);
    w.shutdown().await;
    assert!(w.is_shut_down().await);
    assert_eq!(
        w.events(7).await,
        [
            "create c",
            "start c",
            "exec-added e",
            "exec-started e",
            "exit c e 5",
            "exit c c 42",
            "delete c"
        ]
    );
}

#[tokio::test]
async fn a_process_that_ends_at_once_still_starts_first() {
    let w = World::new().await;
    *w.guest.ends_at_once.lock().unwrap() = Some(0);
    w.create().await.unwrap();
    w.start("").await.unwrap();
    assert_eq!(w.wait("").await.unwrap(), 0);
    assert_eq!(w.events(3).await, ["create c", "start c", "exit c c 0"]);
}

#[tokio::test]
async fn the_inits_exit_takes_the_execs_along_and_comes_last() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    for exec in ["a", "b"] {
        w.exec(exec).await.unwrap();
        w.start(exec).await.unwrap();
    }
    w.guest.end("c", "", 0);
    assert_eq!(w.wait("").await.unwrap(), 0);
    let events = w.events(9).await;
    assert_eq!(events.last().map(String::as_str), Some("exit c c 0"));
    for exec in ["a", "b"] {
        assert!(events.contains(&format!("exit c {exec} 137")), "{events:?}");
    }
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_is_an_exit() {
    let w = World::new().await;
    w.create().await.unwrap();
    let words = "exec: \"nope\": executable file not found in $PATH";
    *w.guest.start_error.lock().unwrap() = Some((Code::INVALID_ARGUMENT, words.into()));
    assert_eq!(
        code(w.start("").await),
        (Code::INVALID_ARGUMENT, words.into())
    );
    assert_eq!(w.wait("").await.unwrap(), 127);
    assert_eq!(code(w.kill("", 9).await).0, Code::NOT_FOUND);
    assert_eq!(w.delete("").await.unwrap(), 127);
    assert_eq!(w.events(3).await, ["create c", "exit c c 127", "delete c"]);
}

#[tokio::test]
async fn an_exec_that_fails_to_start_leaves_the_container_alone() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    w.exec("e").await.unwrap();
    *w.guest.start_error.lock().unwrap() = Some((Code::UNKNOWN, "permission denied".into()));
    assert_eq!(code(w.start("e").await).1, "permission denied");
    assert_eq!(w.wait("e").await.unwrap(), 126);
    assert_eq!(w.delete("e").await.unwrap(), 126);
    assert_eq!(w.status("").await.unwrap(), Status::RUNNING);
    assert_eq!(code(w.start("e").await).0, Code::NOT_FOUND);
}

/// `echo hi | ctr task exec c cat`: the client closes stdin whenever it likes.
#[tokio::test]
async fn a_close_of_stdin_holds_whenever_it_comes() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    let fifo = w.fifo("stdin");
    let stdin = fifo.to_str().unwrap();
    let write = || {
        let mut client = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&fifo)
            .unwrap();
        std::io::Write::write_all(&mut client, b"hi").unwrap();
        client
    };

    w.exec_with("before", stdin, "").await.unwrap();
    w.close_stdin("before").await;
    let client = write();
    w.start("before").await.unwrap();
    drop(client);
    assert_eq!(w.input().await, "hi");

    w.exec_with("during", stdin, "").await.unwrap();
    w.guest.deaf.send_replace(true);
    let client = write();
    let (started, ()) = tokio::join!(w.start("during"), async {
        w.called("exec c during").await;
        w.close_stdin("during").await;
        drop(client);
        w.guest.deaf.send_replace(false);
    });
    started.unwrap();
    assert_eq!(w.input().await, "hi");
}

#[tokio::test]
async fn the_death_of_the_vm_ends_everything_that_runs() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    w.exec("e").await.unwrap();
    w.start("e").await.unwrap();
    let (waited, ()) = tokio::join!(w.wait(""), w.vmm.die("the guest kernel panicked"));
    assert_eq!(waited.unwrap(), 137);
    let events = w.events(6).await;
    assert_eq!(&events[4..], ["exit c e 137", "exit c c 137"]);
    assert_eq!(w.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(code(w.kill("", 9).await).0, Code::NOT_FOUND);
    assert_eq!(w.delete("").await.unwrap(), 137);
    w.shutdown().await;
    assert!(w.is_shut_down().await);
}

/// One had ended before, and its output is still on its way.
#[tokio::test]
async fn the_death_of_the_vm_gives_nobody_the_status_of_another() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    let fifo = w.fifo("stdout");
    *w.guest.stdout_bytes.lock().unwrap() = 1;
    w.exec_with("e", "", fifo.to_str().unwrap()).await.unwrap();
    w.start("e").await.unwrap();
    let token = w.guest.stdio.lock().unwrap().stdout_token.clone();
    let stdout = w.vmm.dial(&token).await;
    w.guest.end("c", "e", 5);
    w.called("waited c e").await;
    // For the answer to arrive.
    tokio::time::sleep(Duration::from_millis(200)).await;
    w.vmm.die("the guest kernel panicked").await;
    w.tasks.sandbox().phase().gone().await;
    drop(stdout);
    assert_eq!(w.wait("").await.unwrap(), 137);
    assert_eq!(w.wait("e").await.unwrap(), 5);
    assert_eq!(w.events(6).await[4..], ["exit c e 5", "exit c c 137"]);
}

/// Whatever the guest has written to its console.
#[tokio::test]
async fn a_vm_that_dies_during_a_start_answers_it() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.guest.deaf.send_replace(true);
    let words = "husk-vmm was killed; its console: /init: no such file or directory";
    let (started, ()) = tokio::join!(w.start(""), w.vmm.die(words));
    let (_, message) = code(started);
    assert!(message.contains("husk-vmm was killed"), "{message}");
    assert_eq!(w.wait("").await.unwrap(), 137);
    assert_eq!(w.events(2).await[1], "exit c c 137");
}

#[tokio::test]
async fn calls_answer_when_the_guest_does_not() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    w.guest.deaf.send_replace(true);
    assert_eq!(w.status("").await.unwrap(), Status::RUNNING);
    assert_eq!(w.pids().await, [""]);
    w.kill("", 9).await.unwrap();
    assert_eq!(w.wait("").await.unwrap(), 137);
    assert!(w.tasks.sandbox().phase().gone().await.contains("SIGKILL"));
}

/// Else its pod could not be removed: engines wait for the end of what they have killed.
#[tokio::test]
async fn a_guest_that_only_says_that_it_kills_loses_its_vm() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    w.guest.spares.store(true, Ordering::Relaxed);
    w.kill("", 15).await.unwrap();
    w.kill("", 9).await.unwrap();
    tokio::time::pause();
    // The bound of this wait is shorter than the guest's.
    let _ = timeout(Duration::from_secs(200), std::future::pending::<()>()).await;
    assert_eq!(w.status("").await.unwrap(), Status::RUNNING);
    let reason = w.tasks.sandbox().phase().gone().await;
    assert!(reason.contains("did not report the end"), "{reason}");
    tokio::time::resume();
    assert_eq!(w.wait("").await.unwrap(), 137);
}

#[tokio::test]
async fn a_created_container_can_be_killed_and_deleted() {
    let w = World::new().await;
    w.create().await.unwrap();
    assert_eq!(w.delete("").await.unwrap(), 137);
    assert_eq!(w.events(3).await, ["create c", "exit c c 137", "delete c"]);
    let calls = w.guest.calls.lock().unwrap().clone();
    assert!(calls.contains(&"delete c".to_owned()), "{calls:?}");
}

#[tokio::test]
async fn pause_and_resume_follow_the_state() {
    let w = World::new().await;
    w.create().await.unwrap();
    let request = || PauseRequest {
        id: "c".into(),
        ..Default::default()
    };
    let pause = async || w.service.pause(&context(), request()).await;
    let request = || ResumeRequest {
        id: "c".into(),
        ..Default::default()
    };
    let resume = async || w.service.resume(&context(), request()).await;
    assert_eq!(code(pause().await.map(drop)).0, Code::FAILED_PRECONDITION);
    w.start("").await.unwrap();
    pause().await.unwrap();
    assert_eq!(w.status("").await.unwrap(), Status::PAUSED);
    assert_eq!(code(w.exec("e").await).0, Code::FAILED_PRECONDITION);
    resume().await.unwrap();
    assert_eq!(w.status("").await.unwrap(), Status::RUNNING);
    assert_eq!(w.events(4).await[2..], ["/tasks/paused", "/tasks/resumed"]);
}

#[tokio::test]
async fn update_checkpoint_and_connect() {
    let w = World::new().await;
    let connect = w
        .service
        .connect(&context(), ConnectRequest::new())
        .await
        .unwrap();
    assert_eq!(connect.shim_pid, std::process::id());
    w.create().await.unwrap();
    let json = "{\"memory\":{\"limit\":5}}";
    let resources = Any {
        value: json.as_bytes().to_vec(),
        ..Default::default()
    };
    let request = UpdateTaskRequest {
        id: "c".into(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    w.service.update(&context(), request).await.unwrap();
    let calls = w.guest.calls.lock().unwrap().clone();
    assert_eq!(
        calls.last().map(String::as_str),
        Some("update c {\"memory\":{\"limit\":5}}")
    );
    let checkpoint = w
        .service
        .checkpoint(&context(), CheckpointTaskRequest::new())
        .await;
    assert_eq!(code(checkpoint.map(drop)).0, Code::UNIMPLEMENTED);
}

/// CRI-O names settings with Create alone, when the VM is there already.
#[tokio::test]
async fn settings_that_come_too_late_are_refused() {
    let w = World::new().await;
    // runtimeoptions.v1.Options, config_path = 2.
    let mut options = Any::new();
    options.type_url = "runtimeoptions.v1.Options".into();
    options.value = b"\x12\x0a/else.toml".to_vec();
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: w.bundle().display().to_string(),
        options: Some(options).into(),
        ..Default::default()
    };
    let (kind, words) = code(w.service.create(&context(), request).await.map(drop));
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    assert!(
        words.contains("/else.toml") && words.contains("/etc/husk/config.toml"),
        "{words}"
    );
}

#[tokio::test]
async fn oom_kills_are_told_at_most_once_a_second_and_not_after_the_exit() {
    let guest = Arc::new(Guest::default());
    let (sender, events) = mpsc::unbounded_channel();
    let _ = guest.events.set(tokio::sync::Mutex::new(events));
    let w = World::with(guest, Fault::None).await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    let killed = |kills| {
        let kind = Some(Kind::Oom(OomKill {
            kills,
            ..Default::default()
        }));
        sender
            .send(Event {
                container_id: "c".into(),
                kind,
                ..Default::default()
            })
            .unwrap();
    };
    let told = || tokio::time::sleep(Duration::from_millis(1200));
    (1..=50).for_each(&killed);
    told().await;
    // Told already, then news.
    killed(1);
    killed(51);
    told().await;
    // For CRI-O, which takes no events.
    assert!(w.bundle().join("oom").exists());
    w.guest.end("c", "", 0);
    w.wait("").await.unwrap();
    killed(52);
    told().await;
    assert_eq!(w.delete("").await.unwrap(), 0);
    assert_eq!(
        w.events(6).await[2..],
        ["oom c", "oom c", "exit c c 0", "delete c"]
    );
}

#[tokio::test]
async fn a_vm_that_cannot_start_says_why_and_the_shim_can_end() {
    let w = World::with(Arc::default(), Fault::Spawn).await;
    let (_, message) = code(w.create().await);
    assert!(message.contains("kvm_pvm"), "{message}");
    assert!(!w.bundle().join("../test/c/share/c").exists());
    w.shutdown().await;
    assert!(w.is_shut_down().await);
}

#[tokio::test]
async fn an_agent_that_never_dials_is_given_up_with_the_console() {
    let w = World::with(Arc::default(), Fault::Silent).await;
    let (_, message) = code(w.create().await);
    assert!(
        message.contains("did not report") && message.contains("last line of the console"),
        "{message}"
    );
}

#[tokio::test]
async fn a_broken_bundle_is_named() {
    let w = World::new().await;
    std::fs::write(w.bundle().join("config.json"), "{").unwrap();
    let (kind, message) = code(w.create().await);
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    assert!(message.contains("config.json"), "{message}");
    assert_eq!(code(w.status("").await).0, Code::NOT_FOUND);
}

/// Where a pod's containers end together, each has its Delete and its Shutdown from containerd, in any order.
#[tokio::test]
async fn a_shutdown_leaves_a_delete_time_to_be_answered() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    w.guest.end("c", "", 7);
    assert_eq!(w.wait("").await.unwrap(), 7);
    let dir = std::fs::File::open(w.bundle().join("../test/c")).unwrap();
    let held = Flock::lock(dir, FlockArg::LockExclusive).unwrap();
    let (deleted, ()) = tokio::join!(w.delete(""), async {
        w.called("delete c").await;
        // Up to where it waits for the pod's state.
        sleep(Duration::from_millis(100)).await;
        w.shutdown().await;
        assert!(!w.is_shut_down().await);
        drop(held);
    });
    assert_eq!(deleted.unwrap(), 7);
    w.shutdown().await;
    assert!(w.is_shut_down().await);
}

/// containerd restarts, or its client has had enough.
#[tokio::test]
async fn a_container_that_is_being_created_can_be_deleted() {
    let w = World::new().await;
    // Nobody comes to an end by itself: the guest does not answer.
    w.guest.deaf.send_replace(true);
    let (created, deleted) = tokio::join!(w.create(), async {
        w.called("create_sandbox").await;
        assert_eq!(code(w.status("").await).0, Code::FAILED_PRECONDITION);
        timeout(LIMIT, w.delete("")).await.unwrap()
    });
    assert_eq!(code(created).0, Code::CANCELLED);
    assert_eq!(code(deleted).0, Code::NOT_FOUND);
    assert!(!w.bundle().join("../test/c/share/c").exists());
    w.shutdown().await;
    assert!(w.is_shut_down().await);
}

#[tokio::test]
async fn a_container_that_the_guest_is_creating_can_be_deleted() {
    let w = World::new().await;
    w.tasks.sandbox().phase().agent().await.ok().unwrap();
    w.guest.deaf.send_replace(true);
    let (created, deleted) = tokio::join!(w.create(), async {
        w.called("create c").await;
        timeout(LIMIT, w.delete("")).await.unwrap()
    });
    assert_eq!(code(created).0, Code::CANCELLED);
    assert_eq!(code(deleted).0, Code::NOT_FOUND);
    w.guest.deaf.send_replace(false);
    w.shutdown().await;
    assert!(w.is_shut_down().await);
}

/// shareProcessNamespace: the path holds the pid of every task, so it is the pod that says whose namespace is meant.
#[tokio::test]
async fn a_member_of_the_pod_joins_the_sandbox_container() {
    let w = World::new().await;
    let bundle = w.bundle().join("../member");
    std::fs::create_dir(&bundle).unwrap();
    let namespaces = [("ipc", 1), ("pid", VMM_PID)].map(
        |(typ, pid)| serde_json::json!({"type": typ, "path": format!("/proc/{pid}/ns/{typ}")}),
    );
    let spec = serde_json::json!({
        "ociVersion": "1.2.0", "root": {"path": w.bundle().join("../rootfs")}, "linux": {"namespaces": namespaces},
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "c"},
    });
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let create = async || {
        let request = CreateTaskRequest {
            id: "d".into(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        w.service.create(&context(), request).await
    };
    w.create().await.unwrap();
    create().await.unwrap();
    w.called("create d joining c").await;
}

#[tokio::test]
async fn files_that_are_not_there_are_told_before_the_vm_is_up() {
    let w = World::new().await;
    w.guest.deaf.send_replace(true);
    std::fs::remove_dir(w.bundle().join("../rootfs")).unwrap();
    let (_, message) = code(timeout(LIMIT, w.create()).await.unwrap());
    assert!(message.contains("rootfs"), "{message}");
    w.shutdown().await;
    assert!(w.is_shut_down().await);
    assert!(!w.bundle().join("../test").exists());
}
