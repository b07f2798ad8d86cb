//! Making what is copied, in a directory that others may change at the same time: the kernel finds every directory below where it belongs, and
//! everything is done to a name in it, without following it. A file is written under another name first, so that whoever looks finds the old one or the new.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use anyhow::{Context as _, Result, anyhow, bail};
use husk_image::archive::{Extent, spread};
use rustix::{
    fs::{
        self, AtFlags, FileType, Gid, Mode, OFlags, Stat, StatxFlags, Timespec, Timestamps, Uid,
        XattrFlags, chownat, fchmod, fchown, fsetxattr, fstat, futimens, linkat, mkdirat, openat,
        renameat, statat, statx, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};

use super::{
    owners::Owners,
    walk::{CAPABILITY, Content, Item, Kind, Sink},
};
use crate::root::{DIRECTORY, Root, reopen, split};

/// Bytes that a stream is copied by.
const COPY: usize = 256 << 10;

/// Set-user-ID and set-group-ID.
const PRIVILEGED: u32 = 0o6000;

/// What of a file goes along with its contents, mode and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keep {
    /// Who owns it; root, who calls this, otherwise.
    pub(super) owner: bool,
    /// What gives a program its owner's rights, or some of root's. A container's root is not the host's.
    pub(super) privileges: bool,
    /// Who root is where it is made.
    pub(super) root: Owners,
}

/// What has been made.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// Makes what it is given.
pub(super) struct Maker<'a> {
    root: Root<'a>,
    /// Before each path.
    prefix: Vec<u8>,
    keep: Keep,
    /// Make directories that nothing has told of, as some archives need it.
    makes_parents: bool,
    /// The directory that was asked for last.
    last: Option<(Vec<u8>, OwnedFd)>,
    /// The first directory: device and inode.
    own: Option<(u64, u64)>,
    /// Of the directories that are being copied, those that were there before: they stay as they are.
    old: Vec<Vec<u8>>,
    pub(super) made: Made,
}

impl<'a> Maker<'a> {
    /// In a directory.
    pub(super) fn new(dir: &'a impl AsFd, keep: Keep) -> Self {
        Self::at(Root::without_links(dir), keep)
    }

    fn at(root: Root<'a>, keep: Keep) -> Self {
        Self {
            root,
            prefix: Vec::new(),
            keep,
            makes_parents: false,
            last: None,
            own: None,
            old: Vec::new(),
            made: Made::default(),
        }
    }

    /// In a directory below a root, whose links may be among what is made.
    pub(super) fn below(root: Root<'a>, prefix: &[u8], keep: Keep) -> Self {
        Self {
            prefix: [prefix, b"/"].concat(),
            makes_parents: true,
            ..Self::at(root, keep)
        }
    }

    /// The directory that a path lies in, and its name there.
    fn place(&mut self, item: &Item) -> Result<(OwnedFd, CString)> {
        let (parent, name) = parts(&item.path);
        let dir = self
            .directory(parent)
            .with_context(|| format!("finding the directory of {}", item.name()))?;
        Ok((dir, CString::new(name)?))
    }

