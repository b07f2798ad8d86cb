//! This binary again, run in a container: what busybox has no program for.
//!
//! It takes the loader and the libraries of the Debian tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use husk_tests::cri::{container, v1};

use crate::context::Context;

/// Where the Debian tree is in the container.
const DEBIAN: &str = "/debian";
/// Where its libraries are.
const LIBRARIES: &str = "/debian/usr/lib/x86_64-linux-gnu";
/// Its loader.
const LOADER: &str = "/debian/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const PROGRAM: &str = "/work/husk-e2e";

/// A copy of the program.
pub struct Workload(PathBuf);

impl Workload {
    /// Below this directory: not on the testbed's 9p, the program should come from a plain file system.
    pub fn new(suite: &Context, dir: &Path) -> Result<Self> {
        let bin = dir.join("bin");
        fs::create_dir(&bin)?;
        fs::copy(suite.bin.join("husk-e2e"), bin.join("husk-e2e"))?;
        Ok(Self(bin))
    }

    /// A container that runs one of the program's workloads.
    pub fn container(&self, words: &[&str]) -> v1::ContainerConfig {
        let program = [LOADER, "--library-path", LIBRARIES, PROGRAM];
        let mut config = container(&[&program, words].concat());
        config.mounts = vec![
            mount(&self.0, "/work"),
            mount(Path::new("/srv/debian-rootfs"), DEBIAN),
        ];
        config
    }
}

/// A read-only bind mount.
pub fn mount(host: &Path, inside: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        readonly: true,
        ..Default::default()
    }
}
