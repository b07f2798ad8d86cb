//! What `docker save` wrote before version 25, and `podman save` writes still: layers as plain tar files under names of their own, and a
//! manifest.json that says which are whose, often at the end. So the files become blobs as they come, and the image is put together after.
//!
//! A layer that several images have may stand there once, with symbolic links in its other places.

use std::collections::BTreeMap;

use oci_spec::{
    distribution::Reference,
    image::{Descriptor, MediaType},
};
use serde::Deserialize;

use super::{Store, StoreError, exchange::invalid, import::describe};
use crate::{
    layer::Sha256Digest,
    manifest::{Named, parse},
};

/// The file that names the images.
pub(super) const MANIFEST: &str = "manifest.json";

/// Links that lead to links.
const MAX_LINKS: usize = 8;

/// An image, by the names of its files.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The files of an archive.
#[derive(Debug, Default)]
pub(super) struct Members {
    files: BTreeMap<String, Named>,
    links: BTreeMap<String, String>,
}

impl Members {
    /// Whether a file may be of such an archive: a document, or a layer.
    pub(super) fn is_one(name: &str) -> bool {
        name.ends_with(".json") || name.ends_with(".tar")
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    pub(super) fn add(&mut self, name: &str, digest: Sha256Digest, size: u64) {
        self.files.insert(name.to_owned(), Named { digest, size });
    }

    pub(super) fn add_link(&mut self, name: &str, target: &[u8]) {
        let target = String::from_utf8_lossy(target).into_owned();
        self.links.insert(name.to_owned(), target);
    }

    fn get(&self, name: &str) -> Result<&Named, StoreError> {
        let mut name = name.to_owned();
        for _ in 0..MAX_LINKS {
            if let Some(named) = self.files.get(&name) {
                return Ok(named);
            }
            let Some(target) = self.links.get(&name) else {
                break;
            };
            name = beside(&name, target);
        }
        Err(invalid(&format!("names {name:?} and does not have it")))
    }
}

/// A link's target, from where the link is. One that leads out is no file of the archive.
fn beside(link: &str, target: &str) -> String {
    let mut parts: Vec<&str> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "" | "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

impl Store {
    /// Puts the images of such an archive together. Returns their names and what they are to describe.
    pub(super) fn assemble(
        &self,
        members: &Members,
    ) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let text = self.text(members.get(MANIFEST)?, "archive's manifest.json")?;
        let entries: Vec<Entry> = parse("archive's manifest.json", &text)?;
        let mut images = Vec::new();
        for entry in entries {
            let config = describe(MediaType::ImageConfig, members.get(&entry.config)?)?;
            let layers = entry
                .layers
                .iter()
                .map(|name| describe(MediaType::ImageLayer, members.get(name)?))
                .collect::<Result<Vec<_>, StoreError>>()?;
            let descriptor = self.add_manifest(&config, &layers)?;
            let tags = entry.repo_tags.unwrap_or_default();
            if tags.is_empty() {
                images.push((descriptor.digest().to_string(), descriptor.clone()));
            }
            for tag in tags {
                // Docker leaves out what is its own: registry and "library/".
                let full = tag.parse::<Reference>().map(|name| name.whole());
                images.push((full.unwrap_or(tag), descriptor.clone()));
            }
        }
        Ok(images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_beside_themselves() {
        for (link, target, path) in [
            ("a/layer.tar", "../b/layer.tar", "b/layer.tar"),
            ("a/layer.tar", "./other.tar", "a/other.tar"),
            ("layer.tar", "b//layer.tar", "b/layer.tar"),
            ("a/layer.tar", "../../../etc/passwd", "etc/passwd"),
        ] {
            assert_eq!(beside(link, target), path);
        }
    }

    #[test]
    fn links_to_links_end() {
        let mut members = Members::default();
        let digest = Sha256Digest::of(b"layer");
        members.add("c/layer.tar", digest, 5);
        members.add_link("a/layer.tar", b"../b/layer.tar");
        members.add_link("b/layer.tar", b"../c/layer.tar");
        members.add_link("x.tar", b"y.tar");
        members.add_link("y.tar", b"x.tar");
        assert_eq!(members.get("a/layer.tar").unwrap().digest, digest);
        for name in ["x.tar", "none"] {
            let error = members.get(name).unwrap_err().to_string();
            assert!(error.contains("does not have it"), "{error}");
        }
    }
}
