//! Why a process could not be launched, in the words that runc's users know.
//!
//! The message is one sentence that names the step and its object; the variant tells callers what kind of
//! failure it was, so that they can pick an exit code or an RPC status. The error is made in the
//! `container-init` process and travels to the agent, hence serde.

use std::io;

use serde::{Deserialize, Serialize};

/// The longest sentence, in bytes: with every character escaped it still fits a message.
const MAX_MESSAGE: usize = 8 << 10;

/// A launch that failed. `Display` is the sentence for the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum LaunchError {
    /// The spec or the request cannot be carried out as written (bad value, missing mount source, unknown user).
    #[error("{0}")]
    InvalidSpec(String),
    /// The executable, or its interpreter, does not exist (exit code 127 by custom).
    #[error("{0}")]
    NotFound(String),
    /// The executable may not be run (exit code 126 by custom).
    #[error("{0}")]
    PermissionDenied(String),
    /// The container is not in a state that allows this: its init has ended, or it is paused.
    #[error("{0}")]
    NotRunning(String),
    /// Something in the guest failed.
    #[error("{0}")]
    Internal(String),
}

impl LaunchError {
    /// An [`LaunchError::InvalidSpec`] with this sentence.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::InvalidSpec(message.into())
    }

    /// An [`LaunchError::Internal`] with this sentence.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::Internal(message.into())
    }

    /// Short enough for one message to the agent. Only names that are no names are that long.
    pub(crate) fn shortened(mut self) -> Self {
        let (Self::InvalidSpec(text)
        | Self::NotFound(text)
        | Self::PermissionDenied(text)
        | Self::NotRunning(text)
        | Self::Internal(text)) = &mut self;
        if text.len() > MAX_MESSAGE {
            *text = text.chars().take(MAX_MESSAGE / 4).collect();
            text.push('…');
        }
        self
    }

    /// The exit code of an init process that ends with this error.
    pub(crate) fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound(_) => 127,
            Self::PermissionDenied(_) => 126,
            _ => 1,
        }
    }
}

/// A failed system call, whichever crate reported it.
pub(crate) trait OsError {
    /// The kernel's error number.
    fn errno(&self) -> i32;

    /// `no such file or directory`: the way Go, and so runc, prints an errno.
    fn text(&self) -> String {
        errno_text(self.errno())
    }
}

impl OsError for io::Error {
    fn errno(&self) -> i32 {
        self.raw_os_error().unwrap_or(0)
    }

    fn text(&self) -> String {
        self.raw_os_error()
            .map_or_else(|| self.to_string(), errno_text)
    }
}

impl OsError for rustix::io::Errno {
    fn errno(&self) -> i32 {
        self.raw_os_error()
    }
}

impl OsError for nix::errno::Errno {
    fn errno(&self) -> i32 {
        *self as i32
    }
}

fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_lowercase().chain(chars).collect()
    })
}

/// Turns a system call's failure into a sentence: `what: errno text`.
pub(crate) trait Step<T> {
    /// The failure is the guest's.
    fn step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError>;
    /// The failure is the spec's.
    fn spec_step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError>;
}

impl<T, E: OsError> Step<T> for Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError> {
        self.map_err(|error| LaunchError::Internal(format!("{}: {}", what(), error.text())))
    }

    fn spec_step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError> {
        self.map_err(|error| LaunchError::InvalidSpec(format!("{}: {}", what(), error.text())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_fit_a_message() {
        let long = LaunchError::invalid("\u{1}".repeat(100_000)).shortened();
        assert!(serde_json::to_vec(&long).unwrap().len() < 60_000);
        let short = LaunchError::invalid("short");
        assert_eq!(short.clone().shortened(), short);
    }

    #[test]
    fn errno_reads_as_go_prints_it() {
        assert_eq!(errno_text(libc::ENOENT), "no such file or directory");
        assert_eq!(errno_text(libc::EPERM), "operation not permitted");
        assert_eq!(errno_text(libc::ENOEXEC), "exec format error");
    }
}
