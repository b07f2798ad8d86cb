//! podman, with a storage of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    ctr::{self, Output},
    wait,
};

/// Debian's.
pub const PODMAN: &str = "/usr/bin/podman";
/// The image that [`Podman::import`] makes.
pub const IMAGE: &str = "localhost/busybox:e2e";

/// Where it keeps what is of this boot.
pub const RUN_ROOT: &str = "/run/husk-e2e-podman";

/// podman and the runtime that it is given.
#[derive(Debug)]
pub struct Podman {
    /// The runtime's program.
    pub runtime: PathBuf,
    /// `storage` is in it; on a disk, as an overlay's upper directory is.
    pub dir: PathBuf,
}

impl Podman {
    /// With this runtime.
    pub fn new(runtime: &Path) -> Self {
        Self {
            runtime: runtime.to_owned(),
            dir: "/var/lib/husk-e2e-podman".into(),
        }
    }

    /// Where it keeps images and containers; buildah may use the same.
    pub fn storage(&self) -> PathBuf {
        self.dir.join("storage")
    }

    /// Makes [`IMAGE`] of a root file system.
    ///
    /// # Errors
    /// `tar` or `podman import` failed.
    pub fn import(&self, tree: &Path) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        let tar = self.dir.join("busybox.tar");
        let mut pack = Command::new("tar");
        pack.arg("-C").arg(tree).arg("-cf").arg(&tar).arg(".");
        // As images have it: podman mounts into it, and its `/` is nobody's to write to (0555).
        let run = self.dir.join("image");
        fs::create_dir_all(run.join("run"))?;
        pack.arg("-C").arg(run).arg("./run");
        ctr::output(&mut pack)?.ok()?;
        let tar = tar.to_str().context("its name")?;
        self.run(&["import", "-q", tar, IMAGE])?.ok().map(drop)
    }

    /// A command of podman's.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PODMAN);
        command
            .arg("--root")
            .arg(self.storage())
            .args(["--runroot", RUN_ROOT])
            .args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"])
            .arg("--runtime")
            .arg(&self.runtime)
            .args(args);
        command
    }

    /// Runs one.
    ///
    /// # Errors
    /// It cannot be run, or does not end.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        ctr::output(&mut self.command(args))
    }

    /// `podman run --rm` without a network.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn once(&self, flags: &[&str], command: &[&str]) -> Result<Output> {
        let head = ["run", "--rm", "--network", "none"];
        self.run(&[&head, flags, &[IMAGE], command].concat())
    }

    /// What `inspect` has for a container, as a template.
    ///
    /// # Errors
    /// There is no such container.
    pub fn inspect(&self, name: &str, template: &str) -> Result<String> {
        Ok(self
            .run(&["inspect", name, "--format", template])?
            .ok()?
            .text())
    }

    /// Waits until a container has written this line.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_log(&self, name: &str, line: &str) -> Result<()> {
        wait::until(line, || {
            let logs = self.run(&["logs", name]).ok()?;
            logs.text().lines().any(|l| l == line).then_some(())
        })
    }
}
