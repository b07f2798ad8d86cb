//! The tree that the guest sees of the host: one virtio-fs device a pod, one directory a container below it.
//!
//! ```text
//! /run/husk/<namespace>/<pod>/share/      where the tree is put together
//!     <container>/rootfs                  the Create request's mounts, or the spec's root.path
//!     <container>/mounts/<n>              the source of the spec's n-th mount, where it is a bind mount
//! /run/husk/<namespace>/<pod>/served/     the same tree, read-only: the virtio-fs root
//! ```
//!
//! `share` is a shared mount of itself, `served` a read-only slave of it: what the shim mounts in the one appears in the other at once,
//! each mount with its own flags. So the guest can write where a mount lets it, and never to the directories that hold the mounts,
//! which the shim, root on the host, goes by. For the same reason a bind mount that the spec wants read-only is read-only here: the
//! mount that the guest makes of it binds the container, but not who has broken out of it.
//!
//! All of this happens in the shim's own mount namespace, which the VMM inherits: the host does not see it, and it vanishes with
//! the pod's processes however those end.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use husk_protocol::guest_path;
use nix::{
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sys::stat::Mode,
};
use tracing::warn;

use crate::{
    cleanup,
    engine_mounts::EngineMounts,
    error::chain,
    huge_pages::{self, HugeVolume},
    mount::{self, MountError, MountRequest},
    spec::{BundleSpec, GuestPaths},
    vmm_users::VmmUsers,
};

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
    /// A hugetlbfs of another page size than the guest has.
    #[error(
        "mount {destination}: the volume of huge pages {path} has pages of {page_mib} MiB, and a container in a VM can only have those of \
         {} MiB: use medium HugePages-2Mi and a limit hugepages-2Mi, or another runtime class",
        husk_protocol::HUGE_PAGE_BYTES >> 20
    )]
    HugePages {
        /// The source.
        path: PathBuf,
        /// Its place in the container.
        destination: String,
        /// MiB of a page.
        page_mib: u64,
    },
    /// A mount was refused.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// One pod's share.
#[derive(Debug, Clone)]
pub struct Share {
    root: PathBuf,
    served: PathBuf,
    /// Whose the files are shown as; `None`: their owners'.
    users: Option<VmmUsers>,
    engine: EngineMounts,
    mount: fn(&MountRequest, &Path, Option<&VmmUsers>, &EngineMounts) -> Result<(), MountError>,
}

/// Makes what is mounted in `share` appear in `served`, where the directories themselves are read-only. Once a mount namespace, before
/// anything is mounted there; [`cleanup::unmount_below`] takes it down.
///
/// # Errors
/// When the kernel refuses one of the mounts.
pub fn publish(share: &Path, served: &Path) -> io::Result<()> {
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
    };
    let change =
        |at: &Path, flags: MsFlags| mount(None::<&str>, at, None::<&str>, flags, None::<&str>);
    open_to_vmm(share)?;
    bind(share, share)?;
    // Apart from the host's first: what the host mounts there is none of the guest's business.
    change(share, MsFlags::MS_PRIVATE)?;
    change(share, MsFlags::MS_SHARED)?;
    bind(share, served)?;
    change(served, MsFlags::MS_SLAVE)?;
    let locked = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    change(served, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | locked)?;
    Ok(())
}

impl Share {
    /// The share of a pod, whose directories exist and have been [published](publish), for a VMM with these users.
    pub fn new(
        root: PathBuf,
        served: PathBuf,
        users: Option<VmmUsers>,
        engine: EngineMounts,
    ) -> Self {
        Self {
            root,
            served,
            users,
            engine,
            mount: mount::apply,
        }
    }

    /// A share whose mounts are not made: for tests of what lies above.
    #[cfg(test)]
    pub fn without_mounts(root: PathBuf) -> Self {
        Self {
            served: root.clone(),
            root,
            users: None,
            engine: EngineMounts::of_this_thread().unwrap(),
            mount: |_, _, _, _| Ok(()),
        }
    }

