//! virtio-vsock (virtio 1.2, 5.10): stream connections between the guest and the shim, carried by this process.
//!
//! Each connection is a socketpair: one end here, the other handed to the shim over the bridge (`husk_protocol::bridge`). Bytes
//! go between the socket and guest memory without a copy in between; only what a slow reader on the host has not taken is
//! buffered, and credit bounds that.
//!
//! - `packet`: the header of every packet.
//! - `state`: what a connection is in, as one transition function; a primer on the protocol stands above it.
//! - `credit`: who may still send how much.
//! - `connection`: one socket, its state and its credit.
//! - `muxer`: all of them, and the queues.

mod bridge;
mod connection;
mod credit;
mod muxer;
mod packet;
mod silent;
mod socket;
mod state;

use std::os::fd::OwnedFd;

use self::muxer::Muxer;
use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_bytes};
use crate::jail::seccomp::Kind;

const DEVICE_ID: u32 = 19;

/// Receive, transmit and event queue. A receive buffer of Linux holds less than 4 KiB, so the first is the one that
/// wants depth.
const QUEUE_SIZES: [u16; 3] = [512, 256, 8];

/// The vsock device.
pub struct Vsock {
    guest_cid: u64,
    bridge: OwnedFd,
    worker: Option<Worker>,
}

impl Vsock {
    /// A device for the guest with this CID (3 or more), whose connections cross `bridge`, a `SOCK_SEQPACKET` socket.
    pub fn new(guest_cid: u64, bridge: OwnedFd) -> Self {
        Self {
            guest_cid,
            bridge,
            worker: None,
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let host = ActivateError::host("duplicating the vsock bridge");
        let bridge = self.bridge.try_clone().map_err(host)?;
        let muxer = Muxer::new(self.guest_cid, bridge, activation)?;
        self.worker = Some(Worker::spawn(Kind::Vsock, &interrupt, vec![muxer])?);
        Ok(())
    }

    fn reset(&mut self) {
        // Every connection ends with the thread; the shim sees its sockets close.
        self.worker = None;
    }
}

#[cfg(test)]
mod tests;
