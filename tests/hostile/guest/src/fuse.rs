//! A FUSE session by hand (linux/fuse.h, protocol 7): requests as bytes, replies as they come.

use crate::machine::{read, word, write};
use crate::start::Start;
use crate::virtio::{Device, NEXT, Queue, WRITE};

const RINGS: u64 = 0x110_0000;
/// Where the first request and its reply are.
pub const REQUEST: u64 = 0x140_0000;
pub const REPLY: u64 = 0x180_0000;
/// Room for each of a few requests at a time, and for a reply.
const ROOM: u64 = 0x10_0000;
pub const REPLY_ROOM: u32 = 0x1_0000;
pub const HEADER: u64 = 40;

/// The share has the volume somewhat later than the guest runs.
const TRIES: u32 = 2000;
/// Levels between the share's root and a volume.
const LEVELS: u32 = 4;

pub const ROOT: u64 = 1;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE_FILE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const SETXATTR: u32 = 21;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const CREATE: u32 = 35;
pub const BATCH_FORGET: u32 = 42;
pub const RENAME2: u32 = 45;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SETUPMAPPING: u32 = 48;

/// File types of a mode.
pub const TYPE: u64 = 0o170_000;
pub const DIRECTORY: u64 = 0o040_000;
pub const SYMBOLIC_LINK: u64 = 0o120_000;

/// A file that the server has told of.
#[derive(Clone, Copy)]
pub struct Node {
    pub id: u64,
    pub mode: u64,
}

/// One request of a few at a time.
pub struct Request<'a> {
    pub op: u32,
    pub node: u64,
    pub body: &'a [&'a [u8]],
}

/// A session on the device's request queue.
pub struct Session {
    pub device: Device,
    pub queue: Queue,
    unique: u64,
}

impl Session {
    /// Starts the device and the session.
    pub fn new(device: Device) -> Self {
        let (session, started) = Self::quietly(device);
        crate::check!(
            started.is_ok(),
            "a session with the file server ({started:?})"
        );
        session
    }

    /// The same without a word; the answer to the session's first request.
    pub fn quietly(device: Device) -> (Self, Result<u64, i32>) {
        let [_, queue] = device.start(RINGS);
        let mut session = Self {
            device,
            queue,
            unique: 1,
        };
        let body = [7u32, 31, 65_536, 0].map(u32::to_le_bytes);
        let started = session.call(INIT, 0, &[body.as_flattened()]);
        (session, started)
    }

    /// The directory that the pod was given, once it is in the share.
    pub fn volume(&mut self, start: &Start) -> Option<u64> {
        let marker = start.word("marker").as_bytes();
        let volume = (0..TRIES).find_map(|_| self.find(ROOT, marker, LEVELS));
        crate::check!(volume.is_some(), "the volume is in the share");
        volume
    }

    /// Starts anew where the device has stopped.
    pub fn revive(&mut self) {
        if self.device.needs_reset() {
            *self = Self::new(self.device);
        }
    }

    /// Writes a request, the `slot`th of those on their way: where it is and its length.
    fn compose(&mut self, slot: u16, request: &Request<'_>, len: Option<u32>) -> (u64, u32) {
        let at = REQUEST + u64::from(slot) * ROOM;
        let mut end = at + HEADER;
        for piece in request.body {
            write(end, piece);
            end += piece.len() as u64;
        }
        self.unique += 1;
        let size = (end - at) as u32;
        write(at, &len.unwrap_or(size).to_le_bytes());
        write(at + 4, &request.op.to_le_bytes());
        write(at + 8, &self.unique.to_le_bytes());
        write(at + 16, &request.node.to_le_bytes());
        write(at + 24, &[0; 16]);
        write(REPLY + u64::from(slot) * ROOM, &[0; 16]);
        (at, size)
    }

    /// Makes a request available as the `slot`th of those on their way.
    pub fn post(&mut self, slot: u16, request: &Request<'_>, len: Option<u32>) {
        let (at, size) = self.compose(slot, request, len);
        let reply = REPLY + u64::from(slot) * ROOM;
        let head = slot * 2;
        self.queue.descriptor(head, (at, size, NEXT, head + 1));
        self.queue
            .descriptor(head + 1, (reply, REPLY_ROOM, WRITE, 0));
        self.queue.offer(head);
    }

