//! Options as `mount(8)` spells them.

use nix::mount::MsFlags;

use super::{MountError, MountRequest};
use crate::idmap::IdMap;

/// Flags and data of a list of options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Those of mount(2).
    pub flags: MsFlags,
    /// Of a bind mount towards its source; a fresh file system has nobody to hear from.
    pub propagation: MsFlags,
    /// The file system's own.
    pub data: Vec<String>,
    /// Whose the files are shown as, where not their owners'.
    pub idmap: Option<IdMap>,
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

pub(super) fn propagation(option: &str) -> Option<MsFlags> {
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

/// What every mount has, whatever is asked for. Nobody on the host opens a device or runs a program of a container's; what the container
/// may do with them is for the guest to say, whose mounts do not see these flags.
pub const LOCKED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Reads a request's options.
///
/// # Errors
/// [`MountError::Option`].
pub fn parse(request: &MountRequest) -> Result<Options, MountError> {
    let mut options = Options {
        flags: MsFlags::empty(),
        propagation: MsFlags::empty(),
        data: Vec::new(),
        idmap: None,
    };
    let (mut uids, mut gids) = (None, None);
    let unsupported = |option: &str| MountError::Option {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        option: option.to_owned(),
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
        } else if let Some(ranges) = option.strip_prefix("uidmap=") {
            uids = Some(ranges);
        } else if let Some(ranges) = option.strip_prefix("gidmap=") {
            gids = Some(ranges);
        } else if option == "loop" {
            return Err(unsupported(option));
        } else if option != "defaults" && !option.is_empty() {
            options.data.push(option.clone());
        }
    }
    if uids.is_some() || gids.is_some() {
        let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
        let idmap = IdMap::parse(uids, gids);
        let told = || unsupported(&format!("uidmap={uids},gidmap={gids}"));
        options.idmap = Some(idmap.ok_or_else(told)?);
    }
    Ok(options)
}

/// Attributes to set and to clear for the flags of mount(2); those of a whole file system are not a bind mount's.
pub fn attributes(flags: MsFlags) -> (u64, u64) {
    let pairs = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    ];
    let set = pairs
        .iter()
        .filter(|(flag, _)| flags.contains(*flag))
        .fold(0, |set, (_, attribute)| set | attribute);
    // One of three, of which the kernel's default has the value 0.
    let atime = if flags.contains(MsFlags::MS_NOATIME) {
        libc::MOUNT_ATTR_NOATIME
    } else if flags.contains(MsFlags::MS_STRICTATIME) {
        libc::MOUNT_ATTR_STRICTATIME
    } else {
        return (set, 0);
    };
    (set | atime, libc::MOUNT_ATTR__ATIME)
}
