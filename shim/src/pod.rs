//! What a pod's VM is made from, whoever has asked for it.
//!
//! A pod that a container opens (`ctr run`, Docker, CRI's pause container) is described by that container's spec; one that
//! containerd opens through the Sandbox API has no container, and its request says the same things in other words.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;

use crate::{
    cri::{
        self, BadOptions, DNSConfig, IDMapping, LinuxContainerResources, NamespaceMode,
        UserNamespace,
    },
    sizing::{self, Hints},
    spec::{BundleSpec, DEFAULT_SHM_SIZE, NetworkNamespace, SpecError, Users, sysctls_outside},
};

/// Who brings a pod up, and takes it down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeper {
    /// Its containers: the VM is started with the shim and ends with the last of them.
    Containers,
    /// containerd, through the Sandbox API: containers come and go meanwhile.
    SandboxApi,
}

impl Keeper {
    /// Whose pod a bundle opens: containerd gives a sandbox's bundle no spec, or one without a root file system where its client
    /// has made one. What else is wrong with a spec is for the start to say.
    pub fn of_bundle(bundle: &Path) -> Self {
        match BundleSpec::load(bundle) {
            Err(SpecError::NoRoot { .. }) => Self::SandboxApi,
            Err(SpecError::Read { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Self::SandboxApi
            }
            _ => Self::Containers,
        }
    }
}

/// Where a pod's description is.
#[derive(Debug)]
pub enum PodSource {
    /// In the spec of this bundle.
    Bundle(PathBuf),
    /// Here: it came with a request.
    Request(Box<PodSpec>),
}

impl PodSource {
    /// The description. Blocks.
    ///
    /// # Errors
    /// [`SpecError`], for a bundle.
    pub fn load(self) -> Result<PodSpec, SpecError> {
        match self {
            Self::Bundle(bundle) => BundleSpec::load(&bundle).map(|spec| PodSpec::of_spec(&spec)),
            Self::Request(spec) => Ok(*spec),
        }
    }
}

/// A pod, as far as its VM is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSpec {
    /// What its containers may use.
    pub hints: Hints,
    /// Annotations; husk's own are among them.
    pub annotations: HashMap<String, String>,
    /// Its cgroup on the host, as a spec's `cgroupsPath` names one.
    pub cgroups_path: Option<PathBuf>,
    /// How gladly the kernel kills the VM when the host runs out of memory.
    pub oom_score_adj: i32,
    /// Its network.
    pub network: NetworkNamespace,
    /// Host name; empty: the guest's default.
    pub hostname: String,
    /// The guest's resolver.
    pub dns: Dns,
    /// Sysctls of the whole pod, dotted names: those of the guest's own network, IPC and UTS namespaces.
    pub sysctls: HashMap<String, String>,
    /// Its users, where they are not the guest's.
    pub users: Option<Users>,
    /// Of the `/dev/shm` that the containers share; 0: there is none.
    pub shm_size_bytes: u64,
}

/// A resolver's configuration, as resolv.conf(5) has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of the servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl PodSpec {
    /// Of the container that opens the pod. What a sandbox container says for all of the pod's is the pod's; a container without a pod
    /// brings everything itself.
    pub fn of_spec(spec: &BundleSpec) -> Self {
        let shared = if spec.is_sandbox() {
            let users = spec.users();
            Self {
                hostname: spec.hostname(),
                sysctls: sysctls_outside(spec.sysctls(), users.as_ref()),
                users,
                shm_size_bytes: spec.pod_shm_size(),
                ..Self::default()
            }
        } else {
            Self::default()
        };
        Self {
            network: spec.network_namespace(),
            hints: spec.hints(),
            annotations: spec.annotations(),
            cgroups_path: spec.cgroups_path().map(Path::to_owned),
            oom_score_adj: spec.oom_score_adj(),
            ..shared
        }
    }

    /// Of a CreateSandbox in this containerd namespace.
    ///
    /// # Errors
    /// [`BadOptions`] where its options are no pod's configuration.
    pub fn of_request(request: &CreateSandboxRequest, namespace: &str) -> Result<Self, BadOptions> {
        let config = cri::pod_config(request.options.as_ref())?;
        let linux = config.linux.unwrap_or_default();
        let users = users(&linux.security_context.namespace_options.userns_options);
        let mut annotations = config.annotations;
        annotations.extend(request.annotations.clone());
        Ok(Self {
            // Not by annotations: these are the user's, who may not size a VM by the names that CRI writes its own figures under.
            hints: hints(&linux.resources),
            annotations,
            cgroups_path: Some(cgroups_path(
                &linux.cgroup_parent,
                namespace,
                &request.sandbox_id,
            )),
            oom_score_adj: 0,
            // containerd makes none for a pod of the host's network.
            network: match &*request.netns_path {
                "" => NetworkNamespace::Host,
                path => NetworkNamespace::At(path.into()),
            },
            sysctls: sysctls_outside(linux.sysctls, users.as_ref()),
            users,
            shm_size_bytes: DEFAULT_SHM_SIZE,
            hostname: match config.hostname {
                // A pod of the host's network: it has the host's name, as with a pause container.
                empty if empty.is_empty() => host_name(),
                name => name,
            },
            dns: dns(config.dns_config.unwrap_or_default()),
        })
    }
}

fn hints(resources: &LinuxContainerResources) -> Hints {
    let natural = |n: i64| u64::try_from(n).unwrap_or(0);
    Hints {
        memory_limit: resources.memory_limit_in_bytes,
        cpu_quota: resources.cpu_quota,
        cpu_period: natural(resources.cpu_period),
        cpu_shares: natural(resources.cpu_shares),
        cpuset_cpus: sizing::count_cpus(&resources.cpuset_cpus),
        // containerd's client knows the pod's by its cgroup, as every other.
        huge_pages: 0,
    }
}

