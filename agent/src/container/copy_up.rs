//! tmpcopyup: a tmpfs that starts with what the image has at its mount point.
//!
//! The mount point may lie in a volume to which another container writes meanwhile, and the guest's own root is still in reach. So each name
//! is opened once, in a directory that is open, and not followed; what it is and what it holds are asked of that descriptor. Nobody else
//! sees the tmpfs yet.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, fstat, mkdirat,
    mknodat, openat, readlinkat, symlinkat,
};
use rustix::io::Errno;

use crate::directory;

/// How deep a tree may be: each level takes descriptors.
const MAX_DEPTH: usize = 128;

/// Copies the content of one directory into another: owners, modes, links; not times.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let this = OsStr::new(".");
    let (from, to) = (directory::open(from, this)?, directory::open(to, this)?);
    copy_entries(&from, &to, MAX_DEPTH)?;
    Ok(own_like(&to, this, &fstat(&from)?)?)
}

fn copy_entries(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    let below = depth.checked_sub(1).ok_or(Errno::NAMETOOLONG)?;
    for name in &directory::names(from)? {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let source = openat(from, name, flags, Mode::empty())?;
        let stat = fstat(&source)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mode = Mode::from_raw_mode(stat.st_mode);
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let source = directory::open(&source, OsStr::new("."))?;
                copy_entries(&source, &directory::open(to, name)?, below)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(&source, "", Vec::new())?, to, name)?;
            }
            FileType::RegularFile => copy_file(&source, &stat, to, name)?,
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
                mknodat(to, name, kind, mode, stat.st_rdev)?;
            }
            // A socket is of no use without its listener.
            FileType::Socket | FileType::Unknown => continue,
        }
        own_like(to, name, &stat)?;
        if kind != FileType::Symlink {
            chmodat(to, name, mode, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// As much of it as there was when it was looked at: somebody may write to it without end.
fn copy_file(source: &OwnedFd, stat: &Stat, to: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let again = format!("/proc/self/fd/{}", source.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let source = File::from(openat(CWD, again, flags, Mode::empty())?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut target = File::from(openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    io::copy(&mut source.take(length), &mut target).map(drop)
}

fn own_like(at: &OwnedFd, name: &OsStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{RenameFlags, renameat_with};

    use super::*;

    #[test]
    fn a_tree_arrives_whole() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o4711)).unwrap();
        std::os::unix::fs::chown(from.path().join("d"), Some(7), Some(8)).unwrap();
        fs::set_permissions(from.path().join("d"), fs::Permissions::from_mode(0o1570)).unwrap();
        symlink("/etc/shadow", from.path().join("l")).unwrap();
        copy(
            fs::File::open(from.path()).unwrap(),
            fs::File::open(to.path()).unwrap(),
        )
        .unwrap();
        let file = fs::metadata(to.path().join("d/f")).unwrap();
        assert_eq!((file.mode() & 0o7777, file.len()), (0o4711, 4));
        let dir = fs::metadata(to.path().join("d")).unwrap();
        assert_eq!((dir.mode() & 0o7777, dir.uid(), dir.gid()), (0o1570, 7, 8));
        assert_eq!(
            fs::read_link(to.path().join("l")).unwrap(),
            Path::new("/etc/shadow")
        );
    }

    /// Another container writes to the volume below which the tmpfs lies, and swaps what is being copied for links to what is not its own.
    #[test]
    fn a_swapped_name_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (from, aside, outside) = (
            dir.path().join("from"),
            dir.path().join("aside"),
            dir.path().join("outside"),
        );
        for parent in [&from, &aside, &outside] {
            fs::create_dir_all(parent).unwrap();
        }
        fs::create_dir(from.join("d")).unwrap();
        fs::write(from.join("d/secret"), "mine").unwrap();
        fs::write(from.join("f"), "mine").unwrap();
        fs::write(outside.join("secret"), "not mine").unwrap();
        symlink(&outside, aside.join("d")).unwrap();
        symlink(outside.join("secret"), aside.join("f")).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for name in ["d", "f"] {
                        let (a, b) = (from.join(name), aside.join(name));
                        renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
                    }
                }
            });
            let mut whole = 0;
            let mut seen = Vec::new();
            for _ in 0..500 {
                let to = tempfile::tempdir_in(dir.path()).unwrap();
                let open = |path: &Path| fs::File::open(path).unwrap();
                // What is gone when its turn comes ends the copy, as any error does.
                if copy(open(&from), open(to.path())).is_ok() {
                    whole += 1;
                }
                for name in ["d/secret", "f"] {
                    let copied = to.path().join(name);
                    let is_own =
                        |path: &Path| fs::symlink_metadata(path).is_ok_and(|m| !m.is_symlink());
                    if is_own(&copied) && is_own(copied.parent().unwrap()) {
                        seen.push(fs::read_to_string(copied).unwrap());
                    }
                }
            }
            over.store(true, Ordering::Relaxed);
            assert!(whole > 0);
            assert!(seen.iter().any(|text| text == "mine"));
            assert!(
                !seen.iter().any(|text| text.contains("not")),
                "what is not its own came in"
            );
        });
    }
}
