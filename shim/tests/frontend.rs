//! The shim as containerd runs it: `start`, `delete`, `-info`, as processes, on a host of temporary directories.
//!
//! Needs root, as the shim does (a mount namespace of its own). No VM is started: that takes a Create.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use husk_shim::state::{PodDir, ProcessId};
use ttrpc::asynchronous::transport::Socket;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-husk-v2");

/// A machine: bundles, settings, state and sockets below one directory, cleared by `delete` at the end.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        host.configure("");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, more: &str) {
        let text = format!(
            "state_dir = {:?}\nsocket_dir = {:?}\n{more}",
            self.path("state"),
            self.path("s")
        );
        fs::write(self.path("config.toml"), text).unwrap();
    }

    /// A bundle with these annotations.
    fn bundle(&self, id: &str, annotations: &[(&str, &str)]) -> PathBuf {
        let bundle = self.path("bundles").join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let annotations: serde_json::Map<_, _> = annotations
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let spec = serde_json::json!({
            "ociVersion": "1.2.0", "annotations": annotations, "root": {"path": "rootfs"},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn shim(&self, id: &str, action: &str) -> Command {
        self.shim_of("/run/containerd/containerd.sock", id, action)
    }

    /// As the containerd of this address runs it.
    fn shim_of(&self, containerd: &str, id: &str, action: &str) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args([
                "-namespace",
                "test",
                "-address",
                containerd,
                "-publish-binary",
                "/bin/true",
            ])
            .args(["-id", id]);
        if action == "delete" {
            command.arg("-bundle").arg(self.path("bundles").join(id));
        }
        command
            .arg(action)
            .current_dir(self.path("bundles").join(id))
            .env("HUSK_CONFIG", self.path("config.toml"))
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null());
        command
    }

    fn start(&self, id: &str) -> Output {
        self.shim(id, "start").output().unwrap()
    }

    /// Starts, and gives the address.
    fn started(&self, id: &str) -> String {
        address(self.start(id))
    }

    fn delete(&self, id: &str) -> DeleteResponse {
        let output = self.shim(id, "delete").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(text(&output.stderr), "");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    fn pod(&self, id: &str) -> PodDir {
        PodDir::new(&self.path("state"), "test", id).unwrap()
    }

    fn serving(&self, id: &str) -> ProcessId {
        self.pod(id).load().unwrap().shim.unwrap()
    }

    fn nothing_is_left(&self) {
        assert!(
            !self.path("state").exists(),
            "state is left: {:?}",
            self.pod("x").siblings()
        );
        let sockets = fs::read_dir(self.path("s")).map_or(0, Iterator::count);
        assert_eq!(sockets, 0, "sockets are left");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pod in self.pod("any").siblings() {
            husk_shim::delete::clear_pod(&pod);
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a successful start printed: containerd reads both outputs as one.
fn address(output: Output) -> String {
    assert_eq!(text(&output.stderr), "");
    assert!(output.status.success());
    let address = text(&output.stdout);
    assert!(
        address.starts_with("unix:///") && address.trim() == address,
        "{address:?}"
    );
    address
}

/// The one line of a start that failed.
fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(text(&output.stdout), "");
    let line = text(&output.stderr);
    assert_eq!(line.matches('\n').count(), 1, "{line:?}");
    line
}

fn socket(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap())
}

const SANDBOX: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri.sandbox-id", "pod"),
];
const CONTAINER: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "container"),
    ("io.kubernetes.cri.sandbox-id", "pod"),
];

