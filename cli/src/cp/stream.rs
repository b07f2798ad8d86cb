//! The tar streams of `-`.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use husk_image::{
    archive::{self, Archive, Entry},
    layer::{Layer, Limits},
};
use rustix::fs::{FileType, Stat};
use tar::{Builder, EntryType, Header};

use super::walk::{CAPABILITY, Content, Item, Kind, Sink, left_out};
use crate::root::downwards;

/// pax's name of [`CAPABILITY`], as GNU tar and docker have it.
const CAPABILITY_RECORD: &str = "SCHILY.xattr.security.capability";

/// Writes an archive.
pub(super) struct Writer<W: Write> {
    builder: Builder<W>,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(to: W) -> Self {
        Self {
            builder: Builder::new(to),
        }
    }

    pub(super) fn finish(self) -> Result<()> {
        let mut to = self.builder.into_inner()?;
        Ok(to.flush()?)
    }
}

impl<W: Write> Sink for Writer<W> {
    fn add(&mut self, item: &Item, content: Content<'_>) -> Result<()> {
        if item.path.is_empty() {
            return Ok(());
        }
        if let Some(value) = &item.capability {
            let record = (CAPABILITY_RECORD, value.as_slice());
            self.builder.append_pax_extensions([record])?;
        }
        let mut header = Header::new_gnu();
        header.set_mode(item.mode);
        header.set_uid(item.uid.into());
        header.set_gid(item.gid.into());
        // Nothing in an archive is older than the epoch.
        header.set_mtime(u64::try_from(item.mtime.0).unwrap_or(0));
        header.set_size(0);
        let path = Path::new(OsStr::from_bytes(&item.path));
        match (&item.kind, content) {
            (Kind::File(size), Content::File(from)) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(*size);
                let whole = Whole { from, left: *size };
                self.builder.append_data(&mut header, path, whole)?;
            }
            (Kind::Symlink(target), _) => {
                header.set_entry_type(EntryType::Symlink);
                let target = OsStr::from_bytes(target);
                self.builder.append_link(&mut header, path, target)?;
            }
            _ => {
                header.set_entry_type(EntryType::Directory);
                let path = [&*item.path, b"/"].concat();
                let path = Path::new(OsStr::from_bytes(&path));
                self.builder.append_data(&mut header, path, io::empty())?;
            }
        }
        Ok(())
    }

    fn leave(&mut self, _: &Item) -> Result<()> {
        Ok(())
    }

    fn is_own(&self, _: &Stat) -> bool {
        false
    }
}

/// A file of which the archive has told the size.
struct Whole<R> {
    from: R,
    left: u64,
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let part = buffer.get_mut(..most).unwrap_or_default();
        let count = self.from.read(part)?;
        if count == 0 && self.left > 0 && !part.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it became shorter while it was copied",
            ));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

/// Reads an archive, compressed or not, up to its end.
pub(super) fn read(from: impl Read, sink: &mut impl Sink) -> Result<()> {
    let layer = Layer::new(from, Limits::default()).context("reading the archive")?;
    let mut archive = Archive::new(layer);
    while let Some(entry) = archive.next_entry().context("reading the archive")? {
        let Some(item) = item(&entry)? else {
            continue;
        };
        let mut read = |buffer: &mut [u8]| archive.read_data(buffer).context("reading the archive");
        let content = match item.kind {
            Kind::File(_) => Content::Stream(&mut read, entry.extents.as_deref()),
            _ => Content::Nothing,
        };
        sink.add(&item, content)?;
    }
    // Whoever writes it may not be done with what follows its end.
    io::copy(&mut archive.into_inner(), &mut io::sink()).context("reading the archive")?;
    Ok(())
}

/// What an entry makes; `None`: what is left out.
fn item(entry: &Entry) -> Result<Option<Item>> {
    let path = downwards(&entry.name)?;
    let kind = match entry.kind {
        archive::Kind::File => Kind::File(entry.size),
        archive::Kind::Directory => Kind::Directory,
        archive::Kind::Symlink if !entry.link.is_empty() => Kind::Symlink(entry.link.clone()),
        archive::Kind::HardLink => Kind::HardLink(downwards(&entry.link)?),
        archive::Kind::Symlink => bail!("{} is a symbolic link to nothing", entry.display_name()),
        archive::Kind::Fifo => return skipped(entry, FileType::Fifo),
        archive::Kind::CharDevice | archive::Kind::BlockDevice => {
            return skipped(entry, FileType::CharacterDevice);
        }
    };
    if path.is_empty() && kind != Kind::Directory {
        bail!("the archive has a file without a name");
    }
    let capability = entry
        .xattrs
        .iter()
        .find(|(name, _)| name == CAPABILITY.as_bytes());
    Ok(Some(Item {
        path,
        kind,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: (entry.mtime.seconds, entry.mtime.nanoseconds),
        capability: capability.map(|(_, value)| value.clone()),
    }))
}

fn skipped(entry: &Entry, kind: FileType) -> Result<Option<Item>> {
    left_out(&entry.display_name(), kind);
    Ok(None)
}
