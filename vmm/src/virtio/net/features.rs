//! What the device offers, and what the tap has to do for it.

use std::os::raw::c_uint;

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
use virtio_bindings::bindings::virtio_net::*;

use crate::virtio::half;

pub const MRG_RXBUF: u32 = VIRTIO_NET_F_MRG_RXBUF;
pub const CTRL_VQ: u32 = VIRTIO_NET_F_CTRL_VQ;
pub const CTRL_RX: u32 = VIRTIO_NET_F_CTRL_RX;
pub const CTRL_MAC_ADDR: u32 = VIRTIO_NET_F_CTRL_MAC_ADDR;
pub const MQ: u32 = VIRTIO_NET_F_MQ;

/// What every device offers (5.1.3).
const OFFERED: [u32; 14] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    CTRL_VQ,
    CTRL_RX,
    CTRL_MAC_ADDR,
];

/// The features of a device with so many pairs of queues.
pub fn offered(pairs: u16) -> u64 {
    let multi_queue = (pairs > 1).then_some(MQ);
    OFFERED
        .into_iter()
        .chain(multi_queue)
        .fold(0, |features, bit| features | 1 << bit)
}

/// True if bit `bit` is among `features`.
pub fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The `status` field of configuration space.
pub fn status(up: bool) -> u16 {
    const UP: u16 = half(VIRTIO_NET_S_LINK_UP);
    if up { UP } else { 0 }
}

/// What the tap may leave to a guest that has accepted `features` (`TUNSETOFFLOAD` of `linux/if_tun.h`). A feature without the one
/// that it requires (5.1.3.1) counts for nothing.
pub fn offloads(features: u64) -> c_uint {
    let when = |bit, flag| if has(features, bit) { flag } else { 0 };
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let segments =
        when(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4) | when(VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6);
    let ecn = if segments == 0 {
        0
    } else {
        when(VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN)
    };
    TUN_F_CSUM | segments | ecn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_leaves_to_the_guest_what_the_guest_has_accepted() {
        let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1u64 << bit);
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_CSUM])), TUN_F_CSUM);
        let four = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4];
        assert_eq!(offloads(bits(&four)), TUN_F_CSUM | TUN_F_TSO4);
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        assert_eq!(offloads(offered(1)), all);
        let without_what_they_require = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ];
        assert_eq!(offloads(bits(&without_what_they_require)), 0);
        let ecn = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN];
        assert_eq!(offloads(bits(&ecn)), TUN_F_CSUM);
    }

    #[test]
    fn several_pairs_make_a_multi_queue_device() {
        assert!(!has(offered(1), MQ));
        assert!(has(offered(2), MQ));
    }
}
