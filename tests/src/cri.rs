//! A kubelet of a few lines: containerd's CRI, asked over gRPC as a kubelet asks it.

use std::{
    fmt, fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
pub use k8s_cri::v1;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{
    containerd::{BUSYBOX, Containerd, handler},
    runtime::Runtime,
    wait,
};

/// The namespace that containerd's CRI keeps its images and containers in.
pub const NAMESPACE: &str = "k8s.io";

/// Seconds that a stop leaves a container between SIGTERM and SIGKILL where a test does not care.
const NO_GRACE: i64 = 0;

/// The RuntimeService of a containerd.
pub struct Cri {
    tokio: runtime::Runtime,
    client: RuntimeServiceClient<Channel>,
    runtime: Runtime,
    /// Where the pods' logs go, a directory each.
    logs: PathBuf,
    next: AtomicU32,
}

impl Cri {
    /// Connects, and waits until the runtime is ready for pods.
    ///
    /// # Errors
    /// There is no answer, or it never says that it is ready.
    pub fn connect(containerd: &Containerd, runtime: Runtime) -> Result<Self> {
        let tokio = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", containerd.socket().display()))?
            .timeout(wait::HANG);
        let channel = tokio
            .block_on(endpoint.connect())
            .context("connecting to containerd's CRI")?;
        let cri = Self {
            tokio,
            client: RuntimeServiceClient::new(channel),
            runtime,
            logs: containerd.dir().join("pods"),
            next: AtomicU32::new(1),
        };
        cri.ready()?;
        Ok(cri)
    }

    /// Waits until CRI is ready for pods.
    ///
    /// # Errors
    /// It never says so.
    pub fn ready(&self) -> Result<()> {
        wait::until("CRI to be ready, the network included", || {
            let request = v1::StatusRequest::default();
            let answer = self.call("Status", async |mut c| c.status(request).await);
            let conditions = answer.ok()?.status?.conditions;
            conditions.iter().all(|c| c.status).then_some(())
        })
    }

    /// One call, from a thread that is not tokio's.
    pub(crate) fn call<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T> {
        let client = self.client.clone();
        let answer = self.tokio.block_on(call(client));
        // The message alone: it is what a person sees in `kubectl describe pod`.
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| anyhow::anyhow!("{what}: {}", status.message()))
    }

    /// The configuration of a pod with a name of its own, as a kubelet fills it.
    pub fn pod_config(&self) -> v1::PodSandboxConfig {
        // One containerd may serve two of us.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("pod-{}-{number}", self.runtime);
        v1::PodSandboxConfig {
            log_directory: self.logs.join(&name).to_string_lossy().into_owned(),
            hostname: name.clone(),
            metadata: Some(v1::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                name,
                attempt: 0,
            }),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// RunPodSandbox.
    ///
    /// # Errors
    /// CRI's message.
    pub fn run_pod(&self, config: v1::PodSandboxConfig) -> Result<Pod<'_>> {
        self.run_pod_on("bridge", config)
    }

    /// RunPodSandbox, on one of the [networks](crate::containerd::handler).
    ///
    /// # Errors
    /// CRI's message.
    pub fn run_pod_on(&self, network: &str, config: v1::PodSandboxConfig) -> Result<Pod<'_>> {
        fs::create_dir_all(&config.log_directory)?;
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler(self.runtime, network),
        };
        let id = self
            .call("RunPodSandbox", async |mut c| {
                c.run_pod_sandbox(request).await
            })?
            .pod_sandbox_id;
        Ok(Pod {
            cri: self,
            config,
            id,
        })
    }

    /// ListContainerStats of the containers of one pod.
    ///
    /// # Errors
    /// CRI's message.
    pub fn list_container_stats(&self, pod: &str) -> Result<Vec<v1::ContainerStats>> {
        let filter = v1::ContainerStatsFilter {
            pod_sandbox_id: pod.to_owned(),
            ..Default::default()
        };
        let request = v1::ListContainerStatsRequest {
            filter: Some(filter),
        };
        let answer = self.call("ListContainerStats", async |mut c| {
            c.list_container_stats(request).await
        })?;
        Ok(answer.stats)
    }

    /// ListPodSandboxStats of one pod.
    ///
    /// # Errors
    /// CRI's message.
    pub fn list_pod_stats(&self, pod: &str) -> Result<Vec<v1::PodSandboxStats>> {
        let filter = v1::PodSandboxStatsFilter {
            id: pod.to_owned(),
            ..Default::default()
        };
        let request = v1::ListPodSandboxStatsRequest {
            filter: Some(filter),
        };
        let answer = self.call("ListPodSandboxStats", async |mut c| {
            c.list_pod_sandbox_stats(request).await
        })?;
        Ok(answer.stats)
    }

    /// A pod of the plainest kind.
    ///
    /// # Errors
    /// CRI's message.
    pub fn pod(&self) -> Result<Pod<'_>> {
        self.run_pod(self.pod_config())
    }
}

