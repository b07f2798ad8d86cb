//! The directory that a layer is unpacked into. The kernel resolves every path below it.

use std::{
    cell::RefCell,
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat, unlinkat},
    io::Errno,
};

/// How a directory is opened.
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// What is at a place already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum There {
    Nothing,
    Directory,
    /// A deletion.
    Whiteout,
    /// Anything else.
    Other,
}

/// An open directory below the root.
#[derive(Debug, Clone)]
pub(super) struct Dir(Rc<OwnedFd>);

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A tree.
#[derive(Debug)]
pub(super) struct Root {
    dir: Dir,
    /// The directory that was asked for last: archives tell a directory's files one after another.
    last: RefCell<Option<(Vec<u8>, Dir)>>,
}

impl Root {
    /// The tree below this directory.
    pub(super) fn open(path: &Path) -> Result<Self, Errno> {
        let dir = openat(CWD, path, DIRECTORY, Mode::empty())?;
        Ok(Self {
            dir: Dir(Rc::new(dir)),
            last: RefCell::default(),
        })
    }

    /// A directory of it, by a path as processes in the tree would use it: links lead below the root, however they are written.
    pub(super) fn dir(&self, path: &[u8]) -> Result<Dir, Errno> {
        if path.is_empty() {
            return Ok(self.dir.clone());
        }
        if let Some((known, dir)) = &*self.last.borrow()
            && known == path
        {
            return Ok(dir.clone());
        }
        // Without magic links: /proc is not below. Without mounts: nobody has mounted anything there.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let found = loop {
            match openat2(&self.dir, path, DIRECTORY, Mode::empty(), resolve) {
                // A rename somewhere else came in between (openat2(2)).
                Err(Errno::AGAIN | Errno::INTR) => {}
                opened => break Dir(Rc::new(opened?)),
            }
        };
        *self.last.borrow_mut() = Some((path.to_owned(), found.clone()));
        Ok(found)
    }

    /// What is there under this name.
    pub(super) fn there(&self, dir: BorrowedFd<'_>, name: &CStr) -> Result<There, Errno> {
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(There::Nothing),
            stat => stat?,
        };
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => There::Directory,
            FileType::CharacterDevice if stat.st_rdev == 0 => There::Whiteout,
            _ => There::Other,
        })
    }

    /// Takes away what is there, but a directory where one is wanted. Says what was there.
    pub(super) fn make_room(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        keep_directory: bool,
    ) -> Result<There, Errno> {
        match self.there(dir, name)? {
            There::Nothing => Ok(There::Nothing),
            There::Directory if keep_directory => Ok(There::Directory),
            There::Directory => {
                // Open directories may be among what goes.
                *self.last.borrow_mut() = None;
                remove_tree(dir, name)?;
                Ok(There::Directory)
            }
            there => {
                *self.last.borrow_mut() = None;
                unlinkat(dir, name, AtFlags::empty())?;
                Ok(there)
            }
        }
    }
}

/// Removes a directory with all that is in it, no deeper than a [`super::place::Place`] may be.
fn remove_tree(parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let dir = openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push((CString::from(name), entry.file_type()));
        }
    }
    for (name, kind) in names {
        let removed = match kind {
            FileType::Directory => remove_tree(dir.as_fd(), &name),
            _ => unlinkat(&dir, &*name, AtFlags::empty()),
        };
        match removed {
            // The file system does not tell what it is.
            Err(Errno::ISDIR) => remove_tree(dir.as_fd(), &name)?,
            other => other?,
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}
