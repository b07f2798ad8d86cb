//! What a layer deletes of those below.

use std::{
    ffi::CString,
    io::Read,
    os::fd::{AsFd as _, BorrowedFd},
};

use rustix::fs::{FileType, Mode, mknodat};

use super::{
    Unpacker,
    error::{UnpackError, refused, system},
    metadata,
    place::Place,
    root::There,
};
use crate::archive::Entry;

/// What makes a name a deletion, and not a file's (OCI image-spec, layer.md, "Whiteouts").
pub(super) const WHITEOUT: &[u8] = b".wh.";
/// What hides all that lower layers have in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own notes, which some old images have.
const AUFS: &[u8] = b".wh..wh.";

impl<R: Read> Unpacker<'_, R> {
    pub(super) fn white_out(
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

    pub(super) fn make_opaque(
        &self,
        entry: &Entry,
        dir: BorrowedFd<'_>,
        name: &CString,
    ) -> Result<(), UnpackError> {
        metadata::set_xattr(dir, name, self.opaque, b"y")
            .map_err(|source| system("make opaque", entry, source))
    }
}
