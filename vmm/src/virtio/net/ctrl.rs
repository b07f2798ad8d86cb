//! The control queue (virtio 1.2, 5.1.6.5): what the driver asks of its device.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::*;
use vm_memory::GuestMemoryMmap;

use super::features::{self, CTRL_MAC_ADDR, CTRL_RX, MQ};
use super::link::Link;
use crate::virtio::queue::{Chain, DeviceQueue, QueueError};
use crate::virtio::{ActiveQueue, Interrupt, byte};

/// Longest command in bytes: a table of addresses, of which a driver has a few dozen.
const MAX_COMMAND: usize = 4096;

/// Commands that are answered before others have their turn.
const TURN: usize = 16;

const RX: u8 = byte(VIRTIO_NET_CTRL_RX);
const RX_PROMISC: u8 = byte(VIRTIO_NET_CTRL_RX_PROMISC);
const RX_ALLMULTI: u8 = byte(VIRTIO_NET_CTRL_RX_ALLMULTI);
const MAC: u8 = byte(VIRTIO_NET_CTRL_MAC);
const MAC_TABLE_SET: u8 = byte(VIRTIO_NET_CTRL_MAC_TABLE_SET);
const MAC_ADDR_SET: u8 = byte(VIRTIO_NET_CTRL_MAC_ADDR_SET);
const MQ_CLASS: u8 = byte(VIRTIO_NET_CTRL_MQ);
const MQ_PAIRS_SET: u8 = byte(VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);

const OK: u8 = byte(VIRTIO_NET_OK);
const ERR: u8 = byte(VIRTIO_NET_ERR);

/// A command that the device knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// Which packets to let through. Filtering is best effort (5.1.6.5.1), and the guest's kernel filters anyway: all come through.
    Filter,
    /// The device has this address from now on.
    SetAddress([u8; 6]),
    /// So many pairs of queues are used from now on.
    SetPairs(u16),
}

impl Command {
    /// Reads a command of a driver that has accepted `features`: class, command, and what it is about.
    fn parse(bytes: &[u8], features: u64) -> Option<Self> {
        let has = |bit| features::has(features, bit);
        let (&[class, command], data) = bytes.split_first_chunk()?;
        match (class, command) {
            (RX, RX_PROMISC | RX_ALLMULTI) if has(CTRL_RX) && matches!(data, [0 | 1]) => {
                Some(Self::Filter)
            }
            (MAC, MAC_TABLE_SET) if has(CTRL_RX) => {
                // Unicast addresses, then multicast ones.
                let rest = after_table(after_table(data)?)?;
                rest.is_empty().then_some(Self::Filter)
            }
            (MAC, MAC_ADDR_SET) if has(CTRL_MAC_ADDR) => data.try_into().ok().map(Self::SetAddress),
            (MQ_CLASS, MQ_PAIRS_SET) if has(MQ) => {
                let pairs = data.try_into().ok()?;
                Some(Self::SetPairs(u16::from_le_bytes(pairs)))
            }
            _ => None,
        }
    }
}

/// What follows a table: a count of 32 bits, and as many addresses.
fn after_table(data: &[u8]) -> Option<&[u8]> {
    let (count, rest) = data.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    rest.get(len..)
}

/// The control queue.
pub struct Ctrl {
    queue: DeviceQueue,
    features: u64,
    link: Arc<Link>,
}

