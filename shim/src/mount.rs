//! Mounting what containerd describes. (`cleanup` takes it down again.)
//!
//! A request is containerd's `Mount`: type, source, options as `mount(8)` spells them. Everything here blocks and is called
//! on a blocking thread, in the shim's own mount namespace.
//!
//! A bind mount is cloned first, given its flags while nobody sees it, and only then attached: what is mounted in the pod's
//! share appears in the tree that the guest is served at that moment, with the flags that it has at that moment.

mod options;

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2},
    mount::{MoveMountFlags, move_mount},
};

use crate::{
    engine_mounts::EngineMounts,
    idmap::{self, IdMapError, Layers},
    overlay,
    vmm_users::VmmUsers,
};
use options::{LOCKED, Options, attributes, parse};

/// `mount(2)` takes one page of options, with its final NUL.
const MAX_DATA: usize = 4095;

/// One mount, as containerd asks for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountRequest {
    /// File system type; `bind` for a bind mount.
    pub kind: String,
    /// Device or directory.
    pub source: String,
    /// Below the mount point; empty for the mount point itself.
    pub target: String,
    /// As `mount(8)` spells them.
    pub options: Vec<String>,
}

/// A mount that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot mount {source_path} ({kind}) on {target}: {reason}")]
    Refused {
        /// File system type.
        kind: String,
        /// What was to be mounted.
        source_path: String,
        /// Where.
        target: PathBuf,
        /// The kernel's reason.
        reason: io::Error,
    },
    /// Nothing to mount there.
    #[error("cannot mount {source_path}: no such file or directory on the host")]
    NoSource {
        /// What was to be mounted.
        source_path: String,
    },
    /// An option that husk does not offer.
    #[error("cannot mount {source_path} ({kind}): option {option:?} is not supported")]
    Option {
        /// File system type.
        kind: String,
        /// What was to be mounted.
        source_path: String,
        /// The option.
        option: String,
    },
    /// More options than the kernel takes.
    #[error(
        "cannot mount {kind} on {target}: its options take {length} bytes, the kernel takes {MAX_DATA} (too many layers)"
    )]
    TooLong {
        /// File system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// Bytes.
        length: usize,
    },
    /// Its owners cannot be shifted.
    #[error(
        "cannot mount {source_path} ({kind}): {reason}, which the VMM's user namespace takes (user_namespace = false in husk's config.toml does without it)"
    )]
    Owners {
        /// File system type.
        kind: String,
        /// What was to be mounted.
        source_path: String,
        /// What the kernel refused.
        reason: IdMapError,
    },
    /// The target leaves the mount point, or is not there.
    #[error("mount target {0:?} is not a path in the root file system without links")]
    Target(String),
}

