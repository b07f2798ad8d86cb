//! The guest's physical address map: every fixed address in one place.
//!
//! ```text
//! 0x0000_0000  RAM: start info, memory map, command line (all below 640 KiB)
//! 0x000a_0000  nothing, then 128 KiB for the ACPI tables and the VM generation id
//! 0x0010_0000  RAM: kernel where its ELF headers say, initramfs after it
//! 0xc000_0000  the 32-bit MMIO gap: virtio-mmio windows, I/O APIC, local APIC
//! 0x1_0000_0000 the rest of RAM
//! ```

/// First address of the 32-bit MMIO gap; RAM below it is one piece, whatever is left continues at [`HIGH_RAM_START`].
pub const GAP_START: u64 = 0xc000_0000;
/// Where RAM goes on above the gap.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// PVH start info (`struct hvm_start_info`).
pub const START_INFO: u64 = 0x6000;
/// PVH module list: the initramfs.
pub const MODULE_LIST: u64 = 0x6100;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its NUL: `COMMAND_LINE_SIZE` of x86 Linux.
pub const CMDLINE_MAX: usize = 2048;

/// End of conventional memory: what a PC has between here and 1 MiB is not RAM.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// ACPI tables, in the range where firmware keeps them.
pub const ACPI_START: u64 = 0xe_0000;
/// VM generation id: 16 bytes in the last page of the ACPI range.
pub const VM_GENERATION_ID: u64 = 0xf_f000;
/// End of the ACPI range, start of the memory a kernel may be loaded to.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// First interrupt line of the virtio devices; those below are left to the PC's own.
pub const VIRTIO_GSI_START: u32 = 5;
/// Pins of the I/O APIC: one interrupt line each (KVM's fixed number).
pub const IOAPIC_PINS: u32 = 24;

/// I/O APIC registers (KVM's fixed address).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers (architectural reset value).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages Intel hosts without unrestricted guest mode need for real mode.
pub const TSS: u64 = 0xfffb_d000;
/// One page for the same, below the [`TSS`].
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of COM1's ports.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of COM1.
pub const SERIAL_GSI: u32 = 4;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register: the keyboard controller's command port, so that Linux's two ways to reset are one.
pub const RESET_PORT: u16 = 0x64;
/// What resets when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0xfe;
/// Value of `SLP_TYPx` that means soft-off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Most virtio devices: interrupt lines are what runs out first.
pub const MAX_VIRTIO_DEVICES: usize = (IOAPIC_PINS - VIRTIO_GSI_START) as usize;
