//! OCI runtime specs for `ctr run --config`: containerd's own default, changed where a test wants it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    containerd::{Containerd, NAMESPACE},
    ctr::{self, Output},
    runtime::Runtime,
};

/// What containerd grants by default (its oci/spec.go).
const CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Builds a spec and runs it.
pub struct SpecRun<'a> {
    containerd: &'a Containerd,
    runtime: Runtime,
    /// The spec as it will be written; a test changes what it likes.
    pub spec: Value,
}

impl<'a> SpecRun<'a> {
    /// containerd's default spec with this root file system and command, no terminal and no network namespace path.
    ///
    /// # Errors
    /// `ctr oci spec` failed.
    pub fn new(
        containerd: &'a Containerd,
        runtime: Runtime,
        rootfs: &Path,
        command: &[&str],
    ) -> Result<Self> {
        let text = containerd.run_ctr(&["oci", "spec"])?.ok()?.stdout;
        let mut spec: Value =
            serde_json::from_slice(&text).context("reading what `ctr oci spec` printed")?;
        spec["root"] = json!({ "path": rootfs, "readonly": false });
        spec["process"]["args"] = json!(command);
        spec["process"]["terminal"] = json!(false);
        // `ctr oci spec` leaves these to the image.
        spec["process"]["env"] = json!(["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        let all: Vec<String> = CAPABILITIES.iter().map(|c| format!("CAP_{c}")).collect();
        spec["process"]["capabilities"] =
            json!({ "bounding": all, "permitted": all, "effective": all });
        Ok(Self {
            containerd,
            runtime,
            spec,
        })
    }

    /// Gives it a cgroup namespace and, read-only at `/sys/fs/cgroup`, its own cgroup's files.
    pub fn see_own_cgroup(&mut self) {
        let linux = &mut self.spec["linux"];
        if let Some(list) = linux["namespaces"].as_array_mut()
            && !list.iter().any(|n| n["type"] == "cgroup")
        {
            list.push(json!({ "type": "cgroup" }));
        }
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(json!({
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"],
            }));
        }
    }

    /// Where the spec of `id` is written.
    fn path(&self, id: &str) -> PathBuf {
        self.containerd.dir().join(format!("{id}.json"))
    }

    /// `ctr run --config` with more flags, ready to start.
    ///
    /// # Errors
    /// The spec could not be written.
    pub fn command(&self, id: &str, flags: &[&str]) -> Result<std::process::Command> {
        let path = self.path(id);
        // The default is one cgroup for all: each run gets its own.
        let mut spec = self.spec.clone();
        spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
        fs::write(&path, serde_json::to_vec_pretty(&spec)?)?;
        let mut ctr = self.containerd.ctr();
        ctr.arg("run")
            .args(self.runtime.ctr_flags())
            .args(flags)
            .arg("--config")
            .arg(path)
            .arg(id);
        Ok(ctr)
    }

    /// Runs it to its end and removes it.
    ///
    /// # Errors
    /// `ctr` could not be started, or hangs.
    pub fn run(&self) -> Result<Output> {
        let id = self.containerd.fresh_id("spec");
        ctr::output(&mut self.command(&id, &["--rm"])?)
    }
}