/// What a pod's containers share when its spec says nothing.
pub fn namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Pod.into(),
        pid: v1::NamespaceMode::Container.into(),
        ipc: v1::NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

/// A container of the busybox image that runs this.
pub fn container(command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: "c".into(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: BUSYBOX.into(),
            ..Default::default()
        }),
        command: command.iter().map(ToString::to_string).collect(),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The security context of a container's configuration.
pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// A pod's sandbox. Dropped, it is stopped and removed with all that is in it.
pub struct Pod<'a> {
    pub(crate) cri: &'a Cri,
    config: v1::PodSandboxConfig,
    /// CRI's id.
    pub id: String,
}

impl Pod<'_> {
    /// CreateContainer.
    ///
    /// # Errors
    /// CRI's message.
    pub fn create(&self, mut config: v1::ContainerConfig) -> Result<PodContainer<'_>> {
        let number = self.cri.next.fetch_add(1, Ordering::Relaxed);
        let metadata = config.metadata.get_or_insert_default();
        metadata.name = format!("{}-{number}", metadata.name);
        config.log_path = format!("{}.log", metadata.name);
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer = self.cri.call("CreateContainer", async |mut c| {
            c.create_container(request).await
        })?;
        Ok(PodContainer {
            cri: self.cri,
            id: answer.container_id,
            log,
        })
    }

    /// CreateContainer and StartContainer.
    ///
    /// # Errors
    /// CRI's message.
    pub fn start(&self, config: v1::ContainerConfig) -> Result<PodContainer<'_>> {
        let container = self.create(config)?;
        container.start()?;
        Ok(container)
    }

    /// Runs a script in a container of its own, to its end: the exit code and what it printed.
    ///
    /// # Errors
    /// CRI's message.
    pub fn sh(&self, script: &str) -> Result<Ended> {
        self.start(container(&["sh", "-c", script]))?.ended()
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// CRI's message.
    pub fn stop(&self) -> Result<()> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri.call("StopPodSandbox", async |mut c| {
            c.stop_pod_sandbox(request).await
        })?;
        Ok(())
    }

    /// PodSandboxStatus.
    ///
    /// # Errors
    /// CRI's message.
    pub fn status(&self) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.cri.call("PodSandboxStatus", async |mut c| {
            c.pod_sandbox_status(request).await
        })?;
        answer.status.context("a status without a status")
    }

    /// PodSandboxStats.
    ///
    /// # Errors
    /// CRI's message.
    pub fn stats(&self) -> Result<v1::PodSandboxStats> {
        let request = v1::PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let answer = self.cri.call("PodSandboxStats", async |mut c| {
            c.pod_sandbox_stats(request).await
        })?;
        answer.stats.context("stats without stats")
    }

    /// Its addresses, the primary one first.
    ///
    /// # Errors
    /// CRI's message, or it has none.
    pub fn ips(&self) -> Result<Vec<String>> {
        let network = self.status()?.network.context("a pod without a network")?;
        Ok(std::iter::once(network.ip)
            .chain(network.additional_ips.into_iter().map(|ip| ip.ip))
            .collect())
    }

    /// The path of its network namespace on the host.
    ///
    /// # Errors
    /// CRI's message, or it does not tell.
    pub fn netns(&self) -> Result<String> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let answer = self.cri.call("PodSandboxStatus", async |mut c| {
            c.pod_sandbox_status(request).await
        })?;
        let info: serde_json::Value =
            serde_json::from_str(answer.info.get("info").context("no info")?)?;
        let namespaces = info
            .pointer("/runtimeSpec/linux/namespaces")
            .and_then(|n| n.as_array());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|n| n["type"] == "network");
        let path = network.and_then(|n| n["path"].as_str());
        path.map(str::to_owned)
            .with_context(|| format!("no network namespace in {info}"))
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = self.stop();
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let _ = self.cri.call("RemovePodSandbox", async |mut c| {
            c.remove_pod_sandbox(request).await
        });
    }
}

