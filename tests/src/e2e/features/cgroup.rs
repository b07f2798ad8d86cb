//! The cgroup of a pod on the host, which the kubelet makes and containerd is told of.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// A pod's cgroup, made as the kubelet makes it. Dropped, it is removed.
pub struct PodCgroup(PathBuf);

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
        Ok(Self(parent.join(name)))
    }

    pub fn set(&self, file: &str, bytes: u64) -> Result<()> {
        fs::write(self.0.join(file), bytes.to_string()).with_context(|| file.to_owned())
    }

    pub fn number(&self, file: &str) -> Result<u64> {
        let text = fs::read_to_string(self.0.join(file))?;
        text.trim()
            .parse()
            .with_context(|| format!("{file}: {text}"))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = fs::remove_dir(&self.0);
    }
}
