//! `runtime_type = "vm"`: the shim, spoken to as CRI-O's `internal/oci/runtime_vm.go` does: the shim's `start` without any socket of an
//! engine's, root file systems that the engine has mounted, one connection a container, files of its own for what containerd learns by events,
//! and Delete with Shutdown for each container.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::{
    TaskClient,
    api::{
        CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
        PauseRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StatsRequest,
        Status, UpdateTaskRequest, WaitRequest,
    },
    protobuf::well_known_types::any::Any,
    ttrpc::Code,
};
use husk_tests::{
    host::{self, Netns, Traces},
    task::{self, context, refused},
    wait,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::json;

use super::{Private, Storage};
use crate::context::Context;

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// What typeurl writes for an exec's process.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What a process has said so far, read from its FIFOs as they come.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn listen(&self, fifo: &Path) {
        let (said, fifo) = (self.clone(), fifo.to_owned());
        thread::spawn(move || {
            let mut pipe = File::open(fifo)?;
            let mut chunk = [0; 4096];
            loop {
                match pipe.read(&mut chunk)? {
                    0 => return Ok::<_, std::io::Error>(()),
                    n => said
                        .0
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .extend_from_slice(&chunk[..n]),
                }
            }
        });
    }

    fn text(&self) -> String {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said).into_owned()
    }

    fn until(&self, wanted: &str) -> Result<()> {
        wait::until(&format!("{wanted:?} to be said"), || {
            self.text().contains(wanted).then_some(())
        })
        .with_context(|| self.text())
    }
}

/// One container as CRI-O has it.
struct Container {
    files: Storage,
    tasks: TaskClient,
    address: String,
    said: Said,
    /// CRI-O reads the shim's log here.
    _log: File,
}

impl Container {
    /// Up to where the shim has been started: `pod` is the sandbox's id, or none for the sandbox itself.
    fn new(
        suite: &Context,
        storage: &Path,
        netns: &Netns,
        pod: Option<&str>,
        command: &[&str],
        limit: i64,
    ) -> Result<Self> {
        let files = Storage::new(suite, storage, netns, pod, command, limit)?;
        let bundle = files.bundle();
        fs::create_dir(files.dir.join("fifo"))?;
        mkfifo(&bundle.join("log"), Mode::from_bits_truncate(0o700))?;
        let log = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(bundle.join("log"))?;
        let address = start(&suite.bin, &files.id, &bundle)?;
        Ok(Self {
            tasks: task::connect(&address)?,
            address,
            files,
            said: Said::default(),
            _log: log,
        })
    }

    fn fifo(&self, name: &str) -> Result<String> {
        let path = self.files.dir.join("fifo").join(name);
        if !path.exists() {
            mkfifo(&path, Mode::from_bits_truncate(0o700))?;
        }
        Ok(path.display().to_string())
    }

    fn request(&self) -> Result<CreateTaskRequest> {
        Ok(CreateTaskRequest {
            id: self.files.id.clone(),
            bundle: self.files.bundle().display().to_string(),
            stdout: self.fifo("stdout")?,
            stderr: self.fifo("stderr")?,
            ..Default::default()
        })
    }

    fn create_and_start(&self) -> Result<()> {
        let request = self.request()?;
        self.said.listen(Path::new(&request.stdout));
        self.said.listen(Path::new(&request.stderr));
        let created = self.tasks.create(context(), &request)?;
        ensure!(created.pid != 0, "no pid");
        self.tasks.start(
            context(),
            &StartRequest {
                id: self.files.id.clone(),
                ..Default::default()
            },
        )?;
        Ok(())
    }

    fn state(&self) -> Result<containerd_shim_protos::api::StateResponse> {
        let request = StateRequest {
            id: self.files.id.clone(),
            ..Default::default()
        };
        Ok(self.tasks.state(context(), &request)?)
    }

    fn kill(&self, signal: u32) -> containerd_shim_protos::ttrpc::Result<()> {
        let request = KillRequest {
            id: self.files.id.clone(),
            signal,
            ..Default::default()
        };
        self.tasks.kill(context(), &request).map(drop)
    }

