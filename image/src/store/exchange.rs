//! Images to and from a file: an OCI archive, which is a layout in a tar stream. skopeo, podman, containerd and Docker (from version 25 on)
//! write and read it. Docker's older kind is [`super::docker`]'s.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
};

use oci_spec::image::{Descriptor, ImageIndex};

use super::{
    INDEX, LAYOUT, Store, StoreError,
    docker::{MANIFEST, Members},
    images::{NAME, annotation, sorted},
};
use crate::{
    archive::{Archive, Entry, Kind},
    layer::{Layer, Limits, Sha256Digest},
    manifest::{MAX_DOCUMENT, ManifestError, Named, digest, parse},
};

/// A name with its registry, where the other annotation has a tag only (containerd, and Docker after it).
const FULL_NAME: &str = "io.containerd.image.name";

/// Bytes of an archive, unpacked: as many as its layers may have between them.
pub(super) const LIMITS: Limits = Limits {
    bytes: 1 << 40,
    ratio: 500,
};

impl Store {
    /// Takes the images of an archive in, compressed or not, and gives them their names, which it returns; one without a name has its digest
    /// for one. Blocks.
    ///
    /// # Errors
    /// When it is no OCI archive, lacks what its index names, or something in it is another than it should be. Names are given last.
    pub fn load<R: Read>(&self, archive: R) -> Result<Vec<String>, StoreError> {
        let _use = self.begin()?;
        let layer = Layer::new(archive, LIMITS).map_err(StoreError::Stream)?;
        let mut archive = Archive::new(io::BufReader::new(layer));
        let mut index: Option<ImageIndex> = None;
        let mut members = Members::default();
        while let Some(entry) = archive.next_entry()? {
            let name = entry.display_name();
            let name = name.strip_prefix("./").unwrap_or(&name);
            if entry.kind == Kind::Symlink {
                members.add_link(name, &entry.link)?;
            }
            if entry.kind != Kind::File || entry.extents.is_some() {
                continue;
            }
            if name == INDEX.0 {
                let text = read_document(&mut archive, &entry, "archive's index.json")?;
                index = Some(parse("archive's index.json", &text)?);
            } else if name == MANIFEST {
                members.manifest = Some(read_document(
                    &mut archive,
                    &entry,
                    "archive's manifest.json",
                )?);
            } else if let Some(hex) = name.strip_prefix("blobs/sha256/") {
                let digest = digest("archive", &format!("sha256:{hex}"))?;
                self.take(&mut archive, &digest, entry.size)?;
                // Docker's manifest.json names them so, too.
                members.add(
                    name,
                    Named {
                        digest,
                        size: entry.size,
                    },
                    None,
                )?;
            } else if Members::is_one(name) {
                let (digest, unnamed) = self.take_unnamed(|to| {
                    copy_data(&mut archive, |data| {
                        to.write_all(data).map_err(StoreError::Stream)
                    })
                })?;
                members.add(
                    name,
                    Named {
                        digest,
                        size: entry.size,
                    },
                    Some(unnamed),
                )?;
            }
        }
        let images = match (index, &members.manifest) {
            (Some(index), _) => self.check(&index)?,
            (None, Some(text)) => self.assemble(&members, text)?,
            (None, None) => {
                return Err(invalid(
                    "has neither index.json nor manifest.json: it is no archive of images",
                ));
            }
        };
        for (name, descriptor) in &images {
            self.tag(name, descriptor)?;
        }
        Ok(images.into_iter().map(|(name, _)| name).collect())
    }

