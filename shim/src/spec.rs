//! The container's OCI spec: read from the bundle, and rewritten for the guest.
//!
//! The spec was written for a process on this host. In the guest the root file system and the sources of bind mounts live
//! below the pod's share, the host's namespaces, cgroups, security labels and devices do not exist, and its CPUs have other
//! numbers. Everything else goes through as it is (also fields that husk does not know: the agent names those it
//! does not honour), so the rewriting works on the JSON value; typed is only what the shim reads for itself.

mod files;
mod mounts;
mod pod;
mod resources;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

pub use mounts::{BindMount, KeptVolume, Owners};
pub use pod::{DEFAULT_SHM_SIZE, Neighbours, NotInVm, Users, sysctls_outside};
pub use resources::{HUGE_PAGE_SIZE, Resources};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{info, warn};

use self::{
    mounts::{IdRange, Mount},
    pod::PodShm,
};
use crate::{
    group::Role,
    hooks::Hooks,
    huge_pages::HugeVolume,
    sizing::{self, Hints},
    volume,
};

/// Name of the spec in a bundle.
const CONFIG: &str = "config.json";

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// No spec, or one that cannot be read.
    #[error("cannot read the container's spec {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a spec.
    #[error("invalid container spec {path}: {source}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// No root file system.
    #[error(
        "invalid container spec {path}: it has no root.path, so there is no root file system to run"
    )]
    NoRoot {
        /// The file.
        path: PathBuf,
    },
    /// What no VM can offer.
    #[error("{path}: {source}")]
    NotInVm {
        /// The file.
        path: PathBuf,
        /// What and why.
        source: NotInVm,
    },
}

/// A bundle's spec.
#[derive(Debug, Clone)]
pub struct BundleSpec {
    bundle: PathBuf,
    value: Value,
    read: Read,
    pod_shm: Option<PodShm>,
}

/// What the shim itself reads of a spec. The rest is the agent's to understand.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Read {
    root: Option<Root>,
    annotations: Option<HashMap<String, String>>,
    linux: Option<Linux>,
    mounts: Option<Vec<Mount>>,
    process: Option<Process>,
    hostname: Option<String>,
    hooks: Option<Hooks>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Process {
    oom_score_adj: Option<i32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    cgroups_path: Option<PathBuf>,
    namespaces: Option<Vec<Namespace>>,
    resources: Option<Resources>,
    sysctl: Option<HashMap<String, String>>,
    uid_mappings: Option<Vec<IdRange>>,
    gid_mappings: Option<Vec<IdRange>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    #[serde(rename = "type")]
    typ: String,
    path: Option<String>,
}

/// The network that a spec asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// None of its own: the host's.
    Host,
    /// A new one, with nothing in it.
    #[default]
    New,
    /// One that is there.
    At(PathBuf),
}

/// Where the guest finds what the host prepared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestPaths {
    /// The container's root file system.
    pub rootfs: String,
    /// By index in the spec's mount list: the path in the guest that replaces the source.
    pub mounts: HashMap<usize, String>,
    /// Volumes that the guest has to make before, since some of these paths are theirs.
    pub huge_volumes: Vec<HugeVolume>,
}

/// A spec as the agent gets it.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// The spec.
    pub spec: Value,
    /// Id of the container whose namespaces it joins; empty where it joins none.
    pub joins: String,
}

