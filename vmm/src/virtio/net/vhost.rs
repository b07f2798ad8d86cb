//! vhost-net: the host's kernel carries the packets of a pair of queues, between the tap and guest memory, and this process sees
//! none of them.
//!
//! What it is told of the guest's queues comes from the guest, and vhost checks ring addresses against nothing but the bounds of this
//! process. So [`Vhost::start`] lets only rings through that lie in one piece of guest memory each. Buffers vhost checks itself, against
//! the table of guest memory, which holds from the start on: what the guest may plug later is mapped already.
#![allow(
    unsafe_code,
    reason = "the vhost crate sets a backend only of a /dev/vhost-net that it has opened itself"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT as _;
use vm_memory::{
    Address as _, GuestAddress, GuestAddressSpace as _, GuestMemory as _, GuestMemoryMmap,
    GuestMemoryRegion as _,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::features::MRG_RXBUF;
use super::tap::Tap;
use crate::virtio::GuestMemory;
use crate::virtio::queue::{DeviceQueue, RING_FEATURES, areas};

/// What vhost has to do with the queues; the rest of the device's features are the tap's or the control queue's. With these, the
/// header in front of each packet has the 12 bytes that the tap is set to (`vhost_net_set_features` of drivers/vhost/net.c); that
/// vhost should make it instead of the tap is not among them (`VHOST_NET_F_VIRTIO_NET_HDR`), nor are addresses that are not the guest's
/// physical ones (`VIRTIO_F_ACCESS_PLATFORM`). Linux has had all of them since 4.0.
const FEATURES: u64 = RING_FEATURES | 1 << VIRTIO_F_VERSION_1 | 1 << MRG_RXBUF;

/// Queues of a pair, by vhost's numbers.
const QUEUES: [usize; 2] = [0, 1];

/// Why vhost-net does not carry the packets.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// Too old, or of another world.
    #[error("this host's vhost-net lacks the virtio features {0:#x}")]
    Features(u64),
    /// The device's driver cannot be reached by it.
    #[error("the driver's interrupt cannot be shared")]
    Interrupt(#[source] io::Error),
    /// The kernel refused a step, or a ring lies where none may.
    #[error("cannot {step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: vhost::Error,
    },
    /// The kernel refused tap or queue.
    #[error("cannot connect a queue and the tap by vhost-net")]
    Backend(#[source] io::Error),
}

fn step(step: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Step { step, source }
}

/// One `/dev/vhost-net`: a thread of the kernel for a pair of queues.
#[derive(Debug)]
pub struct Vhost {
    fd: OwnedFd,
    memory: GuestMemory,
}

impl Vhost {
    /// Makes `fd`, a `/dev/vhost-net` that nobody has used yet, ready for a guest with this memory.
    ///
    /// # Errors
    /// It is nothing of the kind, or the kernel refuses its thread.
    pub fn adopt(fd: OwnedFd, memory: &GuestMemory) -> Result<Self, VhostError> {
        let memory = memory.clone();
        let vhost = Self { fd, memory };
        let has = vhost
            .get_features()
            .map_err(step("ask vhost-net for its features"))?;
        if FEATURES & !has != 0 {
            return Err(VhostError::Features(FEATURES & !has));
        }
        vhost
            .set_owner()
            .map_err(step("start the thread of vhost-net"))?;
        let regions: Vec<_> = vhost
            .memory
            .memory()
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        vhost
            .set_mem_table(&regions)
            .map_err(step("tell vhost-net of the guest's memory"))?;
        Ok(vhost)
    }

    /// Anything that takes no request of vhost's, for tests of a kernel that refuses.
    #[cfg(test)]
    pub fn unchecked(fd: OwnedFd, memory: GuestMemory) -> Self {
        Self { fd, memory }
    }

    /// Works for a driver that has accepted `features` from the next [`Self::start`] on.
    ///
    /// # Errors
    /// The kernel refuses them.
    pub fn set_driver(&self, features: u64) -> Result<(), VhostError> {
        self.set_features(features & FEATURES)
            .map_err(step("tell vhost-net of the driver's features"))
    }

    /// Carries packets between `tap` and these queues, the receive queue first, from where they are now. `broken` is signalled when the
    /// driver breaks one of them.
    ///
    /// # Errors
    /// The kernel refuses, or a ring is not in one piece of guest memory. One queue may have been started by then: as after a success,
    /// [`Self::stop`] says where they are.
    pub fn start(
        &self,
        tap: &Tap,
        queues: [&DeviceQueue; 2],
        broken: &EventFd,
    ) -> Result<(), VhostError> {
        // First, so that `stop` has something to say whatever fails.
        for (index, queue) in QUEUES.into_iter().zip(queues) {
            self.set_vring_base(index, queue.state().next_avail())
                .map_err(step("tell vhost-net where a queue stands"))?;
        }
        for (index, queue) in QUEUES.into_iter().zip(queues) {
            self.set_up(index, queue, broken)?;
        }
        for (index, queue) in QUEUES.into_iter().zip(queues) {
            self.set_backend(index, tap.as_raw_fd())?;
            // What was kicked before counts as well. EAGAIN: kicked already.
            let _ = queue.kick().write(1);
        }
        Ok(())
    }

    fn set_up(
        &self,
        index: usize,
        queue: &DeviceQueue,
        broken: &EventFd,
    ) -> Result<(), VhostError> {
        let call = queue.queue_event().map_err(VhostError::Interrupt)?;
        let state = queue.state();
        let rings = VringConfigData {
            queue_max_size: state.max_size(),
            queue_size: state.size(),
            // No log of what is written: guest addresses of one are 0.
            flags: 0,
            log_addr: None,
            desc_table_addr: state.desc_table(),
            avail_ring_addr: state.avail_ring(),
            used_ring_addr: state.used_ring(),
        };
        self.set_vring_num(index, rings.queue_size)
            .and_then(|()| self.set_vring_addr(index, &rings))
            .map_err(step("tell vhost-net of a queue's rings"))?;
        self.set_vring_call(index, &call)
            .and_then(|()| self.set_vring_err(index, broken))
            .and_then(|()| self.set_vring_kick(index, queue.kick()))
            .map_err(step("tell vhost-net of a queue's events"))
    }

    /// Carries nothing any more. Returns which available chain is the next of each queue. Idempotent.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop(&self) -> Result<[u16; 2], VhostError> {
        // The kernel waits here for what is under way.
        for index in QUEUES {
            self.set_backend(index, -1)?;
        }
        let mut next = [0; 2];
        for (next, index) in next.iter_mut().zip(QUEUES) {
            let base = self
                .get_vring_base(index)
                .map_err(step("ask vhost-net where a queue stands"))?;
            // An index of a split ring: its 16 bits.
            *next = (base & 0xffff) as u16;
        }
        Ok(next)
    }

    fn set_backend(&self, index: usize, fd: RawFd) -> Result<(), VhostError> {
        let file = vhost_vring_file {
            // 0 or 1.
            index: u32::try_from(index).unwrap_or(u32::MAX),
            fd,
        };
        // SAFETY: the request reads such a structure, and the kernel takes a reference of its own to the file whose descriptor is in it.
        if unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } < 0 {
            return Err(VhostError::Backend(io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = GuestMemory;

    fn mem(&self) -> &GuestMemory {
        &self.memory
    }

    /// The crate's own answer looks at the end of each ring only.
    fn is_valid(&self, rings: &VringConfigData) -> bool {
        is_in_one_piece(&self.memory.memory(), rings)
    }
}

/// Whether each ring lies in a single mapping. Two that adjoin in the guest need not do so in this process, and vhost goes by one address
/// of this process a ring.
fn is_in_one_piece(memory: &GuestMemoryMmap, rings: &VringConfigData) -> bool {
    let starts = [
        rings.desc_table_addr,
        rings.avail_ring_addr,
        rings.used_ring_addr,
    ];
    areas(rings.queue_size, starts)
        .iter()
        .all(|(start, len)| memory.get_slice(GuestAddress(*start), *len).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{self, REGIONS};

    #[test]
    fn rings_that_do_not_lie_in_one_mapping_are_refused() {
        let memory = testing::memory();
        let border = REGIONS[1].0;
        let end = REGIONS[2].0 + REGIONS[2].1 as u64;
        let rings = |desc, avail, used| VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            desc_table_addr: desc,
            avail_ring_addr: avail,
            used_ring_addr: used,
            ..Default::default()
        };
        // 4096, 518 and 2054 bytes.
        let good = rings(border - 4096, border - 518, border - 2054);
        assert!(is_in_one_piece(&memory, &good));
        assert!(is_in_one_piece(
            &memory,
            &rings(end - 4096, end - 518, end - 2054)
        ));
        for (desc, avail, used) in [
            (border - 4095, 0, 0),
            (0, border - 517, 0),
            (0, 0, border - 2053),
            (end - 4095, 0, 0),
            (0, 0, end - 2),
            // Both its ends are memory, and between them there is none.
            (0, 0, 63 << 20),
            (u64::MAX - 15, 0, 0),
        ] {
            let rings = rings(desc, avail, used);
            assert!(
                !is_in_one_piece(&memory, &rings),
                "{desc:#x} {avail:#x} {used:#x}"
            );
        }
    }

    /// CVE-2019-14835, CVE-2026-99686: nobody asks vhost to log what it writes, to translate addresses, or to use buffers in order.
    #[test]
    fn what_has_broken_vhost_is_not_negotiated() {
        const LOG_ALL: u64 = 1 << 26;
        const ACCESS_PLATFORM: u64 = 1 << 33;
        const IN_ORDER: u64 = 1 << 35;
        let offered = super::super::features::offered(8) | RING_FEATURES;
        for never in [LOG_ALL, ACCESS_PLATFORM, IN_ORDER] {
            assert_eq!((FEATURES | offered) & never, 0, "{never:#x}");
        }
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = Vhost::adopt(null.into(), &GuestMemory::new(testing::memory())).unwrap_err();
        assert!(
            crate::sentence(&error).starts_with("cannot ask vhost-net for its features: "),
            "{error}"
        );
    }
}
