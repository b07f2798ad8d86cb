//! virtio-mmio, modern only (virtio 1.2, section 4.2): the registers between a driver and a device.
//!
//! A driver brings a device up by writing ever more bits of the status register; [`Phase`] is that ladder, and
//! [`Phase::next`] its one transition function. What a register accepts follows from the phase: features between
//! `DRIVER` and `FEATURES_OK`, queues between `FEATURES_OK` and `DRIVER_OK`, and nothing else but a reset
//! afterwards. An access the specification does not allow is dropped; a read of what does not exist gives zero.
//!
//! Interrupts are edges: each signal sets a bit of `InterruptStatus` and fires the irqfd, and the driver
//! acknowledges the bit before it looks at its queues.

mod interrupt;

use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::interrupt::MmioInterrupt;
use super::queue::{RING_FEATURES, areas};
use super::worker::drain;
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice,
    may_log_about_guest,
};
use crate::ending::Ending;
use crate::sentence;
use crate::starter::{Starter, StarterError};

/// Size of a device's register window, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// Offset of `QueueNotify`, the register behind which the VMM puts ioeventfds.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "husk": who made the device; drivers show it and do nothing with it.
const VENDOR: u32 = 0x6b73_7568;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// How far the driver has come (virtio 1.2, 3.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing yet, or a reset.
    Reset,
    /// The driver has seen the device.
    Acknowledged,
    /// It knows how to drive it and negotiates features.
    Driver,
    /// Features are settled; queues are set up.
    Features,
    /// The device runs.
    Running,
    /// The driver gave up; only a reset leads on. Holds the status it had reached.
    Failed(u32),
}

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Stop and forget everything.
    Reset,
    /// Settle the features; on success the phase is [`Phase::Features`].
    Negotiate,
    /// Start the device; on success the phase is [`Phase::Running`].
    Activate,
    /// Just go there.
    Go(Phase),
    /// Nothing the ladder knows.
    Ignore,
}

impl Phase {
    fn status(self) -> u32 {
        match self {
            Self::Reset => 0,
            Self::Acknowledged => ACKNOWLEDGE,
            Self::Driver => ACKNOWLEDGE | DRIVER,
            Self::Features => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            Self::Running => ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
            Self::Failed(reached) => reached | FAILED,
        }
    }

    /// The transition function: one rung at a time, never down but by a reset.
    fn next(self, written: u32) -> Step {
        if written == 0 {
            return Step::Reset;
        }
        // A driver writes back what it has read, so the device's own bit may come along.
        let written = written & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if written & FAILED != 0 {
            return Step::Go(Self::Failed(self.status()));
        }
        match self {
            Self::Reset if written == Self::Acknowledged.status() => Step::Go(Self::Acknowledged),
            Self::Acknowledged if written == Self::Driver.status() => Step::Go(Self::Driver),
            Self::Driver if written == Self::Features.status() => Step::Negotiate,
            Self::Features if written == Self::Running.status() => Step::Activate,
            _ => Step::Ignore,
        }
    }
}

/// One device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    /// Where the device is started and stopped.
    starter: Arc<Starter>,
    memory: GuestMemory,
    interrupt: Arc<MmioInterrupt>,
    phase: Phase,
    /// `DeviceFeaturesSel` and `DriverFeaturesSel`.
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue_selected: u32,
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
}

