//! tmpcopyup: a tmpfs that starts with what the image has at its mount point.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};

/// Copies the content of one directory into another: owners, modes, links; not times.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let path = |fd: &dyn AsRawFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (from, to) = (path(&from.as_fd()), path(&to.as_fd()));
    let metadata = fs::metadata(&from)?;
    copy_entries(&from, &to)?;
    lchown_like(&to.join("."), &metadata)
}

fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&source)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_entries(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else if kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
            mknodat(
                CWD,
                &target,
                FileType::from_raw_mode(metadata.mode()),
                Mode::from_raw_mode(metadata.mode()),
                metadata.rdev(),
            )?;
        } else {
            // A socket is of no use without its listener.
            continue;
        }
        lchown_like(&target, &metadata)?;
        if !kind.is_symlink() {
            fs::set_permissions(
                &target,
                fs::Permissions::from_mode(metadata.mode() & 0o7777),
            )?;
        }
    }
    Ok(())
}

fn lchown_like(path: &Path, metadata: &fs::Metadata) -> io::Result<()> {
    lchown(path, Some(metadata.uid()), Some(metadata.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_arrives_whole() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o4711)).unwrap();
        symlink("/etc/shadow", from.path().join("l")).unwrap();
        copy(
            fs::File::open(from.path()).unwrap(),
            fs::File::open(to.path()).unwrap(),
        )
        .unwrap();
        let file = fs::metadata(to.path().join("d/f")).unwrap();
        assert_eq!((file.mode() & 0o7777, file.len()), (0o4711, 4));
        assert_eq!(
            fs::read_link(to.path().join("l")).unwrap(),
            Path::new("/etc/shadow")
        );
    }
}
