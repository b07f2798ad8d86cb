//! One virtual machine, from its parts to its end.
//!
//! [`Vm::launch`] is the recipe: read it from top to bottom. It either returns a running VM or frees what it has made, since
//! every step's result is owned by the next; only the console's thread, which waits for output, stays until the process ends.

mod nics;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protocol::vm::{LaunchTimes, VmExit, VmInfo};
use vm_memory::GuestAddressSpace as _;

use crate::boot::{self, BootError, cmdline};
use crate::bus::{Bus, BusDevice, BusError};
use crate::clock;
use crate::devices::console::Console;
use crate::devices::power::{ResetRegister, SleepRegisters};
use crate::devices::serial::SerialPort;
use crate::ending::{Cause, Ending};
use crate::jail::seccomp::{self, Kind, SeccompError};
use crate::kvm::{Host, KvmError, Machine};
use crate::layout;
use crate::memory::{self, MemoryError};
use crate::parts::{Parts, Share};
use crate::starter::{Starter, StarterError};
use crate::vcpu::{Shared, VcpuError, Vcpus};
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::fs::{BadTag, Fs};
use crate::virtio::mem::{Mem, MemHandle, Region};
use crate::virtio::mmio::{self, MmioTransport, NewTransportError};
use crate::virtio::net::{AttachError, Net, NicHandle};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{GuestMemory, VirtioDevice};

/// The guest's address on its vsock, where it is alone: each VM has a bridge of its own.
const GUEST_CID: u64 = 3;
/// Bytes of a balloon page (virtio 1.2, 5.5.6), whatever the guest's page size.
const BALLOON_PAGE: u64 = 4096;
/// Balloon pages of one MiB.
const BALLOON_PAGES_PER_MIB: u64 = (1 << 20) / BALLOON_PAGE;
/// How long the end of a VM waits for the reader of its console.
const CONSOLE_DRAIN: Duration = Duration::from_millis(200);

