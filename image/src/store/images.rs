//! Images by name: the entries of the layout's index.json, whose annotation `org.opencontainers.image.ref.name` is the name (image-spec,
//! annotations.md).

use std::{
    fs::{self, File},
    io::{self, Read as _},
};

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex};
use rustix::fs::{FlockOperation, flock};

use super::{INDEX, Store, StoreError, failed};
use crate::{
    apply::Expected,
    layer::Sha256Digest,
    manifest::{Document, MAX_DOCUMENT, Manifest, ManifestError, Named, Platform, choose, config},
};

/// An image's name in a layout.
pub(super) const NAME: &str = "org.opencontainers.image.ref.name";

/// An image of the store, ready to be used.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its manifest.
    pub digest: Sha256Digest,
    /// What it wants to be run like.
    pub config: ImageConfiguration,
    /// Its layers, the lowest first.
    pub layers: Vec<Expected>,
}

/// What is to be said of a name.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// What it leads to: an index, or a manifest.
    pub descriptor: Descriptor,
    /// Bytes of all blobs that it leads to, as far as they are in the store.
    pub size: u64,
    /// The image for the platform asked for, if there is one in the store.
    pub image: Option<Image>,
}

impl Store {
    /// All names, and what they lead to.
    ///
    /// # Errors
    /// When the index, or what a name leads to, cannot be read.
    pub fn list(&self, platform: &Platform) -> Result<Vec<Listed>, StoreError> {
        let _use = self.begin()?;
        let one = |(name, descriptor): (String, Descriptor)| {
            let mut size = 0;
            // What is broken has a name nevertheless, by which it can be removed.
            let led_to = Named::of(&descriptor).map(|named| self.led_to(&named));
            for digest in led_to.ok().and_then(Result::ok).unwrap_or_default() {
                if let Some(blob) = self.blob(&digest)? {
                    let path = self.blob_path(&digest);
                    size += blob.metadata().map_err(failed("look at", &path))?.len();
                }
            }
            let image = match self.image(&name, platform) {
                Ok(image) => image,
                // Another platform's, as it was loaded from an archive; or something broken.
                Err(
                    StoreError::Image(_) | StoreError::NoBlob(_) | StoreError::WrongBlob { .. },
                ) => None,
                Err(error) => return Err(error),
            };
            Ok(Listed {
                name,
                descriptor,
                size,
                image,
            })
        };
        self.names()?.into_iter().map(one).collect()
    }