/// Makes one mount on `base`, or below it where the request has a target; with `users`, so that the VMM owns what root does on the disk.
/// The source of a bind mount is the engine's.
///
/// # Errors
/// [`MountError`] naming source and target; [`MountError::Owners`] only with `users`.
pub fn apply(
    request: &MountRequest,
    base: &Path,
    users: Option<&VmmUsers>,
    engine: &EngineMounts,
) -> Result<(), MountError> {
    // Open until the mount is made: its path goes by the descriptor.
    let place = below(base, &request.target)?;
    let target = &place.path();
    // For people.
    let told = base.join(request.target.trim_start_matches('/'));
    let mut options = parse(request)?;
    options.flags |= LOCKED;
    let refused = |reason: io::Error| MountError::Refused {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        target: told.clone(),
        reason,
    };
    let not_shifted = |error: IdMapError| match error {
        IdMapError::Os(reason) => refused(reason),
        reason if users.is_some() => MountError::Owners {
            kind: request.kind.clone(),
            source_path: request.source.clone(),
            reason,
        },
        IdMapError::Unmappable(_, reason) => refused(reason),
    };
    let is_overlay = request.kind == "overlay";
    if options.flags.contains(MsFlags::MS_BIND) {
        let below = options.flags.contains(MsFlags::MS_REC);
        let source = Path::new(&request.source);
        let tree = engine
            .copy(source, below)
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => MountError::NoSource {
                    source_path: request.source.clone(),
                },
                _ => refused(error),
            })?;
        bind(&tree, source, target, &options, users).map_err(not_shifted)?;
    } else if options.idmap.is_some() && !is_overlay {
        return Err(MountError::Option {
            kind: request.kind.clone(),
            source_path: request.source.clone(),
            option: "uidmap".into(),
        });
    } else if let Some(idmap) = &options.idmap {
        // What the request maps are the lower layers: containerd gives the upper one to the users that are shown.
        let own = idmap.user_namespace().map_err(refused)?;
        let layers = Layers {
            lower: own.as_fd(),
            upper: users,
        };
        mapped_overlay(layers, target, &options).map_err(not_shifted)?;
    } else if is_overlay && let Some(users) = users {
        mapped_overlay(users.layers(), target, &options).map_err(not_shifted)?;
    } else if let Some(users) = users {
        mapped(request, target, &options, users).map_err(not_shifted)?;
    } else {
        let data = options.data.join(",");
        let length = data.len();
        if length <= MAX_DATA {
            mount_with(request, target, options.flags, &data).map_err(|e| refused(e.into()))?;
        } else if is_overlay {
            mount_many_layers(request, target, &options)?;
        } else {
            return Err(MountError::TooLong {
                kind: request.kind.clone(),
                target: told,
                length,
            });
        }
    }
    // What lies on top of a directory is not seen by the directory's descriptor.
    let is_seen = matches!(place, Place::Base(_));
    if is_overlay && is_seen && !options.flags.contains(MsFlags::MS_RDONLY) {
        overlay::ensure_writable(target, &options.data).map_err(refused)?;
    }
    Ok(())
}

/// [`apply`] with the mounts of the calling thread.
#[cfg(test)]
pub fn apply_here(
    request: &MountRequest,
    base: &Path,
    users: Option<&VmmUsers>,
) -> Result<(), MountError> {
    apply(
        request,
        base,
        users,
        &EngineMounts::of_this_thread().unwrap(),
    )
}

/// Attaches a copy of what is mounted at `source`, flags and all. Flags hold for the mounts below as well where those come along. What the
/// request maps itself has no file of root's.
fn bind(
    tree: &OwnedFd,
    source: &Path,
    target: &Path,
    options: &Options,
    users: Option<&VmmUsers>,
) -> Result<(), IdMapError> {
    let below = options.flags.contains(MsFlags::MS_REC);
    // What is mounted in the pod's share is not to reach the engine's mounts.
    set_attributes(tree.as_fd(), below, (0, 0), MsFlags::MS_SLAVE, None)?;
    let (set, clear) = attributes(options.flags);
    if set != 0 {
        set_attributes(tree.as_fd(), below, (set, clear), MsFlags::empty(), None)?;
    }
    if let Some(idmap) = &options.idmap {
        idmap::map(tree, false, idmap.user_namespace()?.as_fd(), source)?;
    } else if let Some(users) = users {
        users.map(tree.as_fd(), below, source)?;
    }
    let kind = options.propagation - MsFlags::MS_REC;
    if !kind.is_empty() {
        let below = options.propagation.contains(MsFlags::MS_REC);
        set_attributes(tree.as_fd(), below, (0, 0), kind, None)?;
    }
    Ok(attach(tree, target)?)
}

fn mapped_overlay(layers: Layers<'_>, target: &Path, options: &Options) -> Result<(), IdMapError> {
    let tree = idmap::overlay(layers, target, options.flags, &options.data)?;
    Ok(attach(&tree, target)?)
}

/// A file system of its own: mounted where nobody sees it, to be mapped before it is attached.
fn mapped(
    request: &MountRequest,
    target: &Path,
    options: &Options,
    users: &VmmUsers,
) -> Result<(), IdMapError> {
    let tree = idmap::unseen(|| {
        mount_with(request, target, options.flags, &options.data.join(","))?;
        let tree = idmap::clone(target)?;
        users.map(tree.as_fd(), false, Path::new(&request.source))?;
        Ok(tree)
    })?;
    Ok(attach(&tree, target)?)
}

fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    // The target may be a descriptor's link in /proc.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(tree, c"", CWD, target, flags)?)
}