    /// Sends several at once and waits for all: errno or 0 of each.
    pub fn at_once<const N: usize>(&mut self, requests: [Request<'_>; N]) -> [i32; N] {
        for (slot, request) in (0..).zip(&requests) {
            self.post(slot, request, None);
        }
        self.queue.kick();
        for _ in 0..N {
            self.queue.taken();
        }
        let mut slot = 0;
        [(); N].map(|()| {
            let error = word::<4>(REPLY + slot * ROOM + 4) as u32 as i32;
            slot += 1;
            -error
        })
    }

    /// One request that is made available so many times at once: how often it is answered.
    pub fn many_times(&mut self, request: &Request<'_>, times: usize) -> usize {
        self.post(0, request, None);
        (1..times).for_each(|_| self.queue.offer(0));
        self.queue.kick();
        (0..times).filter(|_| self.queue.taken().is_some()).count()
    }

    /// The reply's length without its header; an errno, or `i32::MAX` where there was no answer.
    pub fn call(&mut self, op: u32, node: u64, body: &[&[u8]]) -> Result<u64, i32> {
        self.call_of_length(op, node, body, None)
    }

    /// The same, with a length of its own in the header.
    pub fn call_of_length(
        &mut self,
        op: u32,
        node: u64,
        body: &[&[u8]],
        len: Option<u32>,
    ) -> Result<u64, i32> {
        self.post(0, &Request { op, node, body }, len);
        self.queue.kick();
        let (_, used) = self.queue.taken().ok_or(i32::MAX)?;
        match word::<4>(REPLY + 4) as u32 as i32 {
            // Without as much as a header it is no answer.
            0 => u64::from(used).checked_sub(16).ok_or(i32::MAX),
            error => Err(-error),
        }
    }

    fn entry() -> Node {
        Node {
            id: word::<8>(REPLY + 16),
            mode: word::<4>(REPLY + 16 + 100),
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<Node, i32> {
        self.call(LOOKUP, parent, &[name, &[0]])
            .map(|_| Self::entry())
    }

    /// `mode` with its type, `device` for those of devices.
    pub fn make_node(
        &mut self,
        parent: u64,
        name: &[u8],
        mode: u32,
        device: u32,
    ) -> Result<Node, i32> {
        let fixed = [mode, device, 0, 0].map(u32::to_le_bytes);
        self.call(MKNOD, parent, &[fixed.as_flattened(), name, &[0]])
            .map(|_| Self::entry())
    }

    pub fn make_directory(&mut self, parent: u64, name: &[u8]) -> Result<Node, i32> {
        let fixed = [0o755u32, 0].map(u32::to_le_bytes);
        self.call(MKDIR, parent, &[fixed.as_flattened(), name, &[0]])
            .map(|_| Self::entry())
    }

    pub fn link_to(&mut self, parent: u64, name: &[u8], target: &[u8]) -> Result<Node, i32> {
        self.call(SYMLINK, parent, &[name, &[0], target, &[0]])
            .map(|_| Self::entry())
    }

    /// Makes a file and opens it for writing: the node and its handle.
    pub fn create(&mut self, parent: u64, name: &[u8]) -> Result<(Node, u64), i32> {
        // O_RDWR | O_CREAT
        let fixed = [0o102u32, 0o100_644, 0, 0].map(u32::to_le_bytes);
        self.call(CREATE, parent, &[fixed.as_flattened(), name, &[0]])
            .map(|_| (Self::entry(), word::<8>(REPLY + 16 + 128)))
    }

    /// A handle, by `OPEN` or `OPENDIR`.
    pub fn open(&mut self, op: u32, node: u64, flags: u32) -> Result<u64, i32> {
        let fixed = [flags, 0].map(u32::to_le_bytes);
        self.call(op, node, &[fixed.as_flattened()])
            .map(|_| word::<8>(REPLY + 16))
    }

    /// Reads by `READ` or `READDIR`; where the bytes are and how many.
    pub fn read(
        &mut self,
        op: u32,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Result<(u64, u64), i32> {
        let size = u64::from(size);
        let fixed = [handle, offset, size, 0, 0].map(u64::to_le_bytes);
        self.call(op, node, &[fixed.as_flattened()])
            .map(|len| (REPLY + 16, len))
    }

    /// Reads, but for the answer's header, to an address of the caller's: how many bytes.
    pub fn read_into(
        &mut self,
        node: u64,
        handle: u64,
        address: u64,
        size: u32,
    ) -> Result<u64, i32> {
        let fixed = [handle, 0, u64::from(size), 0, 0].map(u64::to_le_bytes);
        let body: &[&[u8]] = &[fixed.as_flattened()];
        let request = Request {
            op: READ,
            node,
            body,
        };
        let (at, len) = self.compose(0, &request, None);
        self.queue
            .send(&[(at, len, 0), (REPLY, 16, WRITE), (address, size, WRITE)]);
        match word::<4>(REPLY + 4) as u32 as i32 {
            0 => (word::<4>(REPLY)).checked_sub(16).ok_or(i32::MAX),
            error => Err(-error),
        }
    }

    pub fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        said: u32,
        bytes: &[u8],
    ) -> Result<u64, i32> {
        let said = u64::from(said);
        let fixed = [handle, offset, said, 0, 0].map(u64::to_le_bytes);
        self.call(WRITE_FILE, node, &[fixed.as_flattened(), bytes])
    }

    /// Looks for the directory that has a file of this name, not deeper than so many levels below.
    pub fn find(&mut self, below: u64, marker: &[u8], levels: u32) -> Option<u64> {
        if self.lookup(below, marker).is_ok() {
            return Some(below);
        }
        let levels = levels.checked_sub(1)?;
        let handle = self.open(OPENDIR, below, 0).ok()?;
        let mut found = None;
        let mut offset = 0;
        // One entry at a time: what is looked up in between overwrites the reply.
        while found.is_none()
            && let Ok((entry, 25..)) = self.read(READDIR, below, handle, offset, 512)
        {
            offset = word::<8>(entry + 8);
            let mut name = [0; 255];
            let len = (word::<4>(entry + 16) as usize).min(name.len());
            read(entry + 24, &mut name[..len]);
            let name = &name[..len];
            if name != b"."
                && name != b".."
                && let Ok(node) = self.lookup(below, name)
                && node.mode & TYPE == DIRECTORY
            {
                found = self.find(node.id, marker, levels);
            }
        }
        let release = [handle, 0, 0].map(u64::to_le_bytes);
        // RELEASEDIR; a handle too many does no harm here.
        let _ = self.call(29, below, &[release.as_flattened()]);
        found
    }
}
