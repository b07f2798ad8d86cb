//! Mounting what containerd describes. (`cleanup` takes it down again.)
//!
//! A request is containerd's `Mount`: type, source, options as `mount(8)` spells them. Everything here blocks and is called
//! on a blocking thread, in the shim's own mount namespace.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

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
    /// The target leaves the mount point.
    #[error("mount target {0:?} leaves the root file system")]
    Target(String),
}

/// Flags and data of a list of options.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    propagation: MsFlags,
    data: Vec<String>,
}

/// `Some((set, flag))` for an option that is a flag.
fn flag(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "suid" => (false, MsFlags::MS_NOSUID),
        "nodev" => (true, MsFlags::MS_NODEV),
        "dev" => (false, MsFlags::MS_NODEV),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "atime" => (false, MsFlags::MS_NOATIME),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "bind" => (true, MsFlags::MS_BIND),
        "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MsFlags> {
    let recursive = option.starts_with('r');
    let flag = match option.strip_prefix('r').unwrap_or(option) {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(if recursive {
        flag | MsFlags::MS_REC
    } else {
        flag
    })
}

fn parse(request: &MountRequest) -> Result<Options, MountError> {
    let mut options = Options {
        flags: MsFlags::empty(),
        propagation: MsFlags::empty(),
        data: Vec::new(),
    };
    if request.kind == "bind" {
        options.flags |= MsFlags::MS_BIND;
    } else if request.kind == "rbind" {
        options.flags |= MsFlags::MS_BIND | MsFlags::MS_REC;
    }
    for option in &request.options {
        if let Some((set, flag)) = flag(option) {
            options.flags.set(flag, set);
        } else if let Some(flag) = propagation(option) {
            options.propagation |= flag;
        } else if option == "loop" {
            return Err(MountError::Option {
                kind: request.kind.clone(),
                source_path: request.source.clone(),
                option: option.clone(),
            });
        } else if option != "defaults" && !option.is_empty() {
            options.data.push(option.clone());
        }
    }
    Ok(options)
}

/// Makes one mount on `base`, or below it where the request has a target.
///
/// # Errors
/// [`MountError`] naming source and target.
pub fn apply(request: &MountRequest, base: &Path) -> Result<(), MountError> {
    let target = below(base, &request.target)?;
    let options = parse(request)?;
    let refused = |errno: nix::errno::Errno| MountError::Refused {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        target: target.clone(),
        reason: errno.into(),
    };
    if options.flags.contains(MsFlags::MS_BIND) {
        if !Path::new(&request.source).exists() {
            return Err(MountError::NoSource {
                source_path: request.source.clone(),
            });
        }
        let bind = options.flags & (MsFlags::MS_BIND | MsFlags::MS_REC);
        mount(
            Some(request.source.as_str()),
            &target,
            None::<&str>,
            bind,
            None::<&str>,
        )
        .map_err(refused)?;
        // A bind mount takes its flags only when it is mounted again.
        let rest = options.flags - (MsFlags::MS_BIND | MsFlags::MS_REC);
        if !rest.is_empty() {
            let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(None::<&str>, &target, None::<&str>, again, None::<&str>).map_err(refused)?;
        }
    } else {
        let length = options.data.join(",").len();
        if length <= MAX_DATA {
            let data = options.data.join(",");
            mount_with(request, &target, options.flags, &data).map_err(refused)?;
        } else if request.kind == "overlay" {
            mount_many_layers(request, &target, &options)?;
        } else {
            return Err(MountError::TooLong {
                kind: request.kind.clone(),
                target,
                length,
            });
        }
    }
    if !options.propagation.is_empty() {
        mount(
            None::<&str>,
            &target,
            None::<&str>,
            options.propagation,
            None::<&str>,
        )
        .map_err(refused)?;
    }
    Ok(())
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

/// A path below `base` that does not climb out of it.
fn below(base: &Path, target: &str) -> Result<PathBuf, MountError> {
    let mut path = base.to_owned();
    for component in Path::new(target).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(MountError::Target(target.to_owned()));
            }
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: &str, options: &[&str]) -> MountRequest {
        MountRequest {
            kind: kind.into(),
            source: "/s".into(),
            target: String::new(),
            options: options.iter().map(|&o| o.into()).collect(),
        }
    }

    #[test]
    fn options_are_flags_propagation_or_data() {
        let options = parse(&request(
            "overlay",
            &["ro", "rw", "nodev", "index=off", "rslave", "lowerdir=/a:/b"],
        ))
        .unwrap();
        assert_eq!(options.flags, MsFlags::MS_NODEV);
        assert_eq!(options.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(options.data, ["index=off", "lowerdir=/a:/b"]);
        let bind = parse(&request("bind", &["rbind", "ro"])).unwrap();
        assert_eq!(
            bind.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY
        );
        assert!(parse(&request("ext4", &["loop"])).is_err());
    }

    #[test]
    fn relative_and_rprivate_are_not_confused() {
        assert_eq!(propagation("relatime"), None);
        assert_eq!(
            propagation("rprivate"),
            Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC)
        );
        assert_eq!(propagation("private"), Some(MsFlags::MS_PRIVATE));
    }

    #[test]
    fn a_target_stays_inside() {
        let base = Path::new("/base");
        assert_eq!(below(base, "").unwrap(), base);
        assert_eq!(below(base, "/a/./b").unwrap(), Path::new("/base/a/b"));
        assert!(below(base, "a/../../b").is_err());
    }

    #[test]
    fn layers_become_relative_to_what_they_share() {
        let data = [
            "index=off".to_owned(),
            "lowerdir=/v/s/1/fs:/v/s/22/fs".to_owned(),
            "upperdir=/v/s/3/fs".to_owned(),
        ];
        let (common, data) = relative_layers(&data);
        assert_eq!(common, Path::new("/v/s"));
        assert_eq!(
            data,
            ["index=off", "lowerdir=1/fs:22/fs", "upperdir=/v/s/3/fs"]
        );
    }

    #[test]
    fn a_missing_source_is_named() {
        let mut request = request("bind", &["rbind"]);
        request.source = "/no/such/dir".into();
        let error = apply(&request, Path::new("/tmp")).unwrap_err().to_string();
        assert!(
            error.contains("/no/such/dir") && error.contains("no such file"),
            "{error}"
        );
    }
}
