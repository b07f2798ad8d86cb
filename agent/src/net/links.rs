//! The interfaces that there are, and what a request makes of them.
//!
//! A device is known by the address that the VMM gave it, which the kernel keeps as its permanent one whatever name and address
//! it gets; one without a permanent address has its current one looked at.

use std::collections::BTreeMap;

use husk_protocol::vm::{MAX_NICS, nic_mac};

use super::netlink::{Netlink, Refused, Request, attributes, u32_at};
use super::request::{Config, Interface, Name};
use crate::error::AgentError;

/// `sizeof(struct ifinfomsg)`.
const LINK_HEADER_LEN: usize = 16;

/// An interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) up: bool,
    pub(super) name: String,
    pub(super) address: Vec<u8>,
    pub(super) mtu: u32,
    permanent_address: Option<Vec<u8>>,
}

/// An interface and its part in a request.
#[derive(Debug)]
pub(super) struct Planned<'a> {
    pub(super) link: Link,
    /// What it is to be.
    pub(super) becomes: Option<&'a Interface>,
    /// It has the name that another is to get.
    pub(super) in_the_way: bool,
}

/// A request that fits the guest: its devices are there, its names can be had, and lead somewhere.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) links: Vec<Planned<'a>>,
    /// The interfaces by the names that they are going to have.
    indices: BTreeMap<String, u32>,
}

impl Link {
    /// All interfaces of the network namespace.
    pub(super) fn all(netlink: &mut Netlink) -> Result<Vec<Self>, Refused> {
        let every = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP)
            .bytes(&[0; LINK_HEADER_LEN])
            .attribute(
                libc::IFLA_EXT_MASK,
                &libc::RTEXT_FILTER_SKIP_STATS.to_ne_bytes(),
            );
        let mut links = Vec::new();
        netlink.dump(every, |message| links.extend(Self::parse(message)))?;
        Ok(links)
    }

    /// Reads an `RTM_NEWLINK`; `None` where it is too short to be one.
    fn parse(message: &[u8]) -> Option<Self> {
        let mut link = Self {
            index: u32_at(message, 4)?,
            up: u32_at(message, 8)? & libc::IFF_UP as u32 != 0,
            name: String::new(),
            address: Vec::new(),
            mtu: 0,
            permanent_address: None,
        };
        for (kind, value) in attributes(message.get(LINK_HEADER_LEN..)?) {
            match kind {
                libc::IFLA_IFNAME => {
                    let name = value.strip_suffix(&[0]).unwrap_or(value);
                    link.name = String::from_utf8_lossy(name).into_owned();
                }
                libc::IFLA_ADDRESS => link.address = value.to_vec(),
                libc::IFLA_MTU => link.mtu = u32_at(value, 0)?,
                libc::IFLA_PERM_ADDRESS => link.permanent_address = Some(value.to_vec()),
                _ => {}
            }
        }
        Some(link)
    }

    fn is_nic(&self, nic: u8) -> bool {
        *self.permanent_address.as_ref().unwrap_or(&self.address) == nic_mac(nic)
    }

    /// Whether this is one of the VM's devices, which nobody has configured yet.
    pub(super) fn is_idle_nic(&self) -> bool {
        !self.up && (0..MAX_NICS as u8).any(|nic| self.is_nic(nic))
    }
}

impl<'a> Plan<'a> {
    /// Fits a request to the interfaces that there are.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] for a device or an interface that is not there, and a name that is taken.
    pub(super) fn new(config: &'a Config, links: Vec<Link>) -> Result<Self, AgentError> {
        let mut links: Vec<Planned<'a>> = links
            .into_iter()
            .map(|link| Planned {
                link,
                becomes: None,
                in_the_way: false,
            })
            .collect();
        for interface in &config.interfaces {
            let Some(found) = find(&mut links, interface.device) else {
                return Err(AgentError::Invalid(format!(
                    "the guest has no network device {} to become {}",
                    interface.device, interface.name
                )));
            };
            found.becomes = Some(interface);
        }
        for Planned {
            link,
            becomes,
            in_the_way,
        } in &mut links
        {
            let keeps_its_name = becomes.is_some_and(|i| i.name.as_str() == link.name);
            let wanted = config
                .interfaces
                .iter()
                .any(|i| i.name.as_str() == link.name);
            *in_the_way = wanted && !keeps_its_name;
            if *in_the_way && becomes.is_none() && !link.is_idle_nic() {
                return Err(AgentError::Invalid(format!(
                    "the guest has another interface {} already",
                    link.name
                )));
            }
        }
        let plan = Self {
            indices: names(&links),
            links,
        };
        for name in config.named() {
            plan.index(name)?;
        }
        Ok(plan)
    }

