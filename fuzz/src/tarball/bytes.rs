//! An archive's bytes, as they would be written (POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar, "Basic Tar Format").

use std::fmt::Write as _;

use super::*;

impl Item {
    pub(super) fn write(&self, tar: &mut Vec<u8>) {
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut record =
            |key: &[u8], value: &[u8]| records.push((key.to_owned(), value.to_owned()));
        let (mut data, mut size) = self.data();
        let mut header = [0; BLOCK];
        let flag = self.flag();
        let mut after = Vec::new();
        let mut is_gnu_sparse = false;
        match &self.sparse {
            Sparse::No => {}
            Sparse::Header(map) => {
                is_gnu_sparse = true;
                (data, after) = map.in_header(&mut header);
                size = data.len() as u64;
            }
            Sparse::Pairs(map) => {
                record(b"GNU.sparse.size", map.real_size().as_bytes());
                for (offset, length) in map.extents() {
                    record(b"GNU.sparse.offset", offset.to_string().as_bytes());
                    record(b"GNU.sparse.numbytes", length.to_string().as_bytes());
                }
                data = map.data();
                size = data.len() as u64;
            }
            Sparse::List(map) => {
                record(b"GNU.sparse.size", map.real_size().as_bytes());
                let list: Vec<_> = map
                    .extents()
                    .iter()
                    .map(|(a, b)| format!("{a},{b}"))
                    .collect();
                record(b"GNU.sparse.map", list.join(",").as_bytes());
                data = map.data();
                size = data.len() as u64;
            }
            Sparse::InData(map) => {
                record(b"GNU.sparse.major", b"1");
                record(b"GNU.sparse.minor", b"0");
                record(b"GNU.sparse.realsize", map.real_size().as_bytes());
                record(b"GNU.sparse.name", &self.name.0);
                let mut text = format!("{}\n", map.extents().len());
                for (offset, length) in map.extents() {
                    let _ = write!(text, "{offset}\n{length}\n");
                }
                data = text.into_bytes();
                data.resize(data.len().next_multiple_of(BLOCK), 0);
                data.extend(map.data());
                size = data.len() as u64;
            }
        }
        for (attribute, value) in &self.xattrs {
            record(&[b"SCHILY.xattr.", &*attribute.name()].concat(), value);
        }
        let is_pax = self.format == Format::Pax;
        if is_pax {
            if self.name.0.len() > 100 {
                record(b"path", &self.name.0);
            }
            if self.link.0.len() > 100 {
                record(b"linkpath", &self.link.0);
            }
        }
        match &self.odd.time {
            Time::Fraction(seconds, rest) => {
                record(b"mtime", format!("{seconds}.{rest}").as_bytes())
            }
            Time::Text(text) => record(b"mtime", text),
            Time::Now | Time::Any(_) => {}
        }
        match &self.more {
            More::Nothing | More::Noise(_) => {}
            More::Global(text) => extension(tar, b'g', text),
            More::Records(more) => more
                .iter()
                .for_each(|(key, value)| record(key.name(), value)),
            More::Text(text) => extension(tar, b'x', text),
            More::LongName(name) => extension(tar, b'L', name),
            More::LongLink(name) => extension(tar, b'K', name),
            More::HugeExtension(size) => {
                let mut header = plain(b'x', *size);
                seal(&mut header);
                tar.extend(header);
            }
        }
        if !records.is_empty() {
            extension(tar, b'x', &pax(&records));
        }
        if !is_pax {
            for (flag, name) in [(b'L', &self.name.0), (b'K', &self.link.0)] {
                if name.len() > 100 {
                    extension(tar, flag, name);
                }
            }
        }
        text(&mut header[..100], &self.name.0);
        number(&mut header[100..108], self.odd.mode.into());
        number(&mut header[108..116], self.odd.uid.value());
        number(&mut header[116..124], self.odd.gid.value());
        number(&mut header[124..136], size);
        match self.odd.time {
            Time::Any(time) if time < 0 => {
                header[136..140].fill(0xff);
                header[140..148].copy_from_slice(&time.to_be_bytes());
                header[136] = 0xff;
            }
            Time::Any(time) => number(&mut header[136..148], time.unsigned_abs()),
            _ => number(&mut header[136..148], 1_700_000_000),
        }
        header[156] = if is_gnu_sparse { b'S' } else { flag };
        text(&mut header[157..257], &self.link.0);
        match self.format {
            Format::Pax | Format::Ustar if !is_gnu_sparse => {
                header[257..265].copy_from_slice(b"ustar\x0000")
            }
            Format::Old if !is_gnu_sparse => {}
            _ => header[257..265].copy_from_slice(b"ustar  \0"),
        }
        if self.format != Format::Old && !is_gnu_sparse {
            number(&mut header[329..337], self.odd.device.0.into());
            number(&mut header[337..345], self.odd.device.1.into());
        }
        if let More::Noise(noise) = &self.more {
            for (at, byte) in noise {
                header[usize::from(*at) % BLOCK] = *byte;
            }
        }
        seal(&mut header);
        tar.extend(header);
        tar.extend(after);
        padded(tar, &data);
    }

