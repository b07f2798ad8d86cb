//! How paths are found: the host's as any program finds them, a container's below its root, wherever its links point; and how what was found is
//! opened, when it is known to be a file.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Result, bail};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};

/// A place without opening what is there: no driver hears of it, and no pipe's reader waits.
pub(crate) const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);
/// A directory, the same way.
pub(crate) const DIRECTORY: OFlags = PLACE.union(OFlags::DIRECTORY);

/// How often a path is looked for again because something was renamed meanwhile: a container that never stops doing so is not waited for.
const TRIES: usize = 1000;

/// Bytes of a path with its NUL, and of a name (Linux, PATH_MAX and NAME_MAX).
const PATH_MAX: usize = 4096;
const NAME_MAX: usize = 255;

/// A root directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Root<'a> {
    dir: BorrowedFd<'a>,
    resolve: ResolveFlags,
}

impl<'a> Root<'a> {
    /// The host's own, from the working directory.
    pub(crate) fn host() -> Self {
        Self {
            dir: CWD,
            resolve: ResolveFlags::empty(),
        }
    }

    /// A container's: as if after a chroot, and without the kernel's own links out of it.
    pub(crate) fn container(dir: &'a impl AsFd) -> Self {
        Self {
            dir: dir.as_fd(),
            resolve: ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS),
        }
    }

    /// A directory of which no link is followed: what is made in it lies in it.
    pub(crate) fn without_links(dir: &'a impl AsFd) -> Self {
        Self {
            dir: dir.as_fd(),
            resolve: ResolveFlags::BENEATH
                .union(ResolveFlags::NO_SYMLINKS)
                .union(ResolveFlags::NO_MAGICLINKS),
        }
    }

    pub(crate) fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        for _ in 0..TRIES {
            match openat2(self.dir, path, flags, Mode::empty(), self.resolve) {
                // A rename somewhere else came in between (openat2(2)).
                Err(Errno::AGAIN | Errno::INTR) => {}
                opened => return opened,
            }
        }
        Err(Errno::AGAIN)
    }
}

/// Opens the very thing that this is the place of.
pub(crate) fn reopen(place: &impl AsFd, flags: OFlags) -> Result<File, Errno> {
    let path = format!("/proc/self/fd/{}", place.as_fd().as_raw_fd());
    openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// The path of what a path's last component lies in, and that; `None` where it has no name of its own, as "/" and "..".
pub(crate) fn split(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    let path = trim(path);
    let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(0) => (path.get(..1), path.get(1..)),
        Some(at) => (path.get(..at), path.get(at + 1..)),
        None => (Some(&b"."[..]), Some(path)),
    };
    let name = name.filter(|name| !matches!(*name, b"" | b"." | b".."));
    (parent.unwrap_or_default(), name)
}

fn trim(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/');
    path.get(..end.map_or(0, |at| at + 1)).unwrap_or_default()
}

/// A name of an archive as a path that goes down; empty: where the archive is unpacked itself.
pub(crate) fn downwards(name: &[u8]) -> Result<Vec<u8>> {
    let bad = |why: &str| -> Result<Vec<u8>> {
        bail!(
            "the archive has the name {:?}: {why}",
            String::from_utf8_lossy(name)
        )
    };
    let parts: Vec<&[u8]> = name
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    if parts.contains(&&b".."[..]) {
        return bad("it leads out of the directory that it is unpacked into");
    }
    if name.contains(&0) {
        return bad("there is a NUL in it");
    }
    let path = parts.join(&b'/');
    if path.len() >= PATH_MAX || parts.iter().any(|part| part.len() > NAME_MAX) {
        return bad("it is longer than Linux allows");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_have_a_parent_and_a_name() {
        let split = |path: &str| {
            let (parent, name) = split(path.as_bytes());
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (text(parent), name.map(text))
        };
        for (path, parent, name) in [
            ("/a/b", "/a", Some("b")),
            ("/a/b//", "/a", Some("b")),
            ("a", ".", Some("a")),
            ("/a", "/", Some("a")),
            ("/a/.", "/a", None),
            ("/a/..", "/a", None),
            ("/", ".", None),
            (".", ".", None),
        ] {
            assert_eq!(
                split(path),
                (parent.to_owned(), name.map(str::to_owned)),
                "{path}"
            );
        }
    }

    #[test]
    fn names_of_archives_go_down() {
        for (name, path) in [
            ("./a//b/", "a/b"),
            ("/etc/x", "etc/x"),
            ("./", ""),
            ("...", "..."),
        ] {
            assert_eq!(
                downwards(name.as_bytes()).unwrap(),
                path.as_bytes(),
                "{name}"
            );
        }
        let long = "y".repeat(256);
        let deep = "x/".repeat(2100);
        for name in ["..", "a/../b", "../x", "a\0b", &*long, &*deep] {
            assert!(downwards(name.as_bytes()).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_name_leads_up(name in proptest::collection::vec(prop_oneof![
            Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>(),
        ], 0..40)) {
            if let Ok(path) = downwards(&name) {
                for part in path.split(|byte| *byte == b'/').filter(|_| !path.is_empty()) {
                    prop_assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&0));
                }
            }
        }
    }
}
