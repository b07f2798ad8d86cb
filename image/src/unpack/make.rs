//! What is no directory, made.

use std::{
    ffi::CString,
    io::Read,
    os::fd::{AsFd as _, BorrowedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ftruncate, linkat, makedev, mknodat, openat},
    io::{Errno, pwrite},
};

use super::{
    Owners, Unpacker,
    error::{UnpackError, refused, system},
    place::Place,
};
use crate::archive::{Entry, Extent, Kind, spread};

/// Bytes that a file is copied by.
pub(super) const COPY: usize = 256 << 10;

/// How what is not there yet is opened.
const NEW: OFlags = OFlags::CREATE
    .union(OFlags::EXCL)
    .union(OFlags::WRONLY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

impl<R: Read> Unpacker<'_, R> {
    pub(super) fn write_file(
        &mut self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
        let file = openat(dir, name, NEW, Mode::from_raw_mode(0o600))
            .map_err(|source| system("make the file", entry, source))?;
        let all = [Extent {
            offset: 0,
            length: entry.size,
        }];
        self.bytes += spread(
            entry.extents.as_deref().unwrap_or(&all),
            &mut self.buffer,
            |part| Ok(self.archive.read_data(part)?),
            |mut rest, mut offset| {
                while !rest.is_empty() {
                    let written = match pwrite(&file, rest, offset) {
                        Err(Errno::INTR) => 0,
                        written => written.map_err(|source| system("write", entry, source))?,
                    };
                    offset += written as u64;
                    rest = rest.get(written..).unwrap_or_default();
                }
                Ok(())
            },
            || refused(entry, "its data ends too early"),
        )?;
        if entry.extents.is_some() {
            ftruncate(&file, entry.size).map_err(|source| system("size", entry, source))?;
        }
        Ok(())
    }

    pub(super) fn link(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
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

    /// Makes a device or a pipe, or what stands for it. Says what was made.
    pub(super) fn make_node(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<Kind, UnpackError> {
        let fail = |source| system("make the device", entry, source);
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
        if kind != FileType::Fifo && self.owners == Owners::Caller {
            tracing::debug!("left out: device {major}:{minor}, {name:?} is an empty file");
            openat(dir, name, NEW, Mode::from_raw_mode(0o600)).map_err(fail)?;
            return Ok(Kind::File);
        }
        mknodat(dir, name, kind, Mode::from_raw_mode(0o600), number).map_err(fail)?;
        Ok(entry.kind)
    }
}