    /// All that an index names must be there, and be images.
    fn check(&self, index: &ImageIndex) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let all = index.manifests().iter().map(|descriptor| {
            let named = Named::of(descriptor)?;
            self.document(&named)?;
            Ok((name_of(descriptor), descriptor.clone()))
        });
        all.collect()
    }

    fn take<R: Read>(
        &self,
        archive: &mut Archive<R>,
        digest: &Sha256Digest,
        size: u64,
    ) -> Result<(), StoreError> {
        let Some(mut partial) = self.ingest_anew(digest, size)? else {
            return Ok(());
        };
        copy_data(archive, |data| partial.write(data))?;
        partial.commit()
    }

    /// Writes these images into an archive, each blob once. The same images make the same bytes. Blocks.
    ///
    /// # Errors
    /// When a name is nothing's, something that it leads to is missing, or the archive cannot be written.
    pub fn save<W: Write>(&self, names: &[&str], archive: W) -> Result<(), StoreError> {
        let _use = self.begin()?;
        let all = self.names()?;
        let mut index = self.index()?;
        let mut manifests = Vec::new();
        let mut blobs = BTreeSet::new();
        for name in names {
            let found = all.iter().find(|(other, _)| other == name);
            let Some((_, descriptor)) = found else {
                return Err(StoreError::NoImage((*name).to_owned()));
            };
            let named = Named::of(descriptor)?;
            blobs.extend(self.led_to(&named)?);
            let mut annotations = descriptor.annotations().clone().unwrap_or_default();
            annotations.insert(FULL_NAME.to_owned(), (*name).to_owned());
            let mut descriptor = descriptor.clone();
            descriptor.set_annotations(Some(annotations));
            manifests.push(descriptor);
        }
        index.set_manifests(manifests);
        let index = sorted(&index).map_err(StoreError::Stream)?;
        let mut writer = Writer::new(archive);
        writer.add(LAYOUT.0, LAYOUT.1.len() as u64, LAYOUT.1.as_bytes())?;
        writer.add(INDEX.0, index.len() as u64, &*index)?;
        for digest in blobs {
            // Of an index, the images of other platforms may never have been wanted.
            let Some(blob) = self.blob(&digest)? else {
                continue;
            };
            let size = blob.metadata().map_err(StoreError::Stream)?.len();
            writer.add(&format!("blobs/sha256/{}", digest.hex()), size, blob)?;
        }
        writer.finish()
    }
}

/// Writes an archive, of whose files there is nothing to say but their names and their bytes.
pub(super) struct Writer<W: Write>(tar::Builder<W>);

impl<W: Write> Writer<W> {
    pub(super) fn new(archive: W) -> Self {
        Self(tar::Builder::new(archive))
    }

    /// Adds a file of so many bytes: all that there are to read.
    pub(super) fn add(&mut self, name: &str, size: u64, data: impl Read) -> Result<(), StoreError> {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let added = self.0.append_data(&mut header, name, data);
        added.map_err(StoreError::Stream)
    }

    pub(super) fn finish(self) -> Result<(), StoreError> {
        let mut archive = self.0.into_inner().map_err(StoreError::Stream)?;
        archive.flush().map_err(StoreError::Stream)
    }
}

pub(super) fn invalid(why: &str) -> StoreError {
    let (what, why) = ("archive", why.to_owned());
    StoreError::Image(ManifestError::Invalid { what, why })
}

fn name_of(descriptor: &Descriptor) -> String {
    annotation(descriptor, FULL_NAME)
        .or_else(|| annotation(descriptor, NAME))
        .map_or_else(|| descriptor.digest().to_string(), str::to_owned)
}

fn read_document<R: Read>(
    archive: &mut Archive<R>,
    entry: &Entry,
    what: &'static str,
) -> Result<Vec<u8>, StoreError> {
    if entry.size > MAX_DOCUMENT {
        let size = entry.size;
        return Err(StoreError::Image(ManifestError::TooLarge { what, size }));
    }
    let mut text = Vec::new();
    copy_data(archive, |data| {
        text.extend(data);
        Ok(())
    })?;
    Ok(text)
}

/// Hands the current entry's data on, piece by piece.
fn copy_data<R: Read>(
    archive: &mut Archive<R>,
    mut to: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match archive.read_data(&mut buffer)? {
            0 => return Ok(()),
            count => to(buffer.get(..count).unwrap_or_default())?,
        }
    }
}
