//! What the containers of one Kubernetes pod share, and what of it they may not.
//!
//! With runc the sandbox (pause) container holds the pod's namespaces and the others join them by `/proc/<pid>/ns/…`. Here the pod has a
//! machine of its own, so the pod's network, UTS and IPC namespaces are simply the guest's: a pod without a sandbox container works alike.
//! The agent, which is in them too, uses neither SysV IPC nor message queues, and its host name is the pod's; changing any of them
//! takes rights over the guest's namespaces that only a privileged container has. A pod's own users (`hostUsers: false`) are a namespace that
//! the agent makes before the first container, with one for the network that belongs to it. Process ids are another matter: the agent is PID 1
//! of the guest's own namespace, so those are another container's, joined by its id: the one whose task has the pid in the
//! path (`crate::container::TaskPid`), the sandbox container for a pod that shares its processes.

use std::{
    collections::HashMap,
    path::{Component, Path},
};

use husk_protocol::{JOINED_NAMESPACE, guest_path};
use serde_json::{Map, Value, json};

use super::{BundleSpec, Linux, Read, mounts::IdRange};
use crate::group::{self, Role};

/// Where every container has its shared memory.
const DEV_SHM: &str = "/dev/shm";

/// Size of a pod's `/dev/shm` in bytes, where the engine has made none: what containerd and CRI-O give it.
pub const DEFAULT_SHM_SIZE: u64 = 64 << 20;

/// The groups whose members may ping (icmp(7)).
const PING_GROUPS: &str = "net.ipv4.ping_group_range";

/// Users of a pod, by who they are outside: as `uid_map` and `gid_map` of user_namespaces(7) have them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users {
    /// Of users.
    pub uid_map: String,
    /// Of groups.
    pub gid_map: String,
}

impl Users {
    /// Who the pod's root is outside: a user and a group. `None` where the maps have no root.
    pub fn root(&self) -> Option<(u32, u32)> {
        Some((outside(&self.uid_map, 0)?, outside(&self.gid_map, 0)?))
    }
}

/// Who a user or group of a pod is outside. `None`: the map does not have it.
fn outside(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut fields = line.split(' ').map(str::parse::<u32>);
        let (inside, outside, length) = (
            fields.next()?.ok()?,
            fields.next()?.ok()?,
            fields.next()?.ok()?,
        );
        let offset = id.checked_sub(inside).filter(|&offset| offset < length)?;
        outside.checked_add(offset)
    })
}

/// A pod's sysctls as somebody outside of its users writes them: the one that has groups in it names them by who they are there. It is left as it is
/// where the pod has no such groups: a range of all groups that there are is meant so.
pub fn sysctls_outside(
    mut sysctls: HashMap<String, String>,
    users: Option<&Users>,
) -> HashMap<String, String> {
    if let (Some(users), Some(range)) = (users, sysctls.get_mut(PING_GROUPS)) {
        let outside = |word: &str| outside(&users.gid_map, word.parse().ok()?);
        let groups: Option<Vec<_>> = range.split_whitespace().map(outside).collect();
        if let Some([first, last]) = groups.as_deref() {
            *range = format!("{first} {last}");
        }
    }
    sysctls
}

/// What a container is refused because it runs in a VM.
#[derive(Debug, thiserror::Error)]
pub enum NotInVm {
    /// A namespace of the host.
    #[error(
        "{0} is not possible for a pod in a VM: its containers are processes of the guest's kernel and see nothing of the host's; \
         remove {0} from the pod or run it with another runtime class"
    )]
    HostNamespace(&'static str),
    /// Processes shared with nobody.
    #[error(
        "shareProcessNamespace is not possible in this pod: it has no sandbox container, which would hold the process namespace"
    )]
    SharedProcesses,
    /// Processes shared with somebody who is not there.
    #[error("cannot share the processes of the container with pid {0}: it is not there any more")]
    NoTarget(u32),
    /// A mount that is to appear on the host.
    #[error(
        "mount {0}: Bidirectional mount propagation (shared, rshared) is not possible for a container in a VM: what it mounts stays \
         in its guest; use HostToContainer (rslave) or None (rprivate)"
    )]
    Bidirectional(String),
}

/// The containers of the pod, for one that is to share namespaces with them.
#[derive(Debug, Clone, Default)]
pub struct Neighbours {
    /// Their ids by the pids of their tasks.
    pub by_pid: HashMap<u32, String>,
    /// Id of the sandbox container, where the guest has one.
    pub pause: Option<String>,
}

