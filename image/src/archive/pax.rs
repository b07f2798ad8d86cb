//! Records of pax headers (POSIX.1-2008, pax, "pax Header Block").

use super::{Extent, Time, extents};

/// A file's extended attribute, by star and by everybody after it.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The records that matter here; a later one takes an earlier one's place.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Sparse,
}

/// What GNU's formats of sparse files say: 0.0 and 0.1 have the map in records, 1.0 in front of the data.
#[derive(Debug, Clone, Default)]
pub(super) struct Sparse {
    pub(super) is_in_data: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) extents: Vec<Extent>,
    offset: Option<u64>,
}

impl Records {
    pub(super) fn take_sparse(&mut self) -> Sparse {
        std::mem::take(&mut self.sparse)
    }

    /// Takes records in: "length key=value\n", the length of the whole in decimal digits. A value may hold anything, line ends too.
    pub(super) fn parse(&mut self, mut text: &[u8]) -> Result<(), &'static str> {
        // Some writers pad with NULs.
        while let Some(first) = text.first().filter(|byte| **byte != 0) {
            if !first.is_ascii_digit() {
                return Err("a record without a length");
            }
            let space = text.iter().position(|byte| *byte == b' ');
            let length = space
                .and_then(|space| decimal(text.get(..space)?))
                .and_then(|length| usize::try_from(length).ok());
            let (Some(space), Some(length)) = (space, length) else {
                return Err("a record without a length");
            };
            let record = text.get(space + 1..length);
            let record = record.and_then(|record| record.strip_suffix(b"\n"));
            let (Some(record), Some(rest)) = (record, text.get(length..)) else {
                return Err("a record of a wrong length");
            };
            let equals = record.iter().position(|byte| *byte == b'=');
            let equals = equals.ok_or("a record without a value")?;
            let (key, value) = record.split_at(equals);
            self.take(key, value.get(1..).unwrap_or_default())?;
            text = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || decimal(value).ok_or("a record that should be a number");
        // Empty, it takes an earlier one back, and the header counts.
        let given = !value.is_empty();
        let text = || given.then(|| value.to_owned());
        let optional = || given.then(number).transpose();
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = optional()?,
            b"uid" => self.uid = optional()?,
            b"gid" => self.gid = optional()?,
            b"mtime" => {
                let time = || time(value).ok_or("a time that is none");
                self.mtime = given.then(time).transpose()?;
            }
            b"GNU.sparse.major" => self.sparse.is_in_data = number()? == 1,
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_owned()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.size = Some(number()?),
            b"GNU.sparse.offset" => self.sparse.offset = Some(number()?),
            b"GNU.sparse.numbytes" => {
                let offset = self
                    .sparse
                    .offset
                    .take()
                    .ok_or("a piece without an offset")?;
                self.add(offset, number()?)?;
            }
            b"GNU.sparse.map" => {
                let mut numbers = value.split(|byte| *byte == b',').map(decimal);
                while let Some(offset) = numbers.next() {
                    let (Some(offset), Some(Some(length))) = (offset, numbers.next()) else {
                        return Err("a map of a sparse file that is none");
                    };
                    self.add(offset, length)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_owned(), value.to_owned()));
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, offset: u64, length: u64) -> Result<(), &'static str> {
        if self.sparse.extents.len() == extents::MAX {
            return Err(extents::TOO_MANY);
        }
        self.sparse.extents.push(Extent { offset, length });
        Ok(())
    }
}

/// Decimal digits, and nothing else.
fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// Seconds with a sign and a fraction, both optional.
fn time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = whole.strip_prefix('-').unwrap_or(whole);
    let mut seconds: i64 = decimal(digits.as_bytes())?.try_into().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let mut nanoseconds: u32 = nanoseconds.parse().ok()?;
    if digits.len() < whole.len() {
        seconds = -seconds;
        // Nanoseconds count forward: -1.25 is -2 and 0.75.
        if nanoseconds > 0 {
            seconds = seconds.checked_sub(1)?;
            nanoseconds = 1_000_000_000 - nanoseconds;
        }
    }
    Some(Time {
        seconds,
        nanoseconds,
    })
}
