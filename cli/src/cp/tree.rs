//! A container's files as it sees them, put together on the host: its root file system, and its volumes where they are mounted in it.
//!
//! This happens in a mount namespace that nobody else sees and that goes with this process. While the container runs, its root file system
//! and volumes are those that its shim has mounted when it started; otherwise they are mounted here. Every mount point is found below the root, as a
//! process in the container would find it. Of /proc, /sys, /dev and tmpfs the host has nothing: an empty directory, to which nothing can be
//! written, is in their place.

use std::{
    fs::{self, File},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use rustix::{
    fs::{CWD, Mode, OFlags, fstat, mkdirat, openat},
    io::Errno,
    process::chdir,
};
use serde::Deserialize;

use crate::{
    NAMESPACE,
    container::{Container, State, Status},
    cp::owners::Owners,
    proc,
    root::{DIRECTORY, PLACE, Root, split},
    shim::Shim,
};

/// A container's files.
pub(super) struct Tree {
    pub(super) root: OwnedFd,
    pub(super) owners: Owners,
    /// Its mounts go when nobody holds this.
    _namespace: File,
    /// Devices of what only the guest has.
    guests: Vec<u64>,
    /// Nobody starts it meanwhile, and one that does not run is not removed either.
    _lock: File,
}

impl Tree {
    pub(super) fn open(container: &Container) -> Result<Self> {
        // Before the look: what is mounted now is not mounted once more while this goes on.
        let held = container.hold_files().with_context(|| {
            let name = &container.record.name;
            format!("container {name} is being started or removed")
        })?;
        let status = container.status()?;
        let pid = match status.state {
            State::Running => Some(status.pid.context("its shim has told no pid")?),
            _ => None,
        };
        let lock = match pid {
            Some(_) => held,
            None => hold(container, &status)?,
        };
        // Of a mount that is made here, they are the disk's.
        let owners = match pid {
            Some(pid) => Owners::of(pid)?,
            None => Owners::HOST,
        };
        let assembled = thread::scope(|scope| {
            // A namespace is a thread's own affair: the others keep the host's.
            let assembling = scope.spawn(|| {
                owners.act_as_root()?;
                assemble(container, pid)
            });
            assembling
                .join()
                .unwrap_or_else(|_| Err(anyhow!("its thread has failed")))
        });
        let (root, namespace, guests) = assembled
            .with_context(|| format!("opening the files of container {}", container.record.name))?;
        // The pid was the shim's when its mounts were looked at.
        if pid.is_some() && container.status()?.pid != pid {
            bail!("container {} has ended meanwhile", container.record.name);
        }
        Ok(Self {
            root,
            owners,
            _namespace: namespace,
            guests,
            _lock: lock,
        })
    }

    /// Refuses what the host has nothing of.
    pub(super) fn check(&self, place: &OwnedFd, path: &str, name: &str) -> Result<()> {
        if self.guests.contains(&fstat(place)?.st_dev) {
            bail!(
                "{path} is what only the container's guest has (/proc, /sys, /dev or a tmpfs): `husk exec {name} ...` gets there while it runs"
            );
        }
        Ok(())
    }
}

/// Takes the lock of a container that does not run.
fn hold(container: &Container, status: &Status) -> Result<File> {
    let lock = container.try_lock().context("locking the container")?;
    let Some(lock) = lock else {
        bail!(
            "container {} is being started or stopped",
            container.record.name
        );
    };
    let kept = container.kept::<Status>("status.json")?;
    if kept.is_some_and(|kept| kept.state == State::Running) {
        // Of one whose monitor was killed, the VM may be there still; and with the lock held it would count as running.
        let shim = Shim {
            namespace: NAMESPACE,
            id: &container.record.id,
            bundle: &container.dir.join("bundle"),
        };
        shim.delete();
        container.set_status(status)?;
    }
    Ok(lock)
}

/// What is read here of a specification.
#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    mounts: Vec<Mount>,
    root: SpecRoot,
}

