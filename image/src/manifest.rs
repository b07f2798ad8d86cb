//! What an image says of itself: index, manifest, configuration (image-spec), in OCI's words or Docker's (distribution, "Image Manifest
//! Version 2, Schema 2").
//!
//! The documents are parsed by `oci-spec`. Here they become what the rest may rely on: the layers, from the lowest up, each with the digests
//! and the size that it must have.

use std::{fmt, str::FromStr};

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::de::DeserializeOwned;

use crate::{
    apply::Expected,
    layer::{BadDigest, Sha256Digest},
};

/// The most bytes that a document may have: what a registry must take at least, and none sends more (distribution-spec, "Pushing Manifests").
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// The most layers: what one overlay mount takes (Linux fs/overlayfs/params.h, OVL_MAX_STACK).
pub const MAX_LAYERS: usize = 500;

/// Media types of what can be unpacked: tar, as it is or compressed, which the bytes tell by themselves.
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
pub(crate) const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
pub(crate) const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It cannot be read.
    #[error("the {what} is not one")]
    Parse {
        /// Which document.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It is too large to be one.
    #[error("the {what} has {size} bytes, the most is {MAX_DOCUMENT}")]
    TooLarge {
        /// Which document.
        what: &'static str,
        /// Its size.
        size: u64,
    },
    /// A digest that is none, or of a kind that husk does not check.
    #[error("the {what} names something by a digest that husk cannot use")]
    Digest {
        /// Which document.
        what: &'static str,
        /// The digest.
        #[source]
        source: BadDigest,
    },
    /// It is for other machines.
    #[error("the image is not for {wanted}; it is for {offered}")]
    Platform {
        /// This one.
        wanted: Platform,
        /// Those it is for, with commas.
        offered: String,
    },
    /// Something else that rules it out.
    #[error("the {what} {why}")]
    Invalid {
        /// Which document.
        what: &'static str,
        /// The reason.
        why: String,
    },
}

/// A kind of machine, in Go's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// The operating system.
    pub os: Os,
    /// The processor.
    pub architecture: Arch,
    /// Which of its generations, where that matters.
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this machine's processor.
    pub fn here() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => (Arch::Amd64, None),
            // Every image for it says so, or nothing.
            "aarch64" => (Arch::ARM64, Some("v8".to_owned())),
            other => (Arch::Other(other.to_owned()), None),
        };
        Self {
            os: Os::Linux,
            architecture,
            variant,
        }
    }
}

/// A text that names no platform.
#[derive(Debug, thiserror::Error)]
#[error("it is OS/ARCH or OS/ARCH/VARIANT, as linux/amd64 or linux/arm/v7")]
pub struct BadPlatform;

impl FromStr for Platform {
    type Err = BadPlatform;

    fn from_str(text: &str) -> Result<Self, BadPlatform> {
        let parts: Vec<&str> = text.split('/').collect();
        let is_word = |part: &&str| {
            let is_sound = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
            !part.is_empty() && part.bytes().all(is_sound)
        };
        let (os, architecture, variant) = match *parts {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => return Err(BadPlatform),
        };
        if !parts.iter().all(is_word) {
            return Err(BadPlatform);
        }
        Ok(Self {
            os: Os::from(os),
            architecture: Arch::from(architecture),
            variant: variant.map(str::to_owned),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|v| write!(f, "/{v}"))
    }
}

/// Something that a document names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Its digest.
    pub digest: Sha256Digest,
    /// Its bytes.
    pub size: u64,
}

impl Named {
    /// What a descriptor names.
    ///
    /// # Errors
    /// When it does so by a digest that husk cannot use.
    pub fn of(descriptor: &Descriptor) -> Result<Self, ManifestError> {
        named("image's descriptor", descriptor)
    }
}

/// What a reference leads to.
#[derive(Debug, Clone)]
pub enum Document {
    /// One image for each of several platforms.
    Index(Box<ImageIndex>),
    /// One image.
    Manifest(Box<Manifest>),
}

/// An image's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its configuration.
    pub config: Named,
    /// Its layers, the lowest first.
    pub layers: Vec<Named>,
}

