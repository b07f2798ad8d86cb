//! Where a sparse file has data.

use super::{ArchiveError, BLOCK};

/// The most pieces that a sparse file may have.
pub(super) const MAX: usize = 1 << 16;
pub(super) const TOO_MANY: &str = "a sparse file of more than 65536 pieces";

/// A piece of a sparse file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
}

/// What went wrong while a map was read.
pub(super) enum MapError {
    Read(ArchiveError),
    Invalid(&'static str),
}

impl MapError {
    pub(super) fn about(self, name: &str) -> ArchiveError {
        match self {
            Self::Read(error) => error,
            Self::Invalid(what) => ArchiveError::Entry {
                name: name.to_owned(),
                what: what.to_owned(),
            },
        }
    }
}

/// Reads the map that stands before the data of GNU's format 1.0: decimal numbers, a line each, the count of pieces first; padded to a block.
pub(super) fn read_map(
    mut read: impl FnMut(&mut [u8]) -> Result<(), ArchiveError>,
) -> Result<Vec<Extent>, MapError> {
    let mut block = [0; BLOCK];
    let mut at = BLOCK;
    let mut number = || {
        let mut value: Option<u64> = None;
        loop {
            if at == BLOCK {
                read(&mut block).map_err(MapError::Read)?;
                at = 0;
            }
            let byte = block.get(at).copied().unwrap_or(0);
            at += 1;
            let digit = match byte {
                b'0'..=b'9' => u64::from(byte - b'0'),
                b'\n' => return value.ok_or(MapError::Invalid("its map has an empty line")),
                _ => {
                    return Err(MapError::Invalid(
                        "its map has something other than numbers",
                    ));
                }
            };
            let grown = value.unwrap_or(0).checked_mul(10);
            let grown = grown.and_then(|value| value.checked_add(digit));
            value = Some(grown.ok_or(MapError::Invalid("its map has a number beyond 64 bits"))?);
        }
    };
    let count = number()?;
    let count = usize::try_from(count)
        .ok()
        .filter(|count| *count <= MAX)
        .ok_or(MapError::Invalid(TOO_MANY))?;
    let mut extents = Vec::new();
    for _ in 0..count {
        extents.push(Extent {
            offset: number()?,
            length: number()?,
        });
    }
    Ok(extents)
}

/// They must ascend, lie within the file, and have all the data that is there.
pub(super) fn check(extents: &[Extent], size: u64, data: u64) -> Result<(), String> {
    let mut end = 0;
    let mut sum: u64 = 0;
    for extent in extents {
        let next = extent.offset.checked_add(extent.length);
        match next {
            Some(next) if extent.offset >= end && next <= size => end = next,
            _ => {
                return Err(format!(
                    "a sparse file whose pieces overlap or lie beyond its {size} bytes"
                ));
            }
        }
        // No overflow: they do not overlap.
        sum += extent.length;
    }
    if sum == data {
        Ok(())
    } else {
        Err(format!(
            "a sparse file of {sum} bytes of data, of which the layer has {data}"
        ))
    }
}

/// Brings an entry's data to where they belong in its file: what `read` fills of `buffer` goes to `write`, with its place. Returns their
/// bytes.
///
/// # Errors
/// What the two fail with, and `ended`'s where the data are less than the extents.
pub fn spread<E>(
    extents: &[Extent],
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> Result<usize, E>,
    mut write: impl FnMut(&[u8], u64) -> Result<(), E>,
    ended: impl FnOnce() -> E,
) -> Result<u64, E> {
    let mut bytes = 0;
    for extent in extents {
        let (mut offset, mut left) = (extent.offset, extent.length);
        while left > 0 {
            let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let part = buffer.get_mut(..most).unwrap_or_default();
            let count = read(part)?;
            let Some(data) = part.get(..count).filter(|data| !data.is_empty()) else {
                return Err(ended());
            };
            write(data, offset)?;
            let count = count as u64;
            (offset, left, bytes) = (offset + count, left - count, bytes + count);
        }
    }
    Ok(bytes)
}
