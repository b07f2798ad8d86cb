//! The Sandbox API against a fake guest: what containerd's shim sandboxer relies on.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
};

use containerd_shim_protos::{
    api::{DeleteRequest, KillRequest, ShutdownRequest, StartRequest, WaitRequest},
    protobuf::well_known_types::any::Any,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox as _,
    shim_async::Task as _,
};
use k8s_cri::v1 as cri;
use prost::Message as _;
use tokio::time::timeout;
use ttrpc::Code;

use super::{
    code,
    world::{Fault, LIMIT, VMM_PID, World, context, impatient},
};
use crate::{config::Config, network::tests::netns::Netns, sizing};

/// What CNI has made for each of these pods: nothing yet.
static NETNS: LazyLock<Netns> = LazyLock::new(Netns::new);

fn options(config: &cri::PodSandboxConfig) -> Any {
    Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: config.encode_to_vec(),
        ..Default::default()
    }
}

/// The calls, for the one sandbox.
impl World {
    async fn of_sandbox_api() -> Self {
        Self::failing(Fault::None).await
    }
    async fn failing(fault: Fault) -> Self {
        Self::kept(Arc::default(), fault, impatient()).await
    }
    async fn open(&self) -> ttrpc::Result<()> {
        self.open_with(&cri::PodSandboxConfig::default()).await
    }
    pub(super) async fn open_with(&self, config: &cri::PodSandboxConfig) -> ttrpc::Result<()> {
        let request = CreateSandboxRequest {
            sandbox_id: "pod".into(),
            options: Some(options(config)).into(),
            netns_path: NETNS.path().display().to_string(),
            ..Default::default()
        };
        let created = self.sandbox.create_sandbox(&context(), request).await;
        created.map(drop)
    }
    pub(super) async fn begin(&self) -> ttrpc::Result<StartSandboxResponse> {
        let request = StartSandboxRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let context = context();
        let started = timeout(LIMIT, self.sandbox.start_sandbox(&context, request));
        started.await.unwrap()
    }
    async fn state(&self) -> ttrpc::Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest {
            sandbox_id: "pod".into(),
            verbose: true,
            ..Default::default()
        };
        self.sandbox.sandbox_status(&context(), request).await
    }
    async fn stop(&self, timeout_secs: u32) -> ttrpc::Result<()> {
        let request = StopSandboxRequest {
            sandbox_id: "pod".into(),
            timeout_secs,
            ..Default::default()
        };
        let context = context();
        let stopped = timeout(LIMIT, self.sandbox.stop_sandbox(&context, request));
        stopped.await.unwrap().map(drop)
    }
    async fn over(&self) -> ttrpc::Result<WaitSandboxResponse> {
        let request = WaitSandboxRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let context = context();
        let over = timeout(LIMIT, self.sandbox.wait_sandbox(&context, request));
        over.await.unwrap()
    }
    async fn ping(&self) -> ttrpc::Result<()> {
        let request = PingRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let pinged = self.sandbox.ping_sandbox(&context(), request).await;
        pinged.map(drop)
    }
    async fn close(&self) -> ttrpc::Result<()> {
        let request = ShutdownSandboxRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let context = context();
        let closed = timeout(LIMIT, self.sandbox.shutdown_sandbox(&context, request));
        closed.await.unwrap().map(drop)
    }
    /// Creates and starts a container of the pod.
    async fn run(&self, id: &str) {
        self.create_as(id).await.unwrap();
        let request = StartRequest {
            id: id.into(),
            ..Default::default()
        };
        self.service.start(&context(), request).await.unwrap();
    }
    async fn exit_of(&self, id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            ..Default::default()
        };
        let context = context();
        let waited = timeout(LIMIT, self.service.wait(&context, request));
        waited.await.unwrap().unwrap().exit_status
    }
    pub(super) async fn remove(&self, id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            ..Default::default()
        };
        let deleted = self.service.delete(&context(), request).await;
        deleted.map(|answer| answer.exit_status)
    }
    fn calls(&self) -> Vec<String> {
        self.guest.calls.lock().unwrap().clone()
    }
    fn pod_is_cleared(&self) -> bool {
        !self.bundle().join("../test").exists()
    }
}

