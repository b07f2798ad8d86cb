//! Making what a layer says, in a directory that becomes a layer of an overlay.
//!
//! The archive decides about names and nothing else: a name is checked into a [`Place`], the kernel finds its directory below the layer's
//! ([`Root`]: `openat2` with `RESOLVE_IN_ROOT`, as if after a chroot), and everything is done to the last component there, without following
//! it. A layer's own symbolic links therefore work as they will in the container, and lead nowhere else.
//!
//! What a layer deletes is written as overlayfs has it (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"):
//! `.wh.NAME` becomes a character device 0:0, `.wh..wh..opq` an attribute of its directory.

mod error;
mod metadata;
mod place;
mod root;

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    io::Read,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, ftruncate, linkat, makedev, mkdirat, mknodat, openat,
        symlinkat,
    },
    io::{Errno, pwrite},
};

use crate::archive::{Archive, Entry, Extent, Kind, Time};
pub use error::UnpackError;
use error::{refused, system};
use metadata::Metadata;
use place::Place;
use root::{Root, There};

/// What makes a name a deletion, and not a file's (OCI image-spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// What hides all that lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own notes, which some old images have.
const AUFS: &[u8] = b".wh..wh.";

/// Bytes that a file is copied by.
const COPY: usize = 256 << 10;

/// Directories of a layer, whose times are remembered until its end; the largest images have a tenth of it.
const MAX_DIRECTORIES: usize = 1 << 20;

/// Mode of directories that a layer takes for granted and no layer below has either.
const IMPLIED: u32 = 0o755;

/// Who owns what is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owners {
    /// Whom the layer names. For root, also one in a user namespace, whose overlayfs then has "user." attributes.
    #[default]
    Kept,
    /// The caller, who is not root: attributes that only root may set are left out.
    Caller,
}

/// How a layer is unpacked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Who owns the files.
    pub owners: Owners,
    /// The directories of the layers below, the nearest first: a directory that this layer has without telling it is as it is there.
    pub lowers: &'a [&'a Path],
    /// overlayfs will be mounted with `userxattr`, as it must be in a user namespace.
    pub user_xattrs: bool,
}

/// What was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of files, without holes.
    pub bytes: u64,
    /// Extended attributes that were left out: those of overlayfs itself and of the builder's SELinux, and root's for [`Owners::Caller`].
    pub left_out: u64,
}

/// Unpacks a layer into this directory, which is empty and nobody else's.
///
/// # Errors
/// When the archive is none, an entry is refused, or the file system refuses.
pub fn unpack<R: Read>(
    archive: &mut Archive<R>,
    into: &Path,
    options: Options<'_>,
) -> Result<Unpacked, UnpackError> {
    let mut unpacker = Unpacker::new(archive, into, options)?;
    while let Some(entry) = unpacker.archive.next_entry()? {
        unpacker.entries += 1;
        unpacker.add(&entry)?;
    }
    unpacker.finish()
}

struct Unpacker<'a, R> {
    archive: &'a mut Archive<R>,
    root: Root,
    lowers: Vec<Root>,
    owners: Owners,
    /// The attribute of an opaque directory.
    opaque: &'static str,
    /// Directories' own times, set when nothing is made in them any more.
    times: BTreeMap<Place, Time>,
    buffer: Vec<u8>,
    entries: u64,
    bytes: u64,
    left_out: u64,
}

impl<'a, R: Read> Unpacker<'a, R> {
    fn new(
        archive: &'a mut Archive<R>,
        into: &Path,
        options: Options<'_>,
    ) -> Result<Self, UnpackError> {
        let open = |path: &Path| {
            Root::open(path).map_err(|source| UnpackError::System {
                doing: "open the directory",
                name: path.display().to_string(),
                source,
            })
        };
        Ok(Self {
            archive,
            root: open(into)?,
            lowers: options
                .lowers
                .iter()
                .map(|path| open(path))
                .collect::<Result<_, _>>()?,
            owners: options.owners,
            opaque: if options.user_xattrs {
                "user.overlay.opaque"
            } else {
                "trusted.overlay.opaque"
            },
            times: BTreeMap::new(),
            buffer: vec![0; COPY],
            entries: 0,
            bytes: 0,
            left_out: 0,
        })
    }

