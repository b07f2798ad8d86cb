//! `/dev` of a container: the nodes every container has, those of the spec, and the usual links.
//!
//! Nodes are made with mknod; where the kernel refuses (a user namespace, a file system without devices), the
//! guest's own node is bound instead.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxIdMapping, Spec};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Uid, chownat, makedev, mknodat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::error::{LaunchError, OsError};
use super::paths::{Missing, resolve_parent};
use super::rootfs::{attach_device, guest_device};

/// Name, major and minor of the character devices that the spec gives every container.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links below /dev, and where they lead.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

#[derive(Debug, Clone)]
struct Node {
    path: PathBuf,
    kind: FileType,
    device: u64,
    mode: u32,
    owner: (u32, u32),
}

impl Node {
    fn default_nodes() -> impl Iterator<Item = Self> {
        DEFAULT_DEVICES.iter().map(|(path, major, minor)| Self {
            path: PathBuf::from(path),
            kind: FileType::CharacterDevice,
            device: makedev(*major, *minor),
            mode: 0o666,
            owner: (0, 0),
        })
    }

    fn from_spec(device: &LinuxDevice, spec: &Spec) -> Result<Self, LaunchError> {
        let kind = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(LaunchError::invalid(format!(
                    "device {:?}: \"a\" is not the type of a node",
                    device.path()
                )));
            }
        };
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| {
                LaunchError::invalid(format!(
                    "device {:?}: {value} is not a device number",
                    device.path()
                ))
            })
        };
        let linux = spec.linux().as_ref();
        let uid_map = linux.and_then(|linux| linux.uid_mappings().as_deref());
        let gid_map = linux.and_then(|linux| linux.gid_mappings().as_deref());
        let device_number = if kind == FileType::Fifo {
            0
        } else {
            makedev(number(device.major())?, number(device.minor())?)
        };
        Ok(Self {
            path: device.path().clone(),
            kind,
            device: device_number,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            owner: (
                to_container(uid_map, device.uid().unwrap_or(0)),
                to_container(gid_map, device.gid().unwrap_or(0)),
            ),
        })
    }
}

/// The spec's owner is an id of the guest: inside the user namespace it has another number.
fn to_container(map: Option<&[LinuxIdMapping]>, id: u32) -> u32 {
    map.unwrap_or_default()
        .iter()
        .find_map(|range| {
            let offset = id.checked_sub(range.host_id())?;
            (offset < range.size()).then(|| range.container_id().checked_add(offset))?
        })
        .unwrap_or(id)
}

/// The nodes to make, and the guest's own to bind where mknod is known to fail.
#[derive(Debug)]
pub(crate) struct Prepare {
    nodes: Vec<(Node, Option<OwnedFd>)>,
}

impl Prepare {
    /// Collects the nodes; in a user namespace opens the guest's, as none can be made there.
    pub(crate) fn open(spec: &Spec, user_namespace: bool) -> Result<Self, LaunchError> {
        let from_spec = spec
            .linux()
            .iter()
            .filter_map(|linux| linux.devices().as_ref())
            .flatten()
            // Always a link into the container's own devpts.
            .filter(|device| device.path() != Path::new("/dev/ptmx"))
            .map(|device| Node::from_spec(device, spec))
            .collect::<Result<Vec<_>, _>>()?;
        let nodes = Node::default_nodes()
            .filter(|node| !from_spec.iter().any(|other| other.path == node.path))
            .chain(from_spec.iter().cloned())
            .map(|node| {
                let source = if user_namespace && node.kind != FileType::Fifo {
                    guest_device(&node.path).ok()
                } else {
                    None
                };
                (node, source)
            })
            .collect();
        Ok(Self { nodes })
    }

    /// Makes nodes and links below `root`.
    pub(crate) fn make(self, root: &OwnedFd) -> Result<(), LaunchError> {
        let old_umask = rustix::process::umask(Mode::empty());
        let result = self
            .nodes
            .into_iter()
            .try_for_each(|(node, source)| make_node(root, &node, source))
            .and_then(|()| make_links(root));
        rustix::process::umask(old_umask);
        result
    }
}

fn make_node(root: &OwnedFd, node: &Node, source: Option<OwnedFd>) -> Result<(), LaunchError> {
    let failed = |errno: Errno| {
        LaunchError::internal(format!(
            "creating device {}: {}",
            node.path.display(),
            errno.text()
        ))
    };
    if let Some(source) = source {
        return attach_device(source, root, &node.path).map_err(failed);
    }
    let (parent, name) =
        resolve_parent(root, &node.path, Missing::MakeDirectory).map_err(failed)?;
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(&parent, &name, node.kind, mode, node.device) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(Errno::PERM) => {
            let source = guest_device(&node.path)?;
            return attach_device(source, root, &node.path).map_err(failed);
        }
        Err(errno) => return Err(failed(errno)),
    }
    let (uid, gid) = node.owner;
    if (uid, gid) != (0, 0) {
        chownat(
            &parent,
            &name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed)?;
    }
    Ok(())
}

fn make_links(root: impl AsFd) -> Result<(), LaunchError> {
    let root = root.as_fd();
    for (link, target) in LINKS {
        let failed = |errno: Errno| {
            LaunchError::internal(format!("linking {link} to {target}: {}", errno.text()))
        };
        let (parent, name) =
            resolve_parent(root, Path::new(link), Missing::MakeDirectory).map_err(failed)?;
        if link == "/dev/ptmx" {
            // An image's own node would lead to the guest's terminals.
            match unlinkat(&parent, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        match symlinkat(target, &parent, &name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_mapped_into_the_namespace() {
        let map: Vec<LinuxIdMapping> =
            serde_json::from_str(r#"[{"containerID": 0, "hostID": 1000, "size": 10}]"#).unwrap();
        assert_eq!(to_container(Some(&map), 1003), 3);
        assert_eq!(to_container(Some(&map), 1010), 1010);
        assert_eq!(to_container(None, 7), 7);
    }
}