#[tokio::test]
async fn a_whole_life() {
    let w = World::of_sandbox_api().await;
    w.open().await.unwrap();
    let started = w.begin().await.unwrap();
    assert_eq!(started.pid, VMM_PID);
    assert!(started.created_at.seconds > 1_600_000_000);
    let state = w.state().await.unwrap();
    assert_eq!(
        (state.sandbox_id.as_str(), state.state.as_str(), state.pid),
        ("pod", "SANDBOX_READY", VMM_PID)
    );
    assert_eq!(state.created_at, started.created_at);
    assert!(state.exited_at.is_none());
    let info: serde_json::Value = serde_json::from_str(&state.info["info"]).unwrap();
    assert_eq!(info["pid"], VMM_PID);
    w.ping().await.unwrap();

    // Containers come and go, and the pod stays.
    for id in ["c", "d"] {
        w.run(id).await;
    }
    for id in ["c", "d"] {
        w.guest.end(id, "", 3);
        assert_eq!(w.exit_of(id).await, 3);
        assert_eq!(w.remove(id).await.unwrap(), 3);
    }
    let shutdown = ShutdownRequest::new();
    w.service.shutdown(&context(), shutdown).await.unwrap();
    assert!(!w.is_shut_down().await);
    w.run("again").await;
    w.guest.end("again", "", 0);
    w.exit_of("again").await;
    w.remove("again").await.unwrap();
    assert_eq!(w.state().await.unwrap().state, "SANDBOX_READY");

    let (over, stopped) = tokio::join!(w.over(), w.stop(0));
    stopped.unwrap();
    assert_eq!(over.unwrap().exit_status, 0);
    let state = w.state().await.unwrap();
    assert_eq!((state.state.as_str(), state.pid), ("SANDBOX_NOTREADY", 0));
    assert!(state.exited_at.is_some());
    assert!(w.calls().contains(&"destroy_sandbox".to_owned()));
    // Whoever asks late is answered the same, and stopping twice is fine.
    assert_eq!(w.over().await.unwrap().exited_at, state.exited_at);
    w.stop(0).await.unwrap();
    assert_eq!(code(w.ping().await).0, Code::FAILED_PRECONDITION);
    assert!(!w.is_shut_down().await);
    w.close().await.unwrap();
    assert!(w.is_shut_down().await && w.pod_is_cleared());
    w.close().await.unwrap();
}

