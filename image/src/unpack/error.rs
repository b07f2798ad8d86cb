//! What goes wrong while a layer is unpacked.

use rustix::io::Errno;

use crate::archive::{ArchiveError, Entry};

/// Why a layer is not unpacked. What was made until then stays: the directory is useless.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// An entry that is refused.
    #[error("{name:?} in the layer is refused: {why}")]
    Refused {
        /// Its name.
        name: String,
        /// The reason.
        why: String,
    },
    /// The file system.
    #[error("cannot {doing} {name:?} of the layer")]
    System {
        /// What was being done.
        doing: &'static str,
        /// To what.
        name: String,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

pub(super) fn refused(entry: &Entry, why: impl Into<String>) -> UnpackError {
    UnpackError::Refused {
        name: entry.display_name(),
        why: why.into(),
    }
}

pub(super) fn system(doing: &'static str, entry: &Entry, source: Errno) -> UnpackError {
    UnpackError::System {
        doing,
        name: entry.display_name(),
        source,
    }
}
