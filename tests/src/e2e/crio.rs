//! CRI-O's ways in. No Debian package has CRI-O, so that the tests call husk as it does.

mod oci;
mod vm;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use husk_tests::host::Netns;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::{Test, context::Context, husk_test, test};

pub const TESTS: &[Test] = &[
    husk_test("a_pod_as_crio_runs_it", vm::pod),
    test("a_pod_by_conmon", oci::pod).needs("/usr/bin/conmon"),
];

/// A container's files, as CRI-O makes them: the layers, `merged`, and `userdata`, which is the bundle.
struct Storage {
    id: String,
    dir: PathBuf,
    spec: Value,
}

impl Storage {
    /// `pod` is the sandbox's id, or none for the sandbox itself.
    fn new(
        suite: &Context,
        storage: &Path,
        netns: &Netns,
        pod: Option<&str>,
        command: &[&str],
        limit: i64,
    ) -> Result<Self> {
        let id = suite.containerd.fresh_id("crio");
        let dir = storage.join(&id);
        for name in ["diff", "work", "merged", "userdata"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            suite.rootfs.display(),
            dir.join("diff").display(),
            dir.join("work").display(),
        );
        let merged = dir.join("merged");
        let overlay = Some("overlay");
        mount(
            overlay,
            &merged,
            overlay,
            MsFlags::empty(),
            Some(layers.as_str()),
        )?;
        let mut spec = suite.spec(command)?.spec;
        spec["root"]["path"] = json!(merged);
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": if pod.is_some() { "container" } else { "sandbox" },
            "io.kubernetes.cri-o.SandboxID": pod.unwrap_or(&id),
        });
        spec["linux"]["cgroupsPath"] = json!(format!("/crio/{id}"));
        if limit > 0 {
            spec["linux"]["resources"]["memory"] = json!({ "limit": limit });
        }
        let mounts = spec["mounts"].as_array_mut();
        mounts.context("a spec without mounts")?.push(json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
        }));
        for namespace in spec["linux"]["namespaces"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            if namespace["type"] == "network" {
                namespace["path"] = json!(netns.path());
            }
        }
        let storage = Self { id, dir, spec };
        fs::write(
            storage.bundle().join("config.json"),
            storage.spec.to_string(),
        )?;
        Ok(storage)
    }

    fn bundle(&self) -> PathBuf {
        self.dir.join("userdata")
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = umount2(&self.dir.join("merged"), MntFlags::MNT_DETACH);
    }
}

/// A directory that is a private mount, as containers/storage makes its own (`mount.MakePrivate` in drivers/overlay).
struct Private<'a>(&'a Path);

impl<'a> Private<'a> {
    fn mount(at: &'a Path) -> Result<Self> {
        let none = None::<&str>;
        mount(Some(at), at, none, MsFlags::MS_BIND, none)?;
        let made = Self(at);
        mount(none, at, none, MsFlags::MS_PRIVATE, none)?;
        Ok(made)
    }
}

impl Drop for Private<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}
