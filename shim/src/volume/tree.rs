//! Reads a volume of the kubelet's, whole.
//!
//! The kubelet's AtomicWriter (`pkg/volume/util/atomic_writer.go`) writes each version of a volume into a directory of its own and
//! lets one link, `..data`, lead to the current one; the names that a container reads are links through it:
//!
//! ```text
//! key     -> ..data/key
//! ..data  -> ..2024_05_01_10_00_00.123456789
//! ..2024_05_01_10_00_00.123456789/key
//! ```
//!
//! It replaces `..data` by a rename of `..data_tmp` once the new version is complete, and removes the old one after that. So of what begins
//! with two dots only `..data` and the directory that it leads to belong to the volume; and where `..data` is the same
//! before and after the reading, that directory was complete all the time.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use husk_protocol::{
    agent::{VolumeEntry, volume_entry::Content},
    volume::{MAX_BYTES, MAX_DEPTH, MAX_ENTRIES},
};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2,
        readlinkat, statat,
    },
    io::Errno,
};

/// The link to the current version.
const DATA: &str = "..data";

/// How often a volume is read that changes meanwhile. The kubelet writes one about once a minute.
const READINGS: usize = 5;

/// Why a volume cannot be read as one.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// More than is sent to a guest.
    #[error(
        "it is larger than {} MiB, {MAX_ENTRIES} entries or {MAX_DEPTH} levels",
        MAX_BYTES >> 20
    )]
    TooLarge,
    /// Something that is no copy of anywhere else.
    #[error("{0:?} in it is no file, directory or symlink")]
    Kind(PathBuf),
    /// It never held still.
    #[error("it changed during each of {READINGS} readings")]
    Unsteady,
    /// No inotify watch is to be had.
    #[error("cannot watch {path:?} in it: {source}; is fs.inotify.max_user_watches used up?")]
    Watch {
        /// Relative to the volume.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel's no.
    #[error("cannot read {path:?} in it: {source}")]
    Read {
        /// Relative to the volume.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Reads the volume at `source`: its own directory first, each directory before what is in it, in the same order each time. `watch` is
/// given each directory before it is read. No link is followed and no mount point crossed. Blocks.
///
/// # Errors
/// [`TreeError`].
pub fn read(
    source: &Path,
    mut watch: impl FnMut(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<Vec<VolumeEntry>, TreeError> {
    for _ in 0..READINGS {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = openat(CWD, source, flags, Mode::empty()).map_err(at(Path::new("")))?;
        let data = data(&root)?;
        let mut reading = Reading {
            data: data.as_deref(),
            watch: &mut watch,
            entries: Vec::new(),
            bytes: 0,
        };
        reading.directory(&root, Path::new(""), 0)?;
        let entries = reading.entries;
        if self::data(&root)? == data {
            return Ok(entries);
        }
    }
    Err(TreeError::Unsteady)
}

/// Where `..data` leads; `None` where there is none (yet).
fn data(root: &OwnedFd) -> Result<Option<OsString>, TreeError> {
    match readlinkat(root, DATA, Vec::new()) {
        Ok(text) => Ok(Some(OsStr::from_bytes(text.as_bytes()).to_owned())),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(at(Path::new(DATA))(errno)),
    }
}

fn at(path: &Path) -> impl FnOnce(Errno) -> TreeError {
    |errno| TreeError::Read {
        path: path.to_owned(),
        source: errno.into(),
    }
}

/// Opens a name in a directory: itself, and on the same mount.
fn open(dir: &OwnedFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(dir, name, flags, Mode::empty(), resolve)
}

/// One reading under way.
struct Reading<'a> {
    data: Option<&'a OsStr>,
    watch: &'a mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>,
    entries: Vec<VolumeEntry>,
    bytes: usize,
}

impl Reading<'_> {
    fn directory(&mut self, dir: &OwnedFd, path: &Path, depth: usize) -> Result<(), TreeError> {
        (self.watch)(dir.as_fd()).map_err(|source| TreeError::Watch {
            path: path.to_owned(),
            source,
        })?;
        self.push(path, &fstat(dir).map_err(at(path))?, None)?;
        let below = depth + 1;
        for name in self.names(dir, path)? {
            if depth == 0 && self.is_writers_own(&name) {
                continue;
            }
            if below > MAX_DEPTH {
                return Err(TreeError::TooLarge);
            }
            let path = path.join(&name);
            match self.entry(dir, &name, &path, below) {
                // The kubelet was quicker. Where that matters, the volume is read again.
                Err(TreeError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                }
                done => done?,
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        depth: usize,
    ) -> Result<(), TreeError> {
        let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(at(path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(
                &open(dir, name, OFlags::DIRECTORY).map_err(at(path))?,
                path,
                depth,
            ),
            FileType::Symlink => {
                let text = readlinkat(dir, name, Vec::new()).map_err(at(path))?;
                self.push(path, &stat, Some(Content::Link(text.into_bytes())))
            }
            FileType::RegularFile => {
                self.file(open(dir, name, OFlags::NONBLOCK).map_err(at(path))?, path)
            }
            _ => Err(TreeError::Kind(path.to_owned())),
        }
    }

    fn file(&mut self, file: OwnedFd, path: &Path) -> Result<(), TreeError> {
        let stat = fstat(&file).map_err(at(path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(TreeError::Kind(path.to_owned()));
        }
        let room = MAX_BYTES.saturating_sub(self.bytes) as u64;
        let mut bytes = Vec::new();
        let read = File::from(file).take(room + 1).read_to_end(&mut bytes);
        read.map_err(|source| TreeError::Read {
            path: path.to_owned(),
            source,
        })?;
        self.push(path, &stat, Some(Content::File(bytes)))
    }

    fn push(
        &mut self,
        path: &Path,
        stat: &Stat,
        content: Option<Content>,
    ) -> Result<(), TreeError> {
        let path = path.as_os_str().as_bytes().to_owned();
        self.bytes += path.len();
        let mut entry = VolumeEntry {
            path,
            ..Default::default()
        };
        match &content {
            Some(Content::Link(text)) => self.bytes += text.len(),
            other => {
                if let Some(Content::File(bytes)) = other {
                    self.bytes += bytes.len();
                }
                (entry.mode, entry.uid, entry.gid) =
                    (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
            }
        }
        entry.content = content;
        self.entries.push(entry);
        if self.bytes > MAX_BYTES || self.entries.len() > MAX_ENTRIES {
            return Err(TreeError::TooLarge);
        }
        Ok(())
    }

    /// Sorted.
    fn names(&self, dir: &OwnedFd, path: &Path) -> Result<Vec<OsString>, TreeError> {
        let mut names = Vec::new();
        for entry in Dir::read_from(dir).map_err(at(path))? {
            let entry = entry.map_err(at(path))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
            // Twice: the kubelet may be about to change from one version to the next.
            if names.len() > 2 * MAX_ENTRIES {
                return Err(TreeError::TooLarge);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Something with which the kubelet makes the next version, or what is left of the last.
    fn is_writers_own(&self, name: &OsStr) -> bool {
        name.as_bytes().starts_with(b"..") && name != DATA && Some(name) != self.data
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    };

    use super::*;

    /// A version of a volume of one key, as the kubelet makes it.
    fn volume() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("..1/nested")).unwrap();
        fs::write(dir.path().join("..1/key"), "value").unwrap();
        fs::write(dir.path().join("..1/nested/key"), "deep").unwrap();
        symlink("..1", dir.path().join("..data")).unwrap();
        symlink("..data/key", dir.path().join("key")).unwrap();
        symlink("..data/nested", dir.path().join("nested")).unwrap();
        dir
    }

    fn read_all(dir: &Path) -> Result<Vec<VolumeEntry>, TreeError> {
        read(dir, |_| Ok(()))
    }

    fn paths(entries: &[VolumeEntry]) -> Vec<&str> {
        entries
            .iter()
            .map(|entry| str::from_utf8(&entry.path).unwrap())
            .collect()
    }

    #[test]
    fn a_volume_is_read_whole_and_each_time_alike() {
        let dir = volume();
        let (secret, group) = (dir.path().join("..1/key"), 2000);
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o440)).unwrap();
        chown(&secret, Some(1000), Some(group)).unwrap();
        let mut watched = Vec::new();
        let entries = read(dir.path(), |fd| {
            watched.push(fstat(fd).unwrap().st_ino);
            Ok(())
        })
        .unwrap();
        assert_eq!(
            paths(&entries),
            [
                "",
                "..1",
                "..1/key",
                "..1/nested",
                "..1/nested/key",
                "..data",
                "key",
                "nested"
            ]
        );
        let inode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().ino();
        assert_eq!(watched, ["", "..1", "..1/nested"].map(inode));
        let key = &entries[2];
        assert_eq!(key.content, Some(Content::File(b"value".to_vec())));
        assert_eq!((key.mode, key.uid, key.gid), (0o440, 1000, group));
        assert_eq!(entries[5].content, Some(Content::Link(b"..1".to_vec())));
        assert_eq!(entries[1].content, None);
        assert_eq!(read_all(dir.path()).unwrap(), entries);
    }

    #[test]
    fn only_the_current_version_counts() {
        let dir = volume();
        let before = read_all(dir.path()).unwrap();
        fs::create_dir(dir.path().join("..2")).unwrap();
        fs::write(dir.path().join("..2/key"), vec![0; MAX_BYTES]).unwrap();
        symlink("..2", dir.path().join("..data_tmp")).unwrap();
        assert_eq!(read_all(dir.path()).unwrap(), before);
    }

    #[test]
    fn a_version_that_ends_while_it_is_read_is_not_taken() {
        let dir = volume();
        let mut swapped = false;
        let entries = read(dir.path(), |_| {
            if !swapped {
                swapped = true;
                fs::create_dir(dir.path().join("..2"))?;
                fs::write(dir.path().join("..2/key"), "new")?;
                symlink("..2", dir.path().join("..data_tmp"))?;
                fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data"))?;
                fs::remove_dir_all(dir.path().join("..1"))?;
            }
            Ok(())
        });
        assert_eq!(
            paths(&entries.unwrap()),
            ["", "..2", "..2/key", "..data", "key", "nested"]
        );
        let mut version = 2;
        let restless = read(dir.path(), |_| {
            version += 1;
            fs::remove_file(dir.path().join("..data"))?;
            symlink(format!("..{version}"), dir.path().join("..data"))
        });
        assert!(matches!(restless, Err(TreeError::Unsteady)), "{restless:?}");
    }

    #[test]
    fn a_link_that_leads_out_is_carried_and_not_followed() {
        let dir = volume();
        symlink("/etc/shadow", dir.path().join("out")).unwrap();
        symlink("/etc", dir.path().join("outdir")).unwrap();
        let entries = read_all(dir.path()).unwrap();
        let text = |path: &str| {
            let entry = entries.iter().find(|e| e.path == path.as_bytes()).unwrap();
            entry.content.clone()
        };
        assert_eq!(text("out"), Some(Content::Link(b"/etc/shadow".to_vec())));
        assert_eq!(text("outdir"), Some(Content::Link(b"/etc".to_vec())));
        assert!(
            !paths(&entries)
                .iter()
                .any(|path| path.starts_with("outdir/"))
        );
        symlink(dir.path(), dir.path().join("self")).unwrap();
        assert!(matches!(
            read_all(&dir.path().join("self")),
            Err(TreeError::Read { .. })
        ));
    }

    #[test]
    fn what_cannot_be_sent_is_said() {
        let dir = volume();
        fs::write(dir.path().join("..1/big"), vec![0; MAX_BYTES]).unwrap();
        assert!(matches!(read_all(dir.path()), Err(TreeError::TooLarge)));
        let dir = volume();
        for key in 0..MAX_ENTRIES {
            fs::write(dir.path().join(format!("..1/{key}")), "").unwrap();
        }
        assert!(matches!(read_all(dir.path()), Err(TreeError::TooLarge)));
        let dir = volume();
        fs::create_dir_all(dir.path().join(vec!["d"; MAX_DEPTH + 1].join("/"))).unwrap();
        assert!(matches!(read_all(dir.path()), Err(TreeError::TooLarge)));
        let dir = volume();
        nix::unistd::mkfifo(&dir.path().join("..1/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = read_all(dir.path()).unwrap_err();
        assert!(error.to_string().contains("..1/fifo"), "{error}");
        let refused = read(dir.path(), |_| Err(io::ErrorKind::StorageFull.into()));
        assert!(
            matches!(refused, Err(TreeError::Watch { .. })),
            "{refused:?}"
        );
        let gone = read_all(&dir.path().join("gone"));
        assert!(matches!(gone, Err(TreeError::Read { .. })), "{gone:?}");
    }
}
