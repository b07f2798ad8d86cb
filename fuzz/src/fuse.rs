//! FUSE requests, mostly right, from a fuzzer's bytes: <linux/fuse.h>, protocol 7. Of few names, and of the nodes and handles that earlier
//! answers have given.

mod call;
mod parts;

use arbitrary::Arbitrary;

use self::{
    call::{Body, Call, init},
    parts::{Handle, Node},
};

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
