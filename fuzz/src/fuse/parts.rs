//! What requests are made of: nodes, handles, names, sizes, flags.

use arbitrary::{Arbitrary, Unstructured};

/// Inode, as the guest knows it.
#[derive(Arbitrary, Debug)]
pub(super) enum Node {
    Root,
    Known(u8),
    Any(u64),
}

/// An open file or directory.
#[derive(Arbitrary, Debug)]
pub(super) enum Handle {
    Last,
    Known(u8),
    Any(u64),
}

/// A name.
#[derive(Debug)]
pub(super) struct Name(pub(super) Vec<u8>);

impl<'a> Arbitrary<'a> for Name {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        const GOOD: [&[u8]; 8] = [b"a", b"b", b"d", b"link", b"up", b"out", b"new", b"fifo"];
        const BAD: [&[u8]; 12] = [
            b"..",
            b".",
            b"",
            b"a/b",
            b"../share/a",
            b"../beside/kept",
            b"/outside/file",
            b"up/kept",
            b"d/../..",
            b"proc",
            b"...",
            b"a\0b",
        ];
        Ok(Self(match u.arbitrary::<u8>()? {
            byte @ 0..=191 => GOOD[usize::from(byte % 8)].to_vec(),
            byte @ 192..=245 => BAD[usize::from(byte % 12)].to_vec(),
            246..=247 => vec![b'n'; 255],
            248..=249 => vec![b'n'; 256],
            _ => u.arbitrary()?,
        }))
    }
}

/// An extended attribute's name.
#[derive(Arbitrary, Debug)]
pub(super) enum Attribute {
    User,
    Capability,
    Acl,
    DefaultAcl,
    Trusted,
    Selinux,
    Any(Vec<u8>),
}

/// An offset or a length.
#[derive(Arbitrary, Debug)]
pub(super) enum Size {
    Zero,
    Small(u16),
    Page(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
pub(super) enum Flags {
    Read,
    Write,
    Append,
    Truncate,
    Directory,
    Path,
    Any(u32),
}

impl Size {
    pub(super) fn value(&self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Small(size) => (*size).into(),
            Self::Page(pages) => u64::from(*pages) << 12,
            Self::Any(size) => *size,
        }
    }

    pub(super) fn short(&self) -> u32 {
        self.value() as u32
    }
}

impl Flags {
    pub(super) fn bits(&self) -> u32 {
        let flags = match self {
            Self::Read => 0,
            Self::Write => 0o2,
            Self::Append => 0o2001,
            Self::Truncate => 0o1002,
            Self::Directory => 0o20_0000,
            Self::Path => 0o1000_0000,
            Self::Any(flags) => *flags,
        };
        // O_ASYNC and O_DIRECT say nothing about where a file is.
        flags & !0o6_0000
    }
}

impl Attribute {
    pub(super) fn name(&self) -> &[u8] {
        match self {
            Self::User => b"user.a",
            Self::Capability => b"security.capability",
            Self::Acl => b"system.posix_acl_access",
            Self::DefaultAcl => b"system.posix_acl_default",
            Self::Trusted => b"trusted.overlay.opaque",
            Self::Selinux => b"security.selinux",
            Self::Any(name) => name,
        }
    }
}
