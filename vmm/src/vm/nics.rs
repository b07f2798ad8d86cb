//! The network devices of a VM, by their numbers.

use std::os::fd::OwnedFd;

use husk_protocol::vm::{NicConfig, nic_mac};

use super::VmError;
use crate::virtio::GuestMemory;
use crate::virtio::net::{Net, NicHandle, Vhost, VhostError};

/// The network devices, and what connects each.
pub fn devices(configs: &[NicConfig]) -> (Vec<Net>, Vec<NicHandle>) {
    (0u8..)
        .zip(configs)
        .map(|(nic, config)| Net::new(nic_mac(nic), config.queue_pairs))
        .unzip()
}

/// See [`super::Vm::attach_nic`].
pub fn attach(
    nics: &[NicHandle],
    nic: u8,
    taps: Vec<OwnedFd>,
    vhosts: Vec<OwnedFd>,
    memory: &GuestMemory,
) -> Result<(), VmError> {
    let count = nics.len();
    let device = nics
        .get(usize::from(nic))
        .ok_or(VmError::NoNic { nic, count })?;
    let vhosts = usable(vhosts, memory);
    let carrier = if vhosts.is_empty() {
        "husk-vmm"
    } else {
        "vhost-net"
    };
    device
        .attach(taps, vhosts)
        .map_err(|source| VmError::AttachNic { nic, source })?;
    tracing::info!(nic, carrier, "a network device is connected");
    Ok(())
}

/// All of them, or none if one cannot be used: the device works without.
fn usable(vhosts: Vec<OwnedFd>, memory: &GuestMemory) -> Vec<Vhost> {
    let adopted: Result<_, VhostError> = vhosts
        .into_iter()
        .map(|fd| Vhost::adopt(fd, memory))
        .collect();
    adopted.unwrap_or_else(|error| {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "vhost-net is not used");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentence;
    use crate::virtio::VirtioDevice as _;
    use crate::virtio::testing;

    #[test]
    fn a_network_device_is_named_by_its_number() {
        let config = NicConfig { queue_pairs: 1 };
        let (nics, handles) = devices(&[config.clone(), config]);
        for (nic, device) in (0u8..).zip(&nics) {
            let mut mac = [0; 6];
            device.read_config(0, &mut mac);
            assert_eq!(mac, nic_mac(nic));
        }
        let memory = GuestMemory::new(testing::memory());
        let error = attach(&handles, 2, vec![], vec![], &memory).unwrap_err();
        assert_eq!(
            sentence(&error),
            "this VM has 2 network devices, and none of number 2"
        );
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = attach(&handles, 1, vec![null.into()], vec![], &memory).unwrap_err();
        assert!(
            sentence(&error).starts_with("cannot connect network device 1: "),
            "{error}"
        );
    }

    #[test]
    fn a_vhost_that_cannot_be_used_is_done_without() {
        let memory = GuestMemory::new(testing::memory());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(usable(vec![null.into()], &memory).is_empty());
    }
}
