//! Which containers share a shim: the pod that a bundle's annotations name.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Annotation that names a group of containers, whoever made it.
const GROUP_KEY: &str = "io.containerd.runc.v2.group";
/// The engines' own that name a Kubernetes pod.
const POD_KEYS: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];
/// Annotations that say whether this is the pod's sandbox container or one more.
const TYPE_KEYS: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// Where a container belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The pod's id; the container's own where it has no pod.
    pub id: String,
    /// The pod must be there already.
    pub joins: bool,
}

/// A bundle whose spec cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the container's spec {path}: {reason}")]
pub struct BadSpec {
    path: PathBuf,
    reason: String,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

/// What a container is in a Kubernetes pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It has no pod, or only shares its VM.
    Plain,
    /// The one that stands for the pod (pause).
    Sandbox,
    /// One of the others.
    Member,
}

/// What the annotations say that a container is.
pub fn role(annotations: &HashMap<String, String>) -> Role {
    match find(annotations, &TYPE_KEYS) {
        Some("sandbox") => Role::Sandbox,
        Some("container") => Role::Member,
        _ => Role::Plain,
    }
}

/// The role in a Kubernetes pod, and that pod's id.
pub fn pod(annotations: &HashMap<String, String>) -> Option<(Role, &str)> {
    let role = role(annotations);
    let id = find(annotations, &POD_KEYS)?;
    (role != Role::Plain).then_some((role, id))
}

/// The first of these annotations that says something.
fn find<'a>(annotations: &'a HashMap<String, String>, keys: &[&str]) -> Option<&'a str> {
    let values = keys.iter().filter_map(|key| annotations.get(*key));
    values.map(String::as_str).find(|value| !value.is_empty())
}

impl Group {
    /// Reads `config.json` of the bundle. A bundle without one (containerd's own sandbox API) stands for itself.
    ///
    /// # Errors
    /// [`BadSpec`].
    pub fn of_bundle(bundle: &Path, id: &str) -> Result<Self, BadSpec> {
        let path = bundle.join("config.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self {
                    id: id.to_owned(),
                    joins: false,
                });
            }
            Err(e) => {
                return Err(BadSpec {
                    path,
                    reason: e.to_string(),
                });
            }
        };
        match serde_json::from_slice::<Spec>(&text) {
            Ok(spec) => Ok(Self::of_annotations(
                &spec.annotations.unwrap_or_default(),
                id,
            )),
            Err(e) => Err(BadSpec {
                path,
                reason: e.to_string(),
            }),
        }
    }

    fn of_annotations(annotations: &HashMap<String, String>, id: &str) -> Self {
        // The explicit group first.
        let group = find(annotations, &[GROUP_KEY]).or_else(|| find(annotations, &POD_KEYS));
        let group = group.unwrap_or(id);
        Self {
            id: group.to_owned(),
            joins: role(annotations) == Role::Member && group != id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(annotations: &[(&str, &str)]) -> (String, bool) {
        let map = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let group = Group::of_annotations(&map, "me");
        (group.id, group.joins)
    }

    #[test]
    fn each_engines_pods() {
        assert_eq!(group(&[]), ("me".into(), false));
        assert_eq!(
            group(&[
                ("io.kubernetes.cri.container-type", "sandbox"),
                ("io.kubernetes.cri.sandbox-id", "me")
            ]),
            ("me".into(), false)
        );
        assert_eq!(
            group(&[
                ("io.kubernetes.cri.container-type", "container"),
                ("io.kubernetes.cri.sandbox-id", "pod")
            ]),
            ("pod".into(), true)
        );
        assert_eq!(
            group(&[
                ("io.kubernetes.cri-o.ContainerType", "container"),
                ("io.kubernetes.cri-o.SandboxID", "pod")
            ]),
            ("pod".into(), true)
        );
        assert_eq!(
            group(&[("io.containerd.runc.v2.group", "g")]),
            ("g".into(), false)
        );
    }

    #[test]
    fn a_pod_is_kubernetes_where_the_engine_says_what_the_container_is() {
        let of = |annotations: &[(&str, &str)]| {
            let pairs = annotations
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            let map: HashMap<_, _> = pairs.collect();
            pod(&map).map(|(role, id)| (role, id.to_owned()))
        };
        let crio = |kind| {
            [
                ("io.kubernetes.cri-o.ContainerType", kind),
                ("io.kubernetes.cri-o.SandboxID", "p"),
            ]
        };
        assert_eq!(of(&crio("sandbox")), Some((Role::Sandbox, "p".to_owned())));
        assert_eq!(of(&crio("container")), Some((Role::Member, "p".to_owned())));
        assert_eq!(of(&crio("")), None);
        let cri = [
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-id", "q"),
        ];
        assert_eq!(of(&cri), Some((Role::Member, "q".to_owned())));
        assert_eq!(of(&[("io.containerd.runc.v2.group", "g")]), None);
    }

    #[test]
    fn a_bundle_with_without_and_with_a_broken_spec() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Group::of_bundle(dir.path(), "me").unwrap().id, "me");
        fs::write(
            dir.path().join("config.json"),
            r#"{"ociVersion":"1.2.0","annotations":null}"#,
        )
        .unwrap();
        assert_eq!(Group::of_bundle(dir.path(), "me").unwrap().id, "me");
        fs::write(dir.path().join("config.json"), "{").unwrap();
        let error = Group::of_bundle(dir.path(), "me").unwrap_err().to_string();
        assert!(
            error.contains("config.json") && error.contains("line 1"),
            "{error}"
        );
    }
}