/// The engine's mount of the pod's `/dev/shm` into this container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PodShm {
    /// Its place in the spec's list.
    pub(super) index: usize,
    /// Of the host's tmpfs, in bytes.
    size: u64,
}

impl PodShm {
    /// The mount of the engine's tmpfs for this pod. A volume that somebody mounts at `/dev/shm` is not it.
    pub(super) fn find(read: &Read) -> Option<Self> {
        let annotations = read.annotations.as_ref()?;
        let (_, sandbox_id) = group::pod(annotations)?;
        let mounts = read.mounts.iter().flatten().enumerate();
        let (index, source) = mounts
            .filter(|(_, mount)| {
                mount.bind_kind().is_some() && Path::new(&mount.destination) == Path::new(DEV_SHM)
            })
            .find_map(|(index, mount)| Some((index, mount.source.as_deref()?)))?;
        // containerd: …/sandboxes/<id>/shm, CRI-O: …/overlay-containers/<id>/userdata/shm.
        let is_pods = source.file_name().is_some_and(|name| name == "shm")
            && source
                .components()
                .any(|c| c == Component::Normal(sandbox_id.as_ref()));
        let size = is_pods.then(|| tmpfs_size(source))??;
        Some(Self { index, size })
    }
}

/// Size in bytes of the tmpfs at a path; `None` where there is none, or one without a limit.
fn tmpfs_size(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statfs(path).ok()?;
    let is_tmpfs = u64::try_from(stat.f_type) == Ok(TMPFS_MAGIC);
    let size = u64::try_from(stat.f_bsize)
        .ok()?
        .checked_mul(stat.f_blocks)?;
    (is_tmpfs && size > 0).then_some(size)
}

/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;

impl BundleSpec {
    /// The container is in the pod's network, which is the guest's, also where it asks for a new one: its engine fills that one on the host.
    pub fn join_network(&mut self) {
        let namespaces = self.value.pointer_mut("/linux/namespaces");
        if let Some(list) = namespaces.and_then(Value::as_array_mut) {
            list.retain(|ns| ns.get("type").and_then(Value::as_str) != Some("network"));
        }
    }

    /// Whether it is the sandbox container of a pod: what it says of host name, sysctls and shared memory is said for all.
    pub fn is_sandbox(&self) -> bool {
        self.role() == Role::Sandbox
    }

    /// Host name; empty where there is none.
    pub fn hostname(&self) -> String {
        self.read.hostname.clone().unwrap_or_default()
    }

    /// Sysctls, dotted names.
    pub fn sysctls(&self) -> HashMap<String, String> {
        let linux = self.read.linux.as_ref();
        linux
            .and_then(|linux| linux.sysctl.clone())
            .unwrap_or_default()
    }

    /// The pod's users, where it has its own.
    pub fn users(&self) -> Option<Users> {
        let linux = self.read.linux.as_ref()?;
        let map =
            |ranges: &Option<Vec<IdRange>>| ranges.iter().flatten().map(IdRange::line).collect();
        let has_own = linux.namespaces.iter().flatten().any(|ns| ns.typ == "user");
        has_own.then(|| Users {
            uid_map: map(&linux.uid_mappings),
            gid_map: map(&linux.gid_mappings),
        })
    }

    /// Size in bytes of the `/dev/shm` that the pod's containers share.
    pub fn pod_shm_size(&self) -> u64 {
        self.pod_shm.map_or(DEFAULT_SHM_SIZE, |shm| shm.size)
    }

    /// Gives the container the pod's shared memory in place of one of its own: CRI leaves it to a sandbox without a sandbox container to
    /// have its containers share it.
    pub fn share_shm(&mut self) {
        let mut mounts = self.read.mounts.iter().flatten();
        let own = mounts.position(|mount| {
            mount.bind_kind().is_none() && Path::new(&mount.destination) == Path::new(DEV_SHM)
        });
        self.pod_shm = self.pod_shm.or(own.map(|index| PodShm {
            index,
            size: DEFAULT_SHM_SIZE,
        }));
    }

    /// Whether it is one of the others of a pod.
    pub fn is_member(&self) -> bool {
        self.role() == Role::Member
    }

    /// What this container is in its pod.
    pub(super) fn role(&self) -> Role {
        group::role(&self.annotations())
    }