impl BundleSpec {
    /// Reads the spec of a bundle.
    ///
    /// # Errors
    /// [`SpecError`], naming the file and what is wrong with it.
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join(CONFIG);
        match std::fs::read(&path) {
            Ok(bytes) => Self::parse(bundle, &bytes),
            Err(source) => Err(SpecError::Read { path, source }),
        }
    }

    /// Reads a spec out of bytes.
    ///
    /// # Errors
    /// Every [`SpecError`] but [`SpecError::Read`].
    pub fn parse(bundle: &Path, bytes: &[u8]) -> Result<Self, SpecError> {
        let path = bundle.join(CONFIG);
        let invalid = |source| SpecError::Invalid {
            path: path.clone(),
            source,
        };
        let value: Value = serde_json::from_slice(bytes).map_err(invalid)?;
        // From the bytes once more: this way an error names its line.
        let read: Read = serde_json::from_slice(bytes).map_err(invalid)?;
        let has_root = read
            .root
            .as_ref()
            .is_some_and(|root| !root.path.as_os_str().is_empty());
        if !has_root {
            return Err(SpecError::NoRoot { path });
        }
        pod::check(&read).map_err(|source| SpecError::NotInVm {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            bundle: bundle.to_owned(),
            value,
            pod_shm: PodShm::find(&read),
            read,
        })
    }

    /// The root file system that the spec names, absolute.
    pub fn root_path(&self) -> PathBuf {
        let path = self.read.root.as_ref().map(|root| root.path.clone());
        self.bundle.join(path.unwrap_or_default())
    }

    /// Annotations; empty where there are none.
    pub fn annotations(&self) -> HashMap<String, String> {
        self.read.annotations.clone().unwrap_or_default()
    }

    /// What is to run on the host.
    pub fn hooks(&self) -> Hooks {
        self.read.hooks.clone().unwrap_or_default()
    }

    /// Its cgroup on the host.
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.read.linux.as_ref()?.cgroups_path.as_deref()
    }

    /// Its network.
    pub fn network_namespace(&self) -> NetworkNamespace {
        let namespaces = self.read.linux.iter().flat_map(|linux| &linux.namespaces);
        let network = namespaces.flatten().find(|ns| ns.typ == "network");
        match network.map(|ns| ns.path.as_deref()) {
            None => NetworkNamespace::Host,
            Some(Some(path)) if !path.is_empty() => NetworkNamespace::At(path.into()),
            Some(_) => NetworkNamespace::New,
        }
    }

    /// How gladly the kernel kills the VM when the host runs out of memory. A pod's sandbox container holds nothing and is spared by its
    /// engine; the VM holds what the pod's containers use, and is not.
    pub fn oom_score_adj(&self) -> i32 {
        if self.role() == Role::Sandbox {
            return 0;
        }
        let process = self.read.process.as_ref();
        process
            .and_then(|process| process.oom_score_adj)
            .unwrap_or(0)
    }

    /// What the VM must offer: the pod's annotations where there are any, else this container's limits.
    pub fn hints(&self) -> Hints {
        Hints::from_annotations(&self.annotations()).unwrap_or_else(|| self.own_hints())
    }

    /// This container's limits.
    pub fn own_hints(&self) -> Hints {
        let linux = self.read.linux.as_ref();
        let resources = linux.and_then(|linux| linux.resources.as_ref());
        resources.map_or_else(Hints::default, |r| r.applied_to(Hints::default()))
    }

    /// Volumes that the kubelet keeps up to date and that the container only reads.
    pub fn kept_volumes(&self) -> Vec<KeptVolume> {
        let mounts = self.read.mounts.iter().flatten().enumerate();
        let kept = mounts.filter_map(|(index, mount)| {
            let source = mount.source.as_deref()?;
            let is_kept = mount.bind_kind().is_some()
                && mount.is_read_only()
                && volume::is_kept_up_to_date(source);
            is_kept.then(|| KeptVolume {
                index,
                source: source.to_owned(),
                owners: mount.owners(),
            })
        });
        kept.collect()
    }

    /// The spec as the agent gets it, among these other containers of the pod.
    ///
    /// # Errors
    /// [`NotInVm::SharedProcesses`], [`NotInVm::NoTarget`].
    pub fn for_guest(
        &self,
        paths: &GuestPaths,
        vcpus: u8,
        neighbours: &Neighbours,
    ) -> Result<GuestSpec, NotInVm> {
        let joins = self.joins(neighbours)?;
        let mut spec = self.value.clone();
        if let Some(root) = spec.get_mut("root").and_then(Value::as_object_mut) {
            root.insert("path".into(), json!(paths.rootfs));
        }
        if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
            for (index, mount) in mounts.iter_mut().enumerate() {
                if let (Some(path), Some(mount)) = (paths.mounts.get(&index), mount.as_object_mut())
                {
                    mount.insert("source".into(), json!(path));
                    // The share has done it.
                    mount.remove("uidMappings");
                    mount.remove("gidMappings");
                }
            }
        }
        if let Some(process) = spec.get_mut("process") {
            strip_labels(process);
        }
        drop_host_hooks(&mut spec);
        if let Some(spec) = spec.as_object_mut() {
            self.rewrite_shared(spec, joins.is_some());
        }
        if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
            // A place among the host's cgroups; the agent has its own.
            linux.remove("cgroupsPath");
            linux.remove("mountLabel");
            linux.remove("intelRdt");
            drop_host_devices(linux);
            if let Some(resources) = linux.get_mut("resources") {
                renumber_cpus(resources, vcpus);
            }
        }
        Ok(GuestSpec {
            spec,
            joins: joins.unwrap_or_default().to_owned(),
        })
    }
}

