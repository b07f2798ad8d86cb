//! ACPI tables: how the guest learns of its CPUs, devices and power registers.
//!
//! The hardware-reduced model (ACPI 6.5, 4.1): no PIC, no timer, no fixed event registers, only what the FADT names. The
//! MADT lists one local APIC a vCPU and the I/O APIC; the DSDT lists the virtio-mmio windows, the serial port and
//! the VM generation id. Tables lie one after the other from [`layout::ACPI_START`], the RSDP first.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use rustix::rand::GetRandomFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const OEM_ID: [u8; 6] = *b"HUSK  ";
const OEM_TABLE_ID: [u8; 8] = *b"HUSKVM  ";
const OEM_REVISION: u32 = 1;
/// Integers in our AML are 64 bits wide from revision 2 on.
const DSDT_REVISION: u8 = 2;
/// Length of a table without content: its header.
const SDT_HEADER: u32 = 36;

/// FADT, IA-PC boot architecture flags: neither VGA nor a CMOS clock is there, and ASPM is not ours to set. That the
/// legacy-devices and 8042 bits are clear says that those are not there either.
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More devices than the range holds.
    #[error("{0} virtio devices asked for: a VM has at most {most}", most = layout::MAX_VIRTIO_DEVICES)]
    TooManyDevices(usize),
    /// The tables outgrew their range.
    #[error("the ACPI tables are {0} bytes too long for their range")]
    TooLong(u64),
    /// Guest memory refused a write.
    #[error("cannot write the ACPI tables to guest memory")]
    Memory(#[source] GuestMemoryError),
    /// No randomness for the VM generation id.
    #[error("cannot draw a VM generation id")]
    GenerationId(#[source] std::io::Error),
}

/// Where the tables go, and what comes next.
struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    /// Reserves room for `len` bytes at a 16-byte boundary.
    fn reserve(&mut self, len: u64) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(16))
            .unwrap_or(u64::MAX);
        if end > layout::VM_GENERATION_ID {
            let more = end.saturating_sub(layout::VM_GENERATION_ID);
            return Err(AcpiError::TooLong(more));
        }
        self.next = end;
        Ok(at)
    }

    fn put(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.reserve(bytes.len() as u64)?;
        self.put_at(at, &bytes)?;
        Ok(at)
    }

    fn put_at(&self, at: u64, bytes: &[u8]) -> Result<(), AcpiError> {
        self.memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(AcpiError::Memory)
    }
}

/// Writes all tables for `vcpus` vCPUs and `virtio_devices` virtio-mmio windows; returns the RSDP's address.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    vcpus: u8,
    virtio_devices: usize,
) -> Result<u64, AcpiError> {
    let mut writer = Writer {
        memory,
        next: layout::ACPI_START,
    };
    let rsdp = writer.reserve(Rsdp::len() as u64)?;
    let dsdt = writer.put(&dsdt(virtio_devices)?)?;
    let fadt = writer.put(&fadt(dsdt))?;
    let madt = writer.put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.put(&xsdt)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    writer.put_at(rsdp, &bytes)?;
    writer.put_at(layout::VM_GENERATION_ID, &generation_id()?)?;
    Ok(rsdp)
}

/// A fresh VM generation id: never seen before, so that clones of one VM can tell themselves apart.
fn generation_id() -> Result<[u8; 16], AcpiError> {
    let mut id = [0; 16];
    // 16 bytes come whole (getrandom(2)).
    rustix::rand::getrandom(&mut id[..], GetRandomFlags::empty())
        .map_err(|e| AcpiError::GenerationId(e.into()))?;
    Ok(id)
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means that there is no fixed-hardware button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM | NO_CMOS_CLOCK).into();
    fadt.reset_reg = byte_port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(virtio_devices: usize) -> Result<Sdt, AcpiError> {
    if virtio_devices > layout::MAX_VIRTIO_DEVICES {
        return Err(AcpiError::TooManyDevices(virtio_devices));
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        SDT_HEADER,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut aml = Vec::new();
    // Soft-off: the sleep type that the power registers expect.
    let sleep_type = layout::SLEEP_TYPE_S5;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&sleep_type, &sleep_type]),
    )
    .to_aml_bytes(&mut aml);
    serial_port().append_to(&mut aml);
    generation_id_device().append_to(&mut aml);
    // 19 at most (`MAX_VIRTIO_DEVICES`), so addresses stay in the gap and names in two digits.
    for index in (0u32..).take(virtio_devices) {
        virtio_device(index).append_to(&mut aml);
    }
    dsdt.append_slice(&aml);
    Ok(dsdt)
}