    fn wait(&self, exec_id: &str) -> Result<u32> {
        let request = WaitRequest {
            id: self.files.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        Ok(self.tasks.wait(context(), &request)?.exit_status)
    }

    /// ExecSync with an input: what it said, and its exit code.
    fn exec(&self, command: &[&str], input: &str) -> Result<(String, u32)> {
        const ID: &str = "0123456789abcdef";
        let mut process = self.files.spec["process"].clone();
        process["args"] = json!(command);
        let [stdin, stdout, stderr] =
            ["exec-in", "exec-out", "exec-err"].map(|name| self.fifo(name));
        let (stdin, stdout, stderr) = (stdin?, stdout?, stderr?);
        let said = Said::default();
        said.listen(Path::new(&stdout));
        said.listen(Path::new(&stderr));
        self.tasks.exec(
            context(),
            &ExecProcessRequest {
                id: self.files.id.clone(),
                exec_id: ID.into(),
                stdin: stdin.clone(),
                stdout,
                stderr,
                spec: Some(Any {
                    type_url: PROCESS.into(),
                    value: process.to_string().into_bytes(),
                    ..Any::default()
                })
                .into(),
                ..Default::default()
            },
        )?;
        self.tasks.start(
            context(),
            &StartRequest {
                id: self.files.id.clone(),
                exec_id: ID.into(),
                ..Default::default()
            },
        )?;
        let mut pipe = File::options().write(true).open(&stdin)?;
        pipe.write_all(input.as_bytes())?;
        self.tasks.close_io(
            context(),
            &CloseIORequest {
                id: self.files.id.clone(),
                exec_id: ID.into(),
                stdin: true,
                ..Default::default()
            },
        )?;
        drop(pipe);
        let code = self.wait(ID)?;
        self.delete_process(ID)?;
        Ok((said.text(), code))
    }

    fn delete_process(&self, exec_id: &str) -> Result<()> {
        let request = DeleteRequest {
            id: self.files.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.tasks.delete(context(), &request)?;
        Ok(())
    }

    /// `deleteContainer`: the pipes go first.
    fn delete(&self) -> Result<()> {
        fs::remove_dir_all(self.files.dir.join("fifo"))?;
        self.delete_process("")?;
        self.shutdown()
    }

    fn shutdown(&self) -> Result<()> {
        let request = ShutdownRequest {
            id: self.files.id.clone(),
            ..Default::default()
        };
        self.tasks.shutdown(context(), &request)?;
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // What a failed test leaves must not fail the others.
        let _ = self.kill(SIGKILL);
    }
}

/// containerd's `client.Command` with what CRI-O gives it: no engine to call back, and nothing on standard input.
fn start(bin: &Path, id: &str, bundle: &Path) -> Result<String> {
    let output = Command::new(bin.join("containerd-shim-husk-v2"))
        .args(["-namespace", "default", "-address", "", "-publish-binary"])
        .args(["/usr/bin/crio", "-id", id, "start"])
        .current_dir(bundle)
        .env("GOMAXPROCS", "2")
        .env("TTRPC_ADDRESS", "")
        .env("GRPC_ADDRESS", "")
        .env("NAMESPACE", "default")
        .stdin(Stdio::null())
        .output()
        .context("starting the shim")?;
    // CRI-O takes both together for the address.
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    if !output.status.success() {
        bail!("{said}");
    }
    Ok(said)
}

pub fn pod(suite: &Context) -> Result<()> {
    let before = Traces::now();
    {
        let dir = tempfile::tempdir_in("/run")?;
        let storage = Private::mount(dir.path())?;
        let netns = Netns::new("husk-crio")?;
        netns.wire("husk-crio-h", "10.93.0.1", "eth0", "10.93.0.2")?;
        whole_life(suite, storage.0, &netns)?;
    }
    before.restored()
}

fn whole_life(suite: &Context, storage: &Path, netns: &Netns) -> Result<()> {
    let sandbox = Container::new(suite, storage, netns, None, &["sleep", "1000000"], 0)?;
    sandbox.create_and_start()?;
    let script =
        "trap 'echo asked; exit 3' TERM; echo here; echo problem >&2; while :; do sleep 0.1; done";
    let pod = Some(sandbox.files.id.as_str());
    let main = Container::new(suite, storage, netns, pod, &["sh", "-c", script], 64 << 20)?;
    ensure!(main.address == sandbox.address, "a shim of its own");
    main.create_and_start()?;
    main.said.until("here\n")?;
    main.said.until("problem\n")?;
    // IsContainerAlive.
    main.kill(0)?;
    ensure!(host::run(&["ping", "-c", "1", "-W", "30", "10.93.0.2"])?.contains("1 received"));
    let (said, code) = main.exec(
        &["sh", "-c", "cat; echo of $0; touch /new; exit 7"],
        "words ",
    )?;
    ensure!(
        (said.as_str(), code) == ("words of sh\n", 7),
        "{said:?} {code}"
    );
    // `crictl exec` into the root file system that CRI-O has mounted itself, and what it made there.
    let merged = main.files.dir.join("merged");
    ensure!(merged.join("new").exists() && main.files.dir.join("diff/new").exists());
    changes(&main)?;
    again_after_a_restart(&main)?;
    out_of_memory(suite, storage, netns, &sandbox)?;
    too_late(suite, storage, netns, &sandbox)?;

    // StopContainer, with a Wait beside.
    main.kill(SIGTERM)?;
    ensure!(main.wait("")? == 3);
    main.said.until("asked\n")?;
    refused(main.kill(0), Code::NOT_FOUND)?;
    ensure!(!main.files.bundle().join("oom").exists());
    main.delete()?;
    ensure!(
        sandbox.state()?.status.value() == Status::RUNNING as i32,
        "the pod went with a container"
    );
    sandbox.kill(SIGKILL)?;
    ensure!(sandbox.wait("")? == 137);
    sandbox.delete()
}

fn changes(main: &Container) -> Result<()> {
    let id = &main.files.id;
    let resources = Some(task::resources(&json!({ "memory": { "limit": 96 << 20 } })));
    let update = UpdateTaskRequest {
        id: id.clone(),
        resources: resources.into(),
        ..Default::default()
    };
    main.tasks.update(context(), &update)?;
    let stats = StatsRequest {
        id: id.clone(),
        ..Default::default()
    };
    let stats = main.tasks.stats(context(), &stats)?;
    // By this name alone CRI-O tells the version of the figures.
    ensure!(
        stats.stats.type_url == "io.containerd.cgroups.v2.Metrics",
        "{}",
        stats.stats.type_url
    );
    let pause = PauseRequest {
        id: id.clone(),
        ..Default::default()
    };
    main.tasks.pause(context(), &pause)?;
    ensure!(main.state()?.status.value() == Status::PAUSED as i32);
    let resume = ResumeRequest {
        id: id.clone(),
        ..Default::default()
    };
    main.tasks.resume(context(), &resume)?;
    Ok(())
}

/// CRI-O started anew finds the shim by the bundle, and the pipes by State.
fn again_after_a_restart(main: &Container) -> Result<()> {
    let address = fs::read_to_string(main.files.bundle().join("address"))?;
    ensure!(address.trim() == main.address, "{address}");
    let tasks = task::connect(&address)?;
    let request = StateRequest {
        id: main.files.id.clone(),
        ..Default::default()
    };
    let state = tasks.state(context(), &request)?;
    ensure!(state.status.value() == Status::RUNNING as i32);
    ensure!(state.stdout == main.fifo("stdout")? && state.stderr == main.fifo("stderr")?);
    Ok(())
}

/// The file beside the exit code is all that CRI-O learns by.
fn out_of_memory(
    suite: &Context,
    storage: &Path,
    netns: &Netns,
    sandbox: &Container,
) -> Result<()> {
    let pod = Some(sandbox.files.id.as_str());
    let command = ["tail", "/dev/zero"];
    let greedy = Container::new(suite, storage, netns, pod, &command, 16 << 20)?;
    greedy.create_and_start()?;
    ensure!(greedy.wait("")? == 137);
    ensure!(
        greedy.files.bundle().join("oom").exists(),
        "no word of the OOM kill"
    );
    greedy.delete()
}

/// `runtime_config_path`: CRI-O clears away what it could not create, and the pod goes on.
fn too_late(suite: &Context, storage: &Path, netns: &Netns, sandbox: &Container) -> Result<()> {
    let pod = Some(sandbox.files.id.as_str());
    let other = Container::new(suite, storage, netns, pod, &["true"], 0)?;
    let path = "/etc/husk/other.toml";
    // runtimeoptions.v1.Options: config_path is field 2.
    let value = [&[0x12, u8::try_from(path.len())?], path.as_bytes()].concat();
    let request = CreateTaskRequest {
        options: Some(Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value,
            ..Any::default()
        })
        .into(),
        ..other.request()?
    };
    let words = refused(
        other.tasks.create(context(), &request),
        Code::INVALID_ARGUMENT,
    )?;
    ensure!(words.contains(path), "{words}");
    let request = DeleteRequest {
        id: other.files.id.clone(),
        ..Default::default()
    };
    refused(other.tasks.delete(context(), &request), Code::NOT_FOUND)?;
    other.shutdown()?;
    ensure!(sandbox.state()?.status.value() == Status::RUNNING as i32);
    Ok(())
}
