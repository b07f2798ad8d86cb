//! Removing a directory with all that is in it, whatever an image has made of it: deeper than one process may have directories open, or
//! closed to its own owner, who is not always root.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, chmodat, fchmod, fstat, openat, renameat, unlinkat,
    },
    io::Errno,
};

/// How a directory is opened.
pub(crate) const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// What the owner of a directory needs to change what is in it.
const OPEN: Mode = Mode::RWXU;

/// Directories in each other that are held open.
const HELD: usize = 64;

/// Removes what has this path, if only it is there.
///
/// # Errors
/// When the file system refuses.
pub(crate) fn remove_path(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    let parent = openat(
        CWD,
        parent.unwrap_or(Path::new(".")),
        DIRECTORY,
        Mode::empty(),
    )?;
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let name = CString::new(name.as_bytes())?;
    if !unlink(parent.as_fd(), &name)? {
        remove(parent.as_fd(), &name)?;
    }
    Ok(())
}

/// Removes a directory.
///
/// # Errors
/// When the file system refuses.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    remove_in(&open(parent, name)?)?;
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes what is in a directory.
///
/// # Errors
/// When the file system refuses.
pub(crate) fn remove_in(top: &OwnedFd) -> Result<(), Errno> {
    let mut moved = 0;
    loop {
        let before = moved;
        empty(top, top, 0, &mut moved)?;
        if moved == before {
            return Ok(());
        }
    }
}

/// Removes what is in a directory; what is too deep comes up to the top, for the next time.
fn empty(dir: &OwnedFd, top: &OwnedFd, depth: usize, moved: &mut u64) -> Result<(), Errno> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push((CString::from(name), entry.file_type()));
        }
    }
    for (name, kind) in names {
        if kind != FileType::Directory && unlink(dir.as_fd(), &name)? {
            continue;
        }
        // To move a directory elsewhere takes the right to change it, too.
        let child = open(dir.as_fd(), &name)?;
        if depth >= HELD {
            move_up(dir, &name, top, moved)?;
        } else {
            empty(&child, top, depth + 1, moved)?;
            unlinkat(dir, &*name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(())
}

/// Removes what is no directory; says whether it is none.
fn unlink(parent: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => Ok(false),
        removed => removed.map(|()| true),
    }
}

/// Opens a directory whose owner may then change it.
fn open(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let open = || openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
    let dir = match open() {
        Err(Errno::ACCESS) => {
            chmodat(parent, name, OPEN, AtFlags::empty())?;
            open()?
        }
        opened => opened?,
    };
    let mode = Mode::from_raw_mode(fstat(&dir)?.st_mode);
    if !mode.contains(OPEN) {
        fchmod(&dir, OPEN)?;
    }
    Ok(dir)
}

fn move_up(dir: &OwnedFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> Result<(), Errno> {
    loop {
        *moved += 1;
        match renameat(dir, name, top, format!("{moved}")) {
            // The image has one of this name. An empty directory gives way, and was to go anyway.
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            renamed => return renamed,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn whatever_is_there_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("beside")).unwrap();
        fs::write(path("beside/file"), "").unwrap();
        fs::create_dir_all(path("tree/a/b")).unwrap();
        fs::write(path("tree/a/b/file"), "").unwrap();
        std::os::unix::fs::symlink("../beside", path("tree/link")).unwrap();
        fs::set_permissions(path("tree/a/b"), fs::Permissions::from_mode(0o0)).unwrap();
        std::os::unix::fs::symlink("beside", path("link")).unwrap();
        fs::write(path("file"), "").unwrap();
        for name in ["tree", "link", "file"] {
            remove_path(&path(name)).unwrap();
            assert!(fs::symlink_metadata(path(name)).is_err(), "{name}");
        }
        assert!(path("beside/file").exists());
        let error = remove_path(&path("none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_deeper_than_fds_and_paths_reach_goes() {
        // A disk is slow at so many directories.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let dir = dir.unwrap();
        fs::create_dir(dir.path().join("top")).unwrap();
        // Names that deep directories get when they come up.
        for number in 1..4 {
            fs::write(dir.path().join(format!("top/{number}")), "").unwrap();
        }
        let mut at = openat(CWD, dir.path().join("top"), DIRECTORY, Mode::empty()).unwrap();
        for level in 0..5000 {
            if level > 0 {
                mkdirat(&at, c"1", OPEN).unwrap();
            }
            mkdirat(&at, c"d", OPEN).unwrap();
            at = openat(&at, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        remove_path(&dir.path().join("top")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
