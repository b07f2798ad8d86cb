//! FUSE requests, mostly right, from a fuzzer's bytes: <linux/fuse.h>, protocol 7. Of few names, and of the nodes and handles that earlier
//! answers have given.

use arbitrary::{Arbitrary, Unstructured};

/// A request.
#[derive(Arbitrary, Debug)]
pub struct Request {
    node: Node,
    call: Call,
    who: Who,
    /// Where its bytes are parted into two buffers.
    pub split: u8,
    /// Room for the answer, behind its header.
    pub room: Room,
    odd: Odd,
}

#[derive(Arbitrary, Debug)]
enum Who {
    Root,
    User(u8),
    Other(u32, u32),
}

/// How much an answer may have.
#[derive(Arbitrary, Debug)]
pub enum Room {
    /// As Linux would.
    Enough,
    /// So many bytes in all.
    Bytes(u8),
    /// None.
    None,
}

#[derive(Arbitrary, Debug)]
enum Odd {
    No,
    NoEither,
    NorThis,
    Length(i8),
    Cut(u8),
    Byte(u8, u8),
    More(Vec<u8>),
}

/// Inode, as the guest knows it.
#[derive(Arbitrary, Debug)]
enum Node {
    Root,
    Known(u8),
    Any(u64),
}

/// An open file or directory.
#[derive(Arbitrary, Debug)]
enum Handle {
    Last,
    Known(u8),
    Any(u64),
}

/// A name.
#[derive(Debug)]
struct Name(Vec<u8>);

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
enum Attribute {
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
enum Size {
    Zero,
    Small(u16),
    Page(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Call {
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

#[derive(Arbitrary, Debug)]
enum Flags {
    Read,
    Write,
    Append,
    Truncate,
    Directory,
    Path,
    Any(u32),
}

/// What the guest has been told.
#[derive(Debug, Default)]
pub struct Known {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Known {
    fn node(&self, node: &Node) -> u64 {
        match node {
            Node::Root => 1,
            Node::Known(which) => at(&self.nodes, *which).unwrap_or(1),
            Node::Any(node) => *node,
        }
    }

    fn handle(&self, handle: &Handle) -> u64 {
        match handle {
            Handle::Last => self.handles.last().copied().unwrap_or(0),
            Handle::Known(which) => at(&self.handles, *which).unwrap_or(0),
            Handle::Any(handle) => *handle,
        }
    }

    /// Takes note of an answer's body.
    pub fn learn(&mut self, request: &Request, body: &[u8]) {
        let long = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        match request.call {
            Call::Lookup(_)
            | Call::Symlink(..)
            | Call::Mknod { .. }
            | Call::Mkdir(..)
            | Call::Link(..) => self.nodes.extend(long(0)),
            Call::Open(_) | Call::Opendir(_) => self.handles.extend(long(0)),
            // `struct fuse_entry_out` has 128 bytes.
            Call::Create(..) | Call::Tmpfile(..) => {
                self.nodes.extend(long(0));
                self.handles.extend(long(128));
            }
            Call::Readdir { plus: true, .. } => self.nodes.extend(long(0)),
            _ => {}
        }
    }
}

fn at(all: &[u64], which: u8) -> Option<u64> {
    all.get(usize::from(which).checked_rem(all.len())?).copied()
}

impl Size {
    fn value(&self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Small(size) => (*size).into(),
            Self::Page(pages) => u64::from(*pages) << 12,
            Self::Any(size) => *size,
        }
    }

    fn short(&self) -> u32 {
        self.value() as u32
    }
}

impl Flags {
    fn bits(&self) -> u32 {
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
    fn name(&self) -> &[u8] {
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

/// What is put together to a body.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn w(mut self, word: impl Into<u32>) -> Self {
        self.0.extend(word.into().to_le_bytes());
        self
    }

    fn l(mut self, long: u64) -> Self {
        self.0.extend(long.to_le_bytes());
        self
    }

    fn text(mut self, text: &[u8]) -> Self {
        self.0.extend(text);
        self.0.push(0);
        self
    }

    fn name(self, name: &Name) -> Self {
        self.text(&name.0)
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.0.extend(data);
        self
    }
}

impl Request {
    /// True if it is one of those that get no answer.
    pub fn has_no_answer(&self) -> bool {
        match self.call {
            Call::Forget(_) | Call::BatchForget(_) => true,
            Call::Other { op, .. } => matches!(op, 2 | 36 | 38 | 42),
            _ => false,
        }
    }

    /// Its bytes, under this number.
    pub fn bytes(&self, known: &Known, unique: u64) -> Vec<u8> {
        let (op, body) = self.call.body(known);
        let len = 40 + body.len() as u32;
        let len = match self.odd {
            Odd::Length(by) => len.wrapping_add_signed(by.into()),
            _ => len,
        };
        let (uid, gid) = match self.who {
            Who::Root => (0, 0),
            Who::User(id) => (u32::from(id), u32::from(id)),
            Who::Other(uid, gid) => (uid, gid),
        };
        let mut bytes = Body::default()
            .w(len)
            .w(op)
            .l(unique)
            .l(known.node(&self.node))
            .w(uid)
            .w(gid)
            .w(1_u32)
            .w(0_u32)
            .data(&body)
            .0;
        match &self.odd {
            Odd::Cut(by) => bytes.truncate(bytes.len() - usize::from(*by).min(bytes.len())),
            Odd::Byte(at, byte) => {
                // Neither the operation nor its number: what is answered would not be known.
                if let Some(old) = bytes.get_mut(16 + usize::from(*at)) {
                    *old = *byte;
                }
            }
            Odd::More(more) => bytes.extend(more),
            _ => {}
        }
        bytes
    }
}

impl Call {
    fn body(&self, known: &Known) -> (u32, Vec<u8>) {
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

fn read(handle: u64, offset: &Size, size: &Size) -> Body {
    let body = Body::default().l(handle).l(offset.value());
    body.w(size.short()).w(0_u32).l(0).w(0_u32).w(0_u32)
}

fn init(flags: u32) -> Body {
    let mut body = Body::default().w(7_u32).w(39_u32).w(1_u32 << 20).w(flags);
    body.0.resize(64, 0);
    body
}

/// What a guest says first, with these flags.
pub fn first(flags: u32) -> Vec<u8> {
    let body = init(flags).0;
    let header = Body::default()
        .w(40 + body.len() as u32)
        .w(26_u32)
        .l(1)
        .l(1);
    header.w(0_u32).w(0_u32).w(1_u32).w(0_u32).data(&body).0
}
