//! A second fence around the share, where the host has Landlock (Linux 5.13, and each later one more of it).
//!
//! The first is the root directory. This one does not hang on it: should a descriptor of a directory outside be left open by a mistake, its
//! files could not be opened by it. And it holds what no path says: nothing is executed, no device that is opened takes ioctls, no TCP,
//! no sockets by abstract names, no signals to processes outside.

use ::landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, Scope,
};

use crate::parts::Share;

/// What this was written for; an older kernel does what it can.
const KNOWN: ABI = ABI::V6;

/// Forbids everything that Landlock knows of, but the use of the shares' files.
///
/// # Errors
/// The kernel has Landlock and refuses.
pub fn enter(shares: &[Share]) -> Result<(), RulesetError> {
    let everything = AccessFs::from_all(KNOWN);
    let files = everything & !(AccessFs::Execute | AccessFs::IoctlDev);
    let mut rules = Ruleset::default()
        .handle_access(everything)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    for share in shares {
        let directory = share.root.directory();
        rules = rules.add_rule(PathBeneath::new(directory, files))?;
    }
    rules.restrict_self().map(drop)
}
