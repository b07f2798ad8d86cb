//! From files and figures to guest memory that a vCPU can start in.
//!
//! [`load`] puts kernel, initramfs, command line, ACPI tables and PVH start info into guest memory and says where to
//! start. There is no firmware: the first instruction is the kernel's PVH entry point.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

pub mod acpi;
pub mod cmdline;
pub mod elf;
pub mod pvh;

use std::fs::File;
use std::io::Seek as _;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{layout, memory};
use acpi::AcpiError;
use cmdline::CmdlineError;
use elf::{Kernel, KernelError};

/// What the guest boots from.
pub struct Source<'a> {
    /// Uncompressed `vmlinux`.
    pub kernel: &'a mut File,
    /// Initramfs.
    pub initramfs: &'a mut File,
    /// Kernel command line, without a NUL.
    pub cmdline: &'a str,
    /// vCPUs that the guest may ever have.
    pub vcpus: u8,
    /// virtio-mmio devices, which sit one after the other from [`layout::VIRTIO_MMIO_START`].
    pub virtio_devices: usize,
}

/// Why the guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs file.
    #[error("cannot read the initramfs")]
    Initramfs(#[source] std::io::Error),
    /// Nothing in it.
    #[error("the initramfs is empty: build it with guest-image/build-initramfs.sh")]
    EmptyInitramfs,
    /// Too little guest memory.
    #[error(
        "the kernel ends at {kernel_mib} MiB and the initramfs takes {initramfs_mib} MiB, which does not fit {ram_mib} MiB of guest memory: give the VM more memory"
    )]
    TooBig {
        /// MiB up to the end of the kernel.
        kernel_mib: u64,
        /// MiB of initramfs.
        initramfs_mib: u64,
        /// MiB of RAM below the gap.
        ram_mib: u64,
    },
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Guest memory refused a write: the layout and the RAM size disagree.
    #[error("cannot write {what} to guest memory")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

const PAGE: u64 = 4096;

/// Loads everything; returns the guest-physical entry point.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemoryMmap, source: Source<'_>) -> Result<u64, BootError> {
    let ram = memory::low_bytes(memory);
    let kernel = Kernel::parse(source.kernel, ram)?;
    kernel.load(source.kernel, memory)?;
    let initramfs = load_initramfs(memory, source.initramfs, kernel.end, ram)?;

    let cmdline = cmdline::terminated(source.cmdline)?;
    memory
        .write_slice(&cmdline, GuestAddress(layout::CMDLINE))
        .map_err(wrote("the command line"))?;
    let rsdp = acpi::write(memory, source.vcpus, source.virtio_devices)?;
    pvh::write_start_info(memory, initramfs, rsdp).map_err(wrote("the PVH start info"))?;
    Ok(kernel.entry)
}

fn wrote(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> BootError {
    move |source| BootError::Memory { what, source }
}

/// Puts the initramfs right behind the kernel; returns its address and length.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &mut File,
    kernel_end: u64,
    ram: u64,
) -> Result<(u64, u64), BootError> {
    const MIB: u64 = 1 << 20;
    let len = file.metadata().map_err(BootError::Initramfs)?.len();
    if len == 0 {
        return Err(BootError::EmptyInitramfs);
    }
    let start = kernel_end.next_multiple_of(PAGE);
    if start.checked_add(len).is_none_or(|end| end > ram) {
        return Err(BootError::TooBig {
            kernel_mib: kernel_end.div_ceil(MIB),
            initramfs_mib: len.div_ceil(MIB),
            ram_mib: ram / MIB,
        });
    }
    file.rewind().map_err(BootError::Initramfs)?;
    read_into(memory, file, start, len).map_err(BootError::Initramfs)?;
    Ok((start, len))
}

/// Reads `len` bytes of `file`, from where it stands, to guest address `start`.
fn read_into(
    memory: &GuestMemoryMmap,
    file: &mut File,
    start: u64,
    len: u64,
) -> std::io::Result<()> {
    let too_long = |_| std::io::Error::other("longer than an address space");
    let len = usize::try_from(len).map_err(too_long)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(std::io::Error::other)
}
