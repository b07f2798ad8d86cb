//! Reading a tar stream: POSIX (ustar and pax), with what GNU tar adds for long names and sparse files.
//!
//! The fields of a header are the `tar` crate's to parse; the walk from one header to the next is here, because that crate reads the
//! headers that extend another without a bound, and a compressed stream holds gigabytes of those in a few kilobytes.

mod extents;
mod field;
mod pax;

use std::io::{self, Read};

use tar::{EntryType, Header};

pub use extents::{Extent, spread};
use field::{checksum, number, signed_number};
use pax::Records;

/// Bytes of a header, and what everything is padded to (POSIX.1-2008, pax, "ustar Interchange Format").
const BLOCK: usize = 512;

/// The most bytes that a long name or a set of pax records may have. The largest that Linux can use is a file with all its extended attributes, 64 KiB.
const MAX_EXTENSION: u64 = 1 << 20;

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream itself.
    #[error("reading the layer")]
    Read(#[source] io::Error),
    /// It ends within an entry.
    #[error("the layer ends in the middle of {0:?}: it is incomplete")]
    Truncated(String),
    /// A header that is none.
    #[error("the layer is not a tar archive: {what} after {name:?}")]
    Malformed {
        /// The entry before.
        name: String,
        /// What does not fit.
        what: String,
    },
    /// An entry that says what cannot be.
    #[error("{name:?} in the layer: {what}")]
    Entry {
        /// Its name.
        name: String,
        /// What does not fit.
        what: String,
    },
}

/// What an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file, with data.
    File,
    /// Another name of a file that the archive has told before.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// A time: seconds since the Unix epoch, and nanoseconds after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, below 10^9.
    pub nanoseconds: u32,
}

/// One entry, as the archive tells it: nothing of it has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path, in the bytes of the archive.
    pub name: Vec<u8>,
    /// Where a link points.
    pub link: Vec<u8>,
    /// What it makes.
    pub kind: Kind,
    /// Permissions with setuid, setgid and sticky: 12 bits.
    pub mode: u32,
    /// The user who owns it.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When its contents were changed.
    pub mtime: Time,
    /// A device's numbers, major and minor.
    pub device: (u32, u32),
    /// Extended attributes: names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a file, holes included.
    pub size: u64,
    /// Where a sparse file has data, in ascending order; `None`: everywhere.
    pub extents: Option<Vec<Extent>>,
}

impl Entry {
    /// Its name for people.
    pub fn display_name(&self) -> String {
        lossy(&self.name)
    }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// A tar stream, entry by entry.
#[derive(Debug)]
pub struct Archive<R> {
    input: R,
    /// Of the current entry, bytes of data that have not been read.
    data: u64,
    /// And of padding after them.
    padding: u64,
    /// The current entry's name, for errors.
    name: String,
}

impl<R: Read> Archive<R> {
    /// An archive that begins here.
    pub fn new(input: R) -> Self {
        Self {
            input,
            data: 0,
            padding: 0,
            name: String::new(),
        }
    }

    /// The stream after the archive.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; what has not been read of the last one's data is passed over. `None` at the end.
    ///
    /// # Errors
    /// When the stream cannot be read, or is no archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut long_name = None;
        let mut long_link = None;
        let mut records = Records::default();
        let mut is_extended = false;
        loop {
            self.skip_data()?;
            let Some(header) = self.header()? else {
                if is_extended {
                    return Err(self.malformed("a header of extensions is the last".into()));
                }
                return Ok(None);
            };
            let stored = self.number("size", &header.as_old().size)?;
            is_extended |= header.entry_type() != EntryType::XGlobalHeader;
            match header.entry_type() {
                EntryType::GNULongName => long_name = Some(self.long_name(stored)?),
                EntryType::GNULongLink => long_link = Some(self.long_name(stored)?),
                EntryType::XHeader => {
                    let text = self.extension(stored)?;
                    self.parse(&mut records, &text)?;
                }
                // Records for all entries that follow, which no tool for images heeds (Go's archive/tar, on which they are built, does not).
                EntryType::XGlobalHeader => self.set_data(stored),
                _ => {
                    let names = (long_name, long_link);
                    return self.entry(&header, stored, names, records).map(Some);
                }
            }
        }
    }

