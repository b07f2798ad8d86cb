//! The tree that the guest sees of the host: one virtio-fs device a pod, one directory a container below it.
//!
//! ```text
//! /run/husk/<namespace>/<pod>/share/      the virtio-fs root
//!     <container>/rootfs                  the Create request's mounts, or the spec's root.path
//!     <container>/mounts/<n>              the source of the spec's n-th mount, where it is a bind mount
//! ```
//!
//! The mounts are made in the shim's own mount namespace, which the VMM inherits: the host does not see them, and they vanish
//! with the pod's processes however those end. Whether a bind mount is read-only is the guest's business, since only its mount of
//! it is the container's.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::FileTypeExt as _},
    path::{Path, PathBuf},
};

use husk_protocol::guest_path;
use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tracing::warn;

use crate::{
    cleanup,
    mount::{self, MountError, MountRequest},
    spec::{BundleSpec, GuestPaths},
};

/// Parent of the containers' cgroups in the guest.
const GUEST_CGROUP: &str = "/husk";

/// A container's files that cannot be brought into the share.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The id is no file name.
    #[error("container id {0:?} cannot be used as a directory name")]
    Id(String),
    /// A directory or file of the share itself.
    #[error("cannot prepare {path} in the pod's share: {source}")]
    Prepare {
        /// What was to be made.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The bundle has no root file system.
    #[error(
        "the bundle has no root file system: {path} does not exist and the engine gave no mounts for it"
    )]
    NoRootfs {
        /// The spec's root path.
        path: PathBuf,
    },
    /// A bind mount's source is not there.
    #[error("mount source {path} (of mount {destination}): {reason}")]
    Source {
        /// The source.
        path: PathBuf,
        /// Its place in the container.
        destination: String,
        /// Why not.
        reason: io::Error,
    },
    /// A mount was refused.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// One pod's share.
#[derive(Debug, Clone)]
pub struct Share {
    root: PathBuf,
    mount: fn(&MountRequest, &Path) -> Result<(), MountError>,
}

impl Share {
    /// The share below this directory, which exists.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            mount: mount::apply,
        }
    }

    /// A share whose mounts are not made: for tests of what lies above.
    #[cfg(test)]
    pub fn without_mounts(root: PathBuf) -> Self {
        Self {
            root,
            mount: |_, _| Ok(()),
        }
    }

    /// The directory to serve, for the VMM.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_root(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(open(&self.root, flags, Mode::empty())?)
    }

    /// Brings a container's files in. On failure nothing of them stays. Blocks.
    ///
    /// # Errors
    /// [`ShareError`] naming what is missing.
    pub fn add(
        &self,
        id: &str,
        rootfs: &[MountRequest],
        spec: &BundleSpec,
    ) -> Result<GuestPaths, ShareError> {
        let dir = self.container_dir(id)?;
        let added = self.add_in(&dir, id, rootfs, spec);
        if added.is_err() {
            self.remove(id);
        }
        added
    }

    fn add_in(
        &self,
        dir: &Path,
        id: &str,
        rootfs: &[MountRequest],
        spec: &BundleSpec,
    ) -> Result<GuestPaths, ShareError> {
        let guest = |rest: &str| format!("{}/{id}/{rest}", guest_path::SHARE);
        let root = dir.join("rootfs");
        make_dir(&root)?;
        if rootfs.is_empty() {
            let path = spec.root_path();
            if !path.is_dir() {
                return Err(ShareError::NoRootfs { path });
            }
            (self.mount)(&bind(&path, true), &root)?;
        }
        for request in rootfs {
            (self.mount)(request, &root)?;
        }
        let mut paths = GuestPaths {
            rootfs: guest("rootfs"),
            cgroup: format!("{GUEST_CGROUP}/{id}"),
            ..GuestPaths::default()
        };
        for bound in spec.bind_mounts() {
            let target = dir.join("mounts").join(bound.index.to_string());
            let kind = fs::metadata(&bound.source).map_err(|reason| ShareError::Source {
                path: bound.source.clone(),
                destination: spec.mount_destination(bound.index),
                reason,
            })?;
            if kind.is_dir() {
                make_dir(&target)?;
            } else {
                make_dir(&dir.join("mounts"))?;
                make_file(&target)?;
            }
            if kind.file_type().is_socket() {
                warn!(source = %bound.source.display(), "a socket of the host is mounted: the guest sees it but cannot connect through a VM's border");
            }
            (self.mount)(&bind(&bound.source, bound.recursive), &target)?;
            paths
                .mounts
                .insert(bound.index, guest(&format!("mounts/{}", bound.index)));
        }
        Ok(paths)
    }

    /// Takes a container's files out. Idempotent; what cannot be removed is logged. Blocks.
    pub fn remove(&self, id: &str) {
        let Ok(dir) = self.container_dir(id) else {
            return;
        };
        if !dir.exists() {
            return;
        }
        if let Err(error) = cleanup::unmount_below(&dir) {
            warn!(%error, container = id, "a mount of the container stays until the pod ends");
        }
        if let Err(error) = remove_mount_points(&dir) {
            warn!(%error, container = id, "cannot remove the container's directory");
        }
    }

    fn container_dir(&self, id: &str) -> Result<PathBuf, ShareError> {
        let is_name = !id.is_empty() && id != "." && id != ".." && !id.contains(['/', '\0']);
        if is_name {
            Ok(self.root.join(id))
        } else {
            Err(ShareError::Id(id.to_owned()))
        }
    }
}

