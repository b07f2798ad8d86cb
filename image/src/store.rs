//! The content store: an OCI image layout (image-spec, image-layout.md), which skopeo reads and writes too, with the layers unpacked beside it.
//!
//! ```text
//! oci-layout  index.json  blobs/sha256/DIGEST    the layout
//! ingest/DIGEST                                  blobs that are being fetched, as far as they are
//! layers/CHAINID/                                layers, unpacked
//! layers/CHAINID.new/                            and those that are being
//! ```
//!
//! What has its final name is whole and on the disk: everything is made under another, written out, and renamed. So a power cut leaves
//! nothing but rests under the other names, which the next who wants the same thing goes on with or clears away. One process at a time makes
//! a thing; the others wait, and find it there. The lock is one on the unfinished file, so it ends with the process.

mod docker;
mod exchange;
mod images;
mod import;
mod ingest;
mod layers;
mod sweep;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

pub use images::{Image, Listed};
#[cfg(feature = "registry")]
pub(crate) use import::describe;
pub use ingest::{Ingest, Partial};
pub use layers::Blobs;
pub use sweep::{Swept, Use};

use crate::{
    apply::ApplyError, archive::ArchiveError, layer::Sha256Digest, manifest::ManifestError,
};

/// What marks a layout, and its version (image-layout.md, "oci-layout file").
const LAYOUT: (&str, &str) = ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
/// The images of a layout; in a new one there are none (image-layout.md, "index.json file").
const INDEX: (&str, &str) = ("index.json", r#"{"schemaVersion":2,"manifests":[]}"#);
const BLOBS: &str = "blobs/sha256";
const INGEST: &str = "ingest";
const LAYERS: &str = "layers";

/// Why the store does not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is of another version.
    #[error("{} is an image layout of a version that this husk does not know: {found}", path.display())]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// A name that nothing has.
    #[error("the store has no image {0:?}: pull it, or look at the names that there are")]
    NoImage(String),
    /// An archive that is read or written.
    #[error("reading or writing the archive")]
    Stream(#[source] io::Error),
    /// What an archive says.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A blob that is not there.
    #[error("the store has no blob {0}: pull its image again")]
    NoBlob(Sha256Digest),
    /// A blob that is another than promised.
    #[error("the blob that came for {expected} is another: {found}")]
    WrongBlob {
        /// Its digest should be this.
        expected: Sha256Digest,
        /// And what was wrong.
        found: String,
    },
    /// A blob that somebody fetches, and has given up.
    #[error("the blob {0} has not come to its end")]
    GivenUp(Sha256Digest),
    /// A thread of husk's own that did not come to its end.
    #[error("a part of husk has failed: {0}")]
    Task(String),
    /// An image's documents.
    #[error(transparent)]
    Image(#[from] ManifestError),
    /// A layer that is not unpacked.
    #[error("unpacking layer {blob}")]
    Apply {
        /// Its blob.
        blob: Sha256Digest,
        /// The reason.
        #[source]
        source: ApplyError,
    },
}

/// A store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store in this directory; what is missing is made.
    ///
    /// # Errors
    /// When the file system refuses, or what is there is no layout of a version that husk knows.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let store = Self {
            root: root.to_owned(),
        };
        for dir in [BLOBS, INGEST, LAYERS] {
            let path = store.root.join(dir);
            fs::create_dir_all(&path).map_err(failed("make", &path))?;
        }
        // The mark last: where it is, the rest is.
        store.make_missing(INDEX)?;
        store.make_missing(LAYOUT)?;
        let path = store.root.join(LAYOUT.0);
        let found = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let is_known = found.replace(char::is_whitespace, "").starts_with(LAYOUT.1);
        if !is_known {
            return Err(StoreError::Version { path, found });
        }
        Ok(store)
    }

    fn make_missing(&self, (name, text): (&str, &str)) -> Result<(), StoreError> {
        let path = self.root.join(name);
        if path.exists() {
            return Ok(());
        }
        self.replace(
            name,
            &format!("{name}.{}.new", std::process::id()),
            text.as_bytes(),
        )
    }

    /// Writes a file of the layout under a new name, and gives it its own when it is on the disk.
    fn replace(&self, name: &str, new: &str, text: &[u8]) -> Result<(), StoreError> {
        let (path, new) = (self.root.join(name), self.root.join(new));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            sync_dir(&self.root)
        };
        write().map_err(failed("write", &path))
    }

    /// A blob, to be read.
    ///
    /// # Errors
    /// When it is there and cannot be opened.
    pub fn blob(&self, digest: &Sha256Digest) -> Result<Option<File>, StoreError> {
        let path = self.blob_path(digest);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("open", &path)(error)),
        }
    }

    fn blob_path(&self, digest: &Sha256Digest) -> PathBuf {
        self.root.join(BLOBS).join(digest.hex())
    }

    fn ingest_path(&self, digest: &Sha256Digest) -> PathBuf {
        self.root.join(INGEST).join(digest.hex())
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        doing,
        path,
        source,
    }
}

/// Waits until the names in a directory are on the disk.
fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Opens a file that is renamed or removed when its work is done, and holds its lock; what `open` gives may be gone by the time it is ours.
fn lock_at(path: &Path, open: impl Fn() -> io::Result<File>) -> io::Result<File> {
    use std::os::unix::fs::MetadataExt as _;
    loop {
        let file = open()?;
        flock(&file, FlockOperation::LockExclusive)?;
        let (ours, there) = (file.metadata()?, fs::symlink_metadata(path));
        if there.is_ok_and(|there| (there.ino(), there.dev()) == (ours.ino(), ours.dev())) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests;
