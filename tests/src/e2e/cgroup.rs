//! The cgroup of a pod on the host, which the kubelet makes and containerd is told of.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// A pod's cgroup, made as the kubelet makes it. Dropped, it is removed; the one it lies in stays.
pub struct PodCgroup {
    dir: PathBuf,
    /// As CRI names it (`cgroup_parent`).
    pub path: String,
}

impl PodCgroup {
    pub fn new(name: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let parent = root.join("kubepods");
        fs::create_dir_all(parent.join(name))?;
        for dir in [root, &parent, &parent.join(name)] {
            // The machine may have done so for its root.
            let all = "+cpu +cpuset +memory +pids +io +hugetlb";
            let _ = fs::write(dir.join("cgroup.subtree_control"), all);
        }
        Ok(Self {
            dir: parent.join(name),
            path: format!("/kubepods/{name}"),
        })
    }

    pub fn set(&self, file: &str, value: impl Display) -> Result<()> {
        fs::write(self.dir.join(file), value.to_string())
            .with_context(|| format!("setting {file} to {value}"))
    }

    pub fn number(&self, file: &str) -> Result<u64> {
        let text = fs::read_to_string(self.dir.join(file))?;
        text.trim()
            .parse()
            .with_context(|| format!("{file}: {text}"))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = fs::remove_dir(&self.dir);
    }
}
