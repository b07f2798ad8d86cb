//! Clearing away: mounts, directories, cgroups. Everything here may be called twice, and for things half made.
//!
//! What is mounted below a pod's share may be a user's volume. A recursive delete that walked into one would destroy it, so the walk
//! opens each directory with `RESOLVE_NO_XDEV`: the kernel refuses to cross a mount, also a bind mount of the same
//! file system.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

/// Deeper than any tree of ours; bounds the recursion.
const MAX_DEPTH: usize = 64;

/// One name of a directory, as itself: no link, no mount.
const INSIDE: ResolveFlags = ResolveFlags::NO_XDEV
    .union(ResolveFlags::BENEATH)
    .union(ResolveFlags::NO_SYMLINKS);

/// Unmounts everything mounted at `root` or below it in this mount namespace. Returns how many mounts went.
///
/// # Errors
/// The first mount that does not go; the others are tried all the same.
pub fn unmount_below(root: &Path) -> io::Result<usize> {
    // The thread's: a namespace belongs to one.
    let read = || fs::read("/proc/thread-self/mountinfo");
    let count = |table: &[u8]| mounts_below(table, root).len();
    let mut table = read()?;
    let first = count(&table);
    // What is mounted on top of another at the same place goes alone, and the other's turn is next.
    loop {
        let before = count(&table);
        let outcome = detach(&table, root);
        table = read()?;
        if before == 0 || count(&table) >= before {
            return outcome.map(|()| first.saturating_sub(before));
        }
    }
}

/// Detaches, in a mount namespace copied from the host's, the overlays that no unmounting on the host would reach: the root file systems of other
/// containers, where their engine keeps them in a private mount. Their layers would stay in use after those containers' end. What one of
/// `needed` is in stays.
///
/// # Errors
/// The first mount that does not go; the others are tried all the same.
pub fn leave_private_overlays(needed: &[&Path]) -> io::Result<()> {
    let table = fs::read("/proc/thread-self/mountinfo")?;
    let mut failed = Ok(());
    for mount in mounts(&table).iter().rev() {
        let is_needed = needed.iter().any(|path| path.starts_with(&mount.point));
        if !mount.is_private || mount.kind != b"overlay" || is_needed {
            continue;
        }
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        if let Err(error) = umount2(&mount.point, flags) {
            failed = failed.and(Err(not_unmounted(&mount.point, error)));
        }
    }
    failed
}

/// Detaches the mounts of a table below `root` that are in no other of these. What is mounted in them goes along, and is not
/// looked up: its path leads through directories that a guest may have exchanged for links since the table was read.
fn detach(table: &[u8], root: &Path) -> io::Result<()> {
    let below = mounts_below(table, root);
    let ids: HashSet<&[u8]> = below.iter().map(|mount| mount.id).collect();
    let mut failed = Ok(());
    for mount in below.iter().rev().filter(|m| !ids.contains(m.parent)) {
        match umount2(
            &mount.point,
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        ) {
            // Gone by itself.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(e) if failed.is_ok() => {
                failed = Err(not_unmounted(&mount.point, e));
            }
            Err(_) => {}
        }
    }
    failed
}

fn not_unmounted(point: &Path, e: nix::errno::Errno) -> io::Error {
    let told = format!("cannot unmount {}: {e}", point.display());
    io::Error::new(io::Error::from(e).kind(), told)
}

/// A line of mountinfo, as far as it matters here.
struct Mount<'a> {
    id: &'a [u8],
    parent: &'a [u8],
    point: PathBuf,
    /// Neither hears of other mounts nor is heard of.
    is_private: bool,
    /// File system type.
    kind: &'a [u8],
}

fn mounts_below<'a>(table: &'a [u8], root: &Path) -> Vec<Mount<'a>> {
    let mut mounts = mounts(table);
    mounts.retain(|mount| mount.point.starts_with(root));
    mounts
}

/// The mounts of a mountinfo table (proc(5)), in the order they were mounted.
fn mounts(table: &[u8]) -> Vec<Mount<'_>> {
    table
        .split(|&b| b == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&b| b == b' ');
            let (id, parent) = (fields.next()?, fields.next()?);
            let point = fields.nth(2).map(unescape)?;
            // After the mount's options, optional fields up to a hyphen.
            let mut propagation = fields.skip(1);
            let is_private = propagation.next()? == b"-";
            let kind = if is_private {
                propagation.next()?
            } else {
                propagation.skip_while(|&field| field != b"-").nth(1)?
            };
            Some(Mount {
                id,
                parent,
                point: PathBuf::from(OsString::from_vec(point)),
                is_private,
                kind,
            })
        })
        .collect()
}

