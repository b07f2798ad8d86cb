//! vhost-net: the host's kernel carries a device's packets between tap and guest in the VMM's place, where it has that.

use std::{fs::OpenOptions, io, os::fd::OwnedFd, path::Path};

use tracing::info;

/// The kernel loads its module (`vhost_net`) when this is first opened.
const DEVICE: &str = "/dev/vhost-net";

/// Opens it once for each of so many pairs of queues. None where it cannot be had: the VMM carries the packets then.
pub fn open(pairs: u16) -> Vec<OwnedFd> {
    open_at(Path::new(DEVICE), pairs).unwrap_or_else(|error| {
        info!(%error, "no {DEVICE} on this host: husk-vmm carries the pod's packets itself");
        Vec::new()
    })
}

fn open_at(device: &Path, pairs: u16) -> io::Result<Vec<OwnedFd>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    (0..pairs)
        .map(|_| options.open(device).map(OwnedFd::from))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_for_each_pair_or_none() {
        assert_eq!(open_at(Path::new("/dev/null"), 3).unwrap().len(), 3);
        assert!(open_at(Path::new("/no/vhost-net"), 3).is_err());
    }
}
