//! Each operation, and the bytes of its body.

use arbitrary::Arbitrary;

use super::{
    Known,
    parts::{Attribute, Flags, Handle, Name, Node, Size},
};

#[derive(Arbitrary, Debug)]
pub(super) enum Call {
    Lookup(Name),
    Forget(u8),
    BatchForget(Vec<(Node, u8)>),
    Getattr(Handle),
    Setattr {
        valid: u16,
        handle: Handle,
        size: Size,
        mode: u16,
        uid: u8,
    },
    Readlink,
    Symlink(Name, Name),
    Mknod {
        mode: u16,
        device: u8,
        name: Name,
    },
    Mkdir(u16, Name),
    Unlink(Name),
    Rmdir(Name),
    Rename(Node, Name, Name),
    Rename2(Node, u8, Name, Name),
    Link(Node, Name),
    Open(Flags),
    Opendir(Flags),
    Create(Flags, u16, Name),
    Read(Handle, Size, Size),
    Readdir {
        plus: bool,
        handle: Handle,
        offset: Size,
        size: Size,
    },
    Write {
        handle: Handle,
        offset: Size,
        data: Vec<u8>,
        says: Option<u32>,
        flags: u8,
    },
    Release {
        directory: bool,
        handle: Handle,
    },
    Statfs,
    Fsync(Handle),
    Flush(Handle),
    Setxattr {
        attribute: Attribute,
        value: Vec<u8>,
        flags: u8,
        says: Option<u32>,
    },
    Getxattr(Attribute, Size),
    Listxattr(Size),
    Removexattr(Attribute),
    Access(u8),
    Fallocate {
        handle: Handle,
        offset: Size,
        length: Size,
        mode: u8,
    },
    Lseek {
        handle: Handle,
        offset: Size,
        whence: u8,
    },
    Copy {
        from: Handle,
        node: Node,
        to: Handle,
        length: Size,
    },
    Init(u32),
    Syncfs,
    Tmpfile(Flags, Name),
    Other {
        op: u8,
        body: Vec<u8>,
    },
}

/// What is put together to a body.
#[derive(Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn w(mut self, word: impl Into<u32>) -> Self {
        self.0.extend(word.into().to_le_bytes());
        self
    }

    pub(super) fn l(mut self, long: u64) -> Self {
        self.0.extend(long.to_le_bytes());
        self
    }

    pub(super) fn text(mut self, text: &[u8]) -> Self {
        self.0.extend(text);
        self.0.push(0);
        self
    }

    pub(super) fn name(self, name: &Name) -> Self {
        self.text(&name.0)
    }

    pub(super) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend(data);
        self
    }
}

