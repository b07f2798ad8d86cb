//! Pods: one VM for a pod's containers.
//!
//! podman knows a pod by its infra container, which it starts first: the others join its namespaces, by the pid of what stands for it here. It is
//! the shim's sandbox container, as CRI's pause is, and the others are that one's members. Nothing in an infra container's spec says what it is
//! but its cgroup: a pod's containers have theirs below the pod's, and all but this one name the pod's sandbox in an annotation. CRI-O's say what they
//! are themselves.

use std::path::{Component, Path};

use anyhow::{Result, bail};

use crate::{
    id::Id,
    spec::Spec,
    store::Store,
    task::{self, Task},
};

/// What podman names a pod's slice by, where systemd makes cgroups (podman, libpod/pod_internal_linux.go).
const SLICE: &str = "libpod_pod_";

/// Namespaces that a pod in one VM shares.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

/// Where a container runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a VM of its own.
    Alone,
    /// In its pod's, which it opens.
    Infra,
    /// In the VM of its pod.
    Member {
        /// The container that has opened it.
        infra: Id,
        /// The shim's pid for the container whose processes it sees, if those are another's.
        processes: Option<u32>,
    },
    /// Where its engine says, in the shim's own words.
    Said {
        /// As for a member.
        processes: Option<u32>,
    },
}

impl Place {
    /// The shim's pid for the container whose processes it sees, if those are another's.
    pub(crate) fn processes(&self) -> Option<u32> {
        match self {
            Self::Alone | Self::Infra => None,
            Self::Member { processes, .. } | Self::Said { processes } => *processes,
        }
    }

    /// Of a container about to be made.
    ///
    /// # Errors
    /// Its pod shares what one VM cannot have apart, or the other way round; its users are those of a container in another VM.
    pub(crate) fn of(spec: &Spec, store: &Store) -> Result<Self> {
        let place = Self::by_pod(spec, store)?;
        if matches!(place, Self::Alone | Self::Infra)
            && let Some(path) = spec.namespace("user")
        {
            bail!(
                "the users of {} are in another VM or on the host: give the container its own by `--userns auto` or `--uidmap`, or put it into the pod that has them",
                path.display()
            );
        }
        Ok(place)
    }

    fn by_pod(spec: &Spec, store: &Store) -> Result<Self> {
        if spec.says_its_place() {
            let processes = processes(spec, store);
            return Ok(Self::Said { processes });
        }
        let Some(sandbox) = spec.sandbox() else {
            let is_infra = spec.cgroups_path().is_some_and(is_of_pod);
            return Ok(if is_infra { Self::Infra } else { Self::Alone });
        };
        // A pod without one (`--infra=false`) shares nothing but its cgroup.
        let found = sandbox.parse().ok().and_then(|id| store.find(&id).ok());
        let Some(container) = found else {
            return Ok(Self::Alone);
        };
        let record = container.record()?;
        let shares = |kind: &str| spec.namespace(kind).and_then(pid_in) == Some(record.proxy.pid);
        let count = SHARED.iter().filter(|kind| shares(kind)).count();
        if count == 0 && !shares("pid") {
            return Ok(Self::Alone);
        }
        if count < SHARED.len() {
            bail!(
                "a pod in one VM shares network, IPC and host name: make it with `--share net,ipc,uts`, podman's default, with or without pid, or with `--share none`"
            );
        }
        if !record.is_infra {
            bail!(
                "the pod of container {} was not known for one: make it without --share-parent=false",
                container.id
            );
        }
        Ok(Self::Member {
            infra: container.id,
            processes: processes(spec, store),
        })
    }
}

/// The shim's pid for the container whose process namespace this one is to join: by its proxy's pid, as engines do.
fn processes(spec: &Spec, store: &Store) -> Option<u32> {
    let proxy = spec.namespace("pid").and_then(pid_in)?;
    let all = store.all().ok()?;
    let (container, record) = all
        .into_iter()
        .find(|(_, record)| record.proxy.pid == proxy)?;
    let pid = task::run(async {
        match Task::find(&container, &record).await {
            Some(task) => task.pid().await.map(Some),
            None => Ok(None),
        }
    });
    pid.ok().flatten()
}

