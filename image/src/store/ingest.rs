//! Blobs on their way into the store.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    path::Path,
};

use sha2::{Digest as _, Sha256};

use super::{BLOBS, Store, StoreError, failed, lock_at, sync_dir};
use crate::layer::Sha256Digest;

/// What becomes of a wish for a blob.
#[derive(Debug)]
pub enum Ingest {
    /// It is there, perhaps since a moment ago.
    There,
    /// It is the caller's to fetch: the rest of it, or all.
    Partial(Partial),
}

/// A blob that is being fetched, by nobody else. Dropped, what has come of it stays, and the next goes on from there.
#[derive(Debug)]
pub struct Partial {
    store: Store,
    digest: Sha256Digest,
    size: u64,
    file: File,
    sha256: Sha256,
    written: u64,
}

impl Store {
    /// Begins to fetch a blob of so many bytes, or goes on where somebody was cut off. Waits for another who fetches it. The caller holds the
    /// store ([`Store::begin`]) until a name leads to the blob. Blocks.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn ingest(&self, digest: &Sha256Digest, size: u64) -> Result<Ingest, StoreError> {
        let path = self.ingest_path(digest);
        let open = || {
            let mut options = OpenOptions::new();
            options
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
        };
        if self.blob(digest)?.is_some() {
            return Ok(Ingest::There);
        }
        let file = lock_at(&path, open).map_err(failed("open", &path))?;
        if self.blob(digest)?.is_some() {
            // Whoever had the lock has finished it; the file was made after that.
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            return Ok(Ingest::There);
        }
        let mut partial = Partial {
            store: self.clone(),
            digest: *digest,
            size,
            file,
            sha256: Sha256::new(),
            written: 0,
        };
        partial.read_back().map_err(failed("read", &path))?;
        Ok(Ingest::Partial(partial))
    }

    /// The same where a blob can only be had from its beginning. `None`: it is there.
    pub(crate) fn ingest_anew(
        &self,
        digest: &Sha256Digest,
        size: u64,
    ) -> Result<Option<Partial>, StoreError> {
        let Ingest::Partial(mut partial) = self.ingest(digest, size)? else {
            return Ok(None);
        };
        if partial.written() > 0 {
            partial.restart()?;
        }
        Ok(Some(partial))
    }

    /// Makes a file, whole and with this digest, a blob.
    pub(super) fn keep(
        &self,
        file: &File,
        path: &Path,
        digest: &Sha256Digest,
    ) -> Result<(), StoreError> {
        file.sync_all().map_err(failed("write out", path))?;
        fs::rename(path, self.blob_path(digest)).map_err(failed("rename", path))?;
        let dir = self.root.join(BLOBS);
        sync_dir(&dir).map_err(failed("write out", &dir))
    }
}

impl Partial {
    /// Bytes that are there: the next must be those that follow.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Reads what has come, from its beginning, however far that is.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn reader(&self) -> Result<File, StoreError> {
        let path = self.store.ingest_path(&self.digest);
        File::open(&path).map_err(failed("open", &path))
    }

    /// What is there from before counts, if it can be the blob's beginning.
    fn read_back(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = self.file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            self.sha256.update(buffer.get(..count).unwrap_or_default());
            self.written += count as u64;
        }
        if self.written > self.size {
            self.empty()?;
        }
        Ok(())
    }

    /// Throws away what has come: it is fetched from its beginning.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        let path = self.store.ingest_path(&self.digest);
        self.empty().map_err(failed("empty", &path))
    }

    fn empty(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.sha256 = Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When the disk refuses them, or they are more than the blob has: then all are thrown away.
    pub fn write(&mut self, data: &[u8]) -> Result<(), StoreError> {
        let path = self.store.ingest_path(&self.digest);
        if self.written + data.len() as u64 > self.size {
            self.restart()?;
            return Err(self.wrong(format!("more than {} bytes", self.size)));
        }
        self.file.write_all(data).map_err(failed("write", &path))?;
        self.sha256.update(data);
        self.written += data.len() as u64;
        Ok(())
    }

    /// All of it has come: checks it and makes it a blob of the store.
    ///
    /// # Errors
    /// When the disk refuses, or it is not the blob: then it is thrown away.
    pub fn commit(mut self) -> Result<(), StoreError> {
        let path = self.store.ingest_path(&self.digest);
        if self.written < self.size {
            // It can be gone on with.
            return Err(self.wrong(format!("{} of {} bytes", self.written, self.size)));
        }
        let found = Sha256Digest::from(std::mem::take(&mut self.sha256));
        if found != self.digest {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            return Err(self.wrong(format!("its digest is {found}")));
        }
        self.store.keep(&self.file, &path, &self.digest)
    }

    fn wrong(&self, found: String) -> StoreError {
        StoreError::WrongBlob {
            expected: self.digest,
            found,
        }
    }
}