#[derive(Default, Deserialize)]
struct SpecRoot {
    #[serde(default)]
    readonly: bool,
}

#[derive(Deserialize)]
struct Mount {
    destination: String,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    source: PathBuf,
    #[serde(default)]
    options: Vec<String>,
}

impl Spec {
    /// As it was last started with, or else as it was created.
    fn of(container: &Container) -> Result<Self> {
        let spec = match container.kept("bundle/config.json")? {
            Some(spec) => spec,
            None => container.record.spec.clone(),
        };
        serde_json::from_value(spec).context("reading its specification")
    }
}

/// In a thread of its own: its mount namespace becomes another.
fn assemble(container: &Container, pid: Option<u32>) -> Result<(OwnedFd, File, Vec<u64>)> {
    let spec = Spec::of(container)?;
    unshare(CloneFlags::CLONE_FS)?;
    let rootfs = match pid {
        Some(pid) => {
            let (pid, rootfs) = shims_rootfs(pid, &container.record.id)?;
            let namespace = File::open(format!("/proc/{pid}/ns/mnt"))
                .context("finding the mounts of its shim")?;
            setns(namespace, CloneFlags::CLONE_NEWNS).context("entering the mounts of its shim")?;
            rootfs
        }
        None => container.dir.join("bundle/rootfs"),
    };
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    // Neither does the host see what is mounted here, nor is a mount of the host or the shim held that goes there.
    change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    if pid.is_none() {
        mount_overlay(container, &rootfs)?;
    }
    let root = openat(CWD, &rootfs, DIRECTORY, Mode::empty())
        .with_context(|| format!("opening {}", rootfs.display()))?;
    // What the shim has mounted has its flags already.
    let shims = pid.map(|_| rootfs.with_file_name("mounts"));
    let mut guests = Vec::new();
    for (index, mount) in spec.mounts.iter().enumerate() {
        let what = || format!("mounting {} in it", mount.destination);
        if mount.kind == "bind" {
            let source = match &shims {
                Some(dir) => dir.join(index.to_string()),
                None => mount.source.clone(),
            };
            bind(&root, mount, &source, shims.is_none()).with_context(what)?;
        } else if let Some(guest) = stand_in(&root, mount).with_context(what)? {
            guests.push(guest);
        }
    }
    for place in &guests {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        change(&path_of(place), flags)?;
    }
    if spec.root.readonly {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        change(&path_of(&root), flags)?;
    }
    let devices = guests.iter().map(|place| Ok(fstat(place)?.st_dev));
    let devices = devices.collect::<Result<_>>()?;
    // Of the thread, not of the process.
    let namespace = File::open("/proc/thread-self/ns/mnt").context("keeping the mounts")?;
    Ok((root, namespace, devices))
}

/// The path of what is at this place, whatever becomes of its name.
fn path_of(place: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", place.as_raw_fd()))
}

fn change(at: &Path, flags: MsFlags) -> Result<()> {
    let none: Option<&str> = None;
    let changed = mount(none, at, none, flags, none);
    changed.with_context(|| format!("changing the mount {}", at.display()))
}

/// A container's shim, and where that has its root file system in its mount namespace (shim/src/share.rs). A task's pid is the shim's, or that
/// of the VMM, which is the shim's child and sees nothing of it in its jail.
fn shims_rootfs(pid: u32, id: &str) -> Result<(u32, PathBuf)> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let parent = proc::field(&status, "PPid").and_then(|parent| parent.parse().ok());
    for pid in [Some(pid), parent].into_iter().flatten() {
        let path = format!("/proc/{pid}/mountinfo");
        let mounts = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        if let Some(rootfs) = find_rootfs(&mounts, id) {
            return Ok((pid, rootfs));
        }
    }
    bail!("its shim has no root file system of it")
}