/// Why a VM did not start, or could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A share.
    #[error(transparent)]
    Share(#[from] BadTag),
    /// The transport of a virtio device.
    #[error(transparent)]
    Transport(#[from] NewTransportError),
    /// Address map.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A thread's system calls.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The thread that starts the others.
    #[error(transparent)]
    Starter(#[from] StarterError),
    /// A host resource was refused.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Larger than the guest.
    #[error("a balloon of {asked} MiB asked for in a VM of {most} MiB")]
    Balloon {
        /// MiB asked for.
        asked: u64,
        /// MiB of guest RAM.
        most: u64,
    },
    /// More than there are interrupt lines for.
    #[error("{0} virtio devices asked for: a VM has at most {most}, shares and network devices among them", most = layout::MAX_VIRTIO_DEVICES)]
    TooManyDevices(usize),
    /// No such network device.
    #[error("this VM has {count} network devices, and none of number {nic}")]
    NoNic {
        /// Number asked for.
        nic: u8,
        /// Network devices of the VM, numbered from 0.
        count: usize,
    },
    /// A network device was not connected.
    #[error("cannot connect network device {nic}")]
    AttachNic {
        /// Its number.
        nic: u8,
        /// Why not.
        #[source]
        source: AttachError,
    },
    /// Beyond what the VM was made for.
    #[error("{asked} MiB of memory asked for in a VM that can have {least} to {most} MiB")]
    Size {
        /// MiB asked for.
        asked: u64,
        /// MiB of RAM at boot.
        least: u64,
        /// MiB that it may grow to.
        most: u64,
    },
}

/// A running VM. Dropping it stops it.
pub struct Vm {
    // The order is the order of dropping: vCPUs before the memory that they run in.
    vcpus: Vcpus,
    balloon: BalloonHandle,
    nics: Vec<NicHandle>,
    /// Where the guest may grow.
    mem: Option<MemHandle>,
    /// MiB of RAM: at boot, and at most.
    memory_mib: (u64, u64),
    console: Console,
    ending: Arc<Ending>,
    memory: GuestMemory,
    times: LaunchTimes,
    /// Keeps interrupt lines and notifications connected.
    _machine: Machine,
}

impl Vm {
    /// Builds a VM from `parts` and lets it run. `process_started` is for the account of where the time went.
    ///
    /// # Errors
    /// The first step that failed, in words for the user.
    pub fn launch(mut parts: Parts, process_started: u64) -> Result<Self, VmError> {
        let _span = tracing::info_span!("launch", id = %parts.id).entered();
        // From here on each thread is held to its system calls, this one last.
        seccomp::arm();
        let starter = Arc::new(Starter::new()?);

        // The machine: memory, interrupt controllers, vCPUs as after a reset.
        let ram = memory::allocate(parts.memory_mib)?;
        let (all_memory, pluggable) = match parts.max_memory_mib.saturating_sub(parts.memory_mib) {
            0 => (ram.clone(), None),
            mib => {
                let region = Region::map(&ram, mib)?;
                (region.join(&ram)?, Some(region))
            }
        };
        tracing::debug!("memory mapped");
        let machine = Host::open(parts.kvm)?.create_vm(parts.max_vcpus, &all_memory)?;
        let vcpus = (0..parts.max_vcpus)
            .map(|index| machine.create_vcpu(index))
            .collect::<Result<Vec<_>, _>>()?;

        tracing::debug!("machine and vCPUs made");

        // Its devices.
        let ending = Arc::new(Ending::new().map_err(host("make an eventfd"))?);
        let console = Console::new(parts.console).map_err(host("start the console's thread"))?;
        let ports = ports(&machine, &console, &ending)?;
        #[cfg(feature = "weakened")]
        let ports = crate::weakened::with_door(ports, &all_memory, &starter)?;
        let memory = GuestMemory::new(all_memory);
        let (balloon, balloon_handle) = Balloon::new(&memory);
        let (nics, nic_handles) = nics::devices(&parts.nics);
        let pluggable = pluggable.map(Mem::new).transpose();
        let (pluggable, mem) = pluggable.map_err(host("make an eventfd"))?.unzip();
        let devices = virtio_devices(parts.vsock, parts.shares, balloon, nics, pluggable)?;
        let virtio_devices = devices.len();
        let mmio = mmio_bus(&machine, devices, &memory, &ending, &starter)?;

        tracing::debug!("devices made");

        // What it boots.
        let boot_cpus = (parts.vcpus < parts.max_vcpus).then_some(parts.vcpus);
        let entry = boot::load(
            &ram,
            boot::Source {
                kernel: &mut parts.kernel,
                initramfs: &mut parts.initramfs,
                cmdline: &cmdline::compose(&parts.kernel_params, parts.debug_console, boot_cpus),
                vcpus: parts.max_vcpus,
                virtio_devices,
            },
        )?;
        tracing::debug!("kernel and initramfs loaded");
        let vm_built = clock::monotonic();

        // Off it goes.
        let shared = Shared::new(ports, mmio, Arc::clone(&ending), parts.max_vcpus);
        Kind::Control.confine()?;
        let vcpus = starter.run(move || Vcpus::start(vcpus, entry, shared))??;
        let times = LaunchTimes {
            process_started,
            vm_built,
            vcpus_running: vcpus.entered(),
        };
        tracing::info!(
            vcpus = parts.vcpus,
            memory_mib = parts.memory_mib,
            build_us = times.vm_built.saturating_sub(process_started) / 1000,
            enter_us = times.vcpus_running.saturating_sub(vm_built) / 1000,
            "the guest runs"
        );
        Ok(Self {
            vcpus,
            balloon: balloon_handle,
            nics: nic_handles,
            mem,
            memory_mib: (parts.memory_mib, parts.max_memory_mib),
            console,
            ending,
            memory,
            times,
            _machine: machine,
        })
    }

    /// When the launch reached each step.
    #[must_use]
    pub fn launch_times(&self) -> LaunchTimes {
        self.times
    }

    /// Readable once the VM has ended by itself.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ending.event()
    }

    /// Holds every vCPU; returns when none runs.
    pub fn pause(&mut self) {
        self.vcpus.pause();
    }

    /// Lets the vCPUs run on.
    pub fn resume(&mut self) {
        self.vcpus.resume();
    }

    /// Ends the vCPUs for good; returns when none runs.
    pub fn stop(&mut self) {
        self.vcpus.stop();
    }

    /// Gives the reader of the console a moment to take what the guest has said.
    pub fn drain_console(&self) {
        self.console.drain(CONSOLE_DRAIN);
    }

    /// Takes `target_mib` of the guest's memory into the balloon, as the guest gives it.
    ///
    /// # Errors
    /// More than the guest has.
    pub fn set_balloon(&mut self, target_mib: u64) -> Result<(), VmError> {
        let most = self.has_mib();
        let too_much = VmError::Balloon {
            asked: target_mib,
            most,
        };
        if target_mib > most {
            return Err(too_much);
        }
        let pages = u32::try_from(target_mib * BALLOON_PAGES_PER_MIB).map_err(|_| too_much)?;
        self.balloon.set_target_pages(pages);
        Ok(())
    }

    /// Connects network device `nic` to a tap, by a descriptor for each of the tap's queues. `vhosts` are as many of
    /// `/dev/vhost-net`, if the host's kernel is to carry the packets, or none.
    ///
    /// # Errors
    /// There is no such device, it is connected already, or the tap's descriptors are not what it needs.
    pub fn attach_nic(
        &mut self,
        nic: u8,
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        nics::attach(&self.nics, nic, taps, vhosts, &self.memory)
    }

    /// Lets the guest plug or unplug memory until it has `target_mib` MiB in all. [`Self::memory_set`] tells when it has.
    ///
    /// # Errors
    /// Beyond what the VM was made for.
    pub fn set_memory(&mut self, target_mib: u64) -> Result<(), VmError> {
        let (least, most) = self.memory_mib;
        let mem = self
            .mem
            .as_ref()
            .filter(|_| (least..=most).contains(&target_mib))
            .ok_or(VmError::Size {
                asked: target_mib,
                least,
                most,
            })?;
        // Fits: such a region has been mapped.
        mem.request((target_mib - least) << 20);
        Ok(())
    }

    /// Readable when the guest has as much memory as was last asked for; `None` where it cannot grow.
    #[must_use]
    pub fn memory_set(&self) -> Option<BorrowedFd<'_>> {
        self.mem.as_ref().map(MemHandle::reached)
    }

    /// Takes that signal off: MiB that the guest has, `None` if there was no signal.
    pub fn take_memory_set(&mut self) -> Option<u64> {
        let is_set = self.mem.as_ref().is_some_and(MemHandle::take_reached);
        is_set.then(|| self.has_mib())
    }

    /// MiB of RAM that the guest has.
    fn has_mib(&self) -> u64 {
        let plugged = self.mem.as_ref().map_or(0, MemHandle::plugged_bytes);
        self.memory_mib.0 + (plugged >> 20)
    }

    /// Memory figures.
    ///
    /// # Errors
    /// The host's kernel does not tell.
    pub fn info(&self) -> Result<VmInfo, VmError> {
        Ok(VmInfo {
            memory_bytes: self.has_mib() << 20,
            resident_bytes: memory::resident_bytes(&self.memory.memory())?,
            balloon_bytes: u64::from(self.balloon.held_pages()) * BALLOON_PAGE,
        })
    }

    /// How the VM ended; [`VmExit::Stopped`] if it has not by itself.
    #[must_use]
    pub fn exit(&self) -> VmExit {
        match self.ending.cause() {
            None => VmExit::Stopped,
            Some(Cause::PowerOff) => VmExit::PowerOff,
            Some(Cause::Reset) => VmExit::GuestPanic {
                console: self.console.tail(),
            },
            Some(Cause::Kvm(detail)) => VmExit::KvmError {
                detail,
                console: self.console.tail(),
            },
            Some(Cause::Failed(detail)) => VmExit::Failed { detail },
        }
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

/// The port I/O devices.
fn ports(machine: &Machine, console: &Console, ending: &Arc<Ending>) -> Result<Bus, VmError> {
    let irq = machine.interrupt_line(layout::SERIAL_GSI)?;
    let serial = SerialPort::new(console.clone(), irq);
    let sleep = SleepRegisters::new(Arc::clone(ending));
    let reset = ResetRegister::new(Arc::clone(ending));
    let mut bus = Bus::default();
    let mut insert = |port: u16, count: u16, device: Arc<Mutex<dyn BusDevice>>| {
        bus.insert(u64::from(port), u64::from(count), device)
    };
    insert(
        layout::SERIAL_PORT,
        layout::SERIAL_PORTS,
        Arc::new(Mutex::new(serial)),
    )?;
    insert(layout::SLEEP_CONTROL_PORT, 2, Arc::new(Mutex::new(sleep)))?;
    insert(layout::RESET_PORT, 1, Arc::new(Mutex::new(reset)))?;
    Ok(bus)
}

/// The virtio devices, in the order of their windows.
fn virtio_devices(
    vsock: OwnedFd,
    shares: Vec<Share>,
    balloon: Balloon,
    nics: Vec<Net>,
    mem: Option<Mem>,
) -> Result<Vec<Box<dyn VirtioDevice>>, VmError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![
        Box::new(Vsock::new(GUEST_CID, vsock)),
        Box::new(Rng::default()),
        Box::new(balloon),
    ];
    let count = shares.len();
    for share in shares {
        let fs = Fs::new(&share.tag, share.root, share.cache, count)?;
        devices.push(Box::new(fs));
    }
    for nic in nics {
        devices.push(Box::new(nic));
    }
    if let Some(mem) = mem {
        devices.push(Box::new(mem));
    }
    if devices.len() > layout::MAX_VIRTIO_DEVICES {
        return Err(VmError::TooManyDevices(devices.len()));
    }
    Ok(devices)
}

/// Gives each device a transport, a window, an interrupt line, and a notification a queue.
fn mmio_bus(
    machine: &Machine,
    devices: Vec<Box<dyn VirtioDevice>>,
    memory: &GuestMemory,
    ending: &Arc<Ending>,
    starter: &Arc<Starter>,
) -> Result<Bus, VmError> {
    let mut bus = Bus::default();
    let windows = (layout::VIRTIO_MMIO_START..).step_by(layout::VIRTIO_MMIO_SIZE as usize);
    for ((device, base), gsi) in devices
        .into_iter()
        .zip(windows)
        .zip(layout::VIRTIO_GSI_START..)
    {
        let irq = machine.interrupt_line(gsi)?;
        let (ending, starter) = (Arc::clone(ending), Arc::clone(starter));
        let transport = MmioTransport::new(device, memory.clone(), irq, ending, starter)?;
        for (index, kick) in (0u32..).zip(transport.queue_kicks()) {
            machine.notify_on_write(kick, base + mmio::QUEUE_NOTIFY, index)?;
        }
        bus.insert(base, mmio::WINDOW_SIZE, Arc::new(Mutex::new(transport)))?;
    }
    Ok(bus)
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        Self::read(self, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        Self::write(self, offset, data);
    }
}

#[cfg(test)]
mod tests {
    use husk_protocol::vm::nic_mac;

    use super::*;
    use crate::virtio::testing;

    #[test]
    fn devices_come_in_order_and_are_counted() {
        let devices = |nics: u16| {
            let memory = GuestMemory::new(testing::memory());
            let (bridge, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
            let nics: Vec<_> = (0..nics).map(|_| Net::new(nic_mac(0), 1).0).collect();
            virtio_devices(
                bridge.into(),
                Vec::new(),
                Balloon::new(&memory).0,
                nics,
                None,
            )
        };
        let ids: Vec<_> = devices(2).unwrap().iter().map(|d| d.device_id()).collect();
        // Vsock, entropy, balloon, and the network behind them.
        assert_eq!(ids, [19, 4, 5, 1, 1]);
        let most = layout::MAX_VIRTIO_DEVICES as u16;
        assert!(devices(most - 3).is_ok());
        let error = devices(most - 2).map(drop).unwrap_err();
        assert!(error.to_string().contains("at most 19"), "{error}");
    }
}
