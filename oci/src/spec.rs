//! The spec of an engine's bundle, and the one that the shim gets in its place.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::fs::statfs;
use serde_json::{Value, json};

use crate::hooks::Hooks;

/// The most bytes of a spec. Podman's have some 20,000.
const MOST: u64 = 16 << 20;

/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A bundle's spec.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    bundle: PathBuf,
    value: Value,
}

/// Reads a file that must be JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST + 1).read_to_end(&mut text));
    read.with_context(|| format!("open `{}`", path.display()))?;
    parse(&text).with_context(|| format!("reading {}", path.display()))
}

/// JSON of a bounded size.
pub(crate) fn parse(text: &[u8]) -> Result<Value> {
    if text.len() as u64 > MOST {
        bail!("it has more than {} MiB", MOST >> 20);
    }
    Ok(serde_json::from_slice(text)?)
}

impl Spec {
    /// Reads it.
    pub(crate) fn of_bundle(bundle: &Path) -> Result<Self> {
        let bundle = fs::canonicalize(bundle)
            .with_context(|| format!("chdir `{}` failed", bundle.display()))?;
        let value = read_json(&bundle.join("config.json")).context("error loading config.json")?;
        if !value.is_object() {
            bail!("config.json of {} is no object", bundle.display());
        }
        Ok(Self { bundle, value })
    }

    /// The engine's bundle, absolute.
    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The version that it is written for.
    pub(crate) fn oci_version(&self) -> &str {
        self.value["ociVersion"].as_str().unwrap_or("1.0.0")
    }

    /// Whether its process has a terminal.
    pub(crate) fn terminal(&self) -> bool {
        self.value["process"]["terminal"].as_bool().unwrap_or(false)
    }

    /// Its annotations.
    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        let map = self.value["annotations"].as_object();
        map.into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }

    /// The namespace that it joins, of this type.
    pub(crate) fn namespace(&self, kind: &str) -> Option<&Path> {
        let list = self.value["linux"]["namespaces"].as_array()?;
        let found = list.iter().find(|namespace| namespace["type"] == kind)?;
        let path = found["path"].as_str()?;
        (!path.is_empty()).then(|| Path::new(path))
    }

    /// What is to be run on the host as it comes and goes.
    pub(crate) fn hooks(&self) -> Result<Hooks> {
        Hooks::of(&self.value["hooks"])
    }

    /// The process, as the one of an exec without a spec of its own begins.
    pub(crate) fn process(&self) -> Value {
        self.value["process"].clone()
    }

    /// As the shim reads it in another directory.
    pub(crate) fn for_shim(&self, no_cgroup: bool) -> Result<Value> {
        let mut spec = self.value.clone();
        let Some(root) = spec["root"]["path"].as_str() else {
            bail!("config.json of {} has no root.path", self.bundle.display());
        };
        spec["root"]["path"] = json!(self.bundle.join(root));
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            absolute(mount, &self.bundle);
            if let Some(size) = shm_size(mount) {
                own_shm(mount, size);
            }
        }
        if let Some(hooks) = spec["hooks"].as_object_mut() {
            // The others are run here.
            hooks.retain(|kind, _| kind == "startContainer");
        }
        if no_cgroup && let Some(linux) = spec["linux"].as_object_mut() {
            linux.remove("cgroupsPath");
        }
        Ok(spec)
    }
}

fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array();
    mount["type"] == "bind"
        || options.is_some_and(|list| list.iter().any(|o| o == "bind" || o == "rbind"))
}

/// A bind mount's source may be relative to the bundle (OCI runtime specification, "Mounts").
fn absolute(mount: &mut Value, bundle: &Path) {
    if is_bind(mount)
        && let Some(source) = mount["source"].as_str()
    {
        mount["source"] = json!(bundle.join(source));
    }
}

/// Bytes of the tmpfs that podman has made on this host for the container's `/dev/shm`, if this is its mount.
fn shm_size(mount: &Value) -> Option<u64> {
    let source = Path::new(mount["source"].as_str()?);
    // …/overlay-containers/ID/userdata/shm
    if !is_bind(mount) || mount["destination"] != "/dev/shm" || !source.ends_with("userdata/shm") {
        return None;
    }
    let stat = statfs(source).ok()?;
    let size = u64::try_from(stat.f_bsize)
        .ok()?
        .checked_mul(stat.f_blocks)?;
    (stat.f_type == TMPFS_MAGIC && size > 0).then_some(size)
}