/// A device below `\_SB`, as finished AML.
struct DeviceAml(Vec<u8>);

impl DeviceAml {
    fn new(name: &str, children: Vec<&dyn Aml>) -> Self {
        let device = aml::Device::new(name.into(), children);
        let mut bytes = Vec::new();
        aml::Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(&mut bytes);
        Self(bytes)
    }

    fn append_to(&self, aml: &mut Vec<u8>) {
        aml.extend_from_slice(&self.0);
    }
}

/// An address of the layout below 4 GiB, as the tables have it; for constants only.
const fn low(address: u64) -> u32 {
    assert!(address <= 0xffff_ffff, "an address above 4 GiB");
    (address & 0xffff_ffff) as u32
}

const MMIO_START: u32 = low(layout::VIRTIO_MMIO_START);
const MMIO_SIZE: u32 = low(layout::VIRTIO_MMIO_SIZE);
const GENERATION_ID: u32 = low(layout::VM_GENERATION_ID);
const SERIAL_PORTS: u8 = {
    let [low, high] = layout::SERIAL_PORTS.to_le_bytes();
    assert!(high == 0, "a range of ports has at most 255");
    low
};

fn virtio_device(index: u32) -> DeviceAml {
    // Fits: 19 windows of 4 KiB from 0xd000_0000.
    let base = MMIO_START.saturating_add(index.saturating_mul(MMIO_SIZE));
    let interrupt = layout::VIRTIO_GSI_START.saturating_add(index);
    DeviceAml::new(
        &format!("V{index:03}"),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            // DMA is coherent: without this, Linux would not let the device use it.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base, MMIO_SIZE),
                    &aml::Interrupt::new(true, true, false, false, interrupt),
                ]),
            ),
        ],
    )
}

fn serial_port() -> DeviceAml {
    let port = layout::SERIAL_PORT;
    DeviceAml::new(
        "COM1",
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &aml::IO::new(port, port, 0, SERIAL_PORTS),
                ]),
            ),
        ],
    )
}

/// Microsoft's "Virtual Machine Generation ID": `ADDR` says where the guest finds the id.
fn generation_id_device() -> DeviceAml {
    DeviceAml::new(
        "VGEN",
        vec![
            &aml::Name::new("_HID".into(), &"HUSK0001"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new(
                "ADDR".into(),
                &aml::Package::new(vec![&GENERATION_ID, &aml::ZERO]),
            ),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let table = bytes(memory, at, len as usize);
        assert_eq!(sum(&table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    fn pointer(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_rsdp_leads_to_every_table() {
        let memory = crate::memory::allocate(64).unwrap();
        for vcpus in [1, 2, 32] {
            let rsdp = write(&memory, vcpus, layout::MAX_VIRTIO_DEVICES).unwrap();
            let root = bytes(&memory, rsdp, 36);
            assert_eq!(&root[..8], b"RSD PTR ");
            assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
            let xsdt = table(&memory, pointer(&root, 24));
            assert_eq!(&xsdt[..4], b"XSDT");
            let fadt = table(&memory, pointer(&xsdt, 36));
            assert_eq!(&fadt[..4], b"FACP");
            let dsdt = table(&memory, pointer(&fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            let madt = table(&memory, pointer(&xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            assert_eq!(madt.len(), 44 + usize::from(vcpus) * 8 + 12);
            // All are enabled, also those that stay offline at boot: Linux takes no others for present.
            for (cpu, entry) in (0..vcpus).zip(madt[44..].chunks(8)) {
                assert_eq!(entry, [0, 8, cpu, cpu, 1, 0, 0, 0]);
            }
            if let Some(dir) = std::env::var_os("HUSK_ACPI_DUMP") {
                let dir = std::path::PathBuf::from(dir);
                for (name, table) in [
                    ("dsdt", &dsdt),
                    ("facp", &fadt),
                    ("apic", &madt),
                    ("xsdt", &xsdt),
                ] {
                    std::fs::write(dir.join(format!("{name}.aml")), table).unwrap();
                }
            }
        }
    }

    #[test]
    fn each_vm_has_its_own_generation_id() {
        let memory = crate::memory::allocate(64).unwrap();
        let id = || {
            write(&memory, 1, 0).unwrap();
            bytes(&memory, layout::VM_GENERATION_ID, 16)
        };
        assert_ne!(id(), id());
    }

    #[test]
    fn one_device_too_many_is_refused() {
        let memory = crate::memory::allocate(64).unwrap();
        let error = write(&memory, 1, layout::MAX_VIRTIO_DEVICES + 1).unwrap_err();
        assert!(matches!(error, AcpiError::TooManyDevices(20)));
    }
}
