//! From a blob to a directory, in one pass: what comes out is believed only when all of it was what the image's manifest and configuration
//! promise.

use std::{
    io::{self, BufReader, Read},
    path::Path,
};

use crate::{
    archive::Archive,
    layer::{Layer, Limits, Sha256Digest, Summary},
    unpack::{Options, UnpackError, Unpacked, unpack},
};

/// What a layer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The blob's digest (OCI image-spec, descriptor.md).
    pub digest: Sha256Digest,
    /// The blob's bytes.
    pub size: u64,
    /// Digest of the tar stream (OCI image-spec, config.md, "Layer DiffID").
    pub diff_id: Sha256Digest,
}

/// Why a layer is not there. What has been made of it in the directory is useless.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The stream.
    #[error("reading the layer")]
    Read(#[source] io::Error),
    /// What it says.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// It is another.
    #[error("the layer is not the one that the image names: {what} {found}, not {expected}")]
    Mismatch {
        /// What was compared.
        what: &'static str,
        /// What it was.
        found: String,
        /// What the image says.
        expected: String,
    },
}

/// Unpacks a blob into this directory, which is empty and nobody else's.
///
/// # Errors
/// When the blob cannot be read, is refused, or is not the expected one.
pub fn apply<R: Read>(
    blob: R,
    expected: &Expected,
    limits: Limits,
    into: &Path,
    options: Options<'_>,
) -> Result<Unpacked, ApplyError> {
    // A registry that sends more than it announced is read no further than that.
    let blob = blob.take(expected.size.saturating_add(1));
    let layer = Layer::new(blob, limits).map_err(ApplyError::Read)?;
    let mut archive = Archive::new(BufReader::with_capacity(128 << 10, layer));
    let unpacked = unpack(&mut archive, into, options)?;
    let mut rest = archive.into_inner();
    // What follows the archive's end belongs to the layer as well.
    io::copy(&mut rest, &mut io::sink()).map_err(ApplyError::Read)?;
    let found = rest.into_inner().finish().map_err(ApplyError::Read)?;
    compare(&found, expected)?;
    Ok(unpacked)
}

fn compare(found: &Summary, expected: &Expected) -> Result<(), ApplyError> {
    let check = |what, found: String, expected: String| {
        if found == expected {
            Ok(())
        } else {
            Err(ApplyError::Mismatch {
                what,
                found,
                expected,
            })
        }
    };
    let too_long = found.size > expected.size;
    let size = format!(
        "{}{}",
        if too_long { "more than " } else { "" },
        found.size.min(expected.size)
    );
    check("its size is", size, expected.size.to_string())?;
    check(
        "its digest is",
        found.digest.to_string(),
        expected.digest.to_string(),
    )?;
    check(
        "its diffID is",
        found.diff_id.to_string(),
        expected.diff_id.to_string(),
    )
}