/// Shared memory is memory of the guest: what is mapped through virtio-fs is not the same for all.
fn own_shm(mount: &mut Value, size: u64) {
    *mount = json!({
        "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={size}")],
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(value: Value) -> Spec {
        Spec {
            bundle: "/b".into(),
            value,
        }
    }

    #[test]
    fn paths_are_the_bundles() {
        let spec = spec(json!({
            "root": {"path": "rootfs"},
            "linux": {"cgroupsPath": "/c", "namespaces": [{"type": "network", "path": "/run/netns/n"}, {"type": "pid"}, {"type": "ipc", "path": ""}]},
            "mounts": [
                {"destination": "/a", "type": "bind", "source": "a"},
                {"destination": "/b", "source": "b", "options": ["ro", "rbind"]},
                {"destination": "/c", "type": "bind", "source": "/c"},
                {"destination": "/d", "type": "tmpfs", "source": "tmpfs"},
            ],
        }));
        let made = spec.for_shim(false).unwrap();
        assert_eq!(made["root"]["path"], "/b/rootfs");
        let sources: Vec<_> = (0..4)
            .map(|n| made["mounts"][n]["source"].clone())
            .collect();
        assert_eq!(sources, ["/b/a", "/b/b", "/c", "tmpfs"]);
        assert_eq!(made["linux"]["cgroupsPath"], "/c");
        assert_eq!(
            spec.for_shim(true).unwrap()["linux"].get("cgroupsPath"),
            None
        );
        assert_eq!(spec.namespace("network"), Some(Path::new("/run/netns/n")));
        assert_eq!(
            (
                spec.namespace("pid"),
                spec.namespace("ipc"),
                spec.namespace("uts")
            ),
            (None, None, None)
        );
    }

    #[test]
    fn a_spec_without_a_root_is_refused() {
        let error = spec(json!({})).for_shim(false).unwrap_err().to_string();
        assert!(error.contains("root.path"), "{error}");
    }

    #[test]
    fn podmans_shared_memory_becomes_the_guests() {
        // A tmpfs of every Linux, by a name like podman's.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let userdata = dir.path().join("userdata");
        fs::create_dir_all(userdata.join("shm")).unwrap();
        let mount = |source: &Path, destination: &str| json!({"destination": destination, "type": "bind", "source": source, "options": ["bind"]});
        let mounts = [
            mount(&userdata.join("shm"), "/dev/shm"),
            mount(&userdata, "/dev/shm"),
            mount(&userdata.join("shm"), "/data"),
        ];
        let made = spec(json!({"root": {"path": "/r"}, "mounts": mounts}))
            .for_shim(false)
            .unwrap();
        assert_eq!(made["mounts"][0]["type"], "tmpfs");
        let size = statfs("/dev/shm").unwrap();
        let size = format!(
            "size={}",
            size.f_blocks * u64::try_from(size.f_bsize).unwrap()
        );
        assert!(
            made["mounts"][0]["options"]
                .as_array()
                .unwrap()
                .contains(&json!(size))
        );
        assert_eq!(
            (&made["mounts"][1], &made["mounts"][2]),
            (&mounts[1], &mounts[2])
        );
    }

    #[test]
    fn a_bundle_that_is_gone_is_named() {
        let error = format!(
            "{:#}",
            Spec::of_bundle(Path::new("/nothing/here")).unwrap_err()
        );
        assert!(
            error.contains("/nothing/here") && error.contains("No such file"),
            "{error}"
        );
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Spec::of_bundle(dir.path()).unwrap_err());
        assert!(
            error.contains("config.json") && error.contains("No such file"),
            "{error}"
        );
        for text in ["{", "[]"] {
            fs::write(dir.path().join("config.json"), text).unwrap();
            assert!(Spec::of_bundle(dir.path()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_json_is_survived(text in "\\PC{0,200}", kind in "[a-z]{0,8}") {
            let _ = parse(text.as_bytes());
            for value in [json!({"root": text, "mounts": [text], "linux": kind}), json!({"root": {"path": text}, "mounts": {"a": kind}, "linux": {"namespaces": [kind, {"type": kind, "path": text}]}, "annotations": {"a": 1, "b": text}})] {
                let spec = spec(value);
                let _ = (spec.for_shim(true), spec.namespace(&kind), spec.annotations(), spec.terminal(), spec.oci_version());
            }
        }
    }
}