/// Makes a process object (the spec's, or an exec's) fit for the guest.
pub fn strip_labels(process: &mut Value) {
    if let Some(process) = process.as_object_mut() {
        process.remove("apparmorProfile");
        process.remove("selinuxLabel");
    }
}

/// An exec's process, as JSON for the agent.
///
/// # Errors
/// When it is not JSON.
pub fn exec_process(json: &[u8]) -> Result<Value, serde_json::Error> {
    let mut process: Value = serde_json::from_slice(json)?;
    strip_labels(&mut process);
    Ok(process)
}

/// Resources of an Update, as JSON for the agent.
///
/// # Errors
/// When they are not JSON.
pub fn update_resources(json: &[u8], vcpus: u8) -> Result<Value, serde_json::Error> {
    let mut resources: Value = serde_json::from_slice(json)?;
    renumber_cpus(&mut resources, vcpus);
    Ok(resources)
}

/// Limits a container of a pod that as a whole may use so many bytes of huge pages. containerd drops a container's own limits unless it is
/// told otherwise (`disable_hugetlb_controller`), but the kubelet has written the pod's into its cgroup.
pub fn limit_huge_pages(spec: &mut Value, bytes: u64) {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return;
    };
    let resources = linux.entry("resources").or_insert_with(|| json!({}));
    if let Some(resources) = resources.as_object_mut() {
        let limit = json!([{"pageSize": HUGE_PAGE_SIZE, "limit": bytes}]);
        resources.entry("hugepageLimits").or_insert(limit);
    }
}

/// The guest runs `startContainer` hooks, which are the container's own programs; the host has [its own](crate::hooks).
fn drop_host_hooks(spec: &mut Value) {
    let Some(hooks) = spec.get_mut("hooks").and_then(Value::as_object_mut) else {
        return;
    };
    for hook in hooks
        .get("createContainer")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let path = hook.get("path").and_then(Value::as_str).unwrap_or_default();
        warn!(
            path,
            "createContainer hook not run: it names a program of the host, to run in namespaces that a VM has"
        );
    }
    hooks.retain(|kind, _| kind == "startContainer");
}

/// Devices by type, major and minor that a guest has whatever the host has: memory, tty and pty devices, fuse, tun.
const GUEST_DEVICES: [(&str, i64, i64); 10] = [
    ("c", 1, 3),
    ("c", 1, 5),
    ("c", 1, 7),
    ("c", 1, 8),
    ("c", 1, 9),
    ("c", 5, 0),
    ("c", 5, 1),
    ("c", 5, 2),
    ("c", 10, 200),
    ("c", 10, 229),
];

fn drop_host_devices(linux: &mut Map<String, Value>) {
    let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else {
        return;
    };
    devices.retain(|device| {
        let text = |key: &str| device.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = |key: &str| device.get(key).and_then(Value::as_i64).unwrap_or(-1);
        let kind = if text("type") == "u" {
            "c"
        } else {
            text("type")
        };
        let known =
            kind == "p" || GUEST_DEVICES.contains(&(kind, number("major"), number("minor")));
        if !known {
            info!(
                path = text("path"),
                "device not passed on: it is the host's, the guest has none like it"
            );
        }
        known
    });
}

/// A cpuset names CPUs of the host. The guest has as many vCPUs as the pod may use, numbered from 0.
fn renumber_cpus(resources: &mut Value, vcpus: u8) {
    let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) else {
        return;
    };
    cpu.remove("mems");
    let count = cpu
        .get("cpus")
        .and_then(Value::as_str)
        .map(sizing::count_cpus);
    match count {
        None => {}
        Some(0) => drop(cpu.remove("cpus")),
        Some(count) => {
            let last = count.min(u32::from(vcpus.max(1))) - 1;
            cpu.insert("cpus".into(), json!(format!("0-{last}")));
        }
    }
}

#[cfg(test)]
mod tests;
