//! Which containers share a shim: the pod that a bundle's annotations name.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Annotations that name the pod: the explicit group first, then the engines' own.
const GROUP_KEYS: [&str; 3] = [
    "io.containerd.runc.v2.group",
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

/// Whether these are the annotations of a pod's sandbox container.
pub fn is_sandbox(annotations: &HashMap<String, String>) -> bool {
    TYPE_KEYS
        .iter()
        .any(|key| annotations.get(*key).is_some_and(|kind| kind == "sandbox"))
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
        let find = |keys: &[&str]| {
            keys.iter()
                .filter_map(|k| annotations.get(*k))
                .find(|v| !v.is_empty())
                .cloned()
        };
        let group = find(&GROUP_KEYS).unwrap_or_else(|| id.to_owned());
        let joins = find(&TYPE_KEYS).as_deref() == Some("container") && group != id;
        Self { id: group, joins }
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