impl Document {
    /// Reads what a registry or a layout has under a name. Where nobody says what it is, it says so itself.
    ///
    /// # Errors
    /// When it is neither index nor manifest, or names something in a way that cannot be used.
    pub fn parse(text: &[u8], media_type: Option<&str>) -> Result<Self, ManifestError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Kind {
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let what = "image's manifest";
        let kind: Kind = parse(what, text)?;
        let told = media_type.or(kind.media_type.as_deref());
        let is_index = match told {
            Some(told) if INDEXES.contains(&told) => true,
            Some(told) if MANIFESTS.contains(&told) => false,
            // OCI's first images had no type, and a web server has its own.
            None | Some("application/json" | "text/plain") => kind.manifests.is_some(),
            Some(told) => {
                let why = format!("is of a kind that husk does not know, {told:?}");
                return Err(ManifestError::Invalid { what, why });
            }
        };
        if is_index {
            return Ok(Self::Index(parse("image's index", text)?));
        }
        Manifest::new(&parse(what, text)?).map(|m| Self::Manifest(Box::new(m)))
    }
}

impl Manifest {
    fn new(manifest: &ImageManifest) -> Result<Self, ManifestError> {
        let what = "image's manifest";
        let invalid = |why| ManifestError::Invalid { what, why };
        let layers = manifest.layers();
        if layers.len() > MAX_LAYERS {
            return Err(invalid(format!(
                "has {} layers, the most is {MAX_LAYERS}",
                layers.len()
            )));
        }
        for layer in layers {
            let kind = layer.media_type().to_string();
            if !LAYERS.contains(&&*kind) {
                return Err(invalid(format!(
                    "has a layer that cannot be unpacked, of the kind {kind:?}"
                )));
            }
        }
        let config = named(what, manifest.config())?;
        if config.size > MAX_DOCUMENT {
            return Err(ManifestError::TooLarge {
                what: "image's configuration",
                size: config.size,
            });
        }
        Ok(Self {
            config,
            layers: layers
                .iter()
                .map(|layer| named(what, layer))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The layers as they must be: what the manifest says of the blobs, and the configuration of what is in them.
    ///
    /// # Errors
    /// When the two do not speak of the same layers, or the image is for another platform.
    pub fn layers(
        &self,
        config: &ImageConfiguration,
        platform: &Platform,
    ) -> Result<Vec<Expected>, ManifestError> {
        let what = "image's configuration";
        if (config.os(), config.architecture()) != (&platform.os, &platform.architecture) {
            return Err(ManifestError::Platform {
                wanted: platform.clone(),
                offered: format!("{}/{}", config.os(), config.architecture()),
            });
        }
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != self.layers.len() {
            let (ids, layers) = (diff_ids.len(), self.layers.len());
            let why = format!("tells of {ids} layers, the manifest of {layers}");
            return Err(ManifestError::Invalid { what, why });
        }
        self.layers
            .iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| {
                Ok(Expected {
                    digest: layer.digest,
                    size: layer.size,
                    diff_id: digest(what, diff_id)?,
                })
            })
            .collect()
    }
}

/// Reads an image's configuration.
///
/// # Errors
/// When it is none.
pub fn config(text: &[u8]) -> Result<ImageConfiguration, ManifestError> {
    parse("image's configuration", text)
}

/// The image of an index that is for this platform: of its variant, or of none; the first of several.
///
/// # Errors
/// When there is none.
pub fn choose(index: &ImageIndex, platform: &Platform) -> Result<Named, ManifestError> {
    let of = |descriptor: &Descriptor| {
        let told = descriptor.platform().as_ref()?;
        Some(Platform {
            os: told.os().clone(),
            architecture: told.architecture().clone(),
            variant: told.variant().clone(),
        })
    };
    let manifests = || index.manifests().iter();
    let is_right = |offered: &Platform| {
        (&offered.os, &offered.architecture) == (&platform.os, &platform.architecture)
    };
    let with = |variant: &Option<String>| {
        manifests().find(|d| of(d).is_some_and(|p| is_right(&p) && p.variant == *variant))
    };
    // An index of one that says nothing is what some tools make of a single image.
    let only = || {
        manifests()
            .next()
            .filter(|d| manifests().count() == 1 && of(d).is_none())
    };
    let found = with(&platform.variant)
        .or_else(|| with(&None))
        .or_else(only);
    let Some(found) = found else {
        // Those of what describes an image are "unknown/unknown".
        let mut offered: Vec<String> = manifests()
            .filter_map(of)
            .map(|platform| platform.to_string())
            .filter(|platform| !platform.starts_with("unknown/"))
            .collect();
        offered.dedup();
        if offered.is_empty() {
            offered.push("no platform".to_owned());
        }
        return Err(ManifestError::Platform {
            wanted: platform.clone(),
            offered: offered.join(", "),
        });
    };
    let kind = found.media_type().to_string();
    if !MANIFESTS.contains(&&*kind) {
        let why = format!("leads to {kind:?}, which is no image");
        let what = "image's index";
        return Err(ManifestError::Invalid { what, why });
    }
    named("image's index", found)
}

pub(crate) fn parse<T: DeserializeOwned>(
    what: &'static str,
    text: &[u8],
) -> Result<T, ManifestError> {
    if text.len() as u64 > MAX_DOCUMENT {
        let size = text.len() as u64;
        return Err(ManifestError::TooLarge { what, size });
    }
    serde_json::from_slice(text).map_err(|source| ManifestError::Parse { what, source })
}

fn named(what: &'static str, descriptor: &Descriptor) -> Result<Named, ManifestError> {
    Ok(Named {
        digest: digest(what, descriptor.digest().as_ref())?,
        size: descriptor.size(),
    })
}

pub(crate) fn digest(what: &'static str, text: &str) -> Result<Sha256Digest, ManifestError> {
    text.parse()
        .map_err(|source| ManifestError::Digest { what, source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn descriptor(kind: &str, data: &str) -> Value {
        json!({"mediaType": kind, "digest": Sha256Digest::of(data.as_bytes()).to_string(), "size": data.len()})
    }

    fn manifest(kind: &str, layers: &[&str]) -> Value {
        let layers: Vec<_> = layers.iter().map(|kind| descriptor(kind, kind)).collect();
        json!({
            "schemaVersion": 2, "mediaType": kind,
            "config": descriptor("application/vnd.oci.image.config.v1+json", "config"), "layers": layers,
        })
    }

    fn read(document: &Value, kind: Option<&str>) -> Result<Document, ManifestError> {
        Document::parse(document.to_string().as_bytes(), kind)
    }

    fn image(document: &Value) -> Result<Manifest, ManifestError> {
        match read(document, None)? {
            Document::Manifest(manifest) => Ok(*manifest),
            Document::Index(_) => panic!("an index"),
        }
    }

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> ImageIndex {
        let manifests: Vec<_> = platforms
            .iter()
            .map(|(os, architecture, variant)| {
                let name = format!("{os}{architecture}{variant:?}");
                let mut entry = descriptor(MANIFESTS[0], &name);
                entry["platform"] = json!({"os": os, "architecture": architecture});
                if let Some(variant) = variant {
                    entry["platform"]["variant"] = json!(variant);
                }
                entry
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEXES[0], "manifests": manifests});
        match read(&index, None).unwrap() {
            Document::Index(index) => *index,
            Document::Manifest(_) => panic!("a manifest"),
        }
    }

    #[test]
    fn platforms_are_read_as_they_are_told() {
        for text in ["linux/amd64", "linux/arm/v7", "plan9/s390x"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        assert_eq!(
            "linux/amd64".parse::<Platform>().unwrap().architecture,
            Arch::Amd64
        );
        for text in ["", "amd64", "linux/", "/x", "a/b/c/d", "linux/am d"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn both_families_of_manifests_are_read() {
        for kind in MANIFESTS {
            let manifest = image(&manifest(kind, &LAYERS)).unwrap();
            assert_eq!(manifest.config.digest, Sha256Digest::of(b"config"));
            let digests: Vec<_> = manifest.layers.iter().map(|l| l.digest).collect();
            assert_eq!(digests, LAYERS.map(|l| Sha256Digest::of(l.as_bytes())));
        }
        for kind in INDEXES {
            let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": []});
            assert!(matches!(read(&index, None), Ok(Document::Index(_))));
        }
        // Without a type, by what is in it; with one from the registry, by that.
        let mut untyped = manifest(MANIFESTS[0], &[]);
        untyped.as_object_mut().unwrap().remove("mediaType");
        for kind in [None, Some(MANIFESTS[1]), Some("application/json")] {
            assert!(matches!(read(&untyped, kind), Ok(Document::Manifest(_))));
        }
        let index = json!({"schemaVersion": 2, "manifests": []});
        assert!(matches!(read(&index, None), Ok(Document::Index(_))));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let say = |document: &Value| {
            let error = read(document, None).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        };
        let kind = "application/vnd.oci.image.layer.v1.tar+encrypted";
        assert!(say(&manifest(MANIFESTS[0], &[kind])).contains(kind));
        assert!(say(&manifest("application/vnd.oci.artifact", &[])).contains("artifact"));
        assert!(say(&json!([])).contains("is not one"));
        assert!(say(&manifest(MANIFESTS[0], &[LAYERS[0]; 501])).contains("501 layers"));
        let mut other = manifest(MANIFESTS[0], &[LAYERS[0]]);
        other["layers"][0]["digest"] = json!(format!("sha512:{}", "a".repeat(128)));
        assert!(say(&other).contains("sha512"));
        let mut large = manifest(MANIFESTS[0], &[]);
        large["config"]["size"] = json!(5 << 20);
        assert!(say(&large).contains("the most is"));
        let long = vec![b' '; 5 << 20];
        let error = Document::parse(&long, None).unwrap_err();
        assert!(matches!(error, ManifestError::TooLarge { .. }));
    }

    #[test]
    fn the_image_for_this_machine_is_chosen() {
        let here = |variant: Option<&str>| Platform {
            os: Os::Linux,
            architecture: Arch::ARM64,
            variant: variant.map(str::to_owned),
        };
        let chosen = |index: &ImageIndex, variant| choose(index, &here(variant)).map(|n| n.digest);
        let digest = |name: &str| Sha256Digest::of(name.as_bytes());
        let all = index(&[
            ("unknown", "unknown", None),
            ("windows", "arm64", None),
            ("linux", "amd64", None),
            ("linux", "arm64", None),
            ("linux", "arm64", Some("v8")),
        ]);
        assert_eq!(
            chosen(&all, Some("v8")).unwrap(),
            digest("linuxarm64Some(\"v8\")")
        );
        assert_eq!(chosen(&all, Some("v9")).unwrap(), digest("linuxarm64None"));
        assert_eq!(chosen(&all, None).unwrap(), digest("linuxarm64None"));
        let others = index(&[("linux", "amd64", None), ("unknown", "unknown", None)]);
        let error = chosen(&others, Some("v8")).unwrap_err().to_string();
        assert_eq!(
            error,
            "the image is not for linux/arm64/v8; it is for linux/amd64"
        );
        let error = chosen(&index(&[]), None).unwrap_err().to_string();
        assert!(error.ends_with("it is for no platform"), "{error}");
        let entry = descriptor(MANIFESTS[0], "only");
        let single = json!({"schemaVersion": 2, "manifests": [entry]});
        let single: ImageIndex = serde_json::from_value(single).unwrap();
        assert!(chosen(&single, None).is_ok());
    }

    #[test]
    fn manifest_and_configuration_speak_of_the_same_layers() {
        let platform = Platform::here();
        let configuration = |ids: &[&str], os: &str| {
            let text = json!({
                "architecture": platform.architecture, "os": os,
                "rootfs": {"type": "layers", "diff_ids": ids},
            });
            config(text.to_string().as_bytes()).unwrap()
        };
        let image = image(&manifest(MANIFESTS[0], &LAYERS[..2])).unwrap();
        let ids = [Sha256Digest::of(b"1"), Sha256Digest::of(b"2")].map(|id| id.to_string());
        let ids = ids.each_ref().map(|id| &**id);
        let layers = image
            .layers(&configuration(&ids, "linux"), &platform)
            .unwrap();
        assert_eq!(layers[1].diff_id, Sha256Digest::of(b"2"));
        assert_eq!(layers[1].size, LAYERS[1].len() as u64);
        let say = |config| image.layers(&config, &platform).unwrap_err().to_string();
        assert!(say(configuration(&ids[..1], "linux")).contains("1 layers, the manifest of 2"));
        assert!(say(configuration(&ids, "windows")).contains("it is for windows"));
        assert!(say(configuration(&["sha256:1", "2"], "linux")).contains("digest"));
    }

    proptest! {
        #[test]
        fn any_document_is_survived(text in "[\\[\\]{}:,\"a-z0-9]{0,60}") {
            let _ = Document::parse(text.as_bytes(), None);
            let _ = config(text.as_bytes());
        }
    }
}