impl MmioTransport {
    /// Puts `device` behind registers; `irq` becomes readable for each interrupt (an edge), and what the host refuses the device
    /// ends the VM through `ending`. The device starts and stops on the thread of `starter`.
    ///
    /// # Errors
    /// [`NewTransportError`] when an eventfd is refused, or the device names an impossible queue size.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        irq: EventFd,
        ending: Arc<Ending>,
        starter: Arc<Starter>,
    ) -> Result<Self, NewTransportError> {
        let sizes = device.queue_max_sizes();
        let queues = sizes
            .iter()
            .map(|size| Queue::new(*size).map_err(|_| NewTransportError::QueueSize(*size)))
            .collect::<Result<Vec<_>, _>>()?;
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(NewTransportError::EventFd))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            device,
            starter,
            memory,
            interrupt: Arc::new(MmioInterrupt::new(irq, ending)),
            phase: Phase::Reset,
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            queue_selected: 0,
            queues,
            kicks,
        })
    }

    /// One event a queue, by index. The VMM registers each as an ioeventfd at [`QUEUE_NOTIFY`], 32 bits wide, matching
    /// the queue's index.
    pub fn queue_kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match access(offset, data.len()) {
            Some(Access::Register(register)) => {
                data.copy_from_slice(&self.read_register(register).to_le_bytes());
            }
            Some(Access::Config(offset)) => self.device.read_config(offset, data),
            None => tracing::debug!(offset, len = data.len(), "read of no register dropped"),
        }
    }

    /// The guest writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match (access(offset, data.len()), <[u8; 4]>::try_from(data)) {
            (Some(Access::Register(register)), Ok(value)) => {
                self.write_register(register, u32::from_le_bytes(value));
            }
            (Some(Access::Config(offset)), _) if self.driver_knows_device() => {
                self.device.write_config(offset, data);
            }
            _ => tracing::debug!(offset, len = data.len(), "write to no register dropped"),
        }
    }

    fn driver_knows_device(&self) -> bool {
        matches!(self.phase, Phase::Driver | Phase::Features | Phase::Running)
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => page(self.offered(), self.device_features_page),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.queue().map_or(0, |queue| u32::from(queue.max_size()))
            }
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            // No shared memory regions: length and base of any are all ones (4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.phase == Phase::Driver => {
                set_page(&mut self.driver_features, self.driver_features_page, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_selected = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ if self.phase == Phase::Features => self.write_queue_register(register, value),
            _ => tracing::debug!(register, value, phase = ?self.phase, "register write dropped"),
        }
    }

    fn write_queue_register(&mut self, register: u32, value: u32) {
        let Some(queue) = usize::try_from(self.queue_selected)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        match register {
            // A size that is no power of two or too large leaves the queue as it was (virtio-queue checks).
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => tracing::debug!(register, value, "write to no register dropped"),
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_selected).ok()?)
    }

    fn notify(&self, index: u32) {
        if self.phase == Phase::Running
            && let Some(kick) = usize::try_from(index).ok().and_then(|i| self.kicks.get(i))
        {
            // EAGAIN: the counter is full, the device has been kicked more than enough.
            let _ = kick.write(1);
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES | 1 << VIRTIO_F_VERSION_1
    }

    fn status(&self) -> u32 {
        if self.interrupt.needs_reset() {
            self.phase.status() | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.phase.status()
        }
    }

    fn write_status(&mut self, value: u32) {
        match self.phase.next(value) {
            Step::Reset => self.reset(),
            Step::Go(phase) => self.phase = phase,
            Step::Negotiate => {
                let unknown = self.driver_features & !self.offered();
                if unknown == 0 && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0 {
                    self.phase = Phase::Features;
                } else if may_log_about_guest() {
                    // FEATURES_OK stays clear; the driver sees that and gives up.
                    tracing::warn!(
                        device = self.device.device_id(),
                        features = format_args!("{:#x}", self.driver_features),
                        "the driver's features are refused"
                    );
                }
            }
            Step::Activate => self.activate(),
            Step::Ignore => tracing::debug!(value, phase = ?self.phase, "status write dropped"),
        }
    }

    fn activate(&mut self) {
        // The driver has done its part, whatever becomes of the device's.
        self.phase = Phase::Running;
        let outcome = self
            .activation()
            .and_then(|activation| Ok(self.elsewhere(|device| device.activate(activation))??));
        let Err(error) = outcome else {
            return;
        };
        let device = self.device.device_id();
        let by_host = error.is_hosts();
        if by_host || may_log_about_guest() {
            let error = &error as &dyn std::error::Error;
            tracing::error!(device, error, "the device did not start");
        }
        if by_host {
            let cause = sentence(&error);
            self.interrupt.host_failed(format!(
                "the virtio device of type {device} did not start: {cause}"
            ));
        } else {
            self.interrupt.signal_failed();
        }
    }

    fn activation(&self) -> Result<Activation, StartError> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = self
            .queues
            .iter()
            .zip(&self.kicks)
            .zip(0u16..)
            .map(|((queue, kick), index)| {
                if !queue.ready() {
                    return Ok(None);
                }
                let queue = self
                    .checked(queue, event_idx)
                    .ok_or(StartError::Queue(index))?;
                let kick = kick.try_clone().map_err(StartError::Clone)?;
                Ok(Some(ActiveQueue { queue, kick }))
            })
            .collect::<Result<Vec<_>, StartError>>()?;
        Ok(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        })
    }

    /// A queue of its own for the device, if all of its three areas lie in guest memory. (`Queue::is_valid` looks only at the byte behind
    /// each, and so refuses one at the very end of memory. Size and alignment were checked as they were set.)
    fn checked(&self, queue: &Queue, event_idx: bool) -> Option<Queue> {
        let memory = self.memory.memory();
        let rings = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        let inside = areas(queue.size(), rings)
            .iter()
            .all(|(addr, len)| *addr != 0 && memory.check_range(GuestAddress(*addr), *len));
        let mut active = Queue::try_from(queue.state()).ok()?;
        active.set_event_idx(event_idx);
        inside.then_some(active)
    }

    /// Does something with the device on the starter's thread.
    fn elsewhere<T: Send + 'static>(
        &mut self,
        act: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
    ) -> Result<T, StarterError> {
        let mut device = std::mem::replace(&mut self.device, Box::new(Lost));
        let (device, result) = self.starter.run(move || {
            let result = act(&mut *device);
            (device, result)
        })?;
        self.device = device;
        Ok(result)
    }

    fn reset(&mut self) {
        if let Err(error) = self.elsewhere(|device| device.reset()) {
            self.interrupt.host_failed(format!(
                "a virtio device was not reset: {}",
                sentence(&error)
            ));
        }
        self.queues.iter_mut().for_each(Queue::reset);
        self.kicks.iter().for_each(drain);
        self.driver_features = 0;
        self.device_features_page = 0;
        self.driver_features_page = 0;
        self.queue_selected = 0;
        self.interrupt.reset();
        self.phase = Phase::Reset;
    }
}