impl Ctrl {
    /// Takes over the queue `index`, of a driver that has accepted `features`.
    pub fn new(
        queue: ActiveQueue,
        index: u16,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
        link: Arc<Link>,
    ) -> Self {
        Self {
            queue: DeviceQueue::new(queue, index, u32::MAX, interrupt),
            features,
            link,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// Answers commands; true if there are more.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn run(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mut more = true;
        for _ in 0..TURN {
            match self.queue.pop(memory)? {
                Some(chain) => {
                    let done = self.obey(&chain);
                    let ack = if done { OK } else { ERR };
                    if chain.writable.write_at(0, &[ack]).is_err() {
                        return Err(self.queue.layout(chain.head, "room for an answer"));
                    }
                    self.queue.push_used(memory, chain.head, 1)?;
                }
                None if self.queue.rearm(memory)? => {}
                None => {
                    more = false;
                    break;
                }
            }
        }
        self.queue.notify(memory)?;
        Ok(more)
    }

    fn obey(&self, chain: &Chain<'_>) -> bool {
        let mut bytes = [0; MAX_COMMAND];
        let command = bytes.get_mut(..chain.readable.len()).and_then(|bytes| {
            chain.readable.read_at(0, bytes).ok()?;
            Command::parse(bytes, self.features)
        });
        match command {
            Some(Command::Filter) => true,
            Some(Command::SetAddress(mac)) => {
                self.link.set_mac(mac);
                true
            }
            Some(Command::SetPairs(pairs)) => self.link.set_pairs(pairs),
            None => {
                tracing::debug!(len = chain.readable.len(), "network command refused");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
        let mut bytes = vec![MAC, MAC_TABLE_SET];
        for addresses in [unicast, multicast] {
            bytes.extend((addresses.len() as u32).to_le_bytes());
            bytes.extend(addresses.concat());
        }
        bytes
    }

    #[test]
    fn commands_of_features_that_were_not_accepted_are_unknown() {
        let address = [MAC, MAC_ADDR_SET, 2, 0, 0, 0, 0, 1];
        let pairs = [MQ_CLASS, MQ_PAIRS_SET, 2, 0];
        let promiscuous = [RX, RX_PROMISC, 1];
        let all = features::offered(2);
        assert_eq!(
            Command::parse(&address, all),
            Some(Command::SetAddress([2, 0, 0, 0, 0, 1]))
        );
        assert_eq!(Command::parse(&pairs, all), Some(Command::SetPairs(2)));
        assert_eq!(Command::parse(&promiscuous, all), Some(Command::Filter));
        for command in [&address[..], &pairs, &promiscuous, &table(&[], &[])] {
            assert_eq!(Command::parse(command, 0), None);
        }
    }

    #[test]
    fn a_command_has_its_length() {
        let all = features::offered(2);
        for bytes in [
            &[][..],
            &[RX],
            &[RX, RX_PROMISC],
            &[RX, RX_PROMISC, 2],
            &[RX, RX_PROMISC, 1, 1],
            &[MAC, MAC_ADDR_SET, 1, 2, 3, 4, 5],
            &[MAC, MAC_ADDR_SET, 1, 2, 3, 4, 5, 6, 7],
            &[MQ_CLASS, MQ_PAIRS_SET, 1],
            &[MAC, MAC_TABLE_SET, 0, 0, 0, 0],
            &[MAC, MAC_TABLE_SET, 255, 255, 255, 255, 0, 0, 0, 0],
            &[MAC, MAC_TABLE_SET, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[200, 0, 1],
        ] {
            assert_eq!(Command::parse(bytes, all), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn tables_of_any_length_are_understood(
            unicast in proptest::collection::vec(any::<[u8; 6]>(), 0..40),
            multicast in proptest::collection::vec(any::<[u8; 6]>(), 0..40),
            cut in 1usize..8,
        ) {
            let all = features::offered(1);
            let mut bytes = table(&unicast, &multicast);
            prop_assert_eq!(Command::parse(&bytes, all), Some(Command::Filter));
            bytes.truncate(bytes.len() - cut);
            prop_assert_eq!(Command::parse(&bytes, all), None);
        }

        #[test]
        fn any_bytes_are_a_command_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            match Command::parse(&bytes, features::offered(2)) {
                Some(Command::SetAddress(mac)) => prop_assert_eq!(&bytes[2..], &mac[..]),
                Some(Command::SetPairs(pairs)) => prop_assert_eq!(&bytes[2..], &pairs.to_le_bytes()[..]),
                Some(Command::Filter) => prop_assert!(bytes[0] == RX || bytes[0] == MAC),
                None => {}
            }
        }
    }
}
