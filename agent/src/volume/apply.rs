//! Brings a volume's directory to what a [`Plan`] says.
//!
//! A container that may write to the volume can have put anything there, and go on doing so. So nothing is looked up twice: a parent
//! is opened from the volume's own directory on a way without links, everything else is one name in an open directory, and
//! no name is followed. What lies in the way of an entry is removed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use husk_protocol::volume::TEMPORARY;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, mkdirat,
    openat, openat2, readlinkat, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::list::{Attributes, EntryPath, Kind, Plan};
use crate::directory;
use crate::error::AgentError;

/// How deep a tree may be that goes: a volume's own is not; what a container has made there may be anything.
const REMOVED_DEPTH: usize = 64;

/// Applies a plan that has entries.
pub(super) fn apply(base: &OwnedFd, plan: &Plan) -> Result<(), AgentError> {
    let failed = |path: &EntryPath, error: io::Error| {
        let doing = format!("volume {:?}: bringing {path} up to date", plan.id);
        AgentError::guest(doing, error)
    };
    let volume = EntryPath::default();
    let Some(Kind::Directory(attributes)) = plan.entries.get(&volume) else {
        return Ok(());
    };
    let root = directory(base, OsStr::new(&plan.id), *attributes)
        .map_err(|e| failed(&volume, e.into()))?;
    for (path, kind) in &plan.entries {
        put(&root, path, kind).map_err(|e| failed(path, e))?;
    }
    // Now that everything is there that they may lead to.
    for (path, kind) in &plan.entries {
        swap(&root, path, kind).map_err(|e| failed(path, e))?;
    }
    sweep(&root, &volume, plan).map_err(|e| failed(&volume, e.into()))
}

/// Makes an entry that is not there, and gives a directory or file that is what it should have. A link that leads elsewhere stays.
fn put(root: &OwnedFd, path: &EntryPath, kind: &Kind) -> io::Result<()> {
    let Some((parent, name)) = path.split() else {
        return Ok(());
    };
    let at = open_parent(root, parent)?;
    match kind {
        Kind::Directory(attributes) => drop(directory(&at, name, *attributes)?),
        Kind::File(attributes, bytes) => file(&at, name, bytes, *attributes)?,
        Kind::Link(text) => match symlinkat(OsStr::from_bytes(text), &at, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        },
    }
    Ok(())
}

/// Lets a link lead where it should.
fn swap(root: &OwnedFd, path: &EntryPath, kind: &Kind) -> io::Result<()> {
    let (Some((parent, name)), Kind::Link(text)) = (path.split(), kind) else {
        return Ok(());
    };
    let at = open_parent(root, parent)?;
    if readlinkat(&at, name, Vec::new()).is_ok_and(|now| now.as_bytes() == text) {
        return Ok(());
    }
    remove(&at, OsStr::new(TEMPORARY))?;
    symlinkat(OsStr::from_bytes(text), &at, TEMPORARY)?;
    Ok(take_place(&at, name)?)
}

fn directory(at: &OwnedFd, name: &OsStr, attributes: Attributes) -> Result<OwnedFd, Errno> {
    let private = Mode::RWXU;
    let there = match directory::open(at, name) {
        Err(Errno::NOENT) => mkdirat(at, name, private).and_then(|()| directory::open(at, name)),
        Err(Errno::NOTDIR | Errno::LOOP) => remove(at, name)
            .and_then(|()| mkdirat(at, name, private))
            .and_then(|()| directory::open(at, name)),
        there => there,
    }?;
    set(&there, attributes)?;
    Ok(there)
}

/// A file is written aside and takes its place whole. One that is right already is not touched: somebody may watch it.
fn file(at: &OwnedFd, name: &OsStr, bytes: &[u8], attributes: Attributes) -> io::Result<()> {
    if let Some(there) = same_file(at, name, bytes) {
        return Ok(set(there, attributes)?);
    }
    remove(at, OsStr::new(TEMPORARY))?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut new = File::from(openat(at, TEMPORARY, flags, Mode::RUSR | Mode::WUSR)?);
    new.write_all(bytes)?;
    set(&new, attributes)?;
    Ok(take_place(at, name)?)
}

/// The file of this name, if it is one and holds these bytes. (Devices cannot be opened on the volumes' file system, and a FIFO does
/// not block.)
fn same_file(at: &OwnedFd, name: &OsStr, bytes: &[u8]) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(at, name, flags, Mode::empty()).ok()?);
    let stat = fstat(&file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
        || u64::try_from(stat.st_size).ok()? != bytes.len() as u64
    {
        return None;
    }
    let mut now = Vec::with_capacity(bytes.len());
    (&file)
        .take(bytes.len() as u64)
        .read_to_end(&mut now)
        .ok()?;
    (now == bytes).then_some(file)
}

/// Moves what was made aside to where it belongs: in one step, unless a directory is in the way.
fn take_place(at: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match renameat(at, TEMPORARY, at, name) {
        Err(Errno::ISDIR) => {
            remove(at, name)?;
            renameat(at, TEMPORARY, at, name)
        }
        done => done,
    }
}

