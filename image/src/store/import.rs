//! An image out of a root file system in a tar stream.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek as _},
    path::PathBuf,
};

use oci_spec::image::{Descriptor, MediaType};
use serde_json::{Value, json};

use super::{BLOBS, INGEST, Ingest, Store, StoreError, failed, sync_dir};
use crate::{
    archive::Archive,
    layer::{Layer, Limits, Sha256Digest, Summary},
    manifest::Platform,
};

/// A blob whose digest nobody knows yet. Dropped unfinished, it is removed.
struct Unnamed {
    path: PathBuf,
    file: File,
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        // Under its own name it has gone.
        let _ = fs::remove_file(&self.path);
    }
}

impl Store {
    /// Makes an image of one layer of a tar stream, compressed or not, and gives it this name. Returns the digest of its manifest. Blocks.
    ///
    /// # Errors
    /// When it is no tar archive, is more than the limits, or the file system refuses.
    pub fn import<R: Read>(
        &self,
        mut tar: R,
        name: &str,
        platform: &Platform,
        limits: Limits,
    ) -> Result<Sha256Digest, StoreError> {
        let _use = self.begin()?;
        let mut unnamed = self.unnamed()?;
        io::copy(&mut tar, &mut unnamed.file).map_err(StoreError::Stream)?;
        unnamed.file.rewind().map_err(StoreError::Stream)?;
        let layer = look(&unnamed.file, limits)?;
        self.keep(unnamed, &layer.digest)?;

        let mut config = json!({
            "architecture": platform.architecture, "os": platform.os, "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id.to_string()]},
        });
        if let Some(variant) = &platform.variant {
            config["variant"] = json!(variant);
        }
        let config = self.add_document(&config)?;
        // The layer's bytes tell how it is compressed, to whoever reads it here; to others its kind does.
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest,
            "config": {"mediaType": MediaType::ImageConfig, "digest": config.0.to_string(), "size": config.1},
            "layers": [{
                "mediaType": layer.media_type(), "digest": layer.digest.to_string(), "size": layer.size,
            }],
        });
        let (digest, size) = self.add_document(&manifest)?;
        let described: oci_spec::image::Digest = digest
            .to_string()
            .parse()
            .map_err(|e| StoreError::Stream(io::Error::other(e)))?;
        self.tag(
            name,
            &Descriptor::new(MediaType::ImageManifest, size, described),
        )?;
        Ok(digest)
    }

    fn unnamed(&self) -> Result<Unnamed, StoreError> {
        let mut number = 0;
        loop {
            let name = format!("{INGEST}/import-{}-{number}", std::process::id());
            let path = self.root.join(name);
            let mut options = File::options();
            match options.read(true).write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => {
                    let file = opened.map_err(failed("make", &path))?;
                    return Ok(Unnamed { path, file });
                }
            }
        }
    }

    /// Gives a blob its name.
    fn keep(&self, unnamed: Unnamed, digest: &Sha256Digest) -> Result<(), StoreError> {
        let path = &unnamed.path;
        unnamed.file.sync_all().map_err(failed("write out", path))?;
        fs::rename(path, self.blob_path(digest)).map_err(failed("rename", path))?;
        let dir = self.root.join(BLOBS);
        sync_dir(&dir).map_err(failed("write out", &dir))
    }

    fn add_document(&self, document: &Value) -> Result<(Sha256Digest, u64), StoreError> {
        let text = document.to_string();
        let (digest, size) = (Sha256Digest::of(text.as_bytes()), text.len() as u64);
        if let Ingest::Partial(mut partial) = self.ingest(&digest, size)? {
            if partial.written() > 0 {
                partial.restart()?;
            }
            partial.write(text.as_bytes())?;
            partial.commit()?;
        }
        Ok((digest, size))
    }
}

/// Reads it all, to see that it is an archive, and what its digests are.
fn look(blob: &File, limits: Limits) -> Result<Summary, StoreError> {
    let layer = Layer::new(blob, limits).map_err(StoreError::Stream)?;
    let mut archive = Archive::new(BufReader::new(layer));
    let mut is_empty = true;
    while archive.next_entry().map_err(StoreError::Archive)?.is_some() {
        is_empty = false;
    }
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(StoreError::Stream)?;
    if is_empty {
        let nothing = "there is no file in it: it is no tar archive of a root file system";
        return Err(StoreError::Stream(io::Error::other(nothing)));
    }
    rest.into_inner().finish().map_err(StoreError::Stream)
}