    fn flag(&self) -> u8 {
        match self.kind {
            Kind::File => b'0',
            Kind::OldFile => 0,
            Kind::Contiguous => b'7',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::Character => b'3',
            Kind::Block => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
            Kind::Other(byte) => byte,
        }
    }

    /// The data, and the size that the header tells.
    fn data(&self) -> (Vec<u8>, u64) {
        if !matches!(self.kind, Kind::File | Kind::OldFile | Kind::Contiguous) {
            // Many archives tell a size of what has none.
            return (Vec::new(), self.odd.mode.into());
        }
        let honest = |data: Vec<u8>| {
            let size = data.len() as u64;
            (data, size)
        };
        match &self.data {
            Data::None => honest(Vec::new()),
            Data::Some(data) => honest(data.clone()),
            Data::Many(count) => honest(vec![b'm'; usize::from(*count)]),
            Data::Lie(data, by) => (
                data.clone(),
                (data.len() as u64).saturating_add_signed((*by).into()),
            ),
            Data::Huge(size) => (Vec::new(), *size),
        }
    }
}

impl Map {
    /// Offset and length of each piece.
    fn extents(&self) -> Vec<(u64, u64)> {
        let mut at = 0;
        let piece = |(hole, length): &(u16, u8)| {
            let offset = at + u64::from(*hole);
            at = offset + u64::from(*length);
            (offset, u64::from(*length))
        };
        let mut all: Vec<_> = self.pieces.iter().map(piece).collect();
        if let Some((at, value)) = self.lie
            && let Some(piece) = all.get_mut(usize::from(at >> 1))
        {
            *(if at & 1 == 0 {
                &mut piece.0
            } else {
                &mut piece.1
            }) = value;
        }
        all
    }

    fn data(&self) -> Vec<u8> {
        vec![
            b's';
            self.pieces
                .iter()
                .map(|(_, length)| usize::from(*length))
                .sum()
        ]
    }

    fn real_size(&self) -> String {
        let end: u64 = self
            .pieces
            .iter()
            .map(|(hole, length)| u64::from(*hole) + u64::from(*length))
            .sum();
        (end + u64::from(self.end)).to_string()
    }

    /// Four pieces in the header, the others in blocks that follow: the data, and those blocks.
    fn in_header(&self, header: &mut [u8; BLOCK]) -> (Vec<u8>, Vec<u8>) {
        let extents = self.extents();
        let put = |field: &mut [u8], (offset, length): (u64, u64)| {
            number(&mut field[..12], offset);
            number(&mut field[12..24], length);
        };
        let (first, rest) = extents.split_at(extents.len().min(4));
        for (field, extent) in header[386..482].chunks_mut(24).zip(first) {
            put(field, *extent);
        }
        header[482] = u8::from(!rest.is_empty());
        number(&mut header[483..495], self.real_size().parse().unwrap_or(0));
        let mut after = Vec::new();
        let mut blocks = rest.chunks(21).peekable();
        while let Some(extents) = blocks.next() {
            let mut block = [0; BLOCK];
            for (field, extent) in block.chunks_mut(24).zip(extents) {
                put(field, *extent);
            }
            block[504] = u8::from(blocks.peek().is_some());
            after.extend(block);
        }
        (self.data(), after)
    }
}

