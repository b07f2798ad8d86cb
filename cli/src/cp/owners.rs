//! Who owns a running container's files, as the host sees them: the VMM's user 0 is somebody else there, and what is root's on the disk is his
//! in the mounts that the shim has made for him (shim/src/vmm_users.rs).

use std::fs;

use anyhow::{Context as _, Result};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::thread::{capabilities, set_capabilities};

/// The id of root there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owners(u32);

impl Owners {
    /// On the host itself.
    pub(super) const HOST: Self = Self(0);

    /// In the mounts that are made for this VMM.
    pub(super) fn of(vmm: u32) -> Result<Self> {
        let path = format!("/proc/{vmm}/uid_map");
        let map = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        roots_id(&map).with_context(|| format!("{path} has no user 0"))
    }

    /// An id of a file as its container has it.
    pub(super) fn told(self, id: u32) -> u32 {
        if id == self.0 { 0 } else { id }
    }

    /// An id of a container's as a file has it.
    pub(super) fn stored(self, id: u32) -> u32 {
        if id == 0 { self.0 } else { id }
    }

    /// Has the calling thread make files as the container's root does: the host's is nobody there, and makes none.
    pub(super) fn act_as_root(self) -> Result<()> {
        if self.0 == 0 {
            return Ok(());
        }
        setfsgid(Gid::from_raw(self.0));
        // Takes what root may do with files out of the effective set (capabilities(7)).
        setfsuid(Uid::from_raw(self.0));
        let mut sets = capabilities(None).context("reading its capabilities")?;
        sets.effective = sets.permitted;
        set_capabilities(None, sets).context("raising its capabilities")
    }
}

/// Who user 0 inside is outside, by a map as proc(5) has it.
fn roots_id(map: &str) -> Option<Owners> {
    let mut first = map.split_whitespace();
    let inside = first.next()?;
    let outside = first.next()?.parse().ok()?;
    (inside == "0").then_some(Owners(outside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_somebody_else_and_all_others_themselves() {
        let pods = "         0 4026531847          1\n         1          1 4026531846\n";
        let owners = roots_id(pods).unwrap();
        for (stored, told) in [(4_026_531_847, 0), (1000, 1000)] {
            assert_eq!(owners.told(stored), told);
            assert_eq!(owners.stored(told), stored);
        }
        let hosts = "         0          0 4294967295\n";
        assert_eq!(roots_id(hosts), Some(Owners::HOST));
        assert_eq!(roots_id(""), None);
    }
}
