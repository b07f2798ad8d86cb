//! Tar archives, mostly right, from a fuzzer's bytes: of few names, so that entries meet, and with every way that there is of saying a thing.
//!
//! What is wrong in one is wrong on purpose: a field's noise comes before the checksum, as a stranger's would, and damage to the stream after.

mod bytes;

use arbitrary::{Arbitrary, Unstructured};

pub use bytes::mend;

/// Bytes of a header, and what all is padded to.
const BLOCK: usize = 512;

/// An archive.
#[derive(Arbitrary, Debug)]
pub struct Tarball {
    items: Vec<Item>,
    end: End,
    damage: Vec<Damage>,
}

/// How it ends.
#[derive(Arbitrary, Debug)]
enum End {
    Two,
    One,
    None,
    Behind(Box<Item>),
    Noise(Vec<u8>),
    Cut(u16),
}

/// A byte of the stream, somewhere, made another.
#[derive(Arbitrary, Debug)]
struct Damage {
    at: u16,
    byte: u8,
}

/// An entry.
#[derive(Debug)]
struct Item {
    name: Name,
    link: Name,
    kind: Kind,
    format: Format,
    odd: Odd,
    data: Data,
    xattrs: Vec<(Attribute, Vec<u8>)>,
    sparse: Sparse,
    more: More,
}

impl<'a> Arbitrary<'a> for Item {
    /// In few bytes where nothing is odd about it, so that several plain ones in a row, which make the trouble, are soon come upon.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let kind = Kind::of(u.arbitrary()?);
        let name = Name::arbitrary(u)?;
        let link = match kind {
            Kind::HardLink | Kind::Symlink => Name::target(u)?,
            _ => Name(Vec::new()),
        };
        let (mut odd, mut data, mut xattrs) = (Odd::default(), Data::None, Vec::new());
        let (mut format, mut sparse, mut more) = (Format::Pax, Sparse::No, More::Nothing);
        match u.arbitrary::<u8>()? {
            0..=127 => {}
            128..=147 => data = u.arbitrary()?,
            148..=167 => odd = u.arbitrary()?,
            168..=187 => xattrs = u.arbitrary()?,
            188..=207 => sparse = u.arbitrary()?,
            208..=227 => more = u.arbitrary()?,
            _ => (odd, data, xattrs, format, sparse, more) = u.arbitrary()?,
        }
        Ok(Self {
            name,
            link,
            kind,
            format,
            odd,
            data,
            xattrs,
            sparse,
            more,
        })
    }
}

/// Owner, mode, times, numbers.
#[derive(Arbitrary, Debug)]
struct Odd {
    mode: u16,
    uid: Id,
    gid: Id,
    time: Time,
    device: (u8, u8),
}

impl Default for Odd {
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: Id::Root,
            gid: Id::Root,
            time: Time::Now,
            device: (1, 3),
        }
    }
}

#[derive(Debug)]
enum Kind {
    File,
    OldFile,
    Contiguous,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
    Other(u8),
}

impl Kind {
    fn of(byte: u8) -> Self {
        match byte {
            0..=63 => Self::File,
            64..=111 => Self::Symlink,
            112..=159 => Self::HardLink,
            160..=207 => Self::Directory,
            208..=217 => Self::Character,
            218..=223 => Self::Block,
            224..=231 => Self::Fifo,
            232..=237 => Self::OldFile,
            238..=243 => Self::Contiguous,
            _ => Self::Other(byte),
        }
    }
}

