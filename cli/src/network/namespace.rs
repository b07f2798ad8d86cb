//! A network namespace that a file keeps, where `ip netns` finds it too.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// Where `ip netns` keeps its own.
const DIR: &str = "/run/netns";

/// A namespace.
pub(super) struct Namespace {
    path: PathBuf,
}

impl Namespace {
    /// A new one.
    pub(super) fn make(id: &str) -> Result<Self> {
        let path = Path::new(DIR).join(format!("husk-{id}"));
        let namespace = Self::at(&path);
        // What a monitor that was killed has left.
        namespace.remove();
        let make = || {
            fs::create_dir_all(DIR)?;
            File::create(&path)?;
            let target = path.clone();
            // The thread has the namespace for as long as it takes to be kept.
            let made = thread::spawn(move || -> io::Result<()> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let none: Option<&str> = None;
                let own = Some("/proc/thread-self/ns/net");
                Ok(mount(own, &target, none, MsFlags::MS_BIND, none)?)
            });
            made.join()
                .unwrap_or_else(|_| Err(io::Error::other("its thread has failed")))
        };
        if let Err(error) = make() {
            namespace.remove();
            return Err(error)
                .with_context(|| format!("making the network namespace {}", path.display()));
        }
        Ok(namespace)
    }

    /// One that may be there.
    pub(super) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of it.
    pub(super) fn remove(&self) {
        // It is neither mounted nor there where nobody has made it.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

/// The bridge of a network that has gone. Without `ip` it stays, and harms nobody.
pub(super) fn remove_bridge(name: &str) {
    let mut ip = Command::new("ip");
    ip.args(["link", "del", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _ = ip.status();
}
