//! What a pod's containers may use together.
//!
//! `podman pod create --memory` writes it into the pod's cgroup alone: the infra container, which opens the VM, has no limits of its own. The shim
//! sizes the VM by the annotations that CRI's sandbox containers have, so these are given to it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The unified hierarchy.
const ROOT: &str = "/sys/fs/cgroup";

/// containerd's annotations of a pod's size (containerd, pkg/cri/annotations): bytes, and microseconds.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// The annotations for the pod of an infra container with this `cgroupsPath`; none where the pod has no limits.
pub(crate) fn of_pod(cgroups_path: &str) -> Vec<(&'static str, String)> {
    match pods_cgroup(cgroups_path) {
        Some(path) => in_cgroup(&Path::new(ROOT).join(path)),
        None => Vec::new(),
    }
}

/// The pod's cgroup below the root of all: the one that its infra container's lies in.
fn pods_cgroup(cgroups_path: &str) -> Option<PathBuf> {
    let Some((slice, _)) = cgroups_path.split_once(':') else {
        let parent = Path::new(cgroups_path).parent()?;
        return Some(parent.strip_prefix("/").unwrap_or(parent).to_owned());
    };
    // `a-b.slice` lies in `a.slice` (systemd.slice(5)).
    let name = slice.strip_suffix(".slice")?;
    let ends = name.match_indices('-').map(|(end, _)| end);
    let ends = ends.chain([name.len()]);
    ends.map(|end| Some(format!("{}.slice", name.get(..end)?)))
        .collect()
}

fn in_cgroup(dir: &Path) -> Vec<(&'static str, String)> {
    // "max" is no number.
    let number = |text: &str| Some(text.parse::<u64>().ok()?.to_string());
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let mut found = Vec::new();
    if let Some(bytes) = number(read("memory.max").trim()) {
        found.push((MEMORY, bytes));
    }
    let cpu = read("cpu.max");
    let mut words = cpu.split_whitespace().map(number);
    if let (Some(Some(quota)), Some(Some(period))) = (words.next(), words.next()) {
        found.extend([(CPU_QUOTA, quota), (CPU_PERIOD, period)]);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_cgroup_is_found_in_both_notations() {
        for (path, pod) in [
            ("/libpod_parent/pod/libpod-c", Some("libpod_parent/pod")),
            (
                "machine-libpod_pod_x.slice:libpod:c",
                Some("machine.slice/machine-libpod_pod_x.slice"),
            ),
            ("machine:libpod:c", None),
            ("/", None),
        ] {
            assert_eq!(pods_cgroup(path).as_deref(), pod.map(Path::new), "{path}");
        }
    }

    #[test]
    fn limits_become_annotations_where_there_are_any() {
        let dir = tempfile::tempdir().unwrap();
        assert!(in_cgroup(dir.path()).is_empty());
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        fs::write(dir.path().join("cpu.max"), "max 100000\n").unwrap();
        assert!(in_cgroup(dir.path()).is_empty());
        fs::write(dir.path().join("memory.max"), "536870912\n").unwrap();
        fs::write(dir.path().join("cpu.max"), "200000 100000\n").unwrap();
        let made = in_cgroup(dir.path());
        let text = |text: &str| text.to_owned();
        assert_eq!(
            made,
            [
                (MEMORY, text("536870912")),
                (CPU_QUOTA, text("200000")),
                (CPU_PERIOD, text("100000"))
            ]
        );
    }
}
