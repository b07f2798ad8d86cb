//! The directory that a layer is unpacked into. The kernel resolves every path below it.

use std::{
    cell::RefCell,
    ffi::CStr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2, readlinkat, statat,
        unlinkat,
    },
    io::Errno,
};

use crate::tree::{self, DIRECTORY};

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
    /// Its own path, as the kernel has it.
    path: Vec<u8>,
    /// The directory that was asked for last: archives tell a directory's files one after another.
    last: RefCell<Option<(Vec<u8>, Dir)>>,
}

impl Root {
    /// The tree below this directory.
    pub(super) fn new(path: &Path) -> Result<Self, Errno> {
        let dir = openat(CWD, path, DIRECTORY, Mode::empty())?;
        Ok(Self {
            path: path_of(dir.as_fd())?,
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

    /// The path from the root of what has this name in a directory of it: without links, whichever led there. "." is the directory.
    ///
    /// # Errors
    /// When the kernel has no path for the directory, as where it is longer than one may be.
    pub(super) fn path_of(&self, dir: BorrowedFd<'_>, name: &CStr) -> Result<Vec<u8>, Errno> {
        let path = path_of(dir)?;
        let below = path.strip_prefix(&*self.path).ok_or(Errno::XDEV)?;
        let below = below.strip_prefix(b"/").unwrap_or(below);
        Ok(match name.to_bytes() {
            b"." => below.to_owned(),
            name if below.is_empty() => name.to_owned(),
            name => [below, name].join(&b'/'),
        })
    }

    /// The directory of this name in another.
    pub(super) fn open(&self, dir: BorrowedFd<'_>, name: &CStr) -> Result<Dir, Errno> {
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        Ok(Dir(Rc::new(openat(dir, name, flags, Mode::empty())?)))
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
                tree::remove(dir, name)?;
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

/// An open directory's path (proc_pid_fd(5)).
fn path_of(dir: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let link = format!("/proc/self/fd/{}", dir.as_raw_fd());
    Ok(readlinkat(CWD, link, Vec::new())?.into_bytes())
}