    fn add(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let place = Place::new(&entry.name).map_err(|why| refused(entry, why))?;
        let Place::Below { parent, name } = &place else {
            if entry.kind != Kind::Directory {
                return Err(refused(entry, "the root is a directory"));
            }
            let root = self
                .root
                .dir(b"")
                .map_err(|source| system("find", entry, source))?;
            return self.dress(entry, &place, root.as_fd(), c".");
        };
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.white_out(entry, parent, name.as_bytes(), hidden);
        }
        let fail = |doing| move |source| system(doing, entry, source);
        let dir = self.parent(entry, parent)?;
        let dir = dir.as_fd();
        // It would be taken away before it is linked to.
        if entry.kind == Kind::HardLink && Place::new(&entry.link).as_ref() == Ok(&place) {
            return Err(refused(entry, "a hard link to itself"));
        }
        let there = self
            .root
            .make_room(dir, name, entry.kind == Kind::Directory)
            .map_err(fail("replace"))?;
        let is_kept = there == There::Directory && entry.kind == Kind::Directory;
        if there == There::Directory && !is_kept {
            self.forget_below(&place);
        }
        match entry.kind {
            Kind::Directory => {
                if !is_kept {
                    mkdirat(dir, name, Mode::from_raw_mode(0o700))
                        .map_err(fail("make the directory"))?;
                }
                // What it takes the place of hid all that is below.
                if matches!(there, There::Whiteout | There::Other) {
                    self.make_opaque(entry, dir, name)?;
                }
            }
            Kind::File => self.write_file(entry, dir, name)?,
            Kind::HardLink => {
                self.link(entry, dir, name)?;
                // Its owner, mode and attributes are those of the file that it is.
                return Ok(());
            }
            Kind::Symlink => {
                let target = CString::new(entry.link.clone())
                    .ok()
                    .filter(|target| !target.is_empty())
                    .ok_or_else(|| refused(entry, "a symbolic link to nothing"))?;
                symlinkat(&*target, dir, name).map_err(fail("make the symbolic link"))?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.make_node(entry, dir, name)?
            }
        }
        self.dress(entry, &place, dir, name)
    }

    /// The directory that an entry lies in; it is made where the layer takes it for granted.
    fn parent(&mut self, entry: &Entry, parent: &[u8]) -> Result<root::Dir, UnpackError> {
        match self.root.dir(parent) {
            Ok(dir) => Ok(dir),
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_parents(entry, parent),
            Err(Errno::LOOP) => Err(refused(entry, "symbolic links above it lead in a circle")),
            Err(source) => Err(system("find the directory of", entry, source)),
        }
    }

    fn make_parents(&mut self, entry: &Entry, path: &[u8]) -> Result<root::Dir, UnpackError> {
        for end in path
            .iter()
            .enumerate()
            .filter_map(|(at, byte)| (*byte == b'/').then_some(at))
            .chain([path.len()])
        {
            let Some(prefix) = path.get(..end) else {
                continue;
            };
            match self.root.dir(prefix) {
                Ok(_) => continue,
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(source) => return Err(system("find the directory of", entry, source)),
            }
            let place = Place::new(prefix).map_err(|why| refused(entry, why))?;
            let Place::Below { parent, name } = &place else {
                continue;
            };
            let dir = self
                .root
                .dir(parent)
                .map_err(|source| system("find the directory of", entry, source))?;
            let is_whiteout = match self.root.there(dir.as_fd(), name) {
                Ok(There::Nothing) => false,
                Ok(There::Whiteout) => {
                    self.root
                        .make_room(dir.as_fd(), name, true)
                        .map_err(|source| system("replace a deletion above", entry, source))?;
                    true
                }
                Ok(There::Directory | There::Other) => {
                    let above = String::from_utf8_lossy(prefix).into_owned();
                    return Err(refused(
                        entry,
                        format!("{above:?} above it is no directory"),
                    ));
                }
                Err(source) => return Err(system("look above", entry, source)),
            };
            let fail = |source| system("make the directory of", entry, source);
            mkdirat(dir.as_fd(), name, Mode::from_raw_mode(0o700)).map_err(fail)?;
            if is_whiteout {
                self.make_opaque(entry, dir.as_fd(), name)?;
            }
            // Deleted, it is another than that of the layers below.
            let below = if is_whiteout {
                None
            } else {
                self.below(prefix)
            };
            let metadata = below.unwrap_or_else(|| Metadata::of_mode(IMPLIED));
            self.set(entry, &metadata, &place, dir.as_fd(), name, Kind::Directory)?;
        }
        self.root
            .dir(path)
            .map_err(|source| system("find the directory of", entry, source))
    }

    /// What a directory is like in the nearest layer below that has it.
    fn below(&self, path: &[u8]) -> Option<Metadata> {
        self.lowers
            .iter()
            .find_map(|lower| lower.dir(path).ok())
            .and_then(|dir| Metadata::of_directory(dir.as_fd()).ok())
    }

    fn white_out(
        &mut self,
        entry: &Entry,
        parent: &[u8],
        name: &[u8],
        hidden: &[u8],
    ) -> Result<(), UnpackError> {
        if name == OPAQUE {
            // The directory itself; the root of a layer, too.
            let dir = self.parent(entry, parent)?;
            return metadata::set_xattr_of(dir.as_fd(), self.opaque, b"y")
                .map_err(|source| system("make opaque the directory of", entry, source));
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = Place::new(hidden)
            .ok()
            .and_then(Place::into_name)
            .ok_or_else(|| refused(entry, "it deletes nothing that has a name"))?;
        let dir = self.parent(entry, parent)?;
        let dir = dir.as_fd();
        let there = self
            .root
            .there(dir, &hidden)
            .map_err(|source| system("look at what is deleted by", entry, source))?;
        match there {
            There::Nothing => mknodat(dir, &*hidden, FileType::CharacterDevice, Mode::empty(), 0)
                .map_err(|source| system("make a whiteout for", entry, source)),
            // It speaks of the layers below, and this layer has its own.
            There::Directory => self.make_opaque(entry, dir, &hidden),
            There::Whiteout | There::Other => Ok(()),
        }
    }

    fn make_opaque(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
        metadata::set_xattr(dir, name, self.opaque, b"y")
            .map_err(|source| system("make opaque", entry, source))
    }

    fn write_file(
        &mut self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, name, flags, Mode::from_raw_mode(0o600))
            .map_err(|source| system("make the file", entry, source))?;
        let all = [Extent {
            offset: 0,
            length: entry.size,
        }];
        for extent in entry.extents.as_deref().unwrap_or(&all) {
            let (mut offset, mut left) = (extent.offset, extent.length);
            while left > 0 {
                let most = usize::try_from(left).map_or(COPY, |left| left.min(COPY));
                let part = self.buffer.get_mut(..most).unwrap_or_default();
                let count = self.archive.read_data(part)?;
                let mut rest = part.get(..count).unwrap_or_default();
                if rest.is_empty() {
                    return Err(refused(entry, "its data ends too early"));
                }
                left -= rest.len() as u64;
                self.bytes += rest.len() as u64;
                while !rest.is_empty() {
                    let written = match pwrite(&file, rest, offset) {
                        Err(Errno::INTR) => 0,
                        written => written.map_err(|source| system("write", entry, source))?,
                    };
                    offset += written as u64;
                    rest = rest.get(written..).unwrap_or_default();
                }
            }
        }
        if entry.extents.is_some() {
            ftruncate(&file, entry.size).map_err(|source| system("size", entry, source))?;
        }
        Ok(())
    }

    fn link(&self, entry: &Entry, dir: BorrowedFd<'_>, name: &CString) -> Result<(), UnpackError> {
        let no_target = || {
            let target = String::from_utf8_lossy(&entry.link).into_owned();
            refused(
                entry,
                format!("a hard link to {target:?}, which the layer does not have"),
            )
        };
        let target = Place::new(&entry.link)
            .map_err(|why| refused(entry, format!("a hard link whose target is refused: {why}")))?;
        let Place::Below { parent, name: old } = &target else {
            return Err(refused(entry, "a hard link to the root"));
        };
        let from = self.root.dir(parent).map_err(|_| no_target())?;
        match linkat(from.as_fd(), &**old, dir, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(no_target()),
            Err(Errno::PERM) => Err(refused(entry, "a hard link to a directory")),
            Err(source) => Err(system("make the hard link", entry, source)),
        }
    }

    fn make_node(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
        let (major, minor) = entry.device;
        let (kind, number) = match entry.kind {
            Kind::CharDevice if entry.device == (0, 0) => {
                return Err(refused(
                    entry,
                    "the device 0:0, which overlayfs takes for a deletion",
                ));
            }
            Kind::CharDevice => (FileType::CharacterDevice, makedev(major, minor)),
            Kind::BlockDevice => (FileType::BlockDevice, makedev(major, minor)),
            _ => (FileType::Fifo, 0),
        };
        mknodat(dir, name, kind, Mode::from_raw_mode(0o600), number)
            .map_err(|source| system("make the device", entry, source))
    }

    /// Gives what has been made its owner, mode, attributes and time.
    fn dress(
        &mut self,
        entry: &Entry,
        place: &Place,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), UnpackError> {
        let metadata = Metadata::of_entry(entry);
        self.set(entry, &metadata, place, dir, name, entry.kind)
    }

    fn set(
        &mut self,
        entry: &Entry,
        metadata: &Metadata,
        place: &Place,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
    ) -> Result<(), UnpackError> {
        let left_out = metadata
            .set(dir, name, kind, self.owners)
            .map_err(|(doing, source)| system(doing, entry, source))?;
        self.left_out += left_out;
        if let (Kind::Directory, Some(time)) = (kind, metadata.mtime) {
            if self.times.len() == MAX_DIRECTORIES {
                let why = format!("the layer has more than {MAX_DIRECTORIES} directories");
                return Err(refused(entry, why));
            }
            self.times.insert(place.clone(), time);
        }
        Ok(())
    }

    /// A directory has gone, with those in it. Looks at no others: an archive may replace directories as often as it likes.
    fn forget_below(&mut self, place: &Place) {
        self.times.remove(place);
        // In the map's order those in it and those deeper are two stretches: "a.b" lies between "a" and "a/b".
        let path = place.path();
        let deeper = [&*path, b"/"].concat();
        let gone: Vec<Place> = [path, deeper]
            .into_iter()
            .flat_map(|parent| {
                let name = CString::default();
                let known = self.times.range(Place::Below { parent, name }..);
                known
                    .map(|(known, _)| known)
                    .take_while(|known| known.is_below(place))
            })
            .cloned()
            .collect();
        for known in gone {
            self.times.remove(&known);
        }
    }

    fn finish(self) -> Result<Unpacked, UnpackError> {
        for (place, time) in &self.times {
            let (parent, name) = place.parts();
            let set = self
                .root
                .dir(parent)
                .and_then(|dir| metadata::set_time(dir.as_fd(), &name, *time));
            match set {
                // Its name became another's.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(source) => {
                    return Err(UnpackError::System {
                        doing: "set the time of",
                        name: name.to_string_lossy().into_owned(),
                        source,
                    });
                }
            }
        }
        Ok(Unpacked {
            entries: self.entries,
            bytes: self.bytes,
            left_out: self.left_out,
        })
    }
}

#[cfg(test)]
mod tests;
