//! A guest's vsock driver and the shim's end of the bridge, as far as tests need them.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use husk_protocol::bridge::{Connection as Crossing, PACKET_LEN};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, setsockopt, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::virtio::testing::Guest;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::packet::*;

const CID: u64 = 3;
pub const RX: usize = 0;
pub const TX: usize = 1;
/// Linux's receive buffers hold a little less than a page.
const RX_BUFFER: usize = 3776;
/// The guest's own buffer for each connection.
const GUEST_BUFFER: u32 = 256 * 1024;

/// The shim's end of the bridge.
pub struct Shim {
    bridge: OwnedFd,
}

impl Shim {
    pub fn accept(&self) -> (u32, UnixStream) {
        let mut packet = [0; PACKET_LEN];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut iov = [IoSliceMut::new(&mut packet)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message =
            recvmsg::<()>(self.bridge.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else {
            panic!("no socket");
        };
        let socket = own(fds[0]);
        let Ok(Crossing::FromGuest { port }) = Crossing::decode(&packet) else {
            panic!("not a dial");
        };
        (port, socket.into())
    }

    pub fn dial(&self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.send(port, &[theirs.as_raw_fd()]);
        ours
    }

    /// A dial with these fds, of which one is right.
    pub fn send(&self, port: u32, fds: &[RawFd]) {
        let packet = Crossing::ToGuest { port }.encode();
        sendmsg::<()>(
            self.bridge.as_raw_fd(),
            &[IoSlice::new(&packet)],
            &[ControlMessage::ScmRights(fds)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }
}

#[allow(unsafe_code, reason = "recvmsg(2) hands over fds as numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: just received.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// One connection as the guest's kernel keeps it.
#[derive(Debug, Default)]
pub struct End {
    pub sent: u32,
    pub peer_alloc: u32,
    pub peer_forwarded: u32,
    pub received: Vec<u8>,
    pub accepted: bool,
    pub shutdown: u32,
    pub reset: bool,
    /// The guest sent RST: what is still on its way is dropped.
    pub forgotten: bool,
    pub requested: bool,
}

/// A guest with a vsock driver. Connections are named (host port, guest port).
pub struct Driver {
    pub guest: Guest,
    pub ends: HashMap<(u32, u32), End>,
    /// No more receive buffers are offered.
    pub deaf: bool,
}

pub type Name = (u32, u32);

impl Driver {
    pub fn start() -> (Self, Shim) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        // A device that has died must not hang the test.
        setsockopt(&theirs, sockopt::ReceiveTimeout, &TimeVal::seconds(60)).unwrap();
        let guest = Guest::start(Box::new(Vsock::new(CID, ours)), 128);
        let mut driver = Self {
            guest,
            ends: HashMap::new(),
            deaf: false,
        };
        driver.refill();
        (driver, Shim { bridge: theirs })
    }

    pub fn refill(&mut self) {
        if self.deaf {
            return;
        }
        while self.guest.add(RX, &[], &[RX_BUFFER + HEADER_LEN]).is_some() {}
        self.guest.kick(RX);
    }

    pub fn header(&self, name: Name, op: Op) -> Header {
        let fwd_cnt = self.ends.get(&name).map_or(0, |e| e.received.len() as u32);
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: name.1,
            dst_port: name.0,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt,
        }
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let bytes = header.encode();
        let parts: &[&[u8]] = if payload.is_empty() {
            &[&bytes]
        } else {
            &[&bytes, payload]
        };
        while self.guest.add(TX, parts, &[]).is_none() {
            while self.guest.try_next(TX).is_some() {}
            if self.guest.free_descriptors(TX) < 2 {
                self.poll();
                self.guest.wait_interrupt();
            }
        }
        self.guest.kick(TX);
    }

    pub fn control(&mut self, name: Name, op: Op, flags: u32) {
        let mut header = self.header(name, op);
        header.flags = flags;
        self.send(header, &[]);
    }

    pub fn dial(&mut self, name: Name) {
        self.ends.insert(name, End::default());
        self.control(name, Op::Request, 0);
    }

    /// Sends at most what credit allows; how many bytes.
    pub fn write(&mut self, name: Name, bytes: &[u8]) -> usize {
        let end = self.ends.get_mut(&name).unwrap();
        let room = end
            .peer_alloc
            .saturating_sub(end.sent.wrapping_sub(end.peer_forwarded));
        let len = bytes.len().min(room as usize).min(MAX_PAYLOAD as usize);
        if len > 0 {
            end.sent = end.sent.wrapping_add(len as u32);
            let mut header = self.header(name, Op::Data);
            header.len = len as u32;
            self.send(header, &bytes[..len]);
        }
        len
    }

    /// Takes what has arrived, and answers as Linux would.
    pub fn poll(&mut self) {
        let mut any = false;
        while let Some(used) = self.guest.try_next(RX) {
            any = true;
            let mut bytes = [0; HEADER_LEN];
            bytes.copy_from_slice(&used.data[..HEADER_LEN]);
            let header = Header::decode(&bytes);
            let payload = &used.data[HEADER_LEN..];
            assert_eq!(payload.len(), header.len as usize);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.receive(header, payload);
        }
        if any {
            self.refill();
        }
        while self.guest.try_next(TX).is_some() {}
    }

    pub fn receive(&mut self, header: Header, payload: &[u8]) {
        let name = (header.src_port, header.dst_port);
        let known = self.ends.contains_key(&name);
        let end = self.ends.entry(name).or_default();
        if end.forgotten {
            return;
        }
        assert!(
            !end.reset || header.op == Op::Reset,
            "a packet after RST: {header:?}"
        );
        end.peer_alloc = header.buf_alloc;
        end.peer_forwarded = header.fwd_cnt;
        match header.op {
            Op::Request => {
                assert!(!known);
                end.requested = true;
            }
            Op::Response => end.accepted = true,
            Op::Data => {
                assert_eq!(end.shutdown & SHUTDOWN_SEND, 0, "bytes after their end");
                end.received.extend(payload);
                // It forwards at once, so that everything received is credit again.
                if header.len > 0 {
                    self.control(name, Op::CreditUpdate, 0);
                }
            }
            Op::Shutdown => {
                end.shutdown |= header.flags;
                if end.shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
                    end.reset = true;
                    self.control(name, Op::Reset, 0);
                }
            }
            Op::Reset => end.reset = true,
            Op::CreditUpdate | Op::CreditRequest => {}
            Op::Unknown(op) => panic!("unknown op {op}"),
        }
    }

    /// Polls until `done`.
    pub fn until(&mut self, done: impl Fn(&Self) -> bool) {
        loop {
            self.poll();
            if done(self) {
                return;
            }
            self.guest.wait_interrupt();
        }
    }

    pub fn end(&self, name: Name) -> &End {
        &self.ends[&name]
    }

    pub fn open(&mut self, shim: &Shim, name: Name) -> UnixStream {
        self.dial(name);
        let (port, socket) = shim.accept();
        assert_eq!(port, name.0);
        self.until(|d| d.end(name).accepted);
        socket
    }
}
