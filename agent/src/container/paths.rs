//! Paths inside a container's rootfs, resolved so that nothing in the image can lead out of it.
//!
//! The rootfs belongs to the image's author. A walk opens one component at a time with O_NOFOLLOW, keeps the
//! descriptors of the directories it came through, expands symlinks itself against the rootfs, and takes `..`
//! from its own stack: it never asks the kernel for anything but a plain child of a directory that it holds,
//! so neither a symlink nor a rename during the walk can escape. (openat2 with RESOLVE_IN_ROOT gives the same
//! guarantee for what exists, but cannot create what is missing on the way.)

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, openat, readlinkat};
use rustix::io::Errno;

/// The kernel's own limit on symlinks in one path.
const MAX_LINKS: usize = 40;

/// What to do about missing components.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// It is an error: ENOENT.
    Fail,
    /// Make directories.
    MakeDirectory,
    /// Make directories on the way and an empty file at the end.
    MakeFile,
}

enum Piece {
    Root,
    Up,
    Name(OsString),
}

fn pieces(path: &Path) -> VecDeque<Piece> {
    path.components()
        .filter_map(|component| match component {
            Component::RootDir => Some(Piece::Root),
            Component::ParentDir => Some(Piece::Up),
            Component::Normal(name) => Some(Piece::Name(name.to_owned())),
            Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

/// Opens `path` below `root` as an O_PATH descriptor. The last component, too, is followed when it is a link.
pub(crate) fn resolve(root: impl AsFd, path: &Path, missing: Missing) -> Result<OwnedFd, Errno> {
    walk(root.as_fd(), path, missing)
}

/// Opens the directory that holds `path`'s last component, and returns that component's name.
pub(crate) fn resolve_parent(
    root: impl AsFd,
    path: &Path,
    missing: Missing,
) -> Result<(OwnedFd, OsString), Errno> {
    let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
    let parent = path.parent().ok_or(Errno::INVAL)?;
    Ok((resolve(root, parent, missing)?, name))
}

fn walk(root: BorrowedFd<'_>, path: &Path, missing: Missing) -> Result<OwnedFd, Errno> {
    // The directories from the root (not in the list) to where the walk stands.
    let mut stack: Vec<OwnedFd> = Vec::new();
    let mut todo = pieces(path);
    let mut links = 0;
    while let Some(piece) = todo.pop_front() {
        let name = match piece {
            Piece::Root => {
                stack.clear();
                continue;
            }
            Piece::Up => {
                stack.pop();
                continue;
            }
            Piece::Name(name) => name,
        };
        let last = todo.is_empty();
        let here = stack.last().map_or(root, |fd| fd.as_fd());
        let found = match open_component(here, &name) {
            Err(Errno::NOENT) if missing != Missing::Fail => {
                make(here, &name, missing, last)?;
                open_component(here, &name)?
            }
            other => other?,
        };
        let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
        if kind == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = readlinkat(&found, "", Vec::new())?.into_bytes();
            let target = OsString::from_vec(target);
            for piece in pieces(Path::new(&target)).into_iter().rev() {
                todo.push_front(piece);
            }
            continue;
        }
        if !last && kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        stack.push(found);
    }
    match stack.pop() {
        Some(fd) => Ok(fd),
        None => Ok(root.try_clone_to_owned().map_err(|_| Errno::MFILE)?),
    }
}

fn open_component(here: impl AsFd, name: &OsString) -> Result<OwnedFd, Errno> {
    openat(
        here,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn make(here: impl AsFd, name: &OsString, missing: Missing, last: bool) -> Result<(), Errno> {
    let made = if last && missing == Missing::MakeFile {
        openat(
            here,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        )
        .map(drop)
    } else {
        mkdirat(here, name, Mode::from_raw_mode(0o755))
    };
    match made {
        // Someone else made it: as good.
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Opens a path of the guest (not of a container) as an O_PATH descriptor.
pub(crate) fn open_guest(path: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a file of the guest for reading.
pub(crate) fn open_file(path: &Path) -> Result<OwnedFd, Errno> {
    openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Whether the descriptor refers to a directory.
pub(crate) fn is_directory(fd: impl AsFd) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use proptest::prelude::*;

    use super::*;

    fn inode(fd: &OwnedFd) -> u64 {
        fstat(fd).unwrap().st_ino
    }

    fn rootfs() -> (tempfile::TempDir, OwnedFd) {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "x").unwrap();
        fs::write(outer.path().join("secret"), "s").unwrap();
        let fd = open_guest(&root).unwrap();
        (outer, fd)
    }

    #[test]
    fn hostile_links_stay_inside() {
        let (outer, fd) = rootfs();
        let root = outer.path().join("root");
        symlink("../../../../..", root.join("up")).unwrap();
        symlink(outer.path().join("secret"), root.join("abs")).unwrap();
        symlink("../secret", root.join("rel")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let root_inode = fs::metadata(&root).unwrap().ino();
        let at = |path: &str| resolve(&fd, Path::new(path), Missing::Fail);
        assert_eq!(inode(&at("up").unwrap()), root_inode);
        assert_eq!(inode(&at("../../..").unwrap()), root_inode);
        assert_eq!(
            inode(&at("up/a/../a/b").unwrap()),
            fs::metadata(root.join("a/b")).unwrap().ino()
        );
        for escape in ["abs", "rel", "magic", "up/../secret", "a/b/../../../secret"] {
            assert_eq!(at(escape).unwrap_err(), Errno::NOENT, "{escape}");
        }
        assert_eq!(at("loop").unwrap_err(), Errno::LOOP);
        assert_eq!(at("a/file/x").unwrap_err(), Errno::NOTDIR);
    }

    #[test]
    fn missing_targets_are_made_inside() {
        let (outer, fd) = rootfs();
        let root = outer.path().join("root");
        symlink("/run", root.join("var-run")).unwrap();
        symlink(outer.path().join("made"), root.join("out")).unwrap();
        resolve(&fd, Path::new("/var-run/x/file"), Missing::MakeFile).unwrap();
        assert!(root.join("run/x/file").is_file());
        resolve(&fd, Path::new("/out/dir"), Missing::MakeDirectory).unwrap();
        assert!(!outer.path().join("made").exists());
        let inside = root.join(outer.path().strip_prefix("/").unwrap());
        assert!(inside.join("made/dir").is_dir());
    }

    proptest! {
        #[test]
        fn no_path_of_these_pieces_escapes(
            pieces in proptest::collection::vec(
                proptest::sample::select(vec!["a", "b", "..", ".", "up", "abs", "file", "/"]), 0..10),
            target in "(\\.\\./){0,4}(a|b|secret|up)?",
        ) {
            let (outer, fd) = rootfs();
            let root = outer.path().join("root");
            symlink(if target.is_empty() { ".." } else { &target }, root.join("up")).unwrap();
            symlink("/..", root.join("abs")).unwrap();
            if let Ok(found) = resolve(&fd, Path::new(&pieces.join("/")), Missing::Fail) {
                let path = fs::read_link(format!(
                    "/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found))).unwrap();
                prop_assert!(path.starts_with(&root), "{:?}", path);
            }
        }
    }
}