/// Changes a mount that is not attached yet, with those below it if `below`. `userns` comes with `MOUNT_ATTR_IDMAP`.
#[allow(unsafe_code, reason = "neither nix nor rustix has mount_setattr(2)")]
pub(crate) fn set_attributes(
    tree: BorrowedFd<'_>,
    below: bool,
    (attr_set, attr_clr): (u64, u64),
    propagation: MsFlags,
    userns: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let userns = userns.map_or(0, |fd| fd.as_raw_fd());
    let attributes = libc::mount_attr {
        attr_set,
        attr_clr,
        propagation: propagation.bits(),
        userns_fd: u64::try_from(userns).unwrap_or(0),
    };
    let recursive = if below { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads an empty string with its NUL and a mount_attr of the size given, both alive during the call,
    // and writes nothing of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mount_with(
    request: &MountRequest,
    target: &Path,
    flags: MsFlags,
    data: &str,
) -> nix::Result<()> {
    let data = (!data.is_empty()).then_some(data);
    mount(
        Some(request.source.as_str()),
        target,
        Some(request.kind.as_str()),
        flags,
        data,
    )
}

/// An overlay of so many layers that their paths exceed a page: with the layers' common directory as working directory, they
/// are named relative to it. A working directory belongs to a process, so a thread of its own gives it up first.
fn mount_many_layers(
    request: &MountRequest,
    target: &Path,
    options: &Options,
) -> Result<(), MountError> {
    let too_long = |length| MountError::TooLong {
        kind: request.kind.clone(),
        target: target.to_owned(),
        length,
    };
    let refused = |reason: io::Error| MountError::Refused {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        target: target.to_owned(),
        reason,
    };
    let (common, data) = relative_layers(&options.data);
    let data = data.join(",");
    if data.len() > MAX_DATA {
        return Err(too_long(data.len()));
    }
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_FS)?;
                nix::unistd::chdir(&common)?;
                mount_with(request, target, options.flags, &data)
            })
            .join()
            .unwrap_or(Err(nix::errno::Errno::EIO))
            .map_err(|errno| refused(errno.into()))
    })
}

/// The layers' common directory, and the options with the layers relative to it.
fn relative_layers(data: &[String]) -> (PathBuf, Vec<String>) {
    let layers: Vec<&Path> = data
        .iter()
        .filter_map(|option| option.strip_prefix("lowerdir="))
        .flat_map(|list| list.split(':'))
        .map(Path::new)
        .collect();
    let mut common = layers
        .first()
        .and_then(|layer| layer.parent())
        .unwrap_or(Path::new("/"));
    while !layers.iter().all(|layer| layer.starts_with(common)) {
        common = common.parent().unwrap_or(Path::new("/"));
    }
    let relative = |option: &String| match option.strip_prefix("lowerdir=") {
        None => option.clone(),
        Some(list) => {
            let list: Vec<String> = list
                .split(':')
                .map(|layer| {
                    let layer = Path::new(layer);
                    layer
                        .strip_prefix(common)
                        .unwrap_or(layer)
                        .display()
                        .to_string()
                })
                .collect();
            format!("lowerdir={}", list.join(":"))
        }
    };
    (common.to_owned(), data.iter().map(relative).collect())
}

/// Where a mount goes.
enum Place {
    /// A directory of the shim's own.
    Base(PathBuf),
    /// One below it, where what has been mounted there is the image's, and the guest may be changing it.
    Below(OwnedFd),
}

impl Place {
    fn path(&self) -> PathBuf {
        match self {
            Self::Base(path) => path.clone(),
            Self::Below(place) => format!("/proc/self/fd/{}", place.as_raw_fd()).into(),
        }
    }
}

/// A directory or file below `base`, to which neither `..` nor a link leads out of it.
fn below(base: &Path, target: &str) -> Result<Place, MountError> {
    let inside: PathBuf = Path::new(target)
        .components()
        .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
        .collect();
    if inside.as_os_str().is_empty() {
        return Ok(Place::Base(base.to_owned()));
    }
    let no = |_| MountError::Target(target.to_owned());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat(CWD, base, flags | OFlags::DIRECTORY, Mode::empty()).map_err(no)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let place = openat2(&root, &inside, flags, Mode::empty(), resolve).map_err(no)?;
    Ok(Place::Below(place))
}

#[cfg(test)]
mod tests;