    fn directory(&mut self, path: &[u8]) -> Result<OwnedFd> {
        if let Some((known, dir)) = &self.last
            && known == path
        {
            return Ok(dir.try_clone()?);
        }
        let whole = [&*self.prefix, path].concat();
        let dir = match self.root.open(&whole, DIRECTORY) {
            Err(Errno::NOENT) if self.makes_parents && !path.is_empty() => {
                let (parent, name) = parts(path);
                let parent = self.directory(parent)?;
                match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(explained(error)),
                }
                self.root.open(&whole, DIRECTORY)
            }
            opened => opened,
        };
        let dir = dir.map_err(|error| match error {
            Errno::LOOP => anyhow::anyhow!("a symbolic link is in the way"),
            error => error.into(),
        })?;
        self.last = Some((path.to_owned(), dir.try_clone()?));
        Ok(dir)
    }

    fn make_directory(&mut self, item: &Item) -> Result<()> {
        let (dir, name) = self.place(item)?;
        let is_new = match mkdirat(&dir, &name, Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(explained(error)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = match openat(&dir, &name, flags, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => {
                bail!("there is something that is no directory, and it is not replaced by one")
            }
            made => made?,
        };
        if self.own.is_none() {
            let stat = fstat(&made)?;
            self.own = Some((stat.st_dev, stat.st_ino));
        }
        if is_new {
            return dress(made.as_fd(), item, self.keep);
        }
        // An archive does not say when it leaves one.
        if !self.makes_parents {
            self.old.push(item.path.clone());
        }
        Ok(())
    }

    fn make_file(&mut self, item: &Item, content: Content<'_>) -> Result<()> {
        let (dir, name) = self.place(item)?;
        self.made.bytes += write_new(dir.as_fd(), &name, item, content, self.keep)?;
        Ok(())
    }

    /// In the place of a file that is there: `place` is it, and its name in `dir` may be a link to it.
    fn replace(
        &mut self,
        place: &OwnedFd,
        dir: &OwnedFd,
        item: &Item,
        mut content: Content<'_>,
    ) -> Result<()> {
        let name = CString::new(&*item.path)?;
        let there = statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let is_link = FileType::from_raw_mode(there.st_mode) == FileType::Symlink;
        let is_mounted = mount_id(place)? != mount_id(dir)?;
        if !matches!(item.kind, Kind::File(_)) || !is_link && !is_mounted {
            return self.add(item, content);
        }
        // A mount, or what a link leads to: it stays the same file.
        let file = reopen(place, OFlags::WRONLY | OFlags::TRUNC).map_err(explained)?;
        self.made.bytes += fill(&file, item, &mut content)?;
        self.made.entries += 1;
        dress(file.as_fd(), item, self.keep)
    }
}

/// A [`Maker`] of one thing, in the place of a file that is there.
pub(super) struct Replace<'a, 'b> {
    pub(super) maker: &'a mut Maker<'b>,
    /// The file.
    pub(super) place: &'a OwnedFd,
    /// The directory that it is found by.
    pub(super) dir: &'a OwnedFd,
}

impl Sink for Replace<'_, '_> {
    fn add(&mut self, item: &Item, content: Content<'_>) -> Result<()> {
        let replaced = self.maker.replace(self.place, self.dir, item, content);
        replaced.with_context(|| format!("replacing {}", item.name()))
    }

    fn leave(&mut self, directory: &Item) -> Result<()> {
        self.maker.leave(directory)
    }

    fn is_own(&self, stat: &Stat) -> bool {
        self.maker.is_own(stat)
    }
}

impl Sink for Maker<'_> {
    fn add(&mut self, item: &Item, content: Content<'_>) -> Result<()> {
        if item.path.is_empty() {
            // It is there already.
            return Ok(());
        }
        let made = match &item.kind {
            Kind::Directory => self.make_directory(item),
            Kind::File(_) => self.make_file(item, content),
            Kind::Symlink(target) => self.place(item).and_then(|(dir, name)| {
                let target = CString::new(&**target)?;
                by_rename(dir.as_fd(), &name, |new| {
                    symlinkat(&target, &dir, new).map_err(explained)
                })?;
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                let (uid, gid) = owner(item, self.keep);
                chownat(&dir, &name, Some(uid), Some(gid), flags).map_err(explained)?;
                Ok(utimensat(&dir, &name, &times(item), flags)?)
            }),
            Kind::HardLink(target) => self.place(item).and_then(|(dir, name)| {
                let (parent, old) = parts(target);
                let from = self.directory(parent).context("finding what it links to")?;
                let old = CString::new(old)?;
                by_rename(dir.as_fd(), &name, |new| {
                    linkat(&from, &old, &dir, new, AtFlags::empty()).map_err(explained)
                })
            }),
        };
        made.with_context(|| format!("making {}", item.name()))?;
        self.made.entries += 1;
        Ok(())
    }

    fn leave(&mut self, directory: &Item) -> Result<()> {
        if directory.path.is_empty() || self.old.pop_if(|path| *path == directory.path).is_some() {
            return Ok(());
        }
        let (dir, name) = self.place(directory)?;
        // Its name may be another's by now, in a container.
        match utimensat(&dir, &name, &times(directory), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("setting the time of {}", directory.name()))
            }
        }
    }

    fn is_own(&self, stat: &Stat) -> bool {
        self.own == Some((stat.st_dev, stat.st_ino))
    }
}

/// Its directory's path and its name.
fn parts(path: &[u8]) -> (&[u8], &[u8]) {
    match split(path) {
        (b".", Some(name)) => (b"", name),
        (parent, name) => (parent, name.unwrap_or_default()),
    }
}

/// Which mount it is of.
fn mount_id(place: &OwnedFd) -> Result<u64, Errno> {
    let found = statx(place, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(found.stx_mnt_id)
}

/// Writes a file and puts it where it belongs: its bytes.
fn write_new(
    dir: BorrowedFd<'_>,
    name: &CString,
    item: &Item,
    mut content: Content<'_>,
    keep: Keep,
) -> Result<u64> {
    let mut bytes = 0;
    by_rename(dir, name, |new| {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, new, flags, Mode::from_raw_mode(0o600)).map_err(explained)?;
        let file = File::from(file);
        bytes = fill(&file, item, &mut content)?;
        dress(file.as_fd(), item, keep)
    })?;
    Ok(bytes)
}