#[test]
fn start_leaves_a_serving_shim_and_delete_leaves_nothing() {
    let host = Host::new();
    let bundle = host.bundle("c1", &[]);
    let address = host.started("c1");
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    let socket = socket(&address);
    let meta = fs::metadata(socket).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(socket.parent().unwrap())
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    UnixStream::connect(socket).unwrap();

    let shim = host.serving("c1");
    assert!(shim.is_alive());
    let proc = PathBuf::from(format!("/proc/{}", shim.pid));
    let link = |path: PathBuf| fs::read_link(path).unwrap();
    assert_ne!(
        link(proc.join("ns/mnt")),
        link("/proc/self/ns/mnt".into()),
        "mounts of its own"
    );
    assert_eq!(link(proc.join("cwd")), Path::new("/"));
    assert_eq!(link(proc.join("fd/0")), Path::new("/dev/null"));
    assert_eq!(link(proc.join("fd/1")), Path::new("/dev/null"));
    let score = |path: PathBuf| {
        fs::read_to_string(path.join("oom_score_adj"))
            .unwrap()
            .trim()
            .parse::<i32>()
            .unwrap()
    };
    assert_eq!(score(proc), (score("/proc/self".into()) + 1).min(1000));

    for _ in 0..2 {
        let response = host.delete("c1");
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 1_600_000_000);
        assert!(!shim.is_alive());
        host.nothing_is_left();
    }
}

/// The table of mounts, and everything that follows no link, knows the directory by its real name only.
#[test]
fn a_state_directory_behind_a_link_is_left_as_clean() {
    let host = Host::new();
    fs::create_dir(host.path("real")).unwrap();
    std::os::unix::fs::symlink(host.path("real"), host.path("link")).unwrap();
    let text = format!(
        "state_dir = {:?}\nsocket_dir = {:?}\n",
        host.path("link/husk"),
        host.path("s")
    );
    fs::write(host.path("config.toml"), text).unwrap();
    let bundle = host.bundle("c1", &[]);
    host.started("c1");
    let pod = PodDir::of_bundle(&bundle).unwrap();
    let shim = pod.load().unwrap().shim.unwrap();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", shim.pid)).unwrap();
    let served = format!(" {} ro,", pod.served().display());
    assert!(mounts.contains(&served), "{mounts}");
    host.delete("c1");
    assert!(!shim.is_alive());
    assert_eq!(fs::read_dir(host.path("real")).unwrap().count(), 0);
    // Without the bundle's link, as after a start that did not get that far.
    host.started("c1");
    fs::remove_file(bundle.join("husk-state")).unwrap();
    host.delete("c1");
    assert_eq!(fs::read_dir(host.path("real")).unwrap().count(), 0);
    host.nothing_is_left();
}

/// Two containerds on one machine share the state directory.
#[test]
fn another_containerds_pod_of_the_same_id_is_left_alone() {
    let host = Host::new();
    let bundle = host.bundle("c1", &[]);
    let address = host.started("c1");
    let shim = host.serving("c1");
    // The other one has a bundle of its own.
    let link = fs::read_link(bundle.join("husk-state")).unwrap();
    fs::remove_file(bundle.join("husk-state")).unwrap();
    let other = "/run/k3s/containerd/containerd.sock";
    let line = complaint(&host.shim_of(other, "c1", "start").output().unwrap());
    assert!(
        line.contains("c1 is in use by another containerd"),
        "{line}"
    );
    let output = host.shim_of(other, "c1", "delete").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(shim.is_alive());
    UnixStream::connect(socket(&address)).unwrap();
    std::os::unix::fs::symlink(link, bundle.join("husk-state")).unwrap();
    host.delete("c1");
    assert!(!shim.is_alive());
    // Now the id is free.
    let started = host.shim_of(other, "c1", "start").output().unwrap();
    assert_ne!(self::address(started), address);
    host.delete("c1");
    host.nothing_is_left();
}

#[test]
fn delete_without_any_start() {
    let host = Host::new();
    host.bundle("c1", &[]);
    assert_eq!(host.delete("c1").exit_status, 137);
    host.nothing_is_left();
}

#[test]
fn a_pods_containers_share_its_shim() {
    let host = Host::new();
    host.bundle("pod", &SANDBOX);
    let second = host.bundle("c2", &CONTAINER);
    let address = host.started("pod");
    let shim = host.serving("pod");
    assert_eq!(host.started("c2"), address);
    assert_eq!(fs::read_to_string(second.join("address")).unwrap(), address);
    assert_eq!(host.serving("pod"), shim);
    assert_eq!(host.pod("pod").siblings().len(), 1);
    assert!(host.pod("pod").load().unwrap().containers.contains("c2"));
    // Where all end together, the sandbox container may be the first that containerd is done with.
    host.delete("pod");
    assert!(shim.is_alive());
    host.delete("c2");
    host.nothing_is_left();
}

