//! Reading a tree, of which others may change anything at any time.
//!
//! Everything is looked at by a descriptor that does not open it, and what turns out to be a file is opened by that descriptor: between the
//! look and the opening nobody can put something else there.

use std::{
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use husk_image::archive::Extent;
use rustix::{
    fs::{Dir, FileType, Mode, OFlags, Stat, fgetxattr, fstat, openat, readlinkat},
    io::Errno,
};

use super::owners::Owners;
use crate::root::{PLACE, reopen};

/// Directories in each other: each holds two descriptors while it is read.
const DEPTH: usize = 255;

/// The attribute that gives a program privileges (capabilities(7)).
pub(super) const CAPABILITY: &str = "security.capability";
/// Bytes of its value: struct vfs_ns_cap_data has 24.
const CAPABILITY_MAX: usize = 64;

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// Where, from the place that it is copied to; empty: that itself.
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Twelve bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since the epoch, and nanoseconds.
    pub(super) mtime: (i64, u32),
    /// The value of [`CAPABILITY`].
    pub(super) capability: Option<Vec<u8>>,
}

impl Item {
    /// For people.
    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of so many bytes.
    File(u64),
    Directory,
    /// To this.
    Symlink(Vec<u8>),
    /// Another name of what has been copied before, in an archive.
    HardLink(Vec<u8>),
}

/// A file's contents.
pub(super) enum Content<'a> {
    /// It is none.
    Nothing,
    /// A file, from its beginning.
    File(&'a File),
    /// What comes of an archive: all of it, or what lies at these places.
    Stream(
        &'a mut dyn FnMut(&mut [u8]) -> Result<usize>,
        Option<&'a [Extent]>,
    ),
}

/// Takes what is copied.
pub(super) trait Sink {
    fn add(&mut self, item: &Item, content: Content<'_>) -> Result<()>;

    /// Nothing more comes for this directory.
    fn leave(&mut self, directory: &Item) -> Result<()>;

    /// Is this what it has begun with itself?
    fn is_own(&self, stat: &Stat) -> bool;
}

/// What is to be copied.
pub(super) struct Source {
    pub(super) place: OwnedFd,
    stat: Stat,
    owners: Owners,
}

impl Source {
    pub(super) fn new(place: OwnedFd, owners: Owners) -> Result<Self> {
        let stat = fstat(&place)?;
        Ok(Self {
            place,
            stat,
            owners,
        })
    }

    pub(super) fn is_directory(&self) -> bool {
        kind(&self.stat) == FileType::Directory
    }

    /// What else there is, is left out where it lies in what is copied.
    pub(super) fn can_be_copied(&self) -> bool {
        let kinds = [
            FileType::Directory,
            FileType::RegularFile,
            FileType::Symlink,
        ];
        kinds.contains(&kind(&self.stat))
    }

    /// Copies it to this path, with all that is in it.
    pub(super) fn walk(&self, path: &[u8], sink: &mut impl Sink) -> Result<()> {
        walk(&self.place, path.to_owned(), 0, self.owners, sink)
    }
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn walk(
    place: &OwnedFd,
    path: Vec<u8>,
    depth: usize,
    owners: Owners,
    sink: &mut impl Sink,
) -> Result<()> {
    let stat = fstat(place)?;
    let name = String::from_utf8_lossy(&path).into_owned();
    let mut item = Item {
        path,
        kind: Kind::Directory,
        mode: stat.st_mode & 0o7777,
        uid: owners.told(stat.st_uid),
        gid: owners.told(stat.st_gid),
        mtime: (
            stat.st_mtime,
            u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ),
        capability: None,
    };
    match kind(&stat) {
        FileType::Directory => {
            if depth == DEPTH {
                bail!("{name} has more than {DEPTH} directories in each other");
            }
            if sink.is_own(&stat) {
                bail!("{name} is where it is copied to: a directory cannot be copied into itself");
            }
            sink.add(&item, Content::Nothing)?;
            entries(place, &item, depth, owners, sink)?;
            sink.leave(&item)
        }
        FileType::RegularFile => {
            let file = reopen(place, OFlags::RDONLY).with_context(|| format!("opening {name}"))?;
            item.kind = Kind::File(u64::try_from(stat.st_size).unwrap_or(0));
            item.capability = capability(&file).with_context(|| format!("looking at {name}"))?;
            sink.add(&item, Content::File(&file))
        }
        FileType::Symlink => {
            let target = readlinkat(place, c"", Vec::new());
            let target = target.with_context(|| format!("reading the link {name}"))?;
            item.kind = Kind::Symlink(target.into_bytes());
            sink.add(&item, Content::Nothing)
        }
        other => {
            left_out(&name, other);
            Ok(())
        }
    }
}

fn entries(
    place: &OwnedFd,
    parent: &Item,
    depth: usize,
    owners: Owners,
    sink: &mut impl Sink,
) -> Result<()> {
    let what = || format!("reading the directory {}", parent.name());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(place, ".", flags, Mode::empty()).with_context(what)?;
    for entry in Dir::new(dir).with_context(what)? {
        let entry = entry.with_context(what)?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let mut path = parent.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name.to_bytes());
        match openat(place, name, PLACE | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(child) => walk(&child, path, depth + 1, owners, sink)?,
            // It has gone meanwhile.
            Err(Errno::NOENT) => {}
            Err(error) => {
                let path = String::from_utf8_lossy(&path).into_owned();
                return Err(error).with_context(|| format!("looking at {path}"));
            }
        }
    }
    Ok(())
}

fn capability(file: impl AsFd) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = vec![0; CAPABILITY_MAX];
    match fgetxattr(file, CAPABILITY, &mut value) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Neither opened nor made: what it does is the business of the machine that it belongs to.
pub(super) fn left_out(name: &str, kind: FileType) {
    let what = match kind {
        FileType::Socket => "socket",
        FileType::Fifo => "named pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        _ => "thing of an unknown kind",
    };
    eprintln!("husk: {name} is a {what}: it is left out");
}