impl Id {
    fn value(self) -> u64 {
        match self {
            Self::Root => 0,
            Self::Small(id) => id.into(),
            Self::Large(id) => id.into(),
            Self::Beyond => u64::MAX >> 2,
        }
    }
}

impl Attribute {
    fn name(&self) -> Vec<u8> {
        match self {
            Self::User(n) => format!("user.a{}", n % 4).into_bytes(),
            Self::Trusted(n) => format!("trusted.a{}", n % 4).into_bytes(),
            Self::Capability => b"security.capability".into(),
            Self::Acl => b"system.posix_acl_access".into(),
            Self::Opaque => b"trusted.overlay.opaque".into(),
            Self::UserOpaque => b"user.overlay.opaque".into(),
            Self::Redirect => b"trusted.overlay.redirect".into(),
            Self::Selinux => b"security.selinux".into(),
            Self::Any(name) => name.clone(),
        }
    }
}

impl Key {
    fn name(&self) -> &[u8] {
        match self {
            Self::Path => b"path",
            Self::LinkPath => b"linkpath",
            Self::Size => b"size",
            Self::Uid => b"uid",
            Self::Mtime => b"mtime",
            Self::Major => b"GNU.sparse.major",
            Self::Minor => b"GNU.sparse.minor",
            Self::SparseName => b"GNU.sparse.name",
            Self::SparseSize => b"GNU.sparse.size",
            Self::RealSize => b"GNU.sparse.realsize",
            Self::SparseMap => b"GNU.sparse.map",
            Self::Offset => b"GNU.sparse.offset",
            Self::Bytes => b"GNU.sparse.numbytes",
            Self::Blocks => b"GNU.sparse.numblocks",
            Self::Any(key) => key,
        }
    }
}

fn text(field: &mut [u8], text: &[u8]) {
    for (place, byte) in field.iter_mut().zip(text) {
        *place = *byte;
    }
}

/// In octal, or where that is too short as GNU has it: in base 256.
fn number(field: &mut [u8], value: u64) {
    let digits = format!("{value:0width$o}", width = field.len() - 1);
    if digits.len() < field.len() {
        field[..digits.len()].copy_from_slice(digits.as_bytes());
        return;
    }
    let bytes = value.to_be_bytes();
    let count = bytes.len().min(field.len());
    field.fill(0);
    let start = field.len() - count;
    field[start..].copy_from_slice(&bytes[bytes.len() - count..]);
    field[0] |= 0x80;
}

fn plain(flag: u8, size: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    text(&mut header, b"././@extension");
    number(&mut header[124..136], size);
    header[156] = flag;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header
}

fn extension(tar: &mut Vec<u8>, flag: u8, data: &[u8]) {
    let mut header = plain(flag, data.len() as u64);
    seal(&mut header);
    tar.extend(header);
    padded(tar, data);
}

fn padded(tar: &mut Vec<u8>, data: &[u8]) {
    tar.extend(data);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

/// Records, each with its own length in front (POSIX.1-2008, pax).
fn pax(records: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length += 1;
        }
        all.extend(format!("{length} ").bytes());
        all.extend(key);
        all.push(b'=');
        all.extend(value);
        all.push(b'\n');
    }
    all
}

/// Makes a header's checksum right.
fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().copied().map(u64::from).sum();
    number(&mut header[148..155], sum);
    header[155] = b' ';
}

/// Makes right the checksums of an archive's headers: of all blocks where one may stand, but those of zeros.
pub fn mend(tar: &mut [u8]) {
    let mut rest = tar;
    while let Some((header, behind)) = rest.split_at_mut_checked(BLOCK) {
        if header.iter().all(|byte| *byte == 0) {
            rest = behind;
            continue;
        }
        seal(header);
        let size = header[124..136]
            .iter()
            .filter(|byte| byte.is_ascii_digit())
            .fold(0_u64, |size, byte| {
                size.saturating_mul(8).saturating_add((byte - b'0').into())
            });
        let data = usize::try_from(size.div_ceil(BLOCK as u64))
            .unwrap_or(usize::MAX)
            .saturating_mul(BLOCK);
        rest = behind.get_mut(data..).unwrap_or_default();
    }
}