/// A pod of a sandbox container and `c2`, and its shim.
fn pod_with_a_member() -> (Host, ProcessId) {
    let host = Host::new();
    host.bundle("pod", &SANDBOX);
    host.bundle("c2", &CONTAINER);
    host.started("pod");
    host.started("c2");
    let shim = host.serving("pod");
    (host, shim)
}

#[test]
fn a_pod_goes_with_its_sandbox_container_where_that_is_all_containerd_has() {
    let (host, shim) = pod_with_a_member();
    fs::remove_dir_all(host.path("bundles/c2")).unwrap();
    host.delete("pod");
    assert!(!shim.is_alive());
    host.nothing_is_left();
}

/// It has left them to `delete`: all of the pod's, once.
#[test]
fn the_hooks_of_a_killed_shims_containers_are_run_once() {
    let (host, shim) = pod_with_a_member();
    let said = host.path("said");
    let hook = |id: &str| {
        let script = format!("cat >>{}; echo >>{0}", said.display());
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]});
        let path = host.path("bundles").join(id).join("config.json");
        let mut spec: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        spec["hooks"] = serde_json::json!({"poststop": [hook]});
        fs::write(path, spec.to_string()).unwrap();
    };
    for id in ["pod", "c2"] {
        hook(id);
    }
    // As Create notes it; the member was never created.
    let pod = host.pod("pod");
    pod.update(|state| {
        state.hooked.insert("pod".into());
    })
    .unwrap();
    shim.kill(Duration::from_secs(5)).unwrap();
    for id in ["c2", "pod", "c2", "pod"] {
        host.delete(id);
    }
    let said = fs::read_to_string(said).unwrap();
    let states: Vec<serde_json::Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(states.len(), 1, "{said}");
    assert_eq!(
        (&states[0]["id"], &states[0]["status"]),
        (&"pod".into(), &"stopped".into())
    );
    host.nothing_is_left();
}

#[test]
fn a_pod_whose_shim_does_not_answer_goes_with_its_sandbox_container() {
    let (host, shim) = pod_with_a_member();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(shim.pid),
        nix::sys::signal::Signal::SIGSTOP,
    )
    .unwrap();
    let output = host.shim("pod", "delete").output().unwrap();
    assert!(text(&output.stderr).contains("did not give up container pod"));
    assert!(!shim.is_alive());
    host.nothing_is_left();
}

#[test]
fn a_container_whose_pod_is_not_there_is_refused() {
    let host = Host::new();
    host.bundle("c2", &CONTAINER);
    let line = complaint(&host.start("c2"));
    assert!(
        line.contains("pod") && line.contains("not running"),
        "{line}"
    );
    host.delete("c2");
    host.nothing_is_left();
}

/// What containerd's shim sandboxer makes: a bundle without a spec.
fn sandbox_bundle(host: &Host) -> PathBuf {
    let bundle = host.bundle("pod", &[]);
    fs::remove_file(bundle.join("config.json")).unwrap();
    bundle
}

/// Has a call answered by the shim that serves there.
fn asking<T, F: Future<Output = T>>(address: &str, call: impl FnOnce(Client) -> F) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(socket(address)).await;
        call(Client::new(Socket::from(stream.unwrap()))).await
    })
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("an error status was expected: {other:?}"),
    }
}

