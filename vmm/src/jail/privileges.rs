//! What the process may do as root: what a file server needs for its users' files, and no more.

use std::io;
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, setns};
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Uid, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::JailError;

/// To give files to their owners, set their modes, and pass their permissions, as the guest's kernel has checked them; to make device
/// nodes, which nobody can open here; and to store the file capabilities of images. The same that virtiofsd keeps.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The highest capability number that a set can hold.
const LAST: u32 = 63;

/// Allows the process as many descriptors as the host allows any: the guest's files take one each.
///
/// # Errors
/// [`JailError::Step`].
pub fn raise_descriptor_limit() -> Result<(), JailError> {
    virtiofsd::limits::setup_rlimit_nofile(None)
        .map(drop)
        .map_err(io::Error::other)
        .map_err(JailError::step("raise the limit of open files"))
}

/// The most descriptors that the process may have.
#[must_use]
pub fn descriptor_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Becomes user 0 of a user namespace, who is nobody outside.
///
/// # Errors
/// [`JailError::Step`].
pub fn change_users(namespace: OwnedFd) -> Result<(), JailError> {
    setns(namespace, CloneFlags::CLONE_NEWUSER)
        .map_err(JailError::step("enter the VMM's user namespace"))?;
    let (user, group) = (Uid::ROOT, Gid::ROOT);
    set_thread_res_gid(group, group, group).map_err(JailError::step(
        "become a group of the VMM's user namespace",
    ))?;
    set_thread_res_uid(user, user, user)
        .map_err(JailError::step("become a user of the VMM's user namespace"))
}

/// Gives everything else up, for good.
///
/// # Errors
/// [`JailError::Step`].
pub fn give_up() -> Result<(), JailError> {
    // Nobody else's memory holds the guest's: no core dumps, and nobody but root looks into this process.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(JailError::step("forbid core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(JailError::step("hide this process from others of its user"))?;
    // A login's groups would count for whatever the file server does for somebody else.
    set_thread_groups(&[]).map_err(JailError::step("drop supplementary groups"))?;
    set_no_new_privs(true).map_err(JailError::step("set no_new_privs"))?;
    limit_bounding_set()?;
    // What a user makes, the file server makes as that user. Who may is decided by the guest's kernel, to which a user may be root: of a
    // container with users of its own, whose `/` podman makes 0555. A guest that lies needs no user's name for it, as user 0 has them all.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
    )
    .map_err(JailError::step("keep capabilities as another user"))?;
    clear_ambient_capability_set().map_err(JailError::step("clear the ambient capabilities"))?;
    let sets = CapabilitySets {
        effective: KEPT,
        permitted: KEPT,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(JailError::step("drop capabilities"))
}

fn limit_bounding_set() -> Result<(), JailError> {
    for number in 0..=LAST {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no such capability, nor any above it.
            Err(rustix::io::Errno::INVAL) if number > 0 => break,
            Err(error) => {
                return Err(JailError::step("limit the capabilities to be had")(error));
            }
        }
    }
    Ok(())
}