fn bind(source: &Path, recursive: bool) -> MountRequest {
    MountRequest {
        kind: if recursive { "rbind" } else { "bind" }.into(),
        source: source.display().to_string(),
        ..MountRequest::default()
    }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    fs::create_dir_all(path).map_err(|source| ShareError::Prepare {
        path: path.to_owned(),
        source,
    })
}

fn make_file(path: &Path) -> Result<(), ShareError> {
    match fs::File::create_new(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(ShareError::Prepare {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Removes the mount points and only them: a file or an empty directory goes, anything else would be somebody's data behind a
/// mount that is still there, and stays.
fn remove_mount_points(dir: &Path) -> io::Result<()> {
    let mounts = dir.join("mounts");
    if mounts.exists() {
        for entry in fs::read_dir(&mounts)? {
            let path = entry?.path();
            if path.is_dir() {
                fs::remove_dir(path)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        fs::remove_dir(mounts)?;
    }
    let rootfs = dir.join("rootfs");
    if rootfs.exists() {
        fs::remove_dir(rootfs)?;
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(bundle: &Path, json: serde_json::Value) -> BundleSpec {
        BundleSpec::parse(bundle, &serde_json::to_vec(&json).unwrap()).unwrap()
    }

    #[test]
    fn an_id_that_climbs_is_refused() {
        let share = Share::new("/nowhere".into());
        for id in ["", ".", "..", "a/b"] {
            assert!(share.container_dir(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn a_bundle_without_rootfs_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let share = Share::new(dir.path().join("share"));
        let spec = spec(
            dir.path(),
            json!({"ociVersion": "1", "root": {"path": "rootfs"}}),
        );
        let error = share.add("c", &[], &spec).unwrap_err();
        assert!(matches!(error, ShareError::NoRootfs { .. }), "{error}");
        assert!(error.to_string().contains("rootfs"));
        assert!(!dir.path().join("share/c").exists());
    }

    #[test]
    fn data_behind_a_mount_point_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let share = Share::new(dir.path().to_owned());
        fs::create_dir_all(dir.path().join("c/rootfs")).unwrap();
        fs::write(dir.path().join("c/rootfs/data"), "precious").unwrap();
        share.remove("c");
        assert_eq!(
            fs::read(dir.path().join("c/rootfs/data")).unwrap(),
            b"precious"
        );
    }
}
