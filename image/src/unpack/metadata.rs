//! Owner, mode, extended attributes and time of what has been made.
//!
//! Who is not root owns all of it, and the owner that a layer names is an attribute: `user.rootlesscontainers`, a protobuf message of two
//! numbers (github.com/rootless-containers/proto, rootlesscontainers.proto), of which 2^32-1 says that it is the caller's, who stands for root.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fgetxattr,
        flistxattr, fremovexattr, fsetxattr, fstat, lsetxattr, utimensat,
    },
    io::Errno,
};

use super::Owners;
use crate::archive::{Entry, Kind, Time};

/// Attributes that are not an image's to set: overlayfs would take them for its own, and SELinux's are those of the machine that built it.
const NOT_AN_IMAGES: [&[u8]; 3] = [b"trusted.overlay.", b"user.overlay.", b"security.selinux"];

/// The owner of a file that is the caller's.
const OWNER: &str = "user.rootlesscontainers";

/// Bytes of a file's attributes (Linux, XATTR_SIZE_MAX and XATTR_LIST_MAX).
const XATTR_MAX: usize = 64 << 10;

/// What can be said of a file besides its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    owner: (u32, u32),
    pub(super) mode: u32,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) mtime: Option<Time>,
}

impl Metadata {
    pub(super) fn of_entry(entry: &Entry, owners: Owners) -> Self {
        let mut xattrs = entry.xattrs.clone();
        // It would be taken for husk's own.
        xattrs.retain(|(key, _)| owners == Owners::Kept || key != OWNER.as_bytes());
        Self {
            owner: (entry.uid, entry.gid),
            mode: entry.mode,
            xattrs,
            mtime: Some(entry.mtime),
        }
    }

    /// Root's, with this mode.
    pub(super) fn of_mode(mode: u32) -> Self {
        Self {
            owner: (0, 0),
            mode,
            xattrs: Vec::new(),
            mtime: None,
        }
    }

    /// A directory's, of a layer that was unpacked in the same way.
    pub(super) fn of_directory(dir: BorrowedFd<'_>, owners: Owners) -> Result<Self, Errno> {
        let stat = fstat(dir)?;
        let mut xattrs = Vec::new();
        for name in names_of(dir)? {
            let mut value = vec![0; XATTR_MAX];
            let length = fgetxattr(dir, &*name, &mut value)?;
            value.truncate(length);
            xattrs.push((name, value));
        }
        Ok(Self {
            owner: match owners {
                Owners::Kept => (stat.st_uid, stat.st_gid),
                // Another one is among the attributes.
                Owners::Caller => (0, 0),
            },
            mode: stat.st_mode & 0o7777,
            xattrs,
            mtime: Some(Time {
                seconds: stat.st_mtime,
                nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            }),
        })
    }

    /// Sets all but a directory's time, and its mode for [`Owners::Caller`]. Says how many attributes were left out, or what could not be done.
    pub(super) fn set(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
        owners: Owners,
    ) -> Result<u64, (&'static str, Errno)> {
        let left_out = match owners {
            // In the order that keeps it: a change of owner takes setuid and file capabilities away.
            Owners::Kept => {
                let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
                chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| ("set the owner of", error))?;
                self.set_mode(dir, name, kind)?;
                self.set_xattrs(dir, name, owners)?
            }
            // Attributes first: they can be set of what may be written.
            Owners::Caller => {
                let left_out =
                    self.record_owner(dir, name, kind)? + self.set_xattrs(dir, name, owners)?;
                if kind != Kind::Directory {
                    self.set_mode(dir, name, kind)?;
                }
                left_out
            }
        };
        if let Some(time) = self.mtime.filter(|_| kind != Kind::Directory) {
            set_time(dir, name, time).map_err(|error| ("set the time of", error))?;
        }
        Ok(left_out)
    }

    fn set_mode(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
    ) -> Result<(), (&'static str, Errno)> {
        // A link has none.
        if kind == Kind::Symlink {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(self.mode);
        chmodat(dir, name, mode, AtFlags::empty()).map_err(|error| ("set the mode of", error))
    }

    fn set_xattrs(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        owners: Owners,
    ) -> Result<u64, (&'static str, Errno)> {
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
                // Only root may set it, or the file system has none such.
                Err(why @ (Errno::PERM | Errno::NOTSUP)) if owners == Owners::Caller => {
                    let key = String::from_utf8_lossy(key);
                    tracing::debug!("left out: attribute {key:?} of {name:?}: {why}");
                    left_out += 1;
                }
                set => set.map_err(|error| ("set the extended attributes of", error))?,
            }
        }
        Ok(left_out)
    }

    /// Says in an attribute whose it would be. Links and pipes cannot have one (xattr(7)): how many owners were left out.
    fn record_owner(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: Kind,
    ) -> Result<u64, (&'static str, Errno)> {
        let Some(record) = record(self.owner) else {
            return Ok(0);
        };
        if !matches!(kind, Kind::File | Kind::Directory) {
            tracing::debug!("left out: owner of {name:?}, {:?}", self.owner);
            return Ok(1);
        }
        set_xattr(dir, name, OWNER, &record)
            .map_err(|error| ("keep in a \"user.\" attribute, which the store's file system must have, the owner of", error))?;
        Ok(0)
    }
}

/// An owner in protobuf's encoding: field 1 is the user, field 2 the group, both numbers. `None`: root, whom the caller stands for.
fn record((uid, gid): (u32, u32)) -> Option<Vec<u8>> {
    if (uid, gid) == (0, 0) {
        return None;
    }
    let mut record = Vec::new();
    for (field, id) in [(1_u8, uid), (2, gid)] {
        record.push(field << 3);
        let mut rest = if id == 0 { u32::MAX } else { id };
        while rest >= 0x80 {
            // Seven bits a byte, the lowest first.
            record.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        record.push((rest & 0x7f) as u8);
    }
    Some(record)
}

/// The names of a directory's attributes that are an image's.
fn names_of(dir: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = vec![0; XATTR_MAX];
    let length = match flistxattr(dir, &mut names) {
        // The file system has none.
        Err(Errno::NOTSUP) => 0,
        length => length?,
    };
    let names = names.get(..length).unwrap_or_default();
    let names = names.split(|byte| *byte == 0);
    Ok(names
        .filter(|name| !name.is_empty() && is_an_images(name))
        .map(<[u8]>::to_owned)
        .collect())
}

/// Takes the attributes of a directory away that is told of again: those it has now are all (image-spec, layer.md, "Changeset over existing
/// files").
pub(super) fn clear_xattrs(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    names_of(dir)?
        .iter()
        .try_for_each(|name| fremovexattr(dir, &**name))
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

/// Takes an overlay's mark off a directory.
pub(super) fn unset(dir: BorrowedFd<'_>, key: &str) -> Result<(), Errno> {
    match fremovexattr(dir, key) {
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
        removed => removed,
    }
}

/// Whether a directory has an overlay's mark.
pub(super) fn is_set(dir: BorrowedFd<'_>, key: &str) -> bool {
    let mut value = [0; 2];
    fgetxattr(dir, key, &mut value) == Ok(1) && value.starts_with(b"y")
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