/// Owner first: a change of it may take mode bits away.
pub(super) fn set(fd: impl AsFd, attributes: Attributes) -> Result<(), Errno> {
    let Attributes { mode, uid, gid } = attributes;
    let now = fstat(&fd)?;
    let is_owned = (now.st_uid, now.st_gid) == (uid, gid);
    if !is_owned {
        fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if !is_owned || now.st_mode & 0o7777 != mode {
        fchmod(&fd, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Removes what is no entry: names and links first, then the directories that they led to.
fn sweep(dir: &OwnedFd, path: &EntryPath, plan: &Plan) -> Result<(), Errno> {
    let (mut kept, mut gone) = (Vec::new(), Vec::new());
    for name in directory::names(dir)? {
        match plan.entries.get(&path.join(&name)) {
            Some(Kind::Directory(_)) => kept.push(name),
            Some(_) => {}
            None => match unlinkat(dir, &name, AtFlags::empty()) {
                Err(Errno::ISDIR) => gone.push(name),
                Err(Errno::NOENT) | Ok(()) => {}
                Err(errno) => return Err(errno),
            },
        }
    }
    for name in gone {
        remove(dir, &name)?;
    }
    for name in kept {
        sweep(&directory::open(dir, &name)?, &path.join(&name), plan)?;
    }
    Ok(())
}

/// Removes a name with all that is below it; one that is not there is gone already.
pub(super) fn remove(at: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    remove_to(at, name, REMOVED_DEPTH)
}

fn remove_to(at: &OwnedFd, name: &OsStr, depth: usize) -> Result<(), Errno> {
    match unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    let below = depth.checked_sub(1).ok_or(Errno::NAMETOOLONG)?;
    let dir = directory::open(at, name)?;
    for child in directory::names(&dir)? {
        remove_to(&dir, &child, below)?;
    }
    unlinkat(at, name, AtFlags::REMOVEDIR)
}

fn open_parent(root: &OwnedFd, parent: &OsStr) -> Result<OwnedFd, Errno> {
    let parent = if parent.is_empty() {
        OsStr::new(".")
    } else {
        parent
    };
    openat2(
        root,
        parent,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicBool, Ordering};

    use husk_protocol::agent::volume_entry::Content;
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    use super::super::Volumes;
    use super::super::list::tests::request;
    use super::*;

    struct World {
        volumes: Volumes,
        dir: tempfile::TempDir,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let volumes = Volumes::new(dir.path().join("volumes"));
            Self { volumes, dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join("volumes/v").join(name)
        }

        fn sync(&self, entries: &[(&str, Option<&str>)]) {
            self.volumes
                .sync(&Plan::new(request(entries)).unwrap())
                .unwrap();
        }

        /// The kubelet's volume of one key.
        fn version(&self, version: &str) {
            let hidden = format!("..{version}");
            self.sync(&[
                ("", None),
                (&hidden, None),
                (&format!("{hidden}/key"), Some(version)),
                (&format!("{hidden}/also"), Some(version)),
                ("..data", Some(&format!("@{hidden}"))),
                ("key", Some("@..data/key")),
                ("also", Some("@..data/also")),
            ]);
        }

        fn names(&self, name: &str) -> Vec<String> {
            let mut names: Vec<String> = fs::read_dir(self.path(name))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    fn read(path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn who_watches_sees_the_swap_of_a_host() {
        let world = World::new();
        world.version("1");
        assert_eq!(read(world.path("key")), "1");
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let all = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_DELETE;
        inotify.add_watch(&world.path(""), all).unwrap();
        world.version("2");
        let seen: Vec<(AddWatchFlags, String)> = inotify
            .read_events()
            .unwrap()
            .into_iter()
            .map(|e| (e.mask, e.name.unwrap().into_string().unwrap()))
            .collect();
        let is_dir = AddWatchFlags::IN_ISDIR;
        let expected = [
            (AddWatchFlags::IN_CREATE | is_dir, "..2"),
            (AddWatchFlags::IN_CREATE, "..data_tmp"),
            (AddWatchFlags::IN_MOVED_FROM, "..data_tmp"),
            (AddWatchFlags::IN_MOVED_TO, "..data"),
            (AddWatchFlags::IN_DELETE | is_dir, "..1"),
        ];
        assert_eq!(seen, expected.map(|(mask, name)| (mask, name.to_owned())));
        assert_eq!(world.names(""), ["..2", "..data", "also", "key"]);
        // The same again is no news.
        world.version("2");
        assert_eq!(inotify.read_events().err(), Some(nix::errno::Errno::EAGAIN));
    }

    #[test]
    fn a_reader_finds_one_version_or_the_other() {
        let world = World::new();
        world.version("100");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !over.load(Ordering::Relaxed) || reads == 0 {
                    // By one directory, as a program that wants both of one version does.
                    let now = fs::read_link(world.path("..data")).unwrap();
                    let of = |key: &str| fs::read_to_string(world.path("").join(&now).join(key));
                    // Gone under its reader, as on a host.
                    if let (Ok(key), Ok(also)) = (of("key"), of("also")) {
                        assert!(key.len() == 3 && key == also, "{key:?} {also:?}");
                        reads += 1;
                    }
                    assert!(world.path("..data").is_symlink());
                }
            });
            for version in 101..300 {
                world.version(&version.to_string());
            }
            over.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        assert_eq!(world.names("").len(), 4);
    }

    #[test]
    fn what_is_right_is_not_touched_and_what_is_not_is_replaced() {
        let world = World::new();
        world.sync(&[
            ("", None),
            ("d", None),
            ("d/same", Some("a")),
            ("d/other", Some("a")),
            ("gone", Some("x")),
        ]);
        let inode = |name: &str| fs::metadata(world.path(name)).unwrap().ino();
        let (same, other) = (inode("d/same"), inode("d/other"));
        let held = fs::File::open(world.path("d/other")).unwrap();
        world.sync(&[
            ("", None),
            ("d", None),
            ("d/same", Some("a")),
            ("d/other", Some("b")),
        ]);
        assert_eq!(inode("d/same"), same);
        assert_ne!(inode("d/other"), other);
        assert_eq!(held.metadata().unwrap().len(), 1);
        assert_eq!(world.names(""), ["d"]);
        // Also what is of another kind now.
        world.sync(&[("", None), ("d", Some("file")), ("l", Some("@d"))]);
        assert_eq!(read(world.path("l")), "file");
        world.sync(&[
            ("", None),
            ("d", Some("@/")),
            ("l", None),
            ("l/f", Some("x")),
        ]);
        assert_eq!(fs::read_link(world.path("d")).unwrap(), Path::new("/"));
        assert_eq!(read(world.path("l/f")), "x");
        world.sync(&[]);
        assert!(!world.path("").exists());
        world.sync(&[]);
    }

    #[test]
    fn modes_and_owners_are_those_of_the_host() {
        let world = World::new();
        let with = |mode: u32, gid: u32| {
            let mut request = request(&[("", None), ("secret", Some("s"))]);
            for entry in &mut request.entries {
                (entry.uid, entry.gid) = (1000, gid);
            }
            request.entries[0].mode = 0o2775;
            request.entries[1].mode = mode;
            world.volumes.sync(&Plan::new(request).unwrap()).unwrap();
            let file = fs::metadata(world.path("secret")).unwrap();
            (file.ino(), file.mode() & 0o7777, file.uid(), file.gid())
        };
        let first = with(0o400, 2000);
        assert_eq!(first, (first.0, 0o400, 1000, 2000));
        // The kubelet's fsGroup comes after the contents: the file stays the same.
        assert_eq!(with(0o4440, 3000), (first.0, 0o4440, 1000, 3000));
        let root = fs::metadata(world.path("")).unwrap();
        assert_eq!((root.mode() & 0o7777, root.gid()), (0o2775, 3000));
    }

    #[test]
    fn nothing_that_a_container_put_there_leads_out() {
        let world = World::new();
        world.version("1");
        let outside = world.dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("key"), "precious").unwrap();
        // A way that was a directory, the name that is written aside, and what is in the way of a file.
        fs::remove_dir_all(world.path("..1")).unwrap();
        symlink(&outside, world.path("..1")).unwrap();
        symlink(outside.join("key"), world.path(TEMPORARY)).unwrap();
        fs::create_dir_all(world.path("key.d/deep")).unwrap();
        fs::remove_file(world.path("key")).unwrap();
        fs::rename(world.path("key.d"), world.path("key")).unwrap();
        nix::unistd::mkfifo(&world.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        world.version("1");
        assert_eq!(read(world.path("key")), "1");
        assert_eq!(world.names(""), ["..1", "..data", "also", "key"]);
        // A file that is a FIFO, or a link to another file of the same bytes.
        fs::remove_file(world.path("..1/key")).unwrap();
        nix::unistd::mkfifo(&world.path("..1/key"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::remove_file(world.path("..1/also")).unwrap();
        fs::write(outside.join("one"), "1").unwrap();
        symlink(outside.join("one"), world.path("..1/also")).unwrap();
        world.version("1");
        assert!(
            fs::symlink_metadata(world.path("..1/key"))
                .unwrap()
                .is_file()
        );
        assert!(
            fs::symlink_metadata(world.path("..1/also"))
                .unwrap()
                .is_file()
        );
        assert_eq!(read(outside.join("key")), "precious");
        let mode = fs::metadata(outside.join("one"))
            .unwrap()
            .permissions()
            .mode();
        assert_ne!(mode & 0o777, 0o640, "a file outside was changed");
    }

    #[test]
    fn a_tree_without_end_is_left_and_said() {
        let world = World::new();
        world.version("1");
        fs::create_dir_all(world.path(&vec!["d"; REMOVED_DEPTH + 2].join("/"))).unwrap();
        let mut entries = request(&[("", None), ("key", Some("2"))]);
        entries.entries[1].content = Some(Content::File(b"2".to_vec()));
        let error = world
            .volumes
            .sync(&Plan::new(entries).unwrap())
            .unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::INTERNAL, "{error}");
        assert_eq!(read(world.path("key")), "2");
    }
}