    /// What the store has a name for: the name, and the descriptor of a manifest or an index. The ones without a name are nobody's.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn names(&self) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let index = self.index()?;
        let named = index.manifests().iter().filter_map(|descriptor| {
            let name = name_of(descriptor)?.to_owned();
            Some((name, descriptor.clone()))
        });
        Ok(named.collect())
    }

    /// Gives a name to what this describes, and takes it from whatever had it. Returns once that is on the disk.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn tag(&self, name: &str, what: &Descriptor) -> Result<(), StoreError> {
        self.change(|manifests| {
            manifests.retain(|other| name_of(other) != Some(name));
            let mut annotations = what.annotations().clone().unwrap_or_default();
            annotations.insert(NAME.to_owned(), name.to_owned());
            let mut named = what.clone();
            named.set_annotations(Some(annotations));
            manifests.push(named);
        })
    }

    /// Takes a name away. What nothing else leads to goes with the next [`Store::sweep`]. Says whether there was one.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn untag(&self, name: &str) -> Result<bool, StoreError> {
        let mut was_there = false;
        self.change(|manifests| {
            let before = manifests.len();
            manifests.retain(|other| name_of(other) != Some(name));
            was_there = manifests.len() < before;
        })?;
        Ok(was_there)
    }

    /// The image of this name for this platform; `None`: nothing has the name.
    ///
    /// # Errors
    /// When something that it leads to is missing, is not what it should be, or is for another platform.
    pub fn image(&self, name: &str, platform: &Platform) -> Result<Option<Image>, StoreError> {
        let names = self.names()?;
        let Some((_, descriptor)) = names.into_iter().find(|(other, _)| other == name) else {
            return Ok(None);
        };
        let named = Named::of(&descriptor)?;
        let (digest, manifest) = self.chosen(&named, platform)?;
        let config = self.config(&manifest)?;
        let layers = manifest.layers(&config, platform)?;
        Ok(Some(Image {
            digest,
            config,
            layers,
        }))
    }

    /// A manifest, or that for a platform of an index; with its digest.
    pub(super) fn chosen(
        &self,
        named: &Named,
        platform: &Platform,
    ) -> Result<(Sha256Digest, Manifest), StoreError> {
        let index = match self.document(named)? {
            Document::Manifest(manifest) => return Ok((named.digest, *manifest)),
            Document::Index(index) => index,
        };
        let chosen = choose(&index, platform)?;
        match self.document(&chosen)? {
            Document::Manifest(manifest) => Ok((chosen.digest, *manifest)),
            Document::Index(_) => {
                let (what, why) = ("image's index", "leads to another".to_owned());
                Err(StoreError::Image(ManifestError::Invalid { what, why }))
            }
        }
    }

    pub(super) fn index(&self) -> Result<ImageIndex, StoreError> {
        let path = self.root.join(INDEX.0);
        let text = fs::read(&path).map_err(failed("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| {
            StoreError::Image(ManifestError::Parse {
                what: "store's index.json",
                source,
            })
        })
    }

    /// A manifest or an index, as far as it is in the store.
    pub(super) fn document(&self, named: &Named) -> Result<Document, StoreError> {
        let text = self.text(named, "image's manifest")?;
        Ok(Document::parse(&text, None)?)
    }

    pub(crate) fn config(&self, manifest: &Manifest) -> Result<ImageConfiguration, StoreError> {
        let text = self.text(&manifest.config, "image's configuration")?;
        Ok(config(&text)?)
    }

    /// A document's bytes: others may write to the layout, so they are checked.
    pub(super) fn text(&self, named: &Named, what: &'static str) -> Result<Vec<u8>, StoreError> {
        if named.size > MAX_DOCUMENT {
            let size = named.size;
            return Err(StoreError::Image(ManifestError::TooLarge { what, size }));
        }
        let blob = self.blob(&named.digest)?;
        let blob = blob.ok_or(StoreError::NoBlob(named.digest))?;
        let mut text = Vec::new();
        blob.take(named.size + 1)
            .read_to_end(&mut text)
            .map_err(failed("read", &self.blob_path(&named.digest)))?;
        let found = Sha256Digest::of(&text);
        if text.len() as u64 != named.size || found != named.digest {
            return Err(StoreError::WrongBlob {
                expected: named.digest,
                found: format!("the store has other bytes under its name, {found}"),
            });
        }
        Ok(text)
    }

    /// Changes the index; one process at a time.
    fn change(&self, change: impl FnOnce(&mut Vec<Descriptor>)) -> Result<(), StoreError> {
        let lock = || {
            let root = File::open(&self.root)?;
            flock(&root, FlockOperation::LockExclusive)?;
            Ok(root)
        };
        let _lock = lock().map_err(failed("lock", &self.root))?;
        let mut index = self.index()?;
        let mut manifests = index.manifests().clone();
        change(&mut manifests);
        index.set_manifests(manifests);
        let text = sorted(&index).map_err(failed("write", &self.root.join(INDEX.0)))?;
        self.replace(INDEX.0, "index.json.new", &text)
    }
}

fn name_of(descriptor: &Descriptor) -> Option<&str> {
    annotation(descriptor, NAME)
}

pub(super) fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    let annotations = descriptor.annotations().as_ref()?;
    annotations.get(key).map(String::as_str)
}

/// An index as text, always the same: annotations have no order of their own.
pub(super) fn sorted(index: &ImageIndex) -> io::Result<Vec<u8>> {
    let value = serde_json::to_value(index)?;
    Ok(serde_json::to_vec(&value)?)
}
