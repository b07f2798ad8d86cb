//! Volumes of huge pages (emptyDir of medium HugePages): a hugetlbfs that the kubelet mounts for the pod.
//!
//! Its pages are the host's and cannot be mapped through virtio-fs, so the guest has a hugetlbfs of its own in its place, with pages of
//! the VM's memory. It is the same for all containers that mount the directory, from the first of them to the pod's end. What is in the
//! host's is not seen: the kubelet makes such a volume empty, for one pod. A subPath of one is another directory, and so a volume by itself.

use std::{
    fs::Metadata,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
};

use husk_protocol::{
    HUGE_PAGE_BYTES,
    agent::{SyncVolumeRequest, VolumeEntry},
    guest_path,
};

use crate::spec::Owners;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Bytes of the pages of the hugetlbfs that holds this directory; `None` where another file system does. Blocks.
pub fn page_size(directory: impl AsFd) -> Option<u64> {
    // A file system of FUSE need not tell; a hugetlbfs always does.
    let stat = rustix::fs::fstatfs(directory).ok()?;
    let is_huge = u64::try_from(stat.f_type) == Ok(HUGETLBFS_MAGIC);
    is_huge.then(|| u64::try_from(stat.f_bsize).unwrap_or(0))
}

/// Whether a guest has pages of this size.
pub fn are_possible(page_size: u64) -> bool {
    page_size == HUGE_PAGE_BYTES
}

/// What the guest makes in place of a directory of huge pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugeVolume {
    id: String,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl HugeVolume {
    /// In place of the directory that this is of, its owner shown as these.
    pub fn of(directory: &Metadata, owners: &Owners) -> Self {
        Self {
            // The same for every container that mounts this directory.
            id: format!("huge-{}-{}", directory.dev(), directory.ino()),
            mode: directory.mode() & 0o7777,
            uid: owners.user(directory.uid()),
            gid: owners.group(directory.gid()),
        }
    }

    /// Where it is in the guest.
    pub fn guest_path(&self) -> String {
        format!("{}/{}", guest_path::VOLUMES, self.id)
    }

    /// What the agent is asked for. It can be repeated.
    pub fn request(&self) -> SyncVolumeRequest {
        SyncVolumeRequest {
            volume_id: self.id.clone(),
            entries: vec![VolumeEntry {
                mode: self.mode,
                uid: self.uid,
                gid: self.gid,
                ..Default::default()
            }],
            huge_pages: true,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn other_directories_are_not_concerned() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(page_size(fs::File::open(dir.path()).unwrap()), None);
    }

    #[test]
    fn a_directory_is_one_volume_whatever_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let (at, link) = (dir.path().join("at"), dir.path().join("link"));
        fs::create_dir(&at).unwrap();
        std::os::unix::fs::symlink(&at, &link).unwrap();
        let of = |path: &Path| HugeVolume::of(&fs::metadata(path).unwrap(), &Owners::default());
        assert_eq!(of(&at), of(&link));
        assert_ne!(of(&at).guest_path(), of(dir.path()).guest_path());
        assert_eq!(of(&at).request().entries[0].mode, 0o755);
    }
}