/// Makes something under a name of its own and gives it the one that it is to have. Nothing is left of it where that fails.
fn by_rename(
    dir: BorrowedFd<'_>,
    name: &CString,
    make: impl FnOnce(&CString) -> Result<()>,
) -> Result<()> {
    let free = |attempt: u32| -> Option<CString> {
        let new = format!(".husk-cp-{}-{attempt}", std::process::id());
        let new = CString::new(new).ok()?;
        let there = statat(dir, &new, AtFlags::SYMLINK_NOFOLLOW);
        there
            .is_err_and(|error| error == Errno::NOENT)
            .then_some(new)
    };
    let new = (0..100).find_map(free).context(
        "its directory is no more, or full of what earlier copies have left: .husk-cp-*",
    )?;
    let made = make(&new).and_then(|()| match renameat(dir, &new, dir, name) {
        Err(Errno::ISDIR) => {
            bail!("there is a directory, and it is not replaced by anything else")
        }
        Err(Errno::BUSY) => bail!("there is a mount, and it is not replaced"),
        renamed => renamed.map_err(explained),
    });
    // It has gone to its name, but for a link to a file that has it already.
    let _ = unlinkat(dir, &new, AtFlags::empty());
    made
}

/// Writes the contents: their bytes, without holes.
fn fill(to: &File, item: &Item, content: &mut Content<'_>) -> Result<u64> {
    let Kind::File(size) = item.kind else {
        return Ok(0);
    };
    match content {
        Content::Nothing => Ok(0),
        Content::File(from) => copy_with_holes(from, to, size),
        Content::Stream(read, extents) => {
            let all = [Extent {
                offset: 0,
                length: size,
            }];
            let bytes = spread(
                extents.unwrap_or(&all),
                &mut vec![0; COPY],
                read,
                |data, offset| Ok(to.write_all_at(data, offset)?),
                || anyhow!("its data ends too early"),
            )?;
            to.set_len(size)?;
            Ok(bytes)
        }
    }
}

/// Copies a file of this size, holes as holes: one of an exabyte that a container has made of nothing fills no disk.
fn copy_with_holes(mut from: &File, mut to: &File, size: u64) -> Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    while at < size {
        let data = match fs::seek(from, fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // A hole up to its end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = fs::seek(from, fs::SeekFrom::Hole(data))?.min(size);
        if hole <= data {
            break;
        }
        from.seek(SeekFrom::Start(data))?;
        to.seek(SeekFrom::Start(data))?;
        let copied = io::copy(&mut from.take(hole - data), &mut to)?;
        bytes += copied;
        if copied < hole - data {
            // It has become shorter meanwhile.
            return Ok(bytes);
        }
        at = hole;
    }
    to.set_len(size)?;
    Ok(bytes)
}

fn owner(item: &Item, keep: Keep) -> (Uid, Gid) {
    let (uid, gid) = match keep.owner {
        true => (item.uid, item.gid),
        false => (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        ),
    };
    (
        Uid::from_raw(keep.root.stored(uid)),
        Gid::from_raw(keep.root.stored(gid)),
    )
}

fn times(item: &Item) -> Timestamps {
    let time = Timespec {
        tv_sec: item.mtime.0,
        tv_nsec: item.mtime.1.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Owner, mode, attributes and time, in the order that keeps them: a change of owner takes the rights of a program away.
fn dress(made: BorrowedFd<'_>, item: &Item, keep: Keep) -> Result<()> {
    let (uid, gid) = owner(item, keep);
    fchown(made, Some(uid), Some(gid)).map_err(explained)?;
    let mut mode = item.mode;
    // On a directory the group's bit gives nobody rights.
    if !keep.privileges && item.kind != Kind::Directory {
        mode &= !PRIVILEGED;
    }
    fchmod(made, Mode::from_raw_mode(mode)).map_err(explained)?;
    if let Some(value) = item.capability.as_ref().filter(|_| keep.privileges) {
        fsetxattr(made, CAPABILITY, value, XattrFlags::empty()).map_err(explained)?;
    }
    futimens(made, &times(item)).map_err(explained)
}

/// The kernel's word, with what it means here.
fn explained(error: Errno) -> anyhow::Error {
    let error = anyhow::Error::from(io::Error::from(error));
    match error.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::ReadOnlyFilesystem) => error.context(
            "nothing can be written there: it is mounted read-only, or is what only a container's guest has (/proc, /sys, /dev, tmpfs)",
        ),
        _ => error,
    }
}
