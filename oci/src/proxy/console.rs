//! A terminal of this host, for an engine that expects one: its end goes over the console socket, and what passes through it is neither
//! echoed nor changed here, as the real terminal is the guest's.

use std::{
    fs::File,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{Mode, OFlags, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr},
};

/// Our end.
pub(super) struct Console(OwnedFd);

impl Console {
    /// Makes one, this process' controlling terminal, and sends the other end.
    pub(super) fn new(socket: &Path) -> Result<Self> {
        let connected = UnixStream::connect(socket).with_context(|| {
            format!(
                "open console socket: connect socket to `{}`",
                socket.display()
            )
        })?;
        let (engines, ours, name) = make().context("making a terminal")?;
        send(&connected, &engines, &name)
            .context("sending the terminal over the console socket")?;
        Ok(Self(ours))
    }

    /// Columns and rows, if anybody has said.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.0).ok()?;
        (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }

    /// To read and write.
    pub(super) fn file(&self) -> io::Result<File> {
        Ok(self.0.try_clone()?.into())
    }
}

fn make() -> io::Result<(OwnedFd, OwnedFd, Vec<u8>)> {
    let engines = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&engines)?;
    unlockpt(&engines)?;
    let name = ptsname(&engines, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let ours = open(name.as_c_str(), flags, Mode::empty())?;
    let mut raw = tcgetattr(&ours)?;
    raw.make_raw();
    tcsetattr(&ours, OptionalActions::Now, &raw)?;
    // For the signals that a terminal sends: its size has changed, or its other end has gone.
    ioctl_tiocsctty(&ours)?;
    Ok((engines, ours, name.into_bytes()))
}

/// One message, with the name as its bytes, as runc does.
fn send(socket: &UnixStream, end: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let ends = [end.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&ends)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    sendmsg(
        socket,
        &[IoSlice::new(name)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}