/// There is no VMM here, so the sandbox's start fails; all before and after it is as with one.
#[test]
fn the_sandbox_api_opens_and_closes_a_pod() {
    let host = Host::new();
    host.configure("vmm = \"/no/such/vmm\"\n");
    let bundle = sandbox_bundle(&host);
    let address = host.started("pod");
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    let shim = host.serving("pod");
    let context = ttrpc::context::Context::default;
    let create = CreateSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let start = StartSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    asking(&address, |client| async {
        let tasks = TaskClient::new(client.clone());
        let sandbox = SandboxClient::new(client);
        let (kind, _) = code(sandbox.start_sandbox(context(), &start).await);
        assert_eq!(kind, ttrpc::Code::NOT_FOUND);
        sandbox.create_sandbox(context(), &create).await.unwrap();
        let (kind, _) = code(sandbox.create_sandbox(context(), &create).await);
        assert_eq!(kind, ttrpc::Code::ALREADY_EXISTS);
        let (_, message) = code(sandbox.start_sandbox(context(), &start).await);
        assert!(message.contains("cannot be started"), "{message}");
        // What containerd asks after its own restart, and after a container that it could not create.
        let connect = ConnectRequest {
            id: "pod".into(),
            ..Default::default()
        };
        let answer = tasks.connect(context(), &connect).await.unwrap();
        assert_eq!(i32::try_from(answer.shim_pid).unwrap(), shim.pid);
        tasks
            .shutdown(context(), &ShutdownRequest::new())
            .await
            .unwrap();
        let status = SandboxStatusRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let status = sandbox.sandbox_status(context(), &status).await.unwrap();
        assert_eq!(status.state, "SANDBOX_NOTREADY");
        let end = ShutdownSandboxRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        sandbox.shutdown_sandbox(context(), &end).await.unwrap();
    });
    host.nothing_is_left();
    // containerd's clean-up of the bundle comes when the shim has gone.
    host.delete("pod");
    host.nothing_is_left();
}

#[test]
fn a_sandboxs_shim_is_deleted_and_reclaimed_like_any_other() {
    let host = Host::new();
    sandbox_bundle(&host);
    let old = host.started("pod");
    let shim = host.serving("pod");
    host.delete("pod");
    assert!(!shim.is_alive());
    host.nothing_is_left();

    assert_eq!(host.started("pod"), old);
    let shim = host.serving("pod");
    assert!(shim.kill(std::time::Duration::from_secs(10)).unwrap());
    // A container of the pod, for which no `start` was ever run.
    host.bundle("c", &CONTAINER);
    host.delete("c");
    host.nothing_is_left();
    host.delete("pod");
    host.nothing_is_left();
}

/// containerd asks for it when it has lost its connection to the container, and the pod goes on.
#[test]
fn a_container_of_a_living_sandbox_is_deleted_without_it() {
    let host = Host::new();
    sandbox_bundle(&host);
    host.started("pod");
    host.bundle("c", &CONTAINER);
    assert_eq!(host.delete("c").exit_status, 137);
    assert!(host.serving("pod").is_alive());
    host.delete("pod");
    host.nothing_is_left();
}

#[test]
fn what_a_killed_shim_leaves_goes_with_the_next_start() {
    let host = Host::new();
    host.bundle("c1", &[]);
    host.bundle("c2", &[]);
    let old = host.started("c1");
    // Its VMM would be named in the state; any process will do here.
    let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
    let id = ProcessId::of(i32::try_from(vmm.id()).unwrap()).unwrap();
    host.pod("c1").update(|state| state.vmm = Some(id)).unwrap();
    assert!(
        host.serving("c1")
            .kill(std::time::Duration::from_secs(10))
            .unwrap()
    );

    host.started("c2");
    assert!(!id.is_alive(), "the dead pod's VMM runs on");
    vmm.wait().unwrap();
    assert!(!host.pod("c1").path().exists());
    assert!(!socket(&old).exists());
    // containerd's own clean-up of c1 comes later and finds nothing, and c2 lives.
    assert_eq!(host.delete("c1").exit_status, 137);
    assert!(host.serving("c2").is_alive());
    // The same id again.
    let again = host.started("c1");
    assert_eq!(again, old);
    host.delete("c1");
    host.delete("c2");
    host.nothing_is_left();
}

#[test]
fn broken_settings_and_specs_are_one_clear_line() {
    let host = Host::new();
    let bundle = host.bundle("c1", &[]);
    host.configure("default_vcpus = 0\n");
    let line = complaint(&host.start("c1"));
    assert!(
        line.contains("config.toml, line 3, key default_vcpus") && line.contains("1 to"),
        "{line}"
    );
    host.configure("");
    fs::write(bundle.join("config.json"), "{\"annotations\": 3}").unwrap();
    let line = complaint(&host.start("c1"));
    assert!(line.contains("config.json"), "{line}");
    host.nothing_is_left();
}

