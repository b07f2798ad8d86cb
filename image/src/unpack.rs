//! Making what a layer says, in a directory that becomes a layer of an overlay.
//!
//! The archive decides about names and nothing else: a name is checked into a [`Place`], the kernel finds its directory below the layer's
//! ([`Root`]: `openat2` with `RESOLVE_IN_ROOT`, as if after a chroot), and everything is done to the last component there, without following
//! it. A layer's own symbolic links therefore work as they will in the container, and lead nowhere else.
//!
//! What a layer deletes is written as overlayfs has it (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"):
//! `.wh.NAME` becomes a character device 0:0, `.wh..wh..opq` an attribute of its directory.

mod error;
mod make;
mod metadata;
mod place;
mod root;
mod whiteout;

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    io::Read,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, fchmod, mkdirat, symlinkat},
    io::Errno,
    process::geteuid,
};

use crate::archive::{Archive, Entry, Kind, Time};
pub use error::UnpackError;
use error::{refused, system};
use make::COPY;
use metadata::Metadata;
use place::Place;
use root::{Root, There};
use whiteout::WHITEOUT;

/// Directories of a layer, of which something is remembered until its end; the largest images have a tenth of it.
const MAX_DIRECTORIES: usize = 1 << 20;

/// Mode of directories that a layer takes for granted and no layer below has either.
const IMPLIED: u32 = 0o755;

/// Who owns what is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Owners {
    /// Whom the layer names. For root, also one in a user namespace, whose overlayfs then has "user." attributes.
    #[default]
    Kept,
    /// The caller, who is not root. Whom the layer names is in an attribute of each file and directory (`user.rootlesscontainers`, as umoci
    /// has it), a device is an empty file, and attributes that only root may set are left out. A directory below that is closed to its owner
    /// cannot be taken for granted.
    Caller,
}

impl Owners {
    /// What this process can do.
    pub fn here() -> Self {
        match geteuid().is_root() {
            true => Self::Kept,
            false => Self::Caller,
        }
    }
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
    unpacker.begin()?;
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
    /// The directory that was last found in none of them: nor is what is in it.
    nowhere: Option<Vec<u8>>,
    owners: Owners,
    /// The attribute of an opaque directory.
    opaque: &'static str,
    /// What is set of directories when nothing is made in them any more, by their paths without links.
    late: BTreeMap<Vec<u8>, Late>,
    buffer: Vec<u8>,
    entries: u64,
    bytes: u64,
    left_out: u64,
}

/// What would go again, or be in the way, while a directory is filled.
#[derive(Debug, Clone, Copy, Default)]
struct Late {
    time: Option<Time>,
    /// `None`: it is set already.
    mode: Option<u32>,
}

impl<'a, R: Read> Unpacker<'a, R> {
    fn new(
        archive: &'a mut Archive<R>,
        into: &Path,
        options: Options<'_>,
    ) -> Result<Self, UnpackError> {
        let open = |path: &Path| {
            Root::new(path).map_err(|source| UnpackError::System {
                doing: "open the directory",
                name: path.display().to_string(),
                source,
            })
        };
        Ok(Self {
            archive,
            root: open(into)?,
            nowhere: None,
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
            late: BTreeMap::new(),
            buffer: vec![0; COPY],
            entries: 0,
            bytes: 0,
            left_out: 0,
        })
    }

    /// The root is one of the directories that a layer may take for granted.
    fn begin(&mut self) -> Result<(), UnpackError> {
        let fail = |(doing, source)| UnpackError::System {
            doing,
            name: ".".to_owned(),
            source,
        };
        let root = self.root.dir(b"").map_err(|e| fail(("find", e)))?;
        // Somebody may have been cut off here.
        metadata::clear_xattrs(root.as_fd())
            .and_then(|()| metadata::unset(root.as_fd(), self.opaque))
            .map_err(|e| fail(("clear the attributes of", e)))?;
        let below = self.below(b"").map_err(|e| fail(("look below at", e)))?;
        let metadata = below.unwrap_or_else(|| Metadata::of_mode(IMPLIED));
        self.set(&metadata, root.as_fd(), c".", Kind::Directory)
            .map_err(fail)
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
            metadata::clear_xattrs(root.as_fd())
                .map_err(|source| system("clear the attributes of", entry, source))?;
            return self.dress(entry, entry.kind, root.as_fd(), c".");
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
            self.forget(dir, name).map_err(fail("replace"))?;
        }
        let mut kind = entry.kind;
        match kind {
            Kind::Directory => {
                if is_kept {
                    let known = self.root.open(dir, name).map_err(fail("find"))?;
                    metadata::clear_xattrs(known.as_fd())
                        .map_err(fail("clear the attributes of"))?;
                } else {
                    self.make_directory(entry, dir, name)?;
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
                kind = self.make_node(entry, dir, name)?;
            }
        }
        self.dress(entry, kind, dir, name)
    }