/// What is left of a device whose start or reset has panicked: the VM ends.
struct Lost;

impl VirtioDevice for Lost {
    fn device_id(&self) -> u32 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

/// Why a device could not be put behind registers.
#[derive(Debug, thiserror::Error)]
pub enum NewTransportError {
    /// No eventfd to be had.
    #[error("creating a queue's eventfd")]
    EventFd(#[source] std::io::Error),
    /// A bug in the device.
    #[error("a virtqueue cannot have {0} descriptors")]
    QueueSize(u16),
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {0} lies outside guest memory")]
    Queue(u16),
    #[error("duplicating a queue's eventfd")]
    Clone(#[source] std::io::Error),
    #[error(transparent)]
    Device(#[from] ActivateError),
    #[error(transparent)]
    Starter(#[from] StarterError),
}

impl StartError {
    /// True if the driver could have done nothing about it.
    fn is_hosts(&self) -> bool {
        match self {
            Self::Queue(_) | Self::Device(ActivateError::MissingQueue(_)) => false,
            Self::Clone(_) | Self::Starter(_) | Self::Device(ActivateError::Host { .. }) => true,
        }
    }
}

/// What an access reaches.
enum Access {
    /// A 32-bit register.
    Register(u32),
    /// Device configuration, from this offset.
    Config(u64),
}

/// Registers are read and written whole; configuration in naturally aligned pieces (4.2.2.2).
fn access(offset: u64, len: usize) -> Option<Access> {
    let aligned = matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len as u64);
    match offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
        Some(offset) if aligned => Some(Access::Config(offset)),
        None if aligned && len == 4 => u32::try_from(offset).ok().map(Access::Register),
        _ => None,
    }
}

/// The 32 bits of `features` that a selector register shows.
fn page(features: u64, selector: u32) -> u32 {
    match selector {
        0 => (features & 0xffff_ffff) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_page(features: &mut u64, selector: u32, value: u32) {
    match selector {
        0 => *features = (*features & !0xffff_ffff) | u64::from(value),
        1 => *features = (*features & 0xffff_ffff) | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
