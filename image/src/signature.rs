//! Whether somebody who is trusted has signed an image, as cosign signs it with a key (cosign, specs/SIGNATURE_SPEC.md).
//!
//! The administrator says whose signatures which images must have ([`policy`]). A signature is of a small text, the payload, that names the
//! image by its digest and by its place; it lies beside the image under a tag of its own. Here is what makes one count, without a registry:
//! first a key of the administrator's ([`key`]), and only then what the payload says.

pub mod key;
pub mod policy;

use std::path::PathBuf;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use oci_spec::image::{Descriptor, ImageManifest};
use serde::Deserialize;

use crate::{
    layer::Sha256Digest,
    manifest::{ManifestError, Named},
    name::ImageName,
    registry::PullError,
};
use key::KeyFile;

/// The most signatures that one image may have.
const MAX_SIGNATURES: usize = 64;
/// The most bytes of a payload. One without annotations has some 250.
const MAX_PAYLOAD: u64 = 64 << 10;

/// What cosign calls a payload, and where the signature of it stands.
const KIND: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// What the payload calls itself.
const TYPE: &str = "cosign container image signature";

/// Why an image may not be used, although it is there.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// No image of that place may.
    #[error("{} rejects {name}: `{scope:?} = \"reject\"`", file.display())]
    Rejected {
        /// The image.
        name: String,
        /// The place as the settings name it.
        scope: String,
        /// The settings.
        file: PathBuf,
    },
    /// Nobody has signed it.
    #[error("{name} is not signed: {registry} has no {tag:?} beside it; {wanted}")]
    Unsigned {
        /// The image.
        name: String,
        /// Who was asked.
        registry: String,
        /// Where signatures would be.
        tag: String,
        /// What there should be.
        wanted: Wanted,
    },
    /// It has signatures, none of which counts.
    #[error("no signature of {name} counts: {}; {wanted}", said(.why))]
    NoneCounts {
        /// The image.
        name: String,
        /// Of each signature.
        why: Vec<BadSignature>,
        /// What there should be.
        wanted: Wanted,
    },
    /// Its signatures are not to be had.
    #[error("the signatures of {name} cannot be read; {wanted}")]
    Unreadable {
        /// The image.
        name: String,
        /// What there should be.
        wanted: Wanted,
        /// What happened.
        #[source]
        source: Box<PullError>,
    },
}

/// What the settings want, for people.
#[derive(Debug, Clone)]
pub struct Wanted {
    file: PathBuf,
    keys: Vec<PathBuf>,
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<_> = self
            .keys
            .iter()
            .map(|key| key.display().to_string())
            .collect();
        let (file, keys) = (self.file.display(), keys.join(" or "));
        write!(f, "{file} wants a signature by {keys}")
    }
}

/// Why one signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum BadSignature {
    /// It is none.
    #[error("one is not in base64, or not there")]
    Form,
    /// Whoever made it is not trusted, or somebody has changed what was signed.
    #[error("one is by another key")]
    Key,
    /// What was signed is too large.
    #[error("one is of {0} bytes, the most is {MAX_PAYLOAD}")]
    TooLarge(u64),
    /// What was signed is no payload.
    #[error("one is of something else than an image: {0}")]
    Payload(serde_json::Error),
    /// The payload is one of another kind.
    #[error("one is of another kind, {0:?}")]
    Type(String),
    /// It is another image's.
    #[error("one is of another image, {0:?}")]
    Image(String),
    /// It is of this image in another place.
    #[error("one is for another name, {0:?}")]
    Name(String),
}

/// Some of the reasons, as one sentence.
fn said(why: &[BadSignature]) -> String {
    const MOST: usize = 3;
    if why.is_empty() {
        return "there is none".to_owned();
    }
    let mut words: Vec<_> = why.iter().take(MOST).map(ToString::to_string).collect();
    if why.len() > MOST {
        words.push(format!("and {} more", why.len() - MOST));
    }
    words.join(", ")
}

/// A signature as it lies in the registry: not to be believed yet.
#[derive(Debug)]
pub(crate) struct Signature {
    /// The blob that was signed.
    pub(crate) payload: Named,
    bytes: Vec<u8>,
}

/// The signatures that a manifest of them has: those that can be looked at, and what is wrong with others.
///
/// # Errors
/// When it is no manifest, or has too many.
pub(crate) fn signatures(
    text: &[u8],
) -> Result<Vec<Result<Signature, BadSignature>>, ManifestError> {
    let what = "signatures' manifest";
    let manifest: ImageManifest =
        serde_json::from_slice(text).map_err(|source| ManifestError::Parse { what, source })?;
    let is_one = |layer: &&Descriptor| layer.media_type().to_string() == KIND;
    let layers: Vec<_> = manifest.layers().iter().filter(is_one).collect();
    if layers.len() > MAX_SIGNATURES {
        let why = format!("has {} of them, the most is {MAX_SIGNATURES}", layers.len());
        return Err(ManifestError::Invalid { what, why });
    }
    layers.into_iter().map(signature).collect()
}

fn signature(layer: &Descriptor) -> Result<Result<Signature, BadSignature>, ManifestError> {
    let payload = Named::of(layer)?;
    let annotations = layer.annotations().as_ref();
    let text = annotations.and_then(|all| all.get(ANNOTATION));
    let bytes = text.and_then(|text| STANDARD.decode(text).ok());
    Ok(match bytes {
        _ if payload.size > MAX_PAYLOAD => Err(BadSignature::TooLarge(payload.size)),
        Some(bytes) => Ok(Signature { payload, bytes }),
        None => Err(BadSignature::Form),
    })
}

impl Signature {
    /// Does it count for the image that has this name and leads to this digest?
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn check(
        &self,
        payload: &[u8],
        keys: &[KeyFile],
        name: &ImageName,
        digest: &Sha256Digest,
    ) -> Result<(), BadSignature> {
        if !keys.iter().any(|key| key.has_made(&self.bytes, payload)) {
            return Err(BadSignature::Key);
        }
        let Payload { critical } =
            serde_json::from_slice(payload).map_err(BadSignature::Payload)?;
        if critical.kind != TYPE {
            return Err(BadSignature::Type(critical.kind));
        }
        let image = critical.image.docker_manifest_digest;
        if image != digest.to_string() {
            return Err(BadSignature::Image(image));
        }
        let place = critical.identity.docker_reference;
        match is_of(&place, name, digest) {
            true => Ok(()),
            false => Err(BadSignature::Name(place)),
        }
    }
}

/// Is this the image's place? With a tag, as podman signs, it is the place of that tag alone; an image that is asked for by its digest has
/// none, and its digest says more.
fn is_of(place: &str, name: &ImageName, digest: &Sha256Digest) -> bool {
    let Ok(signed) = place.parse::<ImageName>() else {
        return false;
    };
    let is_place = signed.registry() == name.registry() && signed.repository() == name.repository();
    let is_image = match signed.digest() {
        Some(signed) => signed == *digest,
        None => {
            let last = place.rsplit('/').next().unwrap_or_default();
            !last.contains(':') || name.digest().is_some() || signed.tag() == name.tag()
        }
    };
    is_place && is_image
}

/// What is signed (containers-signature(5)). What is critical must be understood; what is optional says nothing here.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Identity {
    docker_reference: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Image {
    docker_manifest_digest: String,
}

#[cfg(test)]
mod tests;