/// How a container or an exec has ended.
#[derive(PartialEq, Eq)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// Standard output, without the last line's end.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exit code {}\nstdout: {}\nstderr: {}",
            self.code, self.out, self.err
        )
    }
}

impl Ended {
    /// It did what it should.
    ///
    /// # Errors
    /// It did not; with what it printed.
    pub fn ok(self) -> Result<String> {
        anyhow::ensure!(self.code == 0, "{self:?}");
        Ok(self.out)
    }
}

/// A container of a pod.
pub struct PodContainer<'a> {
    pub(crate) cri: &'a Cri,
    /// CRI's id.
    pub id: String,
    log: PathBuf,
}

impl PodContainer<'_> {
    /// StartContainer.
    ///
    /// # Errors
    /// CRI's message.
    pub fn start(&self) -> Result<()> {
        let request = v1::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri.call("StartContainer", async |mut c| {
            c.start_container(request).await
        })?;
        Ok(())
    }

    /// ContainerStatus.
    ///
    /// # Errors
    /// CRI's message.
    pub fn status(&self) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.cri.call("ContainerStatus", async |mut c| {
            c.container_status(request).await
        })?;
        answer.status.context("a status without a status")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&self) -> Result<Ended> {
        let code = wait::until("the container to end", || {
            let status = self.status().ok()?;
            (status.state() == v1::ContainerState::ContainerExited).then_some(status.exit_code)
        })?;
        Ok(Ended {
            code,
            out: self.logged("stdout"),
            err: self.logged("stderr"),
        })
    }

    /// What its log file holds of one stream (kubelet's format: time, stream, P or F, text).
    pub fn logged(&self, stream: &str) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let mut all = String::new();
        for line in text.lines() {
            let mut parts = line.splitn(4, ' ').skip(1);
            if parts.next() == Some(stream) {
                let whole = parts.next() == Some("F");
                all.push_str(parts.next().unwrap_or_default());
                if whole {
                    all.push('\n');
                }
            }
        }
        all.trim_end().to_owned()
    }

    /// ExecSync.
    ///
    /// # Errors
    /// CRI's message.
    pub fn exec(&self, command: &[&str]) -> Result<Ended> {
        let request = v1::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: 60,
        };
        let answer = self
            .cri
            .call("ExecSync", async |mut c| c.exec_sync(request).await)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        Ok(Ended {
            code: answer.exit_code,
            out: text(answer.stdout),
            err: text(answer.stderr),
        })
    }

    /// ExecSync of a shell script.
    ///
    /// # Errors
    /// CRI's message.
    pub fn sh(&self, script: &str) -> Result<Ended> {
        self.exec(&["sh", "-c", script])
    }

    /// StopContainer with this many seconds between SIGTERM and SIGKILL.
    ///
    /// # Errors
    /// CRI's message.
    pub fn stop(&self, grace: i64) -> Result<()> {
        let request = v1::StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        self.cri.call("StopContainer", async |mut c| {
            c.stop_container(request).await
        })?;
        Ok(())
    }

    /// StopContainer and RemoveContainer.
    ///
    /// # Errors
    /// CRI's message.
    pub fn remove(self) -> Result<()> {
        self.stop(NO_GRACE)?;
        let request = v1::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri.call("RemoveContainer", async |mut c| {
            c.remove_container(request).await
        })?;
        Ok(())
    }

    /// UpdateContainerResources.
    ///
    /// # Errors
    /// CRI's message.
    pub fn update(&self, resources: v1::LinuxContainerResources) -> Result<()> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        self.cri.call("UpdateContainerResources", async |mut c| {
            c.update_container_resources(request).await
        })?;
        Ok(())
    }

    /// ContainerStats.
    ///
    /// # Errors
    /// CRI's message.
    pub fn stats(&self) -> Result<v1::ContainerStats> {
        let request = v1::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let answer = self.cri.call("ContainerStats", async |mut c| {
            c.container_stats(request).await
        })?;
        answer.stats.context("stats without stats")
    }
}