/// Looks for it in a mountinfo.
fn find_rootfs(mounts: &str, id: &str) -> Option<PathBuf> {
    let end = format!("/share/{id}/rootfs");
    proc::mounts(mounts)
        .map(|mount| mount.at)
        .find(|point| point.ends_with(&end))
        // The kernel writes blanks and backslashes in octal.
        .map(|point| PathBuf::from(point.replace("\\040", " ").replace("\\134", "\\")))
}

/// Mounts the root file system of one that does not run.
fn mount_overlay(container: &Container, target: &Path) -> Result<()> {
    let layers = &container.record.layers;
    // mount(2) takes one page of options: the layers are named from where they lie.
    let parent = layers.first().and_then(|layer| layer.parent());
    let parent = parent.context("it has no layers")?;
    chdir(parent).with_context(|| format!("entering {}", parent.display()))?;
    let names: Vec<String> = layers
        .iter()
        .map(|layer| {
            layer
                .strip_prefix(parent)
                .unwrap_or(layer)
                .display()
                .to_string()
        })
        .collect();
    let options = container.overlay_options(&names).join(",");
    let mounted = mount(
        Some("overlay"),
        target,
        Some("overlay"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    );
    chdir("/")?;
    mounted.with_context(|| format!("mounting its root file system on {}", target.display()))
}

/// Mounts a volume.
fn bind(root: &OwnedFd, mount_of: &Mount, source: &Path, is_new: bool) -> Result<()> {
    let kind = match fs::metadata(source) {
        Ok(kind) => kind,
        // What the guest has of it is its own.
        Err(_) if !is_new => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("looking at {}", source.display()));
        }
    };
    let target = mount_point(root, mount_of.destination.as_bytes(), kind.is_dir())?;
    let none: Option<&str> = None;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), &path_of(&target), none, flags, none)
        .with_context(|| format!("binding {}", source.display()))?;
    if is_new && mount_of.options.iter().any(|option| option == "ro") {
        // The mount, no more what it hides.
        let place = Root::container(root).open(mount_of.destination.as_bytes(), PLACE)?;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        change(&path_of(&place), flags)?;
    }
    Ok(())
}

/// Mounts an empty directory in place of what only the guest has.
fn stand_in(root: &OwnedFd, mount_of: &Mount) -> Result<Option<OwnedFd>> {
    let path = mount_of.destination.as_bytes();
    let target = match Root::container(root).open(path, DIRECTORY) {
        Ok(target) => target,
        // It is made with the first start, or lies in what the guest has itself.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let tmpfs = Some("tmpfs");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(tmpfs, &path_of(&target), tmpfs, flags, Some("mode=755"))?;
    Ok(Some(Root::container(root).open(path, DIRECTORY)?))
}

/// A place to mount something; it is made where there is none, as the start of the container does.
fn mount_point(root: &OwnedFd, path: &[u8], is_dir: bool) -> Result<OwnedFd> {
    let tree = Root::container(root);
    match tree.open(path, PLACE) {
        Err(Errno::NOENT) => {}
        found => return Ok(found?),
    }
    let (parent, name) = split(path);
    let name = name.context("it has no name")?;
    let parent = mount_point(root, parent, true)?;
    if is_dir {
        mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
    }
    Ok(tree.open(path, PLACE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shims_mounts_tell_where_it_is() {
        let mounts = r"36 1 0:1 / / rw - ext4 /dev/sda rw
50 36 0:40 / /run/my\040husk/husk/ab/share/ab/rootfs rw shared:2 - overlay overlay rw
51 36 0:40 / /run/my\040husk/husk/ab/served/ab/rootfs ro master:2 - overlay overlay rw
";
        let found = find_rootfs(mounts, "ab").unwrap();
        assert_eq!(found, Path::new("/run/my husk/husk/ab/share/ab/rootfs"));
        assert_eq!(find_rootfs(mounts, "b"), None);
        assert_eq!(find_rootfs("", "ab"), None);
    }
}