impl Call {
    pub(super) fn body(&self, known: &Known) -> (u32, Vec<u8>) {
        let b = Body::default;
        let handle = |handle| known.handle(handle);
        let node = |node| known.node(node);
        let (op, body) = match self {
            Self::Lookup(name) => (1, b().name(name)),
            Self::Forget(count) => (2, b().l((*count).into())),
            Self::BatchForget(all) => {
                let body = b().w(all.len() as u32).w(0_u32);
                let add = |body: Body, (one, count): &(Node, u8)| {
                    body.l(known.node(one)).l((*count).into())
                };
                (42, all.iter().fold(body, add))
            }
            Self::Getattr(file) => (3, b().w(1_u32).w(0_u32).l(handle(file))),
            Self::Setattr {
                valid,
                handle: file,
                size,
                mode,
                uid,
            } => {
                let body = b().w(*valid).w(0_u32).l(handle(file)).l(size.value()).l(0);
                let times = body.l(1).l(2).l(3).w(4_u32).w(5_u32).w(6_u32);
                (4, times.w(*mode).w(0_u32).w(*uid).w(*uid).w(0_u32))
            }
            Self::Readlink => (5, b()),
            Self::Symlink(name, target) => (6, b().name(name).name(target)),
            Self::Mknod { mode, device, name } => {
                let device = u32::from(*device) + (1 << 8);
                (8, b().w(*mode).w(device).w(0o22_u32).w(0_u32).name(name))
            }
            Self::Mkdir(mode, name) => (9, b().w(*mode).w(0o22_u32).name(name)),
            Self::Unlink(name) => (10, b().name(name)),
            Self::Rmdir(name) => (11, b().name(name)),
            Self::Rename(to, old, new) => (12, b().l(node(to)).name(old).name(new)),
            Self::Rename2(to, flags, old, new) => {
                (45, b().l(node(to)).w(*flags).w(0_u32).name(old).name(new))
            }
            Self::Link(old, name) => (13, b().l(node(old)).name(name)),
            Self::Open(flags) => (14, b().w(flags.bits()).w(0_u32)),
            Self::Opendir(flags) => (27, b().w(flags.bits()).w(0_u32)),
            Self::Create(flags, mode, name) => {
                let flags = flags.bits() | 0o100;
                (35, b().w(flags).w(*mode).w(0o22_u32).w(0_u32).name(name))
            }
            Self::Tmpfile(flags, name) => (
                51,
                b().w(flags.bits())
                    .w(0o600_u32)
                    .w(0o22_u32)
                    .w(0_u32)
                    .name(name),
            ),
            Self::Read(file, offset, size) => (15, read(handle(file), offset, size)),
            Self::Readdir {
                plus,
                handle: file,
                offset,
                size,
            } => (
                if *plus { 44 } else { 28 },
                read(handle(file), offset, size),
            ),
            Self::Write {
                handle: file,
                offset,
                data,
                says,
                flags,
            } => {
                let len = says.unwrap_or(data.len() as u32);
                let body = b().l(handle(file)).l(offset.value()).w(len).w(*flags % 8);
                (16, body.l(0).w(0_u32).w(0_u32).data(data))
            }
            Self::Release {
                directory,
                handle: file,
            } => {
                let body = b().l(handle(file)).w(0_u32).w(0_u32).l(0);
                (if *directory { 29 } else { 18 }, body)
            }
            Self::Statfs => (17, b()),
            Self::Fsync(file) => (20, b().l(handle(file)).w(0_u32).w(0_u32)),
            Self::Flush(file) => (25, b().l(handle(file)).w(0_u32).w(0_u32).l(0)),
            Self::Setxattr {
                attribute,
                value,
                flags,
                says,
            } => {
                let len = says.unwrap_or(value.len() as u32);
                (21, b().w(len).w(*flags).text(attribute.name()).data(value))
            }
            Self::Getxattr(attribute, size) => {
                (22, b().w(size.short()).w(0_u32).text(attribute.name()))
            }
            Self::Listxattr(size) => (23, b().w(size.short()).w(0_u32)),
            Self::Removexattr(attribute) => (24, b().text(attribute.name())),
            Self::Access(mask) => (34, b().w(*mask).w(0_u32)),
            Self::Fallocate {
                handle: file,
                offset,
                length,
                mode,
            } => {
                let body = b().l(handle(file)).l(offset.value()).l(length.value());
                (43, body.w(*mode).w(0_u32))
            }
            Self::Lseek {
                handle: file,
                offset,
                whence,
            } => (
                46,
                b().l(handle(file)).l(offset.value()).w(*whence).w(0_u32),
            ),
            Self::Copy {
                from,
                node: other,
                to,
                length,
            } => {
                let body = b().l(handle(from)).l(0).l(node(other));
                (47, body.l(handle(to)).l(0).l(length.value()).l(0))
            }
            Self::Init(flags) => (26, init(*flags)),
            Self::Syncfs => (50, b().l(0)),
            Self::Other { op, body } => (u32::from(*op), b().data(body)),
        };
        (op, body.0)
    }
}

pub(super) fn read(handle: u64, offset: &Size, size: &Size) -> Body {
    let body = Body::default().l(handle).l(offset.value());
    body.w(size.short()).w(0_u32).l(0).w(0_u32).w(0_u32)
}

pub(super) fn init(flags: u32) -> Body {
    let mut body = Body::default().w(7_u32).w(39_u32).w(1_u32 << 20).w(flags);
    body.0.resize(64, 0);
    body
}