#[derive(Arbitrary, Debug, Clone, Copy, PartialEq)]
enum Format {
    Pax,
    Gnu,
    Ustar,
    /// Before POSIX: without magic.
    Old,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Id {
    Root,
    Small(u8),
    Large(u32),
    Beyond,
}

#[derive(Arbitrary, Debug)]
enum Time {
    Now,
    Any(i64),
    Fraction(i32, u32),
    Text(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Data {
    None,
    Some(Vec<u8>),
    /// So many bytes alike.
    Many(u16),
    /// Said to be of another size.
    Lie(Vec<u8>, i8),
    Huge(u64),
}

#[derive(Arbitrary, Debug)]
enum Attribute {
    User(u8),
    Trusted(u8),
    Capability,
    Acl,
    Opaque,
    UserOpaque,
    Redirect,
    Selinux,
    Any(Vec<u8>),
}

/// How a file with holes says so: GNU's four ways.
#[derive(Arbitrary, Debug)]
enum Sparse {
    No,
    Header(Map),
    Pairs(Map),
    List(Map),
    InData(Map),
}

#[derive(Arbitrary, Debug)]
struct Map {
    /// A hole and then data, in bytes.
    pieces: Vec<(u16, u8)>,
    end: u32,
    lie: Option<(u8, u64)>,
}

/// What else stands before an entry, or in its header.
#[derive(Arbitrary, Debug)]
enum More {
    Nothing,
    Noise(Vec<(u16, u8)>),
    Global(Vec<u8>),
    Records(Vec<(Key, Vec<u8>)>),
    Text(Vec<u8>),
    LongName(Vec<u8>),
    LongLink(Vec<u8>),
    HugeExtension(u64),
}

#[derive(Arbitrary, Debug)]
enum Key {
    Path,
    LinkPath,
    Size,
    Uid,
    Mtime,
    Major,
    Minor,
    SparseName,
    SparseSize,
    RealSize,
    SparseMap,
    Offset,
    Bytes,
    Blocks,
    Any(Vec<u8>),
}

/// A path.
#[derive(Debug)]
struct Name(Vec<u8>);

impl Name {
    /// Where a link leads: out, if it can.
    fn target(u: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        const TARGETS: [&[u8]; 8] = [
            b"/outside",
            b"/outside/file",
            b"../../../outside",
            b"../lower",
            b"a",
            b"..",
            b"/",
            b"a/b",
        ];
        match u.arbitrary::<u8>()? {
            byte @ 0..=159 => Ok(Self(TARGETS[usize::from(byte % 8)].to_vec())),
            _ => Self::arbitrary(u),
        }
    }
}

impl<'a> Arbitrary<'a> for Name {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        const PARTS: [&[u8]; 16] = [
            b"a",
            b"b",
            b"c",
            b"file",
            b"a",
            b"b",
            b"a",
            b"b",
            b".wh.a",
            b".wh.b",
            b".wh..wh..opq",
            b".wh..wh.plnk",
            b".wh.",
            b".wh..",
            b".",
            b"..",
        ];
        const STARTS: [&[u8]; 8] = [
            b"",
            b"",
            b"",
            b"",
            b"./",
            b"/outside/",
            b"../../outside/",
            b"../lower/",
        ];
        let shape: u8 = u.arbitrary()?;
        let mut name = STARTS[usize::from(shape >> 5)].to_vec();
        for number in 0..=shape & 3 {
            if number > 0 {
                name.push(b'/');
            }
            let part: u8 = u.arbitrary()?;
            match part {
                250 => name.extend([b'n'; 255]),
                251 => name.extend([b'n'; 256]),
                252 => name.extend(b"d/".repeat(120)),
                253 => name.extend(u.arbitrary::<Vec<u8>>()?),
                254 => name.extend(b"proc/self/cwd"),
                _ => name.extend(PARTS[usize::from(part % 16)]),
            }
        }
        if shape & 4 != 0 {
            name.push(b'/');
        }
        Ok(Self(name))
    }
}

impl Tarball {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut tar = Vec::new();
        for item in &self.items {
            item.write(&mut tar);
        }
        match &self.end {
            End::Two => tar.extend([0; 2 * BLOCK]),
            End::One => tar.extend([0; BLOCK]),
            End::None => {}
            End::Behind(item) => {
                tar.extend([0; BLOCK]);
                item.write(&mut tar);
            }
            End::Noise(noise) => {
                tar.extend([0; 2 * BLOCK]);
                tar.extend(noise);
            }
            End::Cut(at) => tar.truncate(usize::from(*at)),
        }
        for damage in &self.damage {
            if let Some(byte) = tar.get_mut(usize::from(damage.at)) {
                *byte = damage.byte;
            }
        }
        tar
    }
}