    /// Puts together what the header and those before it say: GNU's long names before pax, as Go has it.
    fn entry(
        &mut self,
        header: &Header,
        stored: u64,
        (long_name, long_link): (Option<Vec<u8>>, Option<Vec<u8>>),
        mut records: Records,
    ) -> Result<Entry, ArchiveError> {
        let sparse = records.take_sparse();
        let name = sparse
            .name
            .clone()
            .or(long_name)
            .or_else(|| records.path.take())
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = long_link
            .or_else(|| records.link.take())
            .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
            .unwrap_or_default();
        self.name = lossy(&name);
        let kind = self.kind(header, &name)?;
        // Nothing else has data, whatever its size says: a link's is the file's in some archives.
        let stored = match kind {
            Kind::File => records.size.unwrap_or(stored),
            _ => 0,
        };
        let id = |what, record: Option<u64>, field: &[u8]| {
            let id = match record {
                Some(id) => id,
                None => self.number(what, field)?,
            };
            u32::try_from(id)
                .ok()
                // u32::MAX means "unchanged" to chown(2).
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| self.invalid(format!("{what} {id} is none that Linux knows")))
        };
        let uid = id("user", records.uid, &header.as_old().uid)?;
        let gid = id("group", records.gid, &header.as_old().gid)?;
        let mtime = match records.mtime {
            Some(time) => time,
            None => Time {
                seconds: signed_number(&header.as_old().mtime)
                    .ok_or_else(|| self.malformed("a header whose time is no number".into()))?,
                nanoseconds: 0,
            },
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => {
                let ustar = header.as_ustar().map(|h| (h.dev_major, h.dev_minor));
                let fields = ustar.or_else(|| header.as_gnu().map(|h| (h.dev_major, h.dev_minor)));
                let (major, minor) =
                    fields.ok_or_else(|| self.invalid("a device without numbers".into()))?;
                let number = |field: [u8; 8]| {
                    u32::try_from(self.number("device", &field)?)
                        .map_err(|_| self.invalid("a device that Linux does not know".into()))
                };
                (number(major)?, number(minor)?)
            }
            _ => (0, 0),
        };
        let mode = self.number("mode", &header.as_old().mode)?;
        self.set_data(stored);
        let (extents, size) = self.extents(header, sparse)?;
        Ok(Entry {
            name,
            link,
            kind,
            // Twelve bits are left.
            mode: u32::try_from(mode & 0o7777).unwrap_or(0),
            uid,
            gid,
            mtime,
            device,
            xattrs: records.xattrs,
            size,
            extents,
        })
    }

    /// Where a sparse file has data, and how large it is.
    fn extents(
        &mut self,
        header: &Header,
        sparse: pax::Sparse,
    ) -> Result<(Option<Vec<Extent>>, u64), ArchiveError> {
        let gnu = header
            .as_gnu()
            .filter(|_| header.entry_type().is_gnu_sparse());
        let (extents, size) = if let Some(gnu) = gnu {
            let size = self.number("real size", &gnu.realsize)?;
            let mut extents = Vec::new();
            let mut more = gnu.is_extended();
            self.add_extents(&mut extents, &gnu.sparse)?;
            while more {
                let mut block = tar::GnuExtSparseHeader::new();
                // They follow the header and are not counted as data.
                self.fill(block.as_mut_bytes())?;
                self.add_extents(&mut extents, block.sparse())?;
                more = block.is_extended();
            }
            (extents, size)
        } else if sparse.is_in_data {
            let extents = extents::read_map(|buffer| self.read_exact_data(buffer))
                .map_err(|error| error.about(&self.name))?;
            (extents, sparse.size.unwrap_or(0))
        } else if let (false, Some(size)) = (sparse.extents.is_empty(), sparse.size) {
            (sparse.extents, size)
        } else {
            return Ok((None, self.data));
        };
        extents::check(&extents, size, self.data).map_err(|what| self.invalid(what))?;
        Ok((Some(extents), size))
    }

    fn add_extents(
        &self,
        extents: &mut Vec<Extent>,
        headers: &[tar::GnuSparseHeader],
    ) -> Result<(), ArchiveError> {
        for header in headers.iter().filter(|header| !header.is_empty()) {
            if extents.len() == extents::MAX {
                return Err(self.invalid(extents::TOO_MANY.into()));
            }
            extents.push(Extent {
                offset: self.number("offset", &header.offset)?,
                length: self.number("length", &header.numbytes)?,
            });
        }
        Ok(())
    }

    fn kind(&self, header: &Header, name: &[u8]) -> Result<Kind, ArchiveError> {
        // Before POSIX, a directory was a file whose name ends so.
        if header.as_old().linkflag == [0] && name.ends_with(b"/") {
            return Ok(Kind::Directory);
        }
        Ok(match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Directory => Kind::Directory,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Fifo => Kind::Fifo,
            other => {
                let code = char::from(other.as_byte());
                return Err(self.invalid(format!("an entry of an unknown kind, {code:?}")));
            }
        })
    }

    /// Reads of the current entry's data; 0 at its end.
    ///
    /// # Errors
    /// When the stream cannot be read, or ends before the data.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = usize::try_from(self.data).map_or(buffer.len(), |left| left.min(buffer.len()));
        let Some(part) = buffer.get_mut(..most).filter(|part| !part.is_empty()) else {
            return Ok(0);
        };
        let count = read(&mut self.input, part)?;
        if count == 0 {
            return Err(ArchiveError::Truncated(self.name.clone()));
        }
        self.data -= count as u64;
        Ok(count)
    }

    fn read_exact_data(&mut self, buffer: &mut [u8]) -> Result<(), ArchiveError> {
        match fill(buffer, |rest| self.read_data(rest))? {
            count if count < buffer.len() => Err(self.invalid("its data ends too early".into())),
            _ => Ok(()),
        }
    }

    fn set_data(&mut self, size: u64) {
        self.data = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_data(&mut self) -> Result<(), ArchiveError> {
        let left = self.data.checked_add(self.padding);
        let left = left.ok_or_else(|| self.invalid("its size is beyond any".into()))?;
        let skipped = io::copy(&mut (&mut self.input).take(left), &mut io::sink())
            .map_err(ArchiveError::Read)?;
        if skipped < left {
            return Err(ArchiveError::Truncated(self.name.clone()));
        }
        self.set_data(0);
        Ok(())
    }

    /// The next header; `None` at the end: two blocks of zeros, or that of the stream.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut is_ending = false;
        loop {
            let mut block = [0; BLOCK];
            match self.fill_or_end(&mut block)? {
                false => return Ok(None),
                true if block.iter().all(|byte| *byte == 0) => {
                    if is_ending {
                        return Ok(None);
                    }
                    is_ending = true;
                }
                true if is_ending => {
                    return Err(self.malformed("a header behind the block that ends it".into()));
                }
                true => {
                    let header = Header::from_byte_slice(&block).clone();
                    let sum = checksum(&block);
                    return match number(&header.as_old().cksum) {
                        Some(told) if told == sum => Ok(Some(header)),
                        _ => Err(self.malformed("a header with a wrong checksum".into())),
                    };
                }
            }
        }
    }

    /// Fills a block, or tells that the stream ended before it.
    fn fill_or_end(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, ArchiveError> {
        match fill(block, |rest| read(&mut self.input, rest))? {
            0 => Ok(false),
            BLOCK => Ok(true),
            _ => Err(ArchiveError::Truncated(self.name.clone())),
        }
    }

    fn fill(&mut self, block: &mut [u8; BLOCK]) -> Result<(), ArchiveError> {
        match self.fill_or_end(block)? {
            true => Ok(()),
            false => Err(ArchiveError::Truncated(self.name.clone())),
        }
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.extension(size)?;
        // GNU tar ends it with a NUL.
        if let Some(end) = name.iter().position(|byte| *byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    /// The data of a header that extends the next.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let length = usize::try_from(size).ok().filter(|_| size <= MAX_EXTENSION);
        let Some(length) = length else {
            return Err(self.malformed(format!(
                "an extended header of {size} bytes, the most is {MAX_EXTENSION}"
            )));
        };
        self.set_data(size);
        let mut data = vec![0; length];
        self.read_exact_data(&mut data)?;
        Ok(data)
    }

    fn parse(&self, records: &mut Records, text: &[u8]) -> Result<(), ArchiveError> {
        records
            .parse(text)
            .map_err(|what| self.malformed(format!("a pax header that cannot be read ({what})")))
    }

    fn number(&self, what: &str, field: &[u8]) -> Result<u64, ArchiveError> {
        number(field).ok_or_else(|| self.malformed(format!("a header whose {what} is no number")))
    }

    fn malformed(&self, what: String) -> ArchiveError {
        ArchiveError::Malformed {
            name: self.name.clone(),
            what,
        }
    }

    fn invalid(&self, what: String) -> ArchiveError {
        ArchiveError::Entry {
            name: self.name.clone(),
            what,
        }
    }
}

/// Reads until a buffer is full or there is no more. Says how much there was.
fn fill(
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> Result<usize, ArchiveError>,
) -> Result<usize, ArchiveError> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match read(rest)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Reads what there is, whatever comes in between.
fn read(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read.map_err(ArchiveError::Read),
        }
    }
}

#[cfg(test)]
mod tests;