#[test]
fn options_on_standard_input_are_heeded() {
    let host = Host::new();
    host.bundle("c1", &[]);
    let run = |input: &[u8]| {
        let mut child = host
            .shim("c1", "start")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    };
    let any = |name: &str, value: Vec<u8>| Any {
        type_url: name.into(),
        value,
        ..Default::default()
    };
    let runc = oci::Options {
        shim_cgroup: "/no/such/cgroup".into(),
        ..Default::default()
    };
    let input = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap())
        .write_to_bytes()
        .unwrap();
    let line = complaint(&run(&input));
    assert!(line.contains("/no/such/cgroup"), "{line}");
    host.nothing_is_left();

    let path = host.path("other.toml");
    fs::write(&path, "kernle = 1\n").unwrap();
    let mut value = vec![0x12, u8::try_from(path.as_os_str().len()).unwrap()];
    value.extend(path.to_str().unwrap().bytes());
    let line = complaint(&run(&any("runtimeoptions.v1.Options", value)
        .write_to_bytes()
        .unwrap()));
    assert!(line.contains("other.toml, line 1, key kernle"), "{line}");

    let sockets = host.path("elsewhere");
    let params = BootstrapParams {
        instance_id: "c1".into(),
        namespace: "test".into(),
        socket_dir: Some(sockets.to_str().unwrap().into()),
        ..Default::default()
    };
    let address = address(run(&params.write_to_bytes().unwrap()));
    assert!(socket(&address).starts_with(&sockets), "{address}");
    host.delete("c1");
    assert!(!socket(&address).exists());

    // Nonsense is for the log.
    let output = run(b"\xff\xff\xff");
    assert!(output.status.success(), "{output:?}");
    host.delete("c1");
    host.nothing_is_left();
}

#[test]
fn an_input_that_never_ends_does_not_hang_the_start() {
    let host = Host::new();
    host.bundle("c1", &[]);
    let mut child = host
        .shim("c1", "start")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _open = child.stdin.take();
    address(child.wait_with_output().unwrap());
}

#[test]
fn the_log_goes_to_the_bundles_fifo_with_the_pods_id() {
    let host = Host::new();
    let bundle = host.bundle("c1", &[]);
    nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut log = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .unwrap();
    host.started("c1");
    let mut got = Vec::new();
    let mut chunk = [0; 4096];
    while !text(&got).contains("shim serves") {
        match log.read(&mut chunk) {
            Ok(n) => {
                assert!(n > 0, "nobody holds the log open");
                got.extend_from_slice(&chunk[..n]);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(e) => panic!("{e}"),
        }
    }
    let got = text(&got);
    assert!(
        got.starts_with("time=\"2") && got.contains(" level=info msg=\"shim serves\" pod=c1 "),
        "{got}"
    );
}

#[test]
fn ten_starts_of_one_group_at_once_make_one_shim() {
    let host = Host::new();
    let group = [("io.containerd.runc.v2.group", "together")];
    let ids: Vec<_> = (0..10).map(|n| format!("c{n}")).collect();
    ids.iter().for_each(|id| drop(host.bundle(id, &group)));
    let addresses: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> = ids
            .iter()
            .map(|id| scope.spawn(|| host.started(id)))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().unwrap())
            .collect()
    });
    assert!(
        addresses.iter().all(|a| Some(a) == addresses.first()),
        "{addresses:?}"
    );
    assert_eq!(host.pod("x").siblings().len(), 1);
    assert_eq!(host.pod("together").load().unwrap().containers.len(), 10);
}

#[test]
fn info_version_and_help() {
    let run = |arguments: &[&str]| {
        Command::new(SHIM)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let info = RuntimeInfo::parse_from_bytes(&run(&["-info"]).stdout).unwrap();
    assert_eq!(info.name, "io.containerd.husk.v2");
    assert!(text(&run(&["-v"]).stdout).contains(env!("CARGO_PKG_VERSION")));
    for arguments in [&["-h"][..], &[]] {
        let output = run(arguments);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("ctr run --runtime io.containerd.husk.v2"));
    }
    let line = complaint(&run(&["-wat"]));
    assert!(line.contains("unknown flag -wat"), "{line}");
}
