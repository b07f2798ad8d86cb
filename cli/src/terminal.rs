//! The caller's terminal.

use std::{
    io::{self, IsTerminal as _},
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Bytes pass as they are typed, until this is dropped.
pub(crate) struct Raw(Termios);

impl Raw {
    /// `None`: standard input is no terminal.
    pub(crate) fn new() -> io::Result<Option<Self>> {
        let input = io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&input)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may have gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Rows and columns, if there is a terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let of = |fd: BorrowedFd<'_>| tcgetwinsize(fd).ok();
    let size = of(io::stdout().as_fd()).or_else(|| of(io::stdin().as_fd()))?;
    Some((size.ws_row, size.ws_col))
}

/// A terminal for the container wants one here, where its user types.
pub(crate) fn check(tty: bool, interactive: bool) -> Result<()> {
    if tty && interactive && !io::stdin().is_terminal() {
        bail!("-t wants a terminal, and standard input is none: leave -t out");
    }
    Ok(())
}