#[tokio::test]
async fn the_configuration_reaches_the_vm_the_guest_and_the_containers() {
    let w = World::of_sandbox_api().await;
    let memory = 200 << 20;
    let config = cri::PodSandboxConfig {
        hostname: "web-0".into(),
        dns_config: Some(cri::DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["local".into()],
            options: vec!["ndots:5".into()],
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            sysctls: [("kernel.msgmax".to_owned(), "65536".to_owned())].into(),
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: memory,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    w.open_with(&config).await.unwrap();
    w.begin().await.unwrap();
    let hints = sizing::Hints {
        memory_limit: memory,
        ..Default::default()
    };
    let node = Config::default();
    let bound = |vcpus, memory_mib| sizing::Size { vcpus, memory_mib };
    let bounds = sizing::Bounds {
        default: bound(node.default_vcpus, node.default_memory_mib),
        max: bound(node.max_vcpus, node.max_memory_mib),
    };
    let plan = w.vmm.plan.get().unwrap();
    assert_eq!(
        (plan.id.as_str(), plan.size),
        ("pod", sizing::size(&hints, &bounds))
    );
    let asked = w.guest.sandbox.lock().unwrap().clone();
    assert_eq!(asked.hostname, "web-0");
    assert_eq!(asked.dns_servers, ["10.0.0.10"]);
    assert_eq!(
        (asked.dns_searches, asked.dns_options),
        (vec!["local".into()], vec!["ndots:5".into()])
    );
    assert_eq!(asked.sysctls["kernel.msgmax"], "65536");
    w.run("c").await;
    let spec: serde_json::Value = serde_json::from_slice(&w.guest.spec.lock().unwrap()).unwrap();
    let mounts = spec["mounts"].as_array().unwrap();
    let places: BTreeSet<_> = mounts
        .iter()
        .filter_map(|m| m["destination"].as_str())
        .collect();
    assert_eq!(
        places,
        BTreeSet::from(["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"])
    );
    let files = w.bundle().join("../sandbox/work/etc");
    let text = std::fs::read_to_string(files.join("resolv.conf")).unwrap();
    assert_eq!(
        text,
        "search local\nnameserver 10.0.0.10\noptions ndots:5\n"
    );
}

#[tokio::test]
async fn calls_in_the_wrong_order_are_refused_and_change_nothing() {
    let w = World::of_sandbox_api().await;
    assert_eq!(code(w.begin().await).0, Code::NOT_FOUND);
    assert_eq!(code(w.state().await).0, Code::NOT_FOUND);
    assert_eq!(code(w.over().await).0, Code::NOT_FOUND);
    assert_eq!(code(w.stop(0).await).0, Code::NOT_FOUND);
    assert_eq!(code(w.ping().await).0, Code::NOT_FOUND);
    let (kind, message) = code(w.create().await);
    assert_eq!(kind, Code::FAILED_PRECONDITION);
    assert!(message.contains("CreateSandbox"), "{message}");
    let other = CreateSandboxRequest {
        sandbox_id: "other".into(),
        ..Default::default()
    };
    let created = w.sandbox.create_sandbox(&context(), other).await;
    assert_eq!(code(created).0, Code::NOT_FOUND);
    let mut broken = options(&cri::PodSandboxConfig::default());
    broken.value = vec![0xff];
    let broken = CreateSandboxRequest {
        sandbox_id: "pod".into(),
        options: Some(broken).into(),
        ..Default::default()
    };
    let created = w.sandbox.create_sandbox(&context(), broken).await;
    assert_eq!(code(created).0, Code::INVALID_ARGUMENT);
    assert!(w.vmm.plan.get().is_none(), "no VM for any of them");

    w.open().await.unwrap();
    assert_eq!(w.state().await.unwrap().state, "SANDBOX_NOTREADY");
    assert_eq!(code(w.ping().await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(w.open().await).0, Code::ALREADY_EXISTS);
    w.begin().await.unwrap();
    w.stop(0).await.unwrap();
    let (_, message) = code(w.begin().await);
    assert!(message.contains("cannot be started"), "{message}");
    assert_eq!(code(w.open().await).0, Code::ALREADY_EXISTS);
    w.close().await.unwrap();
}

/// containerd makes no network namespace for a pod of the host's network.
#[tokio::test]
async fn the_hosts_network_is_refused() {
    let w = World::of_sandbox_api().await;
    let request = CreateSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    w.sandbox.create_sandbox(&context(), request).await.unwrap();
    let refused = w.begin().await.unwrap_err().to_string();
    assert!(refused.contains("hostNetwork is not possible"), "{refused}");
}

#[tokio::test]
async fn many_at_once_are_one() {
    let w = World::of_sandbox_api().await;
    let (a, b) = tokio::join!(w.open(), w.open());
    let refused = [a, b].into_iter().filter_map(Result::err).count();
    assert_eq!(refused, 1);
    let (a, b) = tokio::join!(w.begin(), w.begin());
    assert_eq!(a.unwrap(), b.unwrap());
    let booted = w.calls().iter().filter(|c| *c == "create_sandbox").count();
    assert_eq!(booted, 1);
    let (a, b, over) = tokio::join!(w.stop(0), w.stop(0), w.over());
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(over.unwrap().exit_status, 0);
    let (a, b) = tokio::join!(w.close(), w.close());
    assert!(a.is_ok() && b.is_ok() && w.is_shut_down().await);
}

#[tokio::test]
async fn running_containers_are_asked_to_end_and_then_made_to() {
    let w = World::of_sandbox_api().await;
    w.open().await.unwrap();
    w.begin().await.unwrap();
    w.run("good").await;
    w.run("deaf").await;
    let stop = w.stop(1);
    let obey = async {
        w.called("signal good  15 false").await;
        w.guest.end("good", "", 0);
        assert_eq!(w.exit_of("good").await, 0);
        w.called("signal deaf  15 false").await;
        assert_eq!(w.exit_of("deaf").await, 137);
    };
    let (stopped, ()) = tokio::join!(stop, obey);
    stopped.unwrap();
    let events = w.events(6).await;
    assert_eq!(events[4..], ["exit good good 0", "exit deaf deaf 137"]);
    // They are still there to be deleted; the shim ends with them all the same.
    assert_eq!(w.remove("good").await.unwrap(), 0);
    w.close().await.unwrap();
    assert!(w.is_shut_down().await && w.pod_is_cleared());
}

#[tokio::test]
async fn the_death_of_the_vm_ends_the_sandbox() {
    let w = World::of_sandbox_api().await;
    w.open().await.unwrap();
    w.begin().await.unwrap();
    w.run("c").await;
    let (over, ()) = tokio::join!(w.over(), w.vmm.die("the guest kernel panicked"));
    assert_eq!(over.unwrap().exit_status, 137);
    let state = w.state().await.unwrap();
    assert_eq!((state.state.as_str(), state.pid), ("SANDBOX_NOTREADY", 0));
    assert_eq!(w.exit_of("c").await, 137);
    assert_eq!(w.events(3).await[2], "exit c c 137");
    let kill = KillRequest {
        id: "c".into(),
        signal: 9,
        ..Default::default()
    };
    assert_eq!(
        code(w.service.kill(&context(), kill).await).0,
        Code::NOT_FOUND
    );
    assert_eq!(w.remove("c").await.unwrap(), 137);
    w.stop(5).await.unwrap();
    w.close().await.unwrap();
    assert!(w.is_shut_down().await && w.pod_is_cleared());
}

#[tokio::test]
async fn a_sandbox_that_cannot_start_says_why_and_leaves_nothing() {
    for (fault, words) in [(Fault::Spawn, "kvm_pvm"), (Fault::Silent, "did not report")] {
        let w = World::failing(fault).await;
        w.open().await.unwrap();
        let (_, message) = code(w.begin().await);
        assert!(message.contains(words), "{message}");
        assert_eq!(w.over().await.unwrap().exit_status, 137);
        w.close().await.unwrap();
        assert!(w.is_shut_down().await && w.pod_is_cleared());
    }
}

#[tokio::test]
async fn files_that_cannot_be_written_fail_the_creation() {
    let w = World::of_sandbox_api().await;
    std::fs::write(w.bundle().join("../sandbox"), "in the way").unwrap();
    let (_, message) = code(w.open().await);
    assert!(message.contains("work/etc"), "{message}");
    assert!(w.vmm.plan.get().is_none());
    let (_, message) = code(w.begin().await);
    assert!(message.contains("cannot be started"), "{message}");
    w.close().await.unwrap();
    assert!(w.is_shut_down().await && w.pod_is_cleared());
}

/// containerd's client has had enough, or containerd has.
#[tokio::test]
async fn a_sandbox_can_be_ended_at_any_time() {
    let w = World::of_sandbox_api().await;
    w.close().await.unwrap();
    assert!(w.is_shut_down().await && w.pod_is_cleared());

    let w = World::of_sandbox_api().await;
    w.guest.deaf.send_replace(true);
    w.open().await.unwrap();
    let (begun, closed) = tokio::join!(w.begin(), async {
        w.called("create_sandbox").await;
        w.close().await
    });
    closed.unwrap();
    assert!(begun.is_err() && w.is_shut_down().await);

    // With a container on its way.
    let w = World::of_sandbox_api().await;
    w.open().await.unwrap();
    w.begin().await.unwrap();
    w.guest.deaf.send_replace(true);
    let (created, closed) = tokio::join!(w.create(), async {
        w.called("create c").await;
        w.close().await
    });
    closed.unwrap();
    assert!(created.is_err() && w.is_shut_down().await && w.pod_is_cleared());
}

#[tokio::test]
async fn a_client_that_goes_away_stops_nothing_half_way() {
    let w = World::of_sandbox_api().await;
    // Asked, and dropped before the answer.
    let mut open = Box::pin(w.open());
    assert!(futures::poll!(open.as_mut()).is_pending());
    drop(open);
    let created = async {
        while w.state().await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, created).await.unwrap();
    w.begin().await.unwrap();
    w.close().await.unwrap();
}

#[tokio::test]
async fn platform_and_metrics() {
    let w = World::of_sandbox_api().await;
    let request = || PlatformRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let answer = w.sandbox.platform(&context(), request()).await.unwrap();
    let platform = answer.platform.unwrap();
    assert_eq!(
        (platform.os.as_str(), platform.architecture.as_str()),
        ("linux", "amd64")
    );
    let metrics = || async {
        let request = SandboxMetricsRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        w.sandbox.sandbox_metrics(&context(), request).await
    };
    assert_eq!(code(metrics().await).0, Code::NOT_FOUND);
    w.open().await.unwrap();
    w.begin().await.unwrap();
    // The fake VMM is no process.
    let (kind, message) = code(metrics().await);
    assert_eq!(kind, Code::UNKNOWN);
    assert!(message.contains("cannot measure"), "{message}");
}

/// A shim that a container has opened has no sandbox to give.
#[tokio::test]
async fn a_containers_pod_is_not_the_sandbox_apis() {
    let w = World::new().await;
    let request = CreateSandboxRequest {
        sandbox_id: "c".into(),
        ..Default::default()
    };
    let created = w.sandbox.create_sandbox(&context(), request).await;
    assert_eq!(code(created).0, Code::NOT_FOUND);
    let request = ShutdownSandboxRequest {
        sandbox_id: "c".into(),
        ..Default::default()
    };
    let closed = w.sandbox.shutdown_sandbox(&context(), request).await;
    assert_eq!(code(closed).0, Code::NOT_FOUND);
    assert!(!w.is_shut_down().await);
    w.create().await.unwrap();
}