    /// The directory to serve, for the VMM.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_root(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(open(&self.served, flags, Mode::empty())?)
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
        // What an earlier container of this name may have left; from here on the directory is a new one.
        self.remove(id);
        make_dir(dir)?;
        let root = dir.join("rootfs");
        make_dir(&root)?;
        if rootfs.is_empty() {
            let path = spec.root_path();
            let seen = self.engine.look(&path).and_then(|file| file.metadata());
            if !seen.is_ok_and(|seen| seen.is_dir()) {
                return Err(ShareError::NoRootfs { path });
            }
            self.mount(&bind(&path, true, &["rprivate"]), &root)?;
        }
        for request in rootfs {
            self.mount(request, &root)?;
        }
        let mut paths = GuestPaths {
            rootfs: guest("rootfs"),
            ..GuestPaths::default()
        };
        let binds = spec.bind_mounts();
        if !binds.is_empty() {
            make_dir(&dir.join("mounts"))?;
        }
        for bound in binds {
            let target = dir.join("mounts").join(bound.index.to_string());
            let unseen = |reason| ShareError::Source {
                path: bound.source.clone(),
                destination: spec.mount_destination(bound.index),
                reason,
            };
            let source = self.engine.look(&bound.source).map_err(unseen)?;
            let kind = source.metadata().map_err(unseen)?;
            if let Some(bytes) = huge_pages::page_size(&source) {
                if !huge_pages::are_possible(bytes) {
                    return Err(ShareError::HugePages {
                        path: bound.source.clone(),
                        destination: spec.mount_destination(bound.index),
                        page_mib: bytes >> 20,
                    });
                }
                let volume = HugeVolume::of(&kind, &bound.owners);
                paths.mounts.insert(bound.index, volume.guest_path());
                paths.huge_volumes.push(volume);
                continue;
            }
            if kind.is_dir() {
                make_dir(&target)?;
            } else {
                make_file(&target)?;
            }
            if kind.file_type().is_socket() {
                warn!(source = %bound.source.display(), "a socket of the host is mounted: the guest sees it but cannot connect through a VM's border");
            }
            let mut options: Vec<&str> = bound.id_maps.iter().map(String::as_str).collect();
            if bound.read_only {
                options.push("ro");
            }
            if bound.private {
                options.push("rprivate");
            }
            let request = bind(&bound.source, bound.recursive, &options);
            match self.mount(&request, &target) {
                // Without this volume the container is no use to anybody, and many a program is not root.
                Err(error @ MountError::Owners { .. }) => {
                    warn!(
                        destination = spec.mount_destination(bound.index),
                        reason = chain(&error),
                        "the volume is shown as it is: root's files are nobody's to the guest"
                    );
                    (self.mount)(&request, &target, None, &self.engine)?;
                }
                mounted => mounted?,
            }
            paths
                .mounts
                .insert(bound.index, guest(&format!("mounts/{}", bound.index)));
        }
        Ok(paths)
    }

    fn mount(&self, request: &MountRequest, at: &Path) -> Result<(), MountError> {
        (self.mount)(request, at, self.users.as_ref(), &self.engine)
    }

    /// The users of the VMM that serves it.
    pub fn users(&self) -> Option<&VmmUsers> {
        self.users.as_ref()
    }

    /// Takes a container's files out. Idempotent; what cannot be removed is logged. Blocks.
    pub fn remove(&self, id: &str) {
        let Ok(dir) = self.container_dir(id) else {
            return;
        };
        if let Err(error) = cleanup::unmount_below(&dir) {
            warn!(%error, container = id, "a mount of the container stays until the pod ends");
        }
        if let Err(error) = cleanup::remove_mount_points(&self.root, OsStr::new(id)) {
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

fn bind(source: &Path, recursive: bool, options: &[&str]) -> MountRequest {
    MountRequest {
        kind: if recursive { "rbind" } else { "bind" }.into(),
        source: source.display().to_string(),
        options: options.iter().map(|&option| option.into()).collect(),
        ..MountRequest::default()
    }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    let made = fs::create_dir(path);
    made.and_then(|()| open_to_vmm(path))
        .map_err(|source| ShareError::Prepare {
            path: path.to_owned(),
            source,
        })
}

/// Lets the VMM go through a directory that is root's, whatever its user and our umask. Nobody else gets to the share.
fn open_to_vmm(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
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

#[cfg(test)]
mod tests;
