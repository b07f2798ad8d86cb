//! A spec's mounts, as far as they are the host's business: bind mounts of what lies on this host.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tracing::info;

use super::BundleSpec;

/// A bind mount of the spec whose source is on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Its place in the spec's list.
    pub index: usize,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Mount points below the source come along (`rbind`).
    pub recursive: bool,
    /// The container may only read it.
    pub read_only: bool,
    /// What the host mounts below the source later does not follow.
    pub private: bool,
    /// Mount options (`uidmap=`, `gidmap=`) that show the files as others'; none where they keep their owners.
    pub id_maps: Vec<String>,
    /// The same, for what is no mount of this host.
    pub owners: Owners,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) destination: String,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) source: Option<PathBuf>,
    pub(super) options: Option<Vec<String>>,
    pub(super) uid_mappings: Option<Vec<IdRange>>,
    pub(super) gid_mappings: Option<Vec<IdRange>>,
}

/// A volume that the kubelet keeps up to date and that the container only reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptVolume {
    /// Its place in the spec's list of mounts.
    pub index: usize,
    /// The directory on the host.
    pub source: PathBuf,
    /// Whose the container sees its files as.
    pub owners: Owners,
}

/// Whose files are shown as whose: nobody's are changed where there are no ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl Owners {
    /// The user that a user on the disk is shown as.
    pub fn user(&self, uid: u32) -> u32 {
        shown_as(&self.uids, uid)
    }

    /// The group.
    pub fn group(&self, gid: u32) -> u32 {
        shown_as(&self.gids, gid)
    }
}

/// What an id-mapped mount shows where an id is in no range: the kernel's `overflowuid`.
const NOBODY: u32 = 65534;

fn shown_as(ranges: &[IdRange], id: u32) -> u32 {
    if ranges.is_empty() {
        return id;
    }
    let shown = ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.container)?;
        (offset < range.size).then(|| range.host.checked_add(offset))?
    });
    shown.unwrap_or(NOBODY)
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct IdRange {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

impl IdRange {
    /// As `uid_map` of user_namespaces(7) has it.
    pub(super) fn line(&self) -> String {
        format!("{} {} {}\n", self.container, self.host, self.size)
    }
}

impl BundleSpec {
    /// Bind mounts whose source lies on this host and must be shared. Those of the kernel's own trees are not among
    /// them, nor is the pod's `/dev/shm`: in the guest they mean the guest's.
    pub fn bind_mounts(&self) -> Vec<BindMount> {
        let mounts = self.read.mounts.as_deref().unwrap_or_default();
        let mut binds = Vec::new();
        for (index, mount) in mounts.iter().enumerate() {
            let Some(recursive) = mount.bind_kind() else {
                continue;
            };
            if self.pod_shm.is_some_and(|shm| shm.index == index) {
                continue;
            }
            let source = self
                .bundle
                .join(mount.source.as_deref().unwrap_or(Path::new("")));
            if is_kernel_tree(&source) {
                info!(source = %source.display(), "a bind mount of the kernel's own tree: the container gets the guest's");
                continue;
            }
            let read_only = mount.is_read_only();
            let private = mount.is_private();
            if read_only && private == Some(false) {
                info!(source = %source.display(), "a read-only bind mount: what the host mounts below it later does not follow");
            }
            binds.push(BindMount {
                index,
                source,
                recursive,
                read_only,
                // A later mount would come writable.
                private: read_only || private == Some(true),
                id_maps: mount.id_maps(),
                owners: mount.owners(),
            });
        }
        binds
    }

    /// Where the n-th mount goes in the container, for messages.
    pub fn mount_destination(&self, index: usize) -> String {
        let mounts = self.read.mounts.as_deref().unwrap_or_default();
        mounts
            .get(index)
            .map(|mount| mount.destination.clone())
            .unwrap_or_default()
    }
}

impl Mount {
    /// `Some(recursive)` for a bind mount.
    pub(super) fn bind_kind(&self) -> Option<bool> {
        let kind = self.kind.as_deref().unwrap_or_default();
        let has = |name: &str| kind == name || self.options.iter().flatten().any(|o| o == name);
        (has("bind") || has("rbind")).then(|| has("rbind"))
    }

    /// The last word counts, as with `mount(8)`.
    pub(super) fn is_read_only(&self) -> bool {
        let said = self
            .options
            .iter()
            .flatten()
            .rfind(|o| matches!(o.as_str(), "ro" | "rro" | "rw" | "rrw"));
        said.is_some_and(|o| o.ends_with("ro"))
    }

    /// `None` where the spec does not say.
    fn is_private(&self) -> Option<bool> {
        self.propagation()
            .map(|kind| matches!(kind, "private" | "unbindable"))
    }

    /// Whether what the container mounts there is to appear on the host.
    pub(super) fn spreads_to_host(&self) -> bool {
        let of_host = |source: &PathBuf| !is_kernel_tree(source);
        self.bind_kind().is_some()
            && self.propagation() == Some("shared")
            && self.source.as_ref().is_some_and(of_host)
    }

    /// As what a copy of the files is to have.
    pub(super) fn owners(&self) -> Owners {
        Owners {
            uids: self.uid_mappings.clone().unwrap_or_default(),
            gids: self.gid_mappings.clone().unwrap_or_default(),
        }
    }

    /// As options of a mount on this host.
    fn id_maps(&self) -> Vec<String> {
        let option = |name: &str, ranges: &Option<Vec<IdRange>>| {
            let range = |r: &IdRange| format!("{}:{}:{}", r.container, r.host, r.size);
            let list: Vec<String> = ranges.iter().flatten().map(range).collect();
            (!list.is_empty()).then(|| format!("{name}={}", list.join(",")))
        };
        let maps = [
            option("uidmap", &self.uid_mappings),
            option("gidmap", &self.gid_mappings),
        ];
        maps.into_iter().flatten().collect()
    }

    /// Without the `r`; the last one counts.
    fn propagation(&self) -> Option<&str> {
        let options = self.options.iter().flatten();
        let kinds = options.map(|o| o.strip_prefix('r').unwrap_or(o));
        kinds
            .rev()
            .find(|o| matches!(*o, "private" | "slave" | "shared" | "unbindable"))
    }
}

/// Trees that every kernel makes for itself. A host's device node, process or cgroup has no meaning in the guest. Its huge pages have none
/// either, but where systemd mounts them, only hosts have something.
fn is_kernel_tree(source: &Path) -> bool {
    let is_below = |tree: &&str| source.starts_with(tree);
    ["/dev", "/proc", "/sys"].iter().any(is_below) && !is_below(&"/dev/hugepages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_shown_as_an_id_mapped_mount_shows_them() {
        let range = |container, host, size| IdRange {
            container,
            host,
            size,
        };
        let owners = Owners {
            uids: vec![range(0, 65536, 1000), range(2000, u32::MAX, 5)],
            gids: Vec::new(),
        };
        assert_eq!((owners.user(0), owners.user(999)), (65536, 66535));
        assert_eq!((owners.user(1000), owners.user(2001)), (NOBODY, NOBODY));
        assert_eq!(owners.group(7), 7);
    }
}
