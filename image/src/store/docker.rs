//! What `docker save` wrote before version 25, and `podman save` writes still: layers as plain tar files under names of their own, and a
//! manifest.json that says which are whose, often at the end. So the files are put aside as they come, and those that it names become blobs.
//!
//! A layer that several images have may stand there once, with symbolic links in its other places. Written here, its name is its diffID,
//! which all of them know it by.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write},
};

use oci_spec::{
    distribution::Reference,
    image::{Descriptor, MediaType},
};
use serde::{Deserialize, Serialize};

use super::{
    Store, StoreError,
    exchange::{LIMITS, Writer, invalid},
    import::{Unnamed, describe},
};
use crate::{
    apply::Expected,
    layer::{Layer, Sha256Digest},
    manifest::{Named, Platform, parse},
    name::ImageName,
};

/// The file that names the images.
pub(super) const MANIFEST: &str = "manifest.json";

/// Links that lead to links.
const MAX_LINKS: usize = 8;

/// Files and links of an archive: a thousand images of sixty layers.
const MAX_MEMBERS: usize = 1 << 16;

/// An image, by the names of its files.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The files of an archive.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// The text of its manifest.json.
    pub(super) manifest: Option<Vec<u8>>,
    /// The file, where it is no blob yet.
    files: BTreeMap<String, (Named, Option<Unnamed>)>,
    links: BTreeMap<String, String>,
}

impl Members {
    /// Whether a file may be of such an archive: a document, or a layer.
    pub(super) fn is_one(name: &str) -> bool {
        name.ends_with(".json") || name.ends_with(".tar")
    }

    pub(super) fn add(
        &mut self,
        name: &str,
        named: Named,
        unnamed: Option<Unnamed>,
    ) -> Result<(), StoreError> {
        self.make_room()?;
        self.files.insert(name.to_owned(), (named, unnamed));
        Ok(())
    }

    pub(super) fn add_link(&mut self, name: &str, target: &[u8]) -> Result<(), StoreError> {
        self.make_room()?;
        let target = String::from_utf8_lossy(target).into_owned();
        self.links.insert(name.to_owned(), target);
        Ok(())
    }

    fn make_room(&self) -> Result<(), StoreError> {
        match self.files.len() + self.links.len() {
            MAX_MEMBERS.. => Err(invalid(&format!("has more than {MAX_MEMBERS} files"))),
            _ => Ok(()),
        }
    }