    /// The container whose process namespace this one joins.
    pub(super) fn joins<'a>(&self, neighbours: &'a Neighbours) -> Result<Option<&'a str>, NotInVm> {
        let shared = self.is_member().then(|| self.read.namespace_path("pid"));
        let Some(path) = shared.flatten() else {
            return Ok(None);
        };
        let pause = neighbours.pause.as_deref();
        match pid_in(path) {
            Some(pid) => {
                let target = neighbours.by_pid.get(&pid).map(String::as_str);
                let gone = match pause {
                    Some(_) => NotInVm::NoTarget(pid),
                    None => NotInVm::SharedProcesses,
                };
                target.map(Some).ok_or(gone)
            }
            None => pause.map(Some).ok_or(NotInVm::SharedProcesses),
        }
    }

    /// Makes the namespaces those of the guest: see the module. `joins`: there is a container to join.
    pub(super) fn rewrite_shared(&self, spec: &mut Map<String, Value>, joins: bool) {
        let role = self.role();
        if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
            if let Some(list) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
                rewrite_namespaces(list, role, joins);
            }
            if role == Role::Sandbox {
                // For all, and before a user namespace takes the right to set them.
                linux.remove("sysctl");
            }
        }
        if role != Role::Plain {
            spec.remove("hostname");
            spec.remove("domainname");
        }
        let shm = self
            .pod_shm
            .and_then(|shm| spec.get_mut("mounts")?.get_mut(shm.index)?.as_object_mut());
        if let Some(mount) = shm {
            if mount.get("type").is_none_or(|kind| kind != "bind") {
                mount.insert("type".into(), json!("bind"));
                mount.insert("options".into(), json!(["rbind", "rprivate", "rw"]));
            }
            mount.insert("source".into(), json!(guest_path::SHM));
            mount.remove("uidMappings");
            mount.remove("gidMappings");
        }
    }
}

fn rewrite_namespaces(list: &mut Vec<Value>, role: Role, joins: bool) {
    let typ = |ns: &Value| ns.get("type").and_then(Value::as_str).map(str::to_owned);
    let has_path = |ns: &Value| {
        ns.get("path")
            .and_then(Value::as_str)
            .is_some_and(|path| !path.is_empty())
    };
    list.retain(|ns| match typ(ns).as_deref() {
        // Without a path in a pod as well: containerd 1.7 has a pod of its own users make the network that is set up next.
        Some("network") => role == Role::Plain && !has_path(ns),
        Some("uts" | "ipc") => role == Role::Plain,
        _ => true,
    });
    for namespace in list {
        let path = match typ(namespace).as_deref() {
            Some("user") if role != Role::Plain => Some(guest_path::USERS),
            Some("pid") if role == Role::Member && joins && has_path(namespace) => {
                Some(JOINED_NAMESPACE)
            }
            _ => None,
        };
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
            if let Some(path) = path {
                namespace.insert("path".into(), json!(path));
            }
        }
    }
}

/// Refuses what a pod in a VM cannot have of its host.
pub(super) fn check(read: &Read) -> Result<(), NotInVm> {
    let role = read.annotations.as_ref().map_or(Role::Plain, group::role);
    let namespaces = read
        .linux
        .as_ref()
        .and_then(|linux| linux.namespaces.as_ref());
    if let (Role::Sandbox | Role::Member, Some(namespaces)) = (role, namespaces) {
        for (typ, field) in [("ipc", "hostIPC"), ("pid", "hostPID")] {
            if !namespaces.iter().any(|ns| ns.typ == typ) {
                return Err(NotInVm::HostNamespace(field));
            }
        }
    }
    match read
        .mounts
        .iter()
        .flatten()
        .find(|mount| mount.spreads_to_host())
    {
        Some(mount) => Err(NotInVm::Bidirectional(mount.destination.clone())),
        None => Ok(()),
    }
}

impl Read {
    fn namespace_path(&self, typ: &str) -> Option<&Path> {
        let namespaces = self
            .linux
            .iter()
            .filter_map(|Linux { namespaces, .. }| namespaces.as_ref());
        let paths = namespaces
            .flatten()
            .filter(|ns| ns.typ == typ)
            .filter_map(|ns| ns.path.as_deref());
        paths.filter(|path| !path.is_empty()).map(Path::new).next()
    }
}

/// The pid in `/proc/<pid>/ns/<type>`.
fn pid_in(path: &Path) -> Option<u32> {
    let (pid, rest) = path.strip_prefix("/proc").ok()?.to_str()?.split_once('/')?;
    rest.starts_with("ns/").then(|| pid.parse().ok())?
}
