//! The socket between the agent and a `container-init` process.
//!
//! A SEQPACKET pair, so that one packet is one message and a closed end is an end of file: the socket is
//! close-on-exec, and the agent learns from the end of file that execve succeeded. Messages are small JSON;
//! the job itself, which can be large, is a memfd beside the first message. Messages without
//! descriptors are plain read and write, which seccomp profiles allow when they allow anything.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest message. Far below the kernel's default socket buffer of 208 KiB.
const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors one message carries: the job, a pidfd, three streams; one spare.
const MAX_FDS: usize = 6;

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

/// A message and the descriptors that came with it.
pub(crate) type Received<T> = (T, Vec<OwnedFd>);

impl Channel {
    /// A connected pair, close-on-exec.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket: ours }, theirs))
    }

    /// Takes an end that was received.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one message.
    pub(crate) fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, &bytes))?;
        Ok(())
    }

    /// Sends one message with descriptors.
    pub(crate) fn send_with<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if bytes.len() > MAX_MESSAGE || !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for one message; `None` at the end of file. Takes no descriptors.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut *bytes))?;
        if length == 0 {
            return Ok(None);
        }
        bytes.truncate(length);
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// Waits for one message with its descriptors; `None` at the end of file.
    pub(crate) fn receive_with<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        self.receive_flags(RecvFlags::empty())
    }

    /// Takes a message if one is there; fails with `WouldBlock` otherwise.
    pub(crate) fn try_receive<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        self.receive_flags(RecvFlags::DONTWAIT)
    }

    fn receive_flags<T: DeserializeOwned>(
        &self,
        flags: RecvFlags,
    ) -> io::Result<Option<Received<T>>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                flags | RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let fds = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        Ok(Some((serde_json::from_slice(&bytes)?, fds)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Writes a value into a memfd, positioned at its start.
pub(crate) fn to_memfd<T: Serialize>(value: &T) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("husk-job", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(value)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads what [`to_memfd`] wrote.
pub(crate) fn from_memfd<T: DeserializeOwned>(fd: OwnedFd) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_descriptors_and_the_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let memfd = to_memfd(&vec!["job"]).unwrap();
        ours.send_with(&"first", &[memfd.as_fd()]).unwrap();
        ours.send(&"second").unwrap();
        let (text, mut fds) = theirs.receive_with::<String>().unwrap().unwrap();
        assert_eq!(text, "first");
        let job: Vec<String> = from_memfd(fds.pop().unwrap()).unwrap();
        assert_eq!(job, ["job"]);
        assert_eq!(theirs.receive::<String>().unwrap().unwrap(), "second");
        let empty = theirs.try_receive::<String>().unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert!(theirs.receive::<String>().unwrap().is_none());
    }
}