/// mountinfo writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => out.push(byte),
        }
    }
    out
}

/// Removes a directory and what is in it, without following a link or crossing a mount. Absent is fine.
///
/// # Errors
/// When something stays; where a mount is in the way, the error is `EXDEV` or `EBUSY`.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let dir = match open_dir(CWD, path.as_os_str().as_bytes(), ResolveFlags::NO_SYMLINKS) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(about(path, e)),
    };
    empty_dir(dir.as_fd(), 0).map_err(|e| about(path, e))?;
    match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(about(path, e)),
    }
}

/// Removes a container's place in a share: its `rootfs`, what is in its `mounts`, and itself. Only mount points go, that is files, links and
/// empty directories; anything else would be somebody's data behind a mount that is still there, and stays. Absent is fine.
///
/// # Errors
/// The first thing that stays.
pub fn remove_mount_points(share: &Path, name: &OsStr) -> io::Result<()> {
    let path = || share.join(name);
    let remove = || {
        let share = open_dir(CWD, share.as_os_str().as_bytes(), ResolveFlags::empty())?;
        if let Some(dir) = open_below(share.as_fd(), name.as_bytes())? {
            if let Some(mounts) = open_below(dir.as_fd(), b"mounts")? {
                for entry in Dir::read_from(&mounts)? {
                    let entry = entry?;
                    if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                        remove_name(mounts.as_fd(), entry.file_name().to_bytes())?;
                    }
                }
            }
            remove_name(dir.as_fd(), b"mounts")?;
            remove_name(dir.as_fd(), b"rootfs")?;
        }
        remove_name(share.as_fd(), name.as_bytes())
    };
    match remove() {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(about(&path(), e)),
    }
}

