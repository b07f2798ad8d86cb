//! An image out of a root file system in a tar stream.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek as _, Write},
    path::PathBuf,
};

use oci_spec::image::{Descriptor, MediaType};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{INGEST, Store, StoreError, failed};
use crate::{
    archive::Archive,
    layer::{Layer, Limits, Sha256Digest, Summary},
    manifest::{Named, Platform},
};

/// A file that may become a blob. Dropped before, it is removed.
#[derive(Debug)]
pub(super) struct Unnamed {
    path: PathBuf,
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
        let (unnamed, mut file) = self.unnamed()?;
        io::copy(&mut tar, &mut file).map_err(StoreError::Stream)?;
        file.rewind().map_err(StoreError::Stream)?;
        let layer = look(&file, limits)?;
        self.keep(&file, &unnamed.path, &layer.digest)?;

        let mut config = json!({
            "architecture": platform.architecture, "os": platform.os, "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id.to_string()]},
        });
        if let Some(variant) = &platform.variant {
            config["variant"] = json!(variant);
        }
        let config = self.add_document(MediaType::ImageConfig, &config)?;
        let named = Named {
            digest: layer.digest,
            size: layer.size,
        };
        let manifest = self.add_manifest(&config, &[describe(layer.media_type(), &named)?])?;
        self.tag(name, &manifest)?;
        Ok(Named::of(&manifest)?.digest)
    }

    /// A file of what `write` writes, and its digest.
    pub(super) fn take_unnamed(
        &self,
        write: impl FnOnce(&mut dyn Write) -> Result<(), StoreError>,
    ) -> Result<(Sha256Digest, Unnamed), StoreError> {
        let (unnamed, file) = self.unnamed()?;
        let mut digesting = Digesting {
            file: &file,
            sha256: Sha256::new(),
        };
        write(&mut digesting)?;
        Ok((digesting.sha256.into(), unnamed))
    }

    /// Makes a blob of it.
    pub(super) fn keep_unnamed(
        &self,
        unnamed: &Unnamed,
        digest: &Sha256Digest,
    ) -> Result<(), StoreError> {
        let file = File::open(&unnamed.path).map_err(failed("open", &unnamed.path))?;
        self.keep(&file, &unnamed.path, digest)
    }

    fn unnamed(&self) -> Result<(Unnamed, File), StoreError> {
        let mut number = 0;
        loop {
            let name = format!("{INGEST}/import-{}-{number}", std::process::id());
            let path = self.root.join(name);
            let mut options = File::options();
            match options.read(true).write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => {
                    let file = opened.map_err(failed("make", &path))?;
                    return Ok((Unnamed { path }, file));
                }
            }
        }
    }

    /// Makes a blob of a manifest, and a descriptor of it.
    pub(super) fn add_manifest(
        &self,
        config: &Descriptor,
        layers: &[Descriptor],
    ) -> Result<Descriptor, StoreError> {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": layers,
        });
        self.add_document(MediaType::ImageManifest, &manifest)
    }

    /// Makes a blob of a document, and a descriptor of it.
    fn add_document(&self, kind: MediaType, document: &Value) -> Result<Descriptor, StoreError> {
        let text = document.to_string();
        let named = Named {
            digest: Sha256Digest::of(text.as_bytes()),
            size: text.len() as u64,
        };
        if let Some(mut partial) = self.ingest_anew(&named.digest, named.size)? {
            partial.write(text.as_bytes())?;
            partial.commit()?;
        }
        describe(kind, &named)
    }
}

/// A descriptor, in oci-spec's terms.
pub(crate) fn describe(kind: MediaType, named: &Named) -> Result<Descriptor, StoreError> {
    let digest: oci_spec::image::Digest = named
        .digest
        .to_string()
        .parse()
        .map_err(|e| StoreError::Stream(io::Error::other(e)))?;
    Ok(Descriptor::new(kind, named.size, digest))
}

/// Digests what it writes.
struct Digesting<'a> {
    file: &'a File,
    sha256: Sha256,
}

impl Write for Digesting<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.file.write(data)?;
        self.sha256.update(data.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Reads it all, to see that it is an archive, and what its digests are.
fn look(blob: &File, limits: Limits) -> Result<Summary, StoreError> {
    let layer = Layer::new(blob, limits).map_err(StoreError::Stream)?;
    let mut archive = Archive::new(BufReader::new(layer));
    let mut is_empty = true;
    while archive.next_entry()?.is_some() {
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
