//! The PVH boot protocol: what the kernel finds in memory and in its registers at the entry point.
//!
//! Xen's `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h` define it: 32-bit protected mode, flat segments,
//! paging off, EBX pointing to `struct hvm_start_info` with the command line, modules (here the initramfs), memory map and RSDP.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::{layout, memory};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const RESERVED: u32 = 2;

/// `X86_EFLAGS_FIXED`: always one.
const EFLAGS: u64 = 2;
/// Protection enable, extension type; neither paging nor the cache-disable bits of a reset.
const CR0: u64 = 1 | 1 << 4;

/// The guest's memory map: base, length, type, ascending.
fn memory_map(ram_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, RAM),
        (
            layout::ACPI_START,
            layout::HIGH_MEMORY_START - layout::ACPI_START,
            RESERVED,
        ),
    ];
    for (base, len) in memory::ranges(ram_bytes) {
        let start = base.max(layout::HIGH_MEMORY_START);
        // RAM reaches beyond 1 MiB, or no kernel would have been loaded.
        let end = base.saturating_add(len);
        map.push((start, end.saturating_sub(start), RAM));
    }
    map
}

/// Writes start info, module list and memory map. `initramfs` is address and length, `rsdp` an address.
pub(super) fn write_start_info(
    memory: &GuestMemoryMmap,
    initramfs: (u64, u64),
    rsdp: u64,
) -> Result<(), GuestMemoryError> {
    let map = memory_map(memory::total_bytes(memory));
    let mut at = layout::MEMORY_MAP;
    for (addr, size, type_) in &map {
        let entry = hvm_memmap_table_entry {
            addr: *addr,
            size: *size,
            type_: *type_,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at))?;
        at = at.saturating_add(size_of::<hvm_memmap_table_entry>() as u64);
    }
    let (paddr, size) = initramfs;
    let module = hvm_modlist_entry {
        paddr,
        size,
        ..Default::default()
    };
    memory.write_obj(module, GuestAddress(layout::MODULE_LIST))?;
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: 1,
        modlist_paddr: layout::MODULE_LIST,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        // At most four: two pieces of RAM, conventional memory and the ACPI range.
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(layout::START_INFO))
}

/// General registers at the entry point.
#[must_use]
pub fn registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rbx: layout::START_INFO,
        rflags: EFLAGS,
        ..Default::default()
    }
}

/// Turns the special registers of a reset into those of the entry point.
pub fn set_special_registers(sregs: &mut kvm_sregs) {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    sregs.cs = flat_segment(CODE, 0x8);
    let data = flat_segment(DATA, 0x10);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS of the minimal size; nothing uses it before the kernel loads its own.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        selector: 0x18,
        ..Default::default()
    };
    sregs.cr0 = CR0;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// A 32-bit segment that covers 4 GiB from zero.
fn flat_segment(type_: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_start_info_leads_to_everything() {
        let memory = crate::memory::allocate(64).unwrap();
        write_start_info(&memory, (32 * MIB, 77), 0xe0000).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::START_INFO)).unwrap();
        assert_eq!((info.magic, info.version), (MAGIC, 1));
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 3));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (32 * MIB, 77));
        let entry: hvm_memmap_table_entry = memory
            .read_obj(GuestAddress(info.memmap_paddr + 48))
            .unwrap();
        assert_eq!((entry.addr, entry.size, entry.type_), (MIB, 63 * MIB, RAM));
    }

    proptest! {
        #[test]
        fn the_map_is_sorted_and_within_ram(mib in 64u64..65536) {
            let map = memory_map(mib * MIB);
            for pair in map.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            let ram: u64 = map.iter().filter(|e| e.2 == RAM).map(|e| e.1).sum();
            // All but the hole between conventional memory and 1 MiB.
            prop_assert_eq!(ram, mib * MIB - (MIB - layout::LOW_MEMORY_END));
        }
    }
}