/// `None` where there is no directory of this name: nothing, or a link.
fn open_below(at: BorrowedFd<'_>, name: &[u8]) -> Result<Option<OwnedFd>, Errno> {
    match open_dir(at, name, INSIDE) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Removes a file, a link or an empty directory.
fn remove_name(at: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => match unlinkat(at, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOENT) => Ok(()),
            removed => removed,
        },
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

fn about(path: &Path, e: Errno) -> io::Error {
    let why = match e {
        Errno::XDEV | Errno::BUSY => " (something is still mounted there)",
        _ => "",
    };
    io::Error::new(
        io::Error::from(e).kind(),
        format!("cannot remove {}: {e}{why}", path.display()),
    )
}

fn open_dir(at: BorrowedFd<'_>, name: &[u8], resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(at, name, flags, Mode::empty(), resolve)
}

fn empty_dir(dir: BorrowedFd<'_>, depth: usize) -> Result<(), Errno> {
    if depth >= MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let is_dir = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => open_dir(dir, name, ResolveFlags::NO_XDEV).is_ok(),
            _ => false,
        };
        let removed = if is_dir {
            let below = open_dir(dir, name, INSIDE)?;
            empty_dir(below.as_fd(), depth + 1)?;
            unlinkat(dir, name, AtFlags::REMOVEDIR)
        } else {
            unlinkat(dir, name, AtFlags::empty())
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Removes a cgroup that has no process in it, trying for `limit`. Absent is fine.
///
/// # Errors
/// When it is still there at the end; then somebody else uses it.
pub fn remove_cgroup(path: &Path, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if Instant::now() >= deadline => {
                return Err(io::Error::new(
                    e.kind(),
                    format!("cannot remove the cgroup {}: {e}", path.display()),
                ));
            }
            // The kernel lets a cgroup go a moment after its last process.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Removes a file; absent is fine.
///
/// # Errors
/// Whatever else the file system says, with the path.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io::Error::new(
            e.kind(),
            format!("cannot remove {}: {e}", path.display()),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use proptest::prelude::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let table = b"36 35 98:0 / / rw - ext4 /dev/sda rw\n\
            37 36 0:5 /x /run/a\\040b\\134c rw,noatime shared:1 master:2 - tmpfs t rw\nshort\n\n";
        assert_eq!(
            mounts(table)
                .into_iter()
                .map(|m| (m.point, m.is_private, m.kind))
                .collect::<Vec<_>>(),
            [
                (PathBuf::from("/"), true, &b"ext4"[..]),
                (PathBuf::from("/run/a b\\c"), false, b"tmpfs")
            ]
        );
    }

    /// Needs root, as husk does.
    #[test]
    fn overlays_that_the_host_cannot_take_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let run = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let change = |at: &Path, flags: MsFlags| {
                mount(None::<&str>, at, None::<&str>, flags, None::<&str>).unwrap();
            };
            change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            let tmpfs = Some("tmpfs");
            mount(tmpfs, dir, tmpfs, MsFlags::empty(), None::<&str>).unwrap();
            let options = format!("lowerdir={0}/one:{0}/two", dir.display());
            for name in ["one", "two", "left", "kept/bin", "heard"] {
                fs::create_dir_all(dir.join(name)).unwrap();
            }
            for name in ["left", "kept", "heard"] {
                let overlay = Some("overlay");
                mount(
                    overlay,
                    &dir.join(name),
                    overlay,
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .unwrap();
            }
            change(&dir.join("heard"), MsFlags::MS_SHARED);
            leave_private_overlays(&[&dir.join("kept/bin/husk")]).unwrap();
            let table = fs::read("/proc/thread-self/mountinfo").unwrap();
            let mut left = mounts_below(&table, dir);
            left.retain(|mount| mount.kind == b"overlay");
            left.into_iter().map(|mount| mount.point).collect()
        };
        let left: Vec<_> =
            std::thread::scope(|scope| scope.spawn(run).join()).expect("the thread to end");
        assert_eq!(left, [dir.join("kept"), dir.join("heard")]);
    }

    #[test]
    fn a_tree_goes_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), "x").unwrap();
        fs::write(tree.join("a/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/b/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && outside.join("keep").exists());
        remove_tree(&tree).unwrap();
        // Nor is the tree's own name.
        std::os::unix::fs::symlink(&outside, &tree).unwrap();
        assert!(remove_tree(&tree).is_err());
        assert!(outside.join("keep").exists());
    }

    /// Needs root, as husk does.
    #[test]
    fn a_mounted_volume_survives_the_removal_and_goes_after_the_unmount() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, volume) = (dir.path().join("tree"), dir.path().join("volume"));
        fs::create_dir_all(tree.join("deep/mnt")).unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("keep"), "x").unwrap();
        // A bind mount of the same file system: the device number alone would not tell.
        let bind = |from: &Path, to: &Path| {
            mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        };
        bind(&volume, &tree.join("deep/mnt")).unwrap();
        bind(&volume, &tree.join("deep/mnt")).unwrap();
        let error = remove_tree(&tree).unwrap_err().to_string();
        assert!(error.contains("mounted"), "{error}");
        assert!(volume.join("keep").exists());
        assert_eq!(unmount_below(&tree).unwrap(), 2);
        assert_eq!(unmount_below(&tree).unwrap(), 0);
        remove_tree(&tree).unwrap();
        assert!(volume.join("keep").exists());
    }

    /// A volume with a mount of its own below it, to which the guest writes while its pod is cleared away.
    #[test]
    fn a_mount_is_not_looked_up_below_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["tree/mnt", "volume/middle/deep", "outside/deep", "other"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        let bind = |from: &str, to: &str| {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(&at(from)), &at(to), None::<&str>, flags, None::<&str>).unwrap();
        };
        bind("other", "volume/middle/deep");
        bind("other", "outside/deep");
        bind("volume", "tree/mnt");
        let mounted = |below: &str| {
            let table = fs::read("/proc/thread-self/mountinfo").unwrap();
            mounts_below(&table, &at(below)).len()
        };
        let table = fs::read("/proc/thread-self/mountinfo").unwrap();
        assert_eq!(mounts_below(&table, &at("tree")).len(), 2);
        // After the table has been read.
        fs::rename(at("volume/middle"), at("volume/away")).unwrap();
        std::os::unix::fs::symlink(at("outside"), at("volume/middle")).unwrap();
        detach(&table, &at("tree")).unwrap();
        assert_eq!((mounted("tree"), mounted("outside")), (0, 1));
        unmount_below(dir.path()).unwrap();
        assert_eq!(mounted(""), 0);
    }

    #[test]
    fn what_is_absent_is_fine() {
        let gone = Path::new("/no/such/thing");
        remove_tree(gone).unwrap();
        remove_file(gone).unwrap();
        remove_cgroup(gone, Duration::ZERO).unwrap();
    }

    #[test]
    fn a_cgroup_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.kill"), "").unwrap();
        fs::create_dir(dir.path().join("inner")).unwrap();
        assert!(remove_cgroup(dir.path(), Duration::ZERO).is_err());
        assert_eq!(fs::read(dir.path().join("cgroup.kill")).unwrap(), b"");
        assert!(dir.path().join("inner").exists());
        remove_cgroup(&dir.path().join("inner"), Duration::ZERO).unwrap();
    }

    proptest! {
        #[test]
        fn any_table_is_survived(table in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = mounts(&table);
        }
    }
}