/// `None` for the mode of users that are the host's, which is also the one without ranges.
fn users(options: &UserNamespace) -> Option<Users> {
    let map = |ranges: &[IDMapping]| {
        let line = |r: &IDMapping| format!("{} {} {}\n", r.container_id, r.host_id, r.length);
        ranges.iter().map(line).collect()
    };
    let is_pods = options.mode.enum_value() == Ok(NamespaceMode::POD) && !options.uids.is_empty();
    is_pods.then(|| Users {
        uid_map: map(&options.uids),
        gid_map: map(&options.gids),
    })
}

fn dns(config: DNSConfig) -> Dns {
    Dns {
        servers: config.servers,
        searches: config.searches,
        options: config.options,
    }
}

/// Where CRI's pause container would be: below the pod's parent (in systemd's notation if that is a slice), else where containerd's default
/// spec puts a container.
fn cgroups_path(parent: &str, namespace: &str, id: &str) -> PathBuf {
    let path = Path::new(parent);
    match path.file_name().and_then(|name| name.to_str()) {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}").into(),
        Some(_) => path.join(id),
        None => Path::new("/").join(namespace).join(id),
    }
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use k8s_cri::v1 as cri;
    use prost::Message as _;

    use super::*;

    fn request(config: cri::PodSandboxConfig) -> CreateSandboxRequest {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.encode_to_vec(),
            ..Default::default()
        };
        CreateSandboxRequest {
            sandbox_id: "pod".into(),
            options: Some(options).into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_request_says_what_a_spec_would() {
        let config = cri::PodSandboxConfig {
            hostname: "web-0".into(),
            dns_config: Some(cri::DnsConfig {
                servers: vec!["10.0.0.10".into()],
                searches: vec!["cluster.local".into()],
                options: vec!["ndots:5".into()],
            }),
            annotations: [("io.kubernetes.cri.sandbox-memory", "99999999999")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/podu".into(),
                sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
                security_context: Some(security(cri::NamespaceMode::Pod)),
                resources: Some(cri::LinuxContainerResources {
                    cpu_period: -1,
                    cpu_quota: 150_000,
                    memory_limit_in_bytes: 64 << 20,
                    cpuset_cpus: "0-2".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut request = request(config);
        request.netns_path = "/run/netns/cni-1".into();
        request
            .annotations
            .insert("io.husk.vcpus".into(), "3".into());
        let pod = PodSpec::of_request(&request, "k8s.io").unwrap();
        let hints = Hints {
            memory_limit: 64 << 20,
            cpu_quota: 150_000,
            cpuset_cpus: 3,
            ..Hints::default()
        };
        assert_eq!(pod.hints, hints, "a user's annotation sizes nothing");
        assert_eq!(pod.annotations["io.husk.vcpus"], "3");
        assert_eq!(pod.cgroups_path, Some("/kubepods/podu/pod".into()));
        assert_eq!(pod.network, NetworkNamespace::At("/run/netns/cni-1".into()));
        assert_eq!(pod.hostname, "web-0");
        assert_eq!(pod.dns.options, ["ndots:5"]);
        assert_eq!(pod.sysctls["kernel.shm_rmid_forced"], "1");
        let users = pod.users.unwrap();
        assert_eq!(users.uid_map, "0 65536 1000\n");
        assert_eq!(users.gid_map, "0 65536 1000\n1000 7 1\n");
    }

    fn security(mode: cri::NamespaceMode) -> cri::LinuxSandboxSecurityContext {
        let range = |container_id, host_id, length| cri::IdMapping {
            host_id,
            container_id,
            length,
        };
        let users = cri::UserNamespace {
            mode: mode.into(),
            uids: vec![range(0, 65536, 1000)],
            gids: vec![range(0, 65536, 1000), range(1000, 7, 1)],
        };
        cri::LinuxSandboxSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                userns_options: Some(users),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn users_of_the_host_are_the_guests() {
        let config = |security_context| cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context,
                ..Default::default()
            }),
            ..Default::default()
        };
        for context in [None, Some(security(cri::NamespaceMode::Node))] {
            let pod = PodSpec::of_request(&request(config(context)), "k8s.io").unwrap();
            assert_eq!(pod.users, None);
        }
    }

    #[test]
    fn a_request_without_wishes_gets_the_defaults() {
        let bare = CreateSandboxRequest {
            sandbox_id: "pod".into(),
            ..Default::default()
        };
        let pod = PodSpec::of_request(&bare, "k8s.io").unwrap();
        assert_eq!(
            (pod.hints, pod.network),
            (Hints::default(), NetworkNamespace::Host)
        );
        assert_eq!(pod.cgroups_path, Some("/k8s.io/pod".into()));
        assert!(!pod.hostname.is_empty());
    }

    #[test]
    fn a_slice_is_named_as_systemd_does() {
        let path = |parent| cgroups_path(parent, "k8s.io", "pod");
        assert_eq!(
            path("/kubepods.slice/kubepods-podu.slice"),
            Path::new("kubepods-podu.slice:cri-containerd:pod")
        );
        assert_eq!(path("/"), Path::new("/k8s.io/pod"));
    }

    #[test]
    fn a_bundle_tells_whose_pod_it_opens() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = || Keeper::of_bundle(dir.path());
        let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
        assert_eq!(keeper(), Keeper::SandboxApi);
        write(r#"{"ociVersion": "1.2.0"}"#);
        assert_eq!(keeper(), Keeper::SandboxApi);
        write(r#"{"ociVersion": "1.2.0", "root": {"path": "rootfs"}}"#);
        assert_eq!(keeper(), Keeper::Containers);
        write("{");
        assert_eq!(keeper(), Keeper::Containers);
    }
}