    fn make_directory(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), UnpackError> {
        if self.late.len() >= MAX_DIRECTORIES {
            let why = format!("the layer has more than {MAX_DIRECTORIES} directories");
            return Err(refused(entry, why));
        }
        mkdirat(dir, name, Mode::RWXU).map_err(|source| system("make the directory", entry, source))
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
            self.make_directory(entry, dir.as_fd(), name)?;
            // Deleted, it is another than that of the layers below.
            let below = if is_whiteout {
                self.make_opaque(entry, dir.as_fd(), name)?;
                None
            } else {
                self.below(prefix)
                    .map_err(|source| system("look below at the directory of", entry, source))?
            };
            let metadata = below.unwrap_or_else(|| Metadata::of_mode(IMPLIED));
            self.set(&metadata, dir.as_fd(), name, Kind::Directory)
                .map_err(|(doing, source)| system(doing, entry, source))?;
        }
        self.root
            .dir(path)
            .map_err(|source| system("find the directory of", entry, source))
    }

    /// What a directory is like in the nearest layer below that has it. A layer that has something else there, or hides what is below it, is
    /// the last that is asked. A link is followed within its own layer.
    ///
    /// The directory is then one, also where it is a link below: the image-spec has no word for that, so it is as with containerd
    /// (`mkparent` of its archive package) and Docker, which both apply a layer beside the lower ones and not upon them. umoci follows the link.
    fn below(&mut self, path: &[u8]) -> Result<Option<Metadata>, Errno> {
        let is_in = |dir: &Vec<u8>| {
            let rest = path.strip_prefix(&**dir);
            rest.is_some_and(|rest| dir.is_empty() || rest.starts_with(b"/"))
        };
        if self.nowhere.as_ref().is_some_and(is_in) {
            return Ok(None);
        }
        let found = self.find_below(path)?;
        if found.is_none() {
            self.nowhere = Some(path.to_owned());
        }
        Ok(found)
    }

    fn find_below(&self, path: &[u8]) -> Result<Option<Metadata>, Errno> {
        for lower in &self.lowers {
            match lower.dir(path) {
                Ok(dir) => return Metadata::of_directory(dir.as_fd(), self.owners).map(Some),
                Err(Errno::NOENT) if !self.is_hidden(lower, path) => {}
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether a layer hides what those below it have at a path: something above it there is opaque.
    fn is_hidden(&self, lower: &Root, path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let mut above = ends
            .filter_map(|(end, _)| path.get(..end))
            .chain([&b""[..]]);
        above.any(|above| {
            let dir = lower.dir(above);
            dir.is_ok_and(|dir| metadata::is_set(dir.as_fd(), self.opaque))
        })
    }

    /// Gives what has been made its owner, mode, attributes and time.
    fn dress(
        &mut self,
        entry: &Entry,
        kind: Kind,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), UnpackError> {
        self.set(&Metadata::of_entry(entry, self.owners), dir, name, kind)
            .map_err(|(doing, source)| system(doing, entry, source))
    }

    fn set(
        &mut self,
        metadata: &Metadata,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
    ) -> Result<(), (&'static str, Errno)> {
        self.left_out += metadata.set(dir, name, kind, self.owners)?;
        if kind == Kind::Directory {
            let late = Late {
                time: metadata.mtime,
                mode: (self.owners == Owners::Caller).then_some(metadata.mode),
            };
            let path = self.root.path_of(dir, name);
            self.late.insert(path.map_err(|e| ("find", e))?, late);
        }
        Ok(())
    }

    /// A directory has gone, with those in it. Looks at no others: an archive may replace directories as often as it likes.
    fn forget(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
        let path = self.root.path_of(dir, name)?;
        // In the map's order they follow each other: the byte after "/" is "0".
        let below = |end: &[u8]| [&*path, end].concat();
        let gone: Vec<_> = self.late.range(below(b"/")..below(b"0")).collect();
        let gone: Vec<_> = gone.into_iter().map(|(path, _)| path.clone()).collect();
        for path in gone.iter().chain([&path]) {
            self.late.remove(path);
        }
        Ok(())
    }

    fn finish(self) -> Result<Unpacked, UnpackError> {
        // What is in a directory before the directory, which may be closed then.
        for (path, late) in self.late.iter().rev() {
            let set = || {
                let dir = self.root.dir(path)?;
                if let Some(time) = late.time {
                    metadata::set_time(dir.as_fd(), c".", time)?;
                }
                match late.mode {
                    Some(mode) => fchmod(&dir, Mode::from_raw_mode(mode)),
                    None => Ok(()),
                }
            };
            set().map_err(|source| UnpackError::System {
                doing: "set mode and time of",
                name: String::from_utf8_lossy(path).into_owned(),
                source,
            })?;
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
