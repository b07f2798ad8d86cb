//! The spec of an engine's bundle, and the one that the shim gets in its place.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::fs::statfs;
use serde_json::{Value, json};

use crate::{hooks::Hooks, id::Id, limits, pod::Place};

/// The annotations by which CRI-O, and podman after it, name a pod's sandbox and what a container is in the pod.
const SANDBOX: &str = "io.kubernetes.cri-o.SandboxID";
const KIND: &str = "io.kubernetes.cri-o.ContainerType";

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

    /// One of a test.
    #[cfg(test)]
    pub(crate) fn example(value: Value) -> Self {
        Self {
            bundle: "/b".into(),
            value,
        }
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

    /// The sandbox of its pod: for podman, its infra container's id, or the pod's own where it has none.
    pub(crate) fn sandbox(&self) -> Option<&str> {
        let id = self.value["annotations"][SANDBOX].as_str();
        id.filter(|id| !id.is_empty())
    }

    /// Whether its engine says what it is in its pod: CRI-O does.
    pub(crate) fn says_its_place(&self) -> bool {
        self.value["annotations"][KIND]
            .as_str()
            .is_some_and(|kind| !kind.is_empty())
    }

    /// Its cgroup, as a path or in systemd's notation.
    pub(crate) fn cgroups_path(&self) -> Option<&str> {
        self.value["linux"]["cgroupsPath"].as_str()
    }

    /// Whether it wants a namespace of this type of its own: a network its engine may fill once the container is there.
    pub(crate) fn has_new(&self, kind: &str) -> bool {
        let list = self.value["linux"]["namespaces"].as_array();
        let has = list.is_some_and(|list| list.iter().any(|ns| ns["type"] == kind));
        has && self.namespace(kind).is_none()
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

    /// As the shim reads it in another directory, for a container of this id in this place.
    pub(crate) fn for_shim(&self, id: &Id, place: &Place, no_cgroup: bool) -> Result<Value> {
        let mut spec = self.value.clone();
        let Some(root) = spec["root"]["path"].as_str() else {
            bail!("config.json of {} has no root.path", self.bundle.display());
        };
        spec["root"]["path"] = json!(self.bundle.join(root));
        let pod = match place {
            Place::Alone => self.has_new("user").then_some(id.as_str()),
            Place::Infra => Some(id.as_str()),
            Place::Member { infra, .. } => Some(infra.as_str()),
            Place::Said { .. } => self.sandbox(),
        };
        let can_mount = can_mount(&spec);
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            absolute(mount, &self.bundle);
            if !can_mount {
                be_slave(mount);
            }
            if let Some(size) = shm_size(mount, pod) {
                own_shm(mount, size);
            }
        }
        be_in(&mut spec, place, pod);
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

/// Whether it shows something of the host.
pub(crate) fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array();
    mount["type"] == "bind"
        || options.is_some_and(|list| list.iter().any(|o| o == "bind" || o == "rbind"))
}

/// Whether its processes may mount (capabilities(7)).
fn can_mount(spec: &Value) -> bool {
    let allowed = spec["process"]["capabilities"]["bounding"].as_array();
    allowed.is_some_and(|list| list.iter().any(|name| name == "CAP_SYS_ADMIN"))
}

/// Shared means that what a container mounts there appears on the host, which a VM cannot do, and the shim refuses. Who may not mount has nothing to
/// show: buildah asks for it for every cache (`--mount type=cache`).
fn be_slave(mount: &mut Value) {
    for option in mount["options"].as_array_mut().into_iter().flatten() {
        match option.as_str() {
            Some("shared") => *option = json!("slave"),
            Some("rshared") => *option = json!("rslave"),
            _ => {}
        }
    }
}

/// A bind mount's source may be relative to the bundle (OCI runtime specification, "Mounts").
fn absolute(mount: &mut Value, bundle: &Path) {
    if is_bind(mount)
        && let Some(source) = mount["source"].as_str()
    {
        mount["source"] = json!(bundle.join(source));
    }
}

/// Tells the shim which pod it is of, as CRI-O does.
fn be_in(spec: &mut Value, place: &Place, pod: Option<&str>) {
    let kind = match place {
        // With users of its own it is a pod of one: a pod's network belongs to its users, a lone container's to the guest's.
        Place::Alone => pod.map(|_| "sandbox"),
        Place::Infra => Some("sandbox"),
        Place::Member { .. } => Some("container"),
        Place::Said { .. } => spec["annotations"][KIND].as_str(),
    };
    let kind = kind.map(str::to_owned);
    let limits = match (place, spec["linux"]["cgroupsPath"].as_str()) {
        (Place::Infra, Some(path)) => limits::of_pod(path),
        _ => Vec::new(),
    };
    if !spec["annotations"].is_object() {
        spec["annotations"] = json!({});
    }
    if let Some(annotations) = spec["annotations"].as_object_mut() {
        for (key, value) in [(SANDBOX, pod), (KIND, kind.as_deref())] {
            annotations.remove(key);
            annotations.extend(value.map(|value| (key.to_owned(), json!(value))));
        }
        annotations.extend(
            limits
                .into_iter()
                .map(|(key, value)| (key.to_owned(), json!(value))),
        );
    }
    if let Some(pid) = place.processes() {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        let found = namespaces
            .into_iter()
            .flatten()
            .find(|ns| ns["type"] == "pid");
        if let Some(namespace) = found {
            // The shim knows the containers by pids of its own.
            namespace["path"] = json!(format!("/proc/{pid}/ns/pid"));
        }
    }
}

/// Bytes of the tmpfs that podman has made on this host for the container's `/dev/shm`, if this is its mount. That of a pod is the shim's to
/// replace.
fn shm_size(mount: &Value, pod: Option<&str>) -> Option<u64> {
    let source = Path::new(mount["source"].as_str()?);
    // …/overlay-containers/ID/userdata/shm
    if !is_bind(mount) || mount["destination"] != "/dev/shm" || !source.ends_with("userdata/shm") {
        return None;
    }
    let mut names = source.components().map(Component::as_os_str);
    if pod.is_some_and(|pod| names.any(|name| name == pod)) {
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
        Spec::example(value)
    }

    fn made(spec: &Spec, place: &Place) -> Value {
        spec.for_shim(&"me".parse().unwrap(), place, false).unwrap()
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
        let made = made(&spec, &Place::Alone);
        assert_eq!(made["root"]["path"], "/b/rootfs");
        let sources: Vec<_> = (0..4)
            .map(|n| made["mounts"][n]["source"].clone())
            .collect();
        assert_eq!(sources, ["/b/a", "/b/b", "/c", "tmpfs"]);
        assert_eq!(made["linux"]["cgroupsPath"], "/c");
        assert_eq!(
            spec.for_shim(&"me".parse().unwrap(), &Place::Alone, true)
                .unwrap()["linux"]
                .get("cgroupsPath"),
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
    fn a_mount_is_shared_only_where_somebody_can_mount() {
        let options = json!(["bind", "shared", "rshared", "rw"]);
        let mounts =
            json!([{"destination": "/a", "type": "bind", "source": "/a", "options": options}]);
        let with = |name: &str| {
            let capabilities = json!({"bounding": [name]});
            let process = json!({"capabilities": capabilities});
            let spec = spec(json!({"root": {"path": "/r"}, "process": process, "mounts": mounts}));
            made(&spec, &Place::Alone)["mounts"][0]["options"].clone()
        };
        assert_eq!(with("CAP_SYS_ADMIN"), options);
        assert_eq!(with("CAP_CHOWN"), json!(["bind", "slave", "rslave", "rw"]));
    }

    #[test]
    fn the_shim_is_told_of_the_pod() {
        let namespaces = json!([{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network"}]);
        let spec = spec(json!({
            "root": {"path": "/r"}, "annotations": {SANDBOX: "pod", "a": "b"}, "linux": {"namespaces": namespaces},
        }));
        assert!(spec.has_new("network") && spec.sandbox() == Some("pod"));
        let alone = made(&spec, &Place::Alone);
        assert_eq!(alone["annotations"], json!({"a": "b"}));
        let mut own = spec.clone();
        own.value["linux"]["namespaces"] = json!([{"type": "user"}]);
        assert_eq!(
            made(&own, &Place::Alone)["annotations"],
            json!({"a": "b", SANDBOX: "me", KIND: "sandbox"})
        );
        let infra = made(&spec, &Place::Infra);
        assert_eq!(
            infra["annotations"],
            json!({"a": "b", SANDBOX: "me", KIND: "sandbox"})
        );
        assert_eq!(infra["linux"]["namespaces"], namespaces);
        let member = Place::Member {
            infra: "pod".parse().unwrap(),
            processes: Some(9),
        };
        let member = made(&spec, &member);
        assert_eq!(
            member["annotations"],
            json!({"a": "b", SANDBOX: "pod", KIND: "container"})
        );
        assert_eq!(member["linux"]["namespaces"][0]["path"], "/proc/9/ns/pid");
        let said = json!({SANDBOX: "pod", KIND: "container"});
        let spec = Spec::example(json!({"root": {"path": "/r"}, "annotations": said}));
        assert!(spec.says_its_place());
        assert_eq!(
            made(&spec, &Place::Said { processes: None })["annotations"],
            said
        );
    }

    #[test]
    fn a_spec_without_a_root_is_refused() {
        let id = "me".parse().unwrap();
        let error = spec(json!({}))
            .for_shim(&id, &Place::Alone, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("root.path"), "{error}");
    }

    #[test]
    fn podmans_shared_memory_becomes_the_guests() {
        // A tmpfs of every Linux, by a name like podman's.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let pod = "pod1";
        let userdata = dir.path().join(pod).join("userdata");
        fs::create_dir_all(userdata.join("shm")).unwrap();
        let mount = |source: &Path, destination: &str| json!({"destination": destination, "type": "bind", "source": source, "options": ["bind"]});
        let mounts = [
            mount(&userdata.join("shm"), "/dev/shm"),
            mount(&userdata, "/dev/shm"),
            mount(&userdata.join("shm"), "/data"),
        ];
        let spec = spec(json!({"root": {"path": "/r"}, "mounts": mounts}));
        let pods = made(
            &spec,
            &Place::Member {
                infra: pod.parse().unwrap(),
                processes: None,
            },
        );
        assert_eq!(pods["mounts"][0], mounts[0]);
        let made = made(&spec, &Place::Infra);
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
                for place in [Place::Infra, Place::Member { infra: "i".parse().unwrap(), processes: Some(1) }] {
                    let _ = spec.for_shim(&"me".parse().unwrap(), &place, true);
                }
                let _ = (spec.sandbox(), spec.cgroups_path(), spec.has_new("network"), spec.namespace(&kind), spec.annotations(), spec.terminal(), spec.oci_version());
            }
        }
    }
}