/// Whether a cgroup is of a container of a pod: …/POD/libpod-ID, or …libpod_pod_POD.slice:libpod:ID.
fn is_of_pod(path: &str) -> bool {
    if let Some((slice, _)) = path.split_once(':') {
        let pod = slice
            .strip_suffix(".slice")
            .and_then(|s| s.rsplit_once(SLICE));
        return pod.is_some_and(|(_, pod)| is_podmans_id(pod));
    }
    let above = Path::new(path)
        .parent()
        .and_then(|p| p.components().next_back());
    matches!(above, Some(Component::Normal(name)) if name.to_str().is_some_and(is_podmans_id))
}

fn is_podmans_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The pid in `/proc/PID/ns/…`.
fn pid_in(path: &Path) -> Option<u32> {
    let (pid, rest) = path.strip_prefix("/proc").ok()?.to_str()?.split_once('/')?;
    rest.starts_with("ns/").then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{process::ProcessId, store::Record};

    const POD: &str = "d277eb9a2176a4f52aab9a993b7e5257333b41abb1e7fa2b181c14698644676b";

    #[test]
    fn an_infra_container_is_known_by_its_cgroup() {
        for (path, is) in [
            (format!("/libpod_parent/{POD}/libpod-{POD}"), true),
            (format!("machine-libpod_pod_{POD}.slice:libpod:{POD}"), true),
            (format!("/libpod_parent/libpod-{POD}"), false),
            (format!("machine.slice:libpod:{POD}"), false),
            ("/".to_owned(), false),
            (String::new(), false),
            (
                format!("user-libpod_pod_{}.slice:libpod:x", &POD[1..]),
                false,
            ),
        ] {
            assert_eq!(is_of_pod(&path), is, "{path}");
        }
    }

    /// A store with an infra container (`is_infra`) that this process stands for.
    fn place(is_infra: bool, sandbox: &str, shared: &[&str]) -> Result<Place> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let proxy = ProcessId::of(std::process::id()).unwrap();
        let record = Record {
            proxy,
            is_infra,
            ..Record::example()
        };
        store
            .create(&"infra".parse().unwrap())
            .unwrap()
            .set_record(&record)
            .unwrap();
        let namespaces: Vec<Value> = ["network", "ipc", "uts", "pid", "user"]
            .iter()
            .map(|kind| match shared.contains(kind) {
                true => json!({"type": kind, "path": format!("/proc/{}/ns/x", proxy.pid)}),
                false => json!({"type": kind}),
            })
            .collect();
        let value = json!({
            "annotations": {"io.kubernetes.cri-o.SandboxID": sandbox},
            "linux": {"namespaces": namespaces, "cgroupsPath": format!("/libpod_parent/{POD}/libpod-{POD}")},
        });
        Place::of(&Spec::example(value), &store)
    }

    #[test]
    fn a_pods_containers_are_together_or_apart() {
        let member = Place::Member {
            infra: "infra".parse().unwrap(),
            processes: None,
        };
        let all = ["network", "ipc", "uts", "user"];
        assert_eq!(place(true, "infra", &all).unwrap(), member);
        assert_eq!(place(true, "", &[]).unwrap(), Place::Infra);
        assert_eq!(place(true, "infra", &[]).unwrap(), Place::Alone);
        assert_eq!(place(true, POD, &[]).unwrap(), Place::Alone);
        for some in [&["network"][..], &["ipc", "uts"], &["pid"]] {
            let error = place(true, "infra", some).unwrap_err().to_string();
            assert!(error.contains("--share"), "{error}");
        }
        for sandbox in ["", "infra", POD] {
            let error = place(true, sandbox, &["user"]).unwrap_err().to_string();
            assert!(error.contains("--userns auto"), "{error}");
        }
        let error = place(false, "infra", &all).unwrap_err().to_string();
        assert!(error.contains("--share-parent"), "{error}");
    }
}