    /// The interface that has this name when the request's have theirs.
    pub(super) fn index(&self, name: &Name) -> Result<u32, AgentError> {
        self.indices.get(name.as_str()).copied().ok_or_else(|| {
            AgentError::Invalid(format!(
                "neither the guest nor the request has an interface {name}"
            ))
        })
    }
}

/// Finds a device. A permanent address counts before a current one, which anybody can give an interface.
fn find<'l, 'a>(links: &'l mut [Planned<'a>], nic: u8) -> Option<&'l mut Planned<'a>> {
    links
        .iter_mut()
        .filter(|planned| planned.link.is_nic(nic))
        .max_by_key(|planned| planned.link.permanent_address.is_some())
}

fn names(links: &[Planned<'_>]) -> BTreeMap<String, u32> {
    links
        .iter()
        .filter_map(|planned| {
            let name = match planned.becomes {
                Some(interface) => interface.name.as_str(),
                None if planned.in_the_way => return None,
                None => &planned.link.name,
            };
            Some((name.to_owned(), planned.link.index))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use husk_protocol::agent::{self, Network};
    use proptest::prelude::*;

    use super::super::netlink::attribute;
    use super::*;

    fn link(index: u32, name: &str, address: [u8; 6], permanent: Option<[u8; 6]>) -> Link {
        Link {
            index,
            up: false,
            name: name.into(),
            address: address.into(),
            mtu: 1500,
            permanent_address: permanent.map(Into::into),
        }
    }

    fn config(interfaces: &[(u32, &str)]) -> Config {
        let interfaces = interfaces.iter().map(|&(device, name)| agent::Interface {
            device,
            name: name.into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            ..Default::default()
        });
        Config::new(Network {
            interfaces: interfaces.collect(),
            ..Default::default()
        })
        .unwrap()
    }

    #[test]
    fn a_link_is_read_from_its_message() {
        let message = [
            &[0, 0, 1, 0][..],
            &7_u32.to_ne_bytes(),
            &(libc::IFF_UP as u32 | libc::IFF_BROADCAST as u32).to_ne_bytes(),
            &[0; 4],
            &attribute(libc::IFLA_IFNAME, b"eth0\0"),
            &attribute(libc::IFLA_MTU, &1500_u32.to_ne_bytes()),
            &attribute(libc::IFLA_ADDRESS, &[2; 6]),
            &attribute(libc::IFLA_PERM_ADDRESS, &nic_mac(3)),
        ]
        .concat();
        let read = Link::parse(&message).unwrap();
        let wanted = Link {
            up: true,
            ..link(7, "eth0", [2; 6], Some(nic_mac(3)))
        };
        assert_eq!(read, wanted);
        assert!(read.is_nic(3) && !read.is_nic(2));
    }

    #[test]
    fn a_device_is_known_by_its_permanent_address() {
        let config = config(&[(1, "net1")]);
        let plan = |links| {
            Plan::new(&config, links).map(|plan| {
                plan.links
                    .iter()
                    .find(|planned| planned.becomes.is_some())
                    .unwrap()
                    .link
                    .index
            })
        };
        let device = link(3, "eth1", [2; 6], Some(nic_mac(1)));
        let pretender = link(9, "dummy0", nic_mac(1), None);
        let changed = link(2, "eth0", nic_mac(1), Some(nic_mac(0)));
        assert_eq!(plan(vec![device.clone(), pretender.clone()]).unwrap(), 3);
        assert_eq!(plan(vec![pretender.clone(), device]).unwrap(), 3);
        assert_eq!(plan(vec![pretender, changed.clone()]).unwrap(), 9);
        let said = plan(vec![changed]).unwrap_err().to_string();
        assert_eq!(said, "the guest has no network device 1 to become net1");
    }

    #[test]
    fn only_an_idle_device_makes_room() {
        let config = config(&[(0, "eth1")]);
        let with = |other: Link| {
            Plan::new(
                &config,
                vec![link(2, "eth0", nic_mac(0), Some(nic_mac(0))), other],
            )
            .map(|plan| plan.links.iter().filter(|p| p.in_the_way).count())
        };
        let idle = link(3, "eth1", nic_mac(1), Some(nic_mac(1)));
        assert_eq!(with(idle.clone()).unwrap(), 1);
        assert_eq!(with(link(3, "eth2", [2; 6], None)).unwrap(), 0);
        for taken in [Link { up: true, ..idle }, link(3, "eth1", [2; 6], None)] {
            let said = with(taken).unwrap_err().to_string();
            assert_eq!(said, "the guest has another interface eth1 already");
        }
    }

    proptest! {
        #[test]
        fn any_message_is_read_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Link::parse(&bytes).is_none() || bytes.len() >= LINK_HEADER_LEN);
        }
    }
}