    fn get(&self, name: &str) -> Result<&(Named, Option<Unnamed>), StoreError> {
        let mut name = name.to_owned();
        for _ in 0..MAX_LINKS {
            if let Some(file) = self.files.get(&name) {
                return Ok(file);
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
        manifest: &[u8],
    ) -> Result<Vec<(String, Descriptor)>, StoreError> {
        let entries: Vec<Entry> = parse("archive's manifest.json", manifest)?;
        // One that lacks something leaves nothing behind.
        let mut kept = BTreeSet::new();
        let mut files = Vec::new();
        for name in entries
            .iter()
            .flat_map(|e| e.layers.iter().chain([&e.config]))
        {
            let (named, unnamed) = members.get(name)?;
            if kept.insert(named.digest) {
                files.extend(unnamed.as_ref().map(|unnamed| (unnamed, named.digest)));
            }
        }
        for (unnamed, digest) in files {
            self.keep_unnamed(unnamed, &digest)?;
        }
        let mut images = Vec::new();
        for entry in entries {
            let config = describe(MediaType::ImageConfig, &members.get(&entry.config)?.0)?;
            let layers = entry
                .layers
                .iter()
                .map(|name| describe(MediaType::ImageLayer, &members.get(name)?.0))
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

    /// Writes these images into an archive of this kind: of an index, the image for this platform. Each layer is there once, unpacked; a
    /// compressed one is read twice, as its size comes before it. The same images make the same bytes. Blocks.
    ///
    /// # Errors
    /// When a name is nothing's, something that it leads to is missing or is not what it should be, or the archive cannot be written.
    pub fn save_for_docker<W: Write>(
        &self,
        names: &[&str],
        platform: &Platform,
        archive: W,
    ) -> Result<(), StoreError> {
        let _use = self.begin()?;
        let mut entries: Vec<Entry> = Vec::new();
        let mut configs = BTreeMap::new();
        let mut layers = BTreeMap::new();
        for name in names {
            let image = self.for_docker(name, platform)?;
            let config = format!("{}.json", image.config.digest.hex());
            let tag = tag(name);
            // Several names of one image are its tags.
            if let Some(known) = entries.iter_mut().find(|entry| entry.config == config) {
                known.repo_tags.get_or_insert_default().extend(tag);
                continue;
            }
            let file = |layer: &Expected| format!("{}.tar", layer.diff_id.hex());
            entries.push(Entry {
                config: config.clone(),
                repo_tags: tag.map(|tag| vec![tag]),
                layers: image.layers.iter().map(file).collect(),
            });
            configs.insert(config, image.config);
            layers.extend(image.layers.into_iter().map(|layer| (file(&layer), layer)));
        }
        let mut writer = Writer::new(archive);
        let text = serde_json::to_vec(&entries).map_err(|e| StoreError::Stream(e.into()))?;
        // The first, so that a reader knows what comes.
        writer.add(MANIFEST, text.len() as u64, &*text)?;
        for (name, config) in configs {
            let text = self.text(&config, "image's configuration")?;
            writer.add(&name, text.len() as u64, &*text)?;
        }
        for (name, layer) in layers {
            self.write_layer(&mut writer, &name, &layer)?;
        }
        writer.finish()
    }

    fn for_docker(&self, name: &str, platform: &Platform) -> Result<Parts, StoreError> {
        let names = self.names()?;
        let Some((_, descriptor)) = names.into_iter().find(|(other, _)| other == name) else {
            return Err(StoreError::NoImage(name.to_owned()));
        };
        let (_, manifest) = self.chosen(&Named::of(&descriptor)?, platform)?;
        let config = self.config(&manifest)?;
        // One that has no other is the one that is meant, whatever it is for.
        let own = Platform {
            os: config.os().clone(),
            architecture: config.architecture().clone(),
            variant: None,
        };
        Ok(Parts {
            config: manifest.config,
            layers: manifest.layers(&config, &own)?,
        })
    }

    fn write_layer<W: Write>(
        &self,
        writer: &mut Writer<W>,
        name: &str,
        layer: &Expected,
    ) -> Result<(), StoreError> {
        let open = || {
            let blob = self.blob(&layer.digest)?;
            let blob = blob.ok_or(StoreError::NoBlob(layer.digest))?;
            Layer::new(blob, LIMITS).map_err(StoreError::Stream)
        };
        let size = match layer.digest == layer.diff_id {
            true => layer.size,
            false => open()?.finish().map_err(StoreError::Stream)?.unpacked,
        };
        let mut stream = open()?;
        writer.add(name, size, (&mut stream).take(size))?;
        let found = stream.finish().map_err(StoreError::Stream)?;
        if found.diff_id != layer.diff_id || found.unpacked != size {
            return Err(StoreError::WrongBlob {
                expected: layer.digest,
                found: format!("its diffID is {}, not {}", found.diff_id, layer.diff_id),
            });
        }
        Ok(())
    }
}

/// What an image is made of.
struct Parts {
    config: Named,
    layers: Vec<Expected>,
}

/// A name that Docker takes for a tag. What has a digest for its name has none.
fn tag(name: &str) -> Option<String> {
    if name.parse::<Sha256Digest>().is_ok() {
        return None;
    }
    let name: ImageName = name.parse().ok()?;
    name.digest().is_none().then(|| name.to_string())
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
        let named = Named { digest, size: 5 };
        members.add("c/layer.tar", named, None).unwrap();
        for (link, target) in [
            ("a/layer.tar", "../b/layer.tar"),
            ("b/layer.tar", "../c/layer.tar"),
            ("x.tar", "y.tar"),
            ("y.tar", "x.tar"),
        ] {
            members.add_link(link, target.as_bytes()).unwrap();
        }
        assert_eq!(members.get("a/layer.tar").unwrap().0.digest, digest);
        for name in ["x.tar", "none"] {
            let error = members.get(name).unwrap_err().to_string();
            assert!(error.contains("does not have it"), "{error}");
        }
    }

    #[test]
    fn there_is_an_end_to_files() {
        let mut members = Members::default();
        let mut add = |n: usize| members.add_link(&n.to_string(), b"x");
        (0..MAX_MEMBERS).for_each(|n| add(n).unwrap());
        let error = add(MAX_MEMBERS).unwrap_err().to_string();
        assert!(error.contains("more than 65536"), "{error}");
    }

    #[test]
    fn docker_knows_an_image_by_registry_and_tag() {
        let digest = Sha256Digest::of(b"").to_string();
        for (name, known) in [
            (
                "docker.io/library/busybox:1",
                Some("docker.io/library/busybox:1"),
            ),
            ("two", Some("docker.io/library/two:latest")),
            (&*format!("docker.io/library/busybox@{digest}"), None),
            (&*digest, None),
            ("from skopeo", None),
        ] {
            assert_eq!(tag(name).as_deref(), known, "{name}");
        }
    }
}
