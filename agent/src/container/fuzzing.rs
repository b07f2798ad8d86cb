//! Ways in for fuzz/, to what is nobody else's business.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Process, Spec};
use rustix::io::Errno;

use super::error::LaunchError;
use super::paths::{Missing, resolve};
use super::seccomp::Filter;
use super::spec::{ParsedSpec, check_id, parse_resources};

/// Parses and checks a container's config.json, compiles its seccomp profile, and completes an exec's process by it.
///
/// # Errors
/// What the host hears.
pub fn spec(json: &[u8], exec: &[u8]) -> Result<(Spec, Result<Process, LaunchError>), LaunchError> {
    let parsed = ParsedSpec::parse(json)?;
    if let Some(profile) = parsed.linux().and_then(|linux| linux.seccomp().as_ref()) {
        Filter::compile(profile)?;
    }
    let exec = parsed.exec_process(exec).map(|parsed| parsed.process);
    Ok((parsed.spec, exec))
}

/// Parses an update's resources.
///
/// # Errors
/// What the host hears.
pub fn resources(json: &[u8]) -> Result<(), LaunchError> {
    parse_resources(json).map(drop)
}

/// Checks a container's id.
///
/// # Errors
/// What the host hears.
pub fn id(id: &str) -> Result<(), LaunchError> {
    check_id(id)
}

/// Opens a path in a container's root file system; what is missing is made, and is a directory or a file then.
///
/// # Errors
/// As those of the system calls.
pub fn walk(root: BorrowedFd<'_>, path: &Path, make: Option<bool>) -> Result<OwnedFd, Errno> {
    let missing = match make {
        None => Missing::Fail,
        Some(true) => Missing::MakeDirectory,
        Some(false) => Missing::MakeFile,
    };
    resolve(root, path, missing)
}
