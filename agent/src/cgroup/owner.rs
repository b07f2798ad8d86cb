//! To whom a container's cgroup belongs (OCI runtime specification, config-linux.md, "Cgroup ownership").
//!
//! systemd as a container's PID 1 makes cgroups of its own below the container's. The guest's root may do so wherever the mount is writable; anybody
//! else, the root of a user namespace among them, has to be its owner. Limits are no part of it: their files stay root's.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::container::mount_options::{MountOptions, attr};

/// Where the kernel lists the files to hand over.
const DELEGATE: &str = "/sys/kernel/cgroup/delegate";
/// The specification's own list, for a kernel that has none.
const FILES: &str = "cgroup.procs cgroup.subtree_control cgroup.threads";

/// The user of the guest whose the container's cgroup is to be: who its process is, where that is not the guest's root and the container sees
/// its own cgroups, and may write to them.
pub(crate) fn owner(spec: &Spec) -> Option<u32> {
    let linux = spec.linux().as_ref()?;
    let namespaces = linux.namespaces().iter().flatten();
    let has = |typ| namespaces.clone().any(|namespace| namespace.typ() == typ);
    if !has(LinuxNamespaceType::Cgroup) || !is_writable(spec) {
        return None;
    }
    let uid = spec.process().as_ref()?.user().uid();
    let in_guest = if has(LinuxNamespaceType::User) {
        linux.uid_mappings().iter().flatten().find_map(|range| {
            let offset = uid.checked_sub(range.container_id())?;
            (offset < range.size()).then(|| range.host_id().checked_add(offset))?
        })?
    } else {
        uid
    };
    (in_guest != 0).then_some(in_guest)
}

fn is_writable(spec: &Spec) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| {
        let is_cgroup = matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"));
        let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default());
        is_cgroup
            && mount.destination() == Path::new("/sys/fs/cgroup")
            && options.is_ok_and(|options| options.attributes.set & attr::RDONLY == 0)
    })
}

/// Hands a cgroup over: its directory, and the files by which its owner makes and fills others below it.
pub(super) fn hand_over(cgroup: &Path, owner: u32) -> io::Result<()> {
    chown(cgroup, Some(owner), None)?;
    let listed = fs::read_to_string(DELEGATE).unwrap_or_else(|_| FILES.to_owned());
    for name in listed.split_ascii_whitespace() {
        match chown(cgroup.join(name), Some(owner), None) {
            // Of a controller that this cgroup does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(change: impl FnOnce(&mut Value)) -> Option<u32> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 1, "gid": 1}, "cwd": "/", "args": ["init"]},
            "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw", "nosuid"]}],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "cgroup"}],
                "uidMappings": [{"containerID": 0, "hostID": 5000, "size": 1}, {"containerID": 1, "hostID": 7000, "size": 10}],
            },
        });
        change(&mut spec);
        owner(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn a_cgroup_belongs_to_who_runs_in_it_where_it_may_be_written_to() {
        assert_eq!(of(|_| ()), Some(1));
        assert_eq!(of(|spec| spec["process"]["user"]["uid"] = json!(0)), None);
        let mapped = |uid: u32| {
            of(|spec| {
                spec["process"]["user"]["uid"] = json!(uid);
                let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.push(json!({"type": "user"}));
            })
        };
        assert_eq!(mapped(0), Some(5000));
        assert_eq!(mapped(3), Some(7002));
        assert_eq!(mapped(11), None);
        for (pointer, value) in [
            ("/mounts/0/options", json!(["ro"])),
            ("/mounts/0/destination", json!("/mnt")),
            ("/mounts/0/type", json!("tmpfs")),
            ("/linux/namespaces/1/type", json!("ipc")),
        ] {
            let owner = of(|spec| *spec.pointer_mut(pointer).unwrap() = value.clone());
            assert_eq!(owner, None, "{pointer} {value}");
        }
    }

    #[test]
    fn only_files_that_are_there_are_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        // As root, or to oneself.
        let own = nix::unistd::getuid().as_raw();
        hand_over(dir.path(), own).unwrap();
        assert!(hand_over(&dir.path().join("missing"), own).is_err());
    }
}
