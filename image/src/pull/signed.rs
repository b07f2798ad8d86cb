//! Signatures on their way from a registry: an image that needs one is looked at before anything of it is kept.

use super::PullError;
use crate::{
    layer::Sha256Digest,
    manifest::ManifestError,
    name::ImageName,
    registry::Endpoint,
    signature::{SignatureError, policy::Policy, signatures},
};

/// Does somebody whom the administrator trusts vouch that this name leads to this digest? Asks the registry for signatures where it must.
///
/// # Errors
/// When nobody does, or it cannot be known.
pub(super) async fn check(
    endpoint: &Endpoint,
    policy: &Policy,
    name: &ImageName,
    digest: &Sha256Digest,
) -> Result<(), PullError> {
    let Some(demand) = policy.of(name)? else {
        return Ok(());
    };
    let unreadable = |source: PullError| SignatureError::Unreadable {
        name: name.to_string(),
        wanted: demand.wanted.clone(),
        source: Box::new(source),
    };
    let tag = format!("sha256-{}.sig", digest.hex());
    let text = match endpoint.tagged(&tag, "signatures' manifest").await {
        Ok(text) => text,
        Err(PullError::NotFound { registry, .. }) => {
            return Err(SignatureError::Unsigned {
                name: name.to_string(),
                registry,
                tag,
                wanted: demand.wanted.clone(),
            }
            .into());
        }
        Err(error) => return Err(unreadable(error).into()),
    };
    let found = signatures(&text).map_err(|error: ManifestError| unreadable(error.into()))?;
    let mut why = Vec::new();
    for signature in found {
        let checked = match signature {
            Ok(signature) => {
                let payload = endpoint.small_blob(&signature.payload).await;
                let payload = payload.map_err(&unreadable)?;
                signature.check(&payload, demand.keys, name, digest)
            }
            Err(bad) => Err(bad),
        };
        match checked {
            Ok(()) => return Ok(()),
            Err(bad) => why.push(bad),
        }
    }
    Err(SignatureError::NoneCounts {
        name: name.to_string(),
        why,
        wanted: demand.wanted.clone(),
    }
    .into())
}
