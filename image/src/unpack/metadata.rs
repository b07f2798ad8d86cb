//! Owner, mode, extended attributes and time of what has been made.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fgetxattr,
        flistxattr, fsetxattr, fstat, lsetxattr, utimensat,
    },
    io::Errno,
};

use super::Owners;
use crate::archive::{Entry, Kind, Time};

/// Attributes that are not an image's to set: overlayfs would take them for its own, and SELinux's are those of the machine that built it.
const NOT_AN_IMAGES: [&[u8]; 3] = [b"trusted.overlay.", b"user.overlay.", b"security.selinux"];

/// Bytes of a file's attributes (Linux, XATTR_SIZE_MAX and XATTR_LIST_MAX).
const XATTR_MAX: usize = 64 << 10;

/// What can be said of a file besides its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    owner: Option<(u32, u32)>,
    mode: u32,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) mtime: Option<Time>,
}

impl Metadata {
    pub(super) fn of_entry(entry: &Entry) -> Self {
        Self {
            owner: Some((entry.uid, entry.gid)),
            mode: entry.mode,
            xattrs: entry.xattrs.clone(),
            mtime: Some(entry.mtime),
        }
    }

    /// Root's, with this mode.
    pub(super) fn of_mode(mode: u32) -> Self {
        Self {
            owner: Some((0, 0)),
            mode,
            xattrs: Vec::new(),
            mtime: None,
        }
    }

    /// A directory's.
    pub(super) fn of_directory(dir: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = fstat(dir)?;
        let mut xattrs = Vec::new();
        let mut names = vec![0; XATTR_MAX];
        let length = flistxattr(dir, &mut names)?;
        for name in names
            .get(..length)
            .unwrap_or_default()
            .split(|byte| *byte == 0)
        {
            if name.is_empty() || !is_an_images(name) {
                continue;
            }
            let mut value = vec![0; XATTR_MAX];
            let length = fgetxattr(dir, name, &mut value)?;
            value.truncate(length);
            xattrs.push((name.to_owned(), value));
        }
        Ok(Self {
            owner: Some((stat.st_uid, stat.st_gid)),
            mode: stat.st_mode & 0o7777,
            xattrs,
            mtime: Some(Time {
                seconds: stat.st_mtime,
                nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            }),
        })
    }

    /// Sets it all, in the order that keeps it: a change of owner takes setuid and file capabilities away. Says how many attributes were
    /// left out, or what could not be done.
    pub(super) fn set(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
        owners: Owners,
    ) -> Result<u64, (&'static str, Errno)> {
        if let (Owners::Kept, Some((uid, gid))) = (owners, self.owner) {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| ("set the owner of", error))?;
        }
        // A link has none.
        if kind != Kind::Symlink {
            let mode = Mode::from_raw_mode(self.mode);
            chmodat(dir, name, mode, AtFlags::empty())
                .map_err(|error| ("set the mode of", error))?;
        }
        let mut left_out = 0;
        for (key, value) in &self.xattrs {
            let set = match CString::new(&**key) {
                Ok(key) if is_an_images(key.as_bytes()) => set_xattr(dir, name, &*key, value),
                _ => {
                    left_out += 1;
                    continue;
                }
            };
            match set {
                Err(Errno::PERM) if owners == Owners::Caller => left_out += 1,
                set => set.map_err(|error| ("set the extended attributes of", error))?,
            }
        }
        if let Some(time) = self.mtime {
            set_time(dir, name, time).map_err(|error| ("set the time of", error))?;
        }
        Ok(left_out)
    }
}

fn is_an_images(key: &[u8]) -> bool {
    !NOT_AN_IMAGES.iter().any(|other| key.starts_with(other))
}

/// Sets an attribute of what has this name in a directory, a symbolic link's own too: there is no call that takes both (before Linux 6.13),
/// so the directory is named by its fd.
pub(super) fn set_xattr(
    dir: BorrowedFd<'_>,
    name: &CStr,
    key: impl rustix::path::Arg,
    value: &[u8],
) -> Result<(), Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()).into_bytes();
    path.extend(name.to_bytes());
    lsetxattr(&*path, key, value, XattrFlags::empty())
}

/// Sets an attribute of an open directory.
pub(super) fn set_xattr_of(dir: BorrowedFd<'_>, key: &str, value: &[u8]) -> Result<(), Errno> {
    fsetxattr(dir, key, value, XattrFlags::empty())
}

/// Sets both times; the archive has one.
pub(super) fn set_time(dir: BorrowedFd<'_>, name: &CStr, time: Time) -> Result<(), Errno> {
    let time = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}
