//! Volumes of huge pages: a hugetlbfs of the guest each.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use rustix::fs::{fstatfs, mkdirat};
use rustix::io::Errno;

use super::apply::set;
use super::list::{EntryPath, Kind, Plan};
use crate::directory;
use crate::error::AgentError;
use crate::huge_pages;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Mounts the volume, where it is not mounted yet. `base` is the directory at `path`.
pub(super) fn make(base: &OwnedFd, path: &Path, plan: &Plan) -> Result<(), AgentError> {
    make_at(base, path, plan).map_err(|e| {
        AgentError::guest(format!("mounting {:?}, a volume of huge pages", plan.id), e)
    })
}

fn make_at(base: &OwnedFd, path: &Path, plan: &Plan) -> io::Result<()> {
    let name = OsStr::new(&plan.id);
    match mkdirat(base, name, rustix::fs::Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    huge_pages::give()?;
    if fstatfs(directory::open(base, name)?)?.f_type == HUGETLBFS_MAGIC {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let pages = Some("pagesize=2M");
    mount(
        Some("nodev"),
        &path.join(name),
        Some("hugetlbfs"),
        flags,
        pages,
    )?;
    // Not by mount options: they have no set-group-ID bit, which a pod's fsGroup comes with.
    if let Some(Kind::Directory(attributes)) = plan.entries.get(&EntryPath::default()) {
        set(directory::open(base, name)?, *attributes)?;
    }
    Ok(())
}
