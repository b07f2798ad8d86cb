//! What only a terminal can do: change its size, say that input is over, and be opened again.

#![allow(unsafe_code, reason = "the TIOCSWINSZ ioctl")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::termios::{LocalFlags, SpecialCharacterIndices, tcgetattr};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

/// Sets the size in characters through the master side.
///
/// # Errors
/// The ioctl's.
pub fn resize(master: &impl AsRawFd, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives across the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Opens the other end through the master side, as nobody's controlling terminal.
///
/// # Errors
/// The ioctl's: `ENOTTY` where it is no terminal.
pub fn open_other_end(master: &impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    Ok(ioctl_tiocgptpeer(master, flags)?)
}

/// The character that ends the input of a program which reads lines: a terminal has no half-close. `None` where the
/// program takes raw keys and would see it as one.
pub fn end_of_input(master: &impl AsFd) -> Option<u8> {
    // The attributes of a pty are its slave's, whichever side asks.
    let attributes = tcgetattr(master).ok()?;
    if !attributes.local_flags.contains(LocalFlags::ICANON) {
        return None;
    }
    attributes
        .control_chars
        .get(SpecialCharacterIndices::VEOF as usize)
        .copied()
        .filter(|&character| character != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::sys::termios::{SetArg, cfmakeraw, tcsetattr};

    #[test]
    fn a_size_reaches_the_other_side() {
        let pty = openpty(None, None).unwrap();
        resize(&pty.master, 132, 43).unwrap();
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCGWINSZ writes one winsize, which lives across the call.
        let done = unsafe { libc::ioctl(pty.slave.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        assert_eq!((done, size.ws_col, size.ws_row), (0, 132, 43));
    }

    #[test]
    fn only_a_line_reader_is_told_that_input_is_over() {
        let pty = openpty(None, None).unwrap();
        assert_eq!(end_of_input(&pty.master), Some(4));
        let mut attributes = tcgetattr(&pty.slave).unwrap();
        cfmakeraw(&mut attributes);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &attributes).unwrap();
        assert_eq!(end_of_input(&pty.master), None);
    }
}
