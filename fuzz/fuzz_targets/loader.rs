//! A kernel file, an initramfs and a command line into guest memory: all of it refused before the first byte is written, or there to the letter
//! and inside of RAM, with tables that can be read.
#![no_main]

use std::{fs::File, io::Write as _, ops::Range};

use husk_vmm::{
    boot::{self, BootError, Source, cmdline, elf::KernelError},
    layout,
    memory::resident_bytes,
};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    ram: Ram,
    headers: Vec<Header>,
    notes: Vec<Note>,
    code: Vec<u8>,
    elf: Elf,
    initramfs: Initramfs,
    cmdline: String,
    debug_console: bool,
    vcpus: u8,
    devices: u8,
    damage: Vec<(u16, u8)>,
    cut: Option<u16>,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Ram {
    Two,
    Sixteen,
    SixtyFour,
}

/// A program header.
#[derive(arbitrary::Arbitrary, Debug)]
struct Header {
    kind: Kind,
    offset: Place,
    address: Address,
    file_len: Length,
    memory_len: Length,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Kind {
    Load,
    LoadToo,
    Note,
    Other(u32),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Place {
    Code(u8),
    Notes,
    Any(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Address {
    Page(u8),
    End(i8),
    Low(u16),
    Any(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Length {
    Whole,
    Some(u8),
    Pages(u8),
    Any(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Note {
    Entry32(u32),
    Entry64(u64),
    InPage(u8, u8),
    Other {
        name: Vec<u8>,
        kind: u8,
        data: Vec<u8>,
    },
    Lie(u32, u32, u32),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Elf {
    Good,
    GoodToo,
    Count(u16),
    Table(u64),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Initramfs {
    Bytes(Vec<u8>),
    Pages(u8),
    Sparse(u32),
}

const MIB: u64 = 1 << 20;
const HEADER: u64 = 64;

fuzz_target!(|input: Input| {
    let ram = match input.ram {
        Ram::Two => 2 * MIB,
        Ram::Sixteen => 16 * MIB,
        Ram::SixtyFour => 64 * MIB,
    };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
    let image = input.image(ram);
    let mut kernel = file(&image);
    let initramfs = input.initramfs.bytes();
    let mut initramfs_file = file(&initramfs);
    if let Initramfs::Sparse(len) = input.initramfs {
        initramfs_file.set_len(len.into()).unwrap();
    }
    let cmdline = cmdline::compose(&input.cmdline, input.debug_console, None);
    let source = Source {
        kernel: &mut kernel,
        initramfs: &mut initramfs_file,
        cmdline: &cmdline,
        vcpus: input.vcpus % 32 + 1,
        virtio_devices: usize::from(input.devices % 24),
    };
    match boot::load(&memory, source) {
        Ok(entry) => {
            assert!((layout::HIGH_MEMORY_START..ram).contains(&entry));
            for (start, len) in segments(&image) {
                assert!(start >= layout::HIGH_MEMORY_START && start + len <= ram);
            }
            let loaded = Loaded { memory, ram };
            loaded.check(&cmdline, &initramfs);
        }
        Err(error) => {
            let _ = husk_vmm::sentence(&error);
            let is_early = matches!(&error, BootError::Kernel(error) if !matches!(error, KernelError::Load(_)));
            let touched = resident_bytes(&memory).unwrap();
            assert!(
                !is_early || touched == 0,
                "{touched} bytes written, then {error}"
            );
        }
    }
});

/// Where a kernel that was taken has its segments, by address and length in memory.
fn segments(image: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let long = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    let table = long(32) as usize;
    let count = usize::from(u16::from_le_bytes([image[56], image[57]]));
    let headers = (0..count).map(move |number| table + 56 * number);
    headers
        .filter(move |at| image[*at..at + 4] == 1_u32.to_le_bytes())
        .map(move |at| (long(at + 24), long(at + 40)))
        .filter(|(_, len)| *len > 0)
}

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("fuzz", MFdFlags::empty()).unwrap());
    file.write_all(bytes).unwrap();
    file
}

impl Initramfs {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Pages(count) => vec![0x5a; usize::from(*count) << 12],
            Self::Sparse(_) => Vec::new(),
        }
    }
}

impl Input {
    /// The kernel file: its header, program headers, code, notes.
    fn image(&self, ram: u64) -> Vec<u8> {
        let count = self.headers.len().min(64) as u64;
        let code_at = HEADER + 56 * count;
        let notes_at = code_at + self.code.len() as u64;
        let notes: Vec<u8> = self.notes.iter().flat_map(Note::bytes).collect();
        let (table, count) = match self.elf {
            Elf::Good | Elf::GoodToo => (HEADER, count as u16),
            Elf::Count(count) => (HEADER, count),
            Elf::Table(table) => (table, count as u16),
        };
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for value in [MIB, table, 0] {
            elf.extend(value.to_le_bytes());
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0]);
        elf.extend(count.to_le_bytes());
        elf.resize(HEADER as usize, 0);
        for header in self.headers.iter().take(64) {
            let kind = match header.kind {
                Kind::Load | Kind::LoadToo => 1,
                Kind::Note => 4,
                Kind::Other(kind) => kind,
            };
            let (offset, whole) = match header.offset {
                Place::Code(at) => (code_at + u64::from(at), self.code.len()),
                Place::Notes => (notes_at, notes.len()),
                Place::Any(offset) => (offset, 0),
            };
            let address = match header.address {
                Address::Page(page) => MIB + (u64::from(page) << 12),
                Address::End(by) => ram.wrapping_add_signed(by.into()),
                Address::Low(address) => address.into(),
                Address::Any(address) => address,
            };
            let length = |length: &Length| match length {
                Length::Whole => whole as u64,
                Length::Some(len) => (*len).into(),
                Length::Pages(count) => u64::from(*count) << 12,
                Length::Any(len) => *len,
            };
            elf.extend((kind as u32).to_le_bytes());
            elf.extend(5_u32.to_le_bytes());
            let (file_len, memory_len) = (length(&header.file_len), length(&header.memory_len));
            for value in [offset, address, address, file_len, memory_len, 4096] {
                elf.extend(value.to_le_bytes());
            }
        }
        elf.extend(&self.code);
        elf.extend(notes);
        for (at, byte) in &self.damage {
            if let Some(old) = elf.get_mut(usize::from(*at)) {
                *old = *byte;
            }
        }
        if let Some(len) = self.cut {
            elf.truncate(len.into());
        }
        elf
    }
}

impl Note {
    fn bytes(&self) -> Vec<u8> {
        let (name, kind, data) = match self {
            Self::Entry32(entry) => (&b"Xen\0"[..], 18, entry.to_le_bytes().to_vec()),
            Self::Entry64(entry) => (&b"Xen\0"[..], 18, entry.to_le_bytes().to_vec()),
            Self::InPage(page, by) => {
                let entry = MIB + (u64::from(*page) << 12) + u64::from(*by);
                (&b"Xen\0"[..], 18, entry.to_le_bytes().to_vec())
            }
            Self::Other { name, kind, data } => (&**name, u32::from(*kind), data.clone()),
            Self::Lie(name, data, kind) => {
                return [name, data, kind].map(|word| word.to_le_bytes()).concat();
            }
        };
        let mut bytes = Vec::new();
        for word in [name.len() as u32, data.len() as u32, kind] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [name, &data] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }
}

/// What the guest starts with.
struct Loaded {
    memory: GuestMemoryMmap,
    ram: u64,
}

impl Loaded {
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn u32(&self, at: u64) -> u32 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn u64(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// `struct hvm_start_info` and all that it leads to.
    fn check(&self, cmdline: &str, initramfs: &[u8]) {
        let info = layout::START_INFO;
        assert_eq!((self.u32(info), self.u32(info + 4)), (0x336e_c578, 1));
        assert_eq!(self.u32(info + 12), 1, "one module");
        let [modules, cmdline_at, rsdp, map] =
            [16, 24, 32, 40].map(|offset| self.u64(info + offset));
        let (start, len) = (self.u64(modules), self.u64(modules + 8));
        assert!(start >= layout::HIGH_MEMORY_START && start + len <= self.ram);
        assert_eq!(self.bytes(start, initramfs.len()), initramfs);
        let written = self.bytes(cmdline_at, cmdline.len() + 1);
        assert_eq!(written, [cmdline.as_bytes(), &[0]].concat());
        let mut end = 0;
        let mut holds_it = false;
        for number in 0..u64::from(self.u32(info + 48)) {
            let entry = map + 24 * number;
            let (at, size, kind) = (self.u64(entry), self.u64(entry + 8), self.u32(entry + 16));
            assert!(at >= end && size > 0, "the memory map is no map");
            end = at + size;
            holds_it |= kind == 1 && at <= start && start + len <= end;
        }
        assert!(holds_it, "the initramfs is not in RAM");
        self.check_acpi(rsdp);
    }

    /// The tables by their pointers (ACPI 6.5, 5.2), each whole, of the right sum and where firmware keeps it.
    fn check_acpi(&self, rsdp: u64) {
        let place: Range<u64> = layout::ACPI_START..layout::VM_GENERATION_ID;
        let whole = |at: u64, len: usize| {
            assert!(place.contains(&at) && at + len as u64 <= place.end);
            let bytes = self.bytes(at, len);
            let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "the checksum of the table at {at:#x}");
            bytes
        };
        let table = |at: u64, signature: &[u8; 4]| {
            let bytes = whole(at, self.u32(at + 4) as usize);
            assert_eq!(&bytes[..4], signature);
            bytes
        };
        assert_eq!(&whole(rsdp, 36)[..8], b"RSD PTR ");
        let xsdt = table(self.u64(rsdp + 24), b"XSDT");
        let entries = xsdt[36..].chunks_exact(8);
        let entries: Vec<_> = entries
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
            .collect();
        let [fadt, madt] = entries[..] else {
            panic!("{entries:?}");
        };
        let fadt = table(fadt, b"FACP");
        table(madt, b"APIC");
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        table(dsdt, b"DSDT");
    }
}
