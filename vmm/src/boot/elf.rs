//! The kernel file: an uncompressed ELF `vmlinux` with a PVH entry point.
//!
//! Our own parser, because everything is checked before the first byte reaches guest memory, and because a wrong
//! file should say what to do about it. The headers are read into a [`Kernel`]; only a checked one can be loaded.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::GuestMemoryMmap;

use crate::layout::HIGH_MEMORY_START;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const ELF_CLASS_64: u8 = 2;
const ELF_DATA_LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry point.
const NOTE_PVH_ENTRY: u32 = 18;
/// A `vmlinux` has about five.
const MAX_SEGMENTS: u16 = 64;
/// A `vmlinux` has a few hundred bytes of notes.
const MAX_NOTES: u64 = 64 * 1024;

/// Why a kernel file was refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Reading failed.
    #[error("cannot read the guest kernel")]
    Read(#[source] io::Error),
    /// Too short for what its headers promise.
    #[error(
        "the guest kernel file is cut short: {0} lies beyond its end; copy or build it again (guest-image/build-kernel.sh)"
    )]
    Truncated(&'static str),
    /// A known wrong kind of file.
    #[error(
        "the guest kernel is {0}: husk boots the uncompressed ELF image `vmlinux` (guest-image/build-kernel.sh makes it)"
    )]
    WrongKind(&'static str),
    /// No PVH note.
    #[error(
        "the guest kernel has no PVH entry point: build it with CONFIG_PVH=y (guest-image/build-kernel.sh does)"
    )]
    NoPvhEntry,
    /// Headers that make no sense.
    #[error("the guest kernel's ELF headers are damaged: {0}")]
    Damaged(&'static str),
    /// Does not fit.
    #[error(
        "the guest kernel needs memory up to {needed_mib} MiB, the VM has {ram_mib} MiB: give the VM more memory"
    )]
    TooBig {
        /// MiB the kernel reaches to.
        needed_mib: u64,
        /// MiB of guest RAM below the MMIO gap.
        ram_mib: u64,
    },
    /// Guest memory refused it.
    #[error("cannot load the guest kernel into guest memory")]
    Load(#[source] io::Error),
}

/// A piece of the file and where it goes. The bytes lie within the file, the target within RAM above 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    file_len: u64,
    address: u64,
    memory_len: u64,
}

/// A checked kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    segments: Vec<Segment>,
    /// Guest-physical address of the PVH entry point, inside a loaded segment.
    pub entry: u64,
    /// First address behind the kernel, its zero-filled data included.
    pub end: u64,
}

/// Little-endian integers at fixed offsets; `None` past the end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }
    fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }
    fn u64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }
}

impl Kernel {
    /// Reads and checks the headers of `image` for a guest with `ram` bytes below the MMIO gap.
    ///
    /// # Errors
    /// Not a `vmlinux` with a PVH entry, damaged, or too big for the guest.
    pub fn parse(image: &mut (impl Read + Seek), ram: u64) -> Result<Self, KernelError> {
        let image_len = image.seek(SeekFrom::End(0)).map_err(KernelError::Read)?;
        let start = read_at(image, 0, image_len.min(1024))?;
        check_kind(&start)?;
        let header = Fields(&start);
        let short = KernelError::Truncated("its ELF header");
        let (Some(table), Some(entry_size), Some(count)) =
            (header.u64(32), header.u16(54), header.u16(56))
        else {
            return Err(short);
        };
        if start.len() < ELF_HEADER {
            return Err(short);
        }
        if usize::from(entry_size) != PROGRAM_HEADER || count == 0 || count > MAX_SEGMENTS {
            return Err(KernelError::Damaged("implausible program header table"));
        }
        let table_len = u64::from(count).saturating_mul(PROGRAM_HEADER as u64);
        within(table, table_len, image_len, "its program header table")?;
        let table = read_at(image, table, table_len)?;

        let mut segments = Vec::new();
        let mut entry = None;
        for raw in table.chunks_exact(PROGRAM_HEADER) {
            let damaged = || KernelError::Damaged("short program header");
            let fields = Fields(raw);
            let kind = fields.u32(0).ok_or_else(damaged)?;
            let segment = Segment {
                offset: fields.u64(8).ok_or_else(damaged)?,
                address: fields.u64(24).ok_or_else(damaged)?,
                file_len: fields.u64(32).ok_or_else(damaged)?,
                memory_len: fields.u64(40).ok_or_else(damaged)?,
            };
            match kind {
                SEGMENT_LOAD if segment.memory_len > 0 => {
                    segments.push(segment);
                }
                SEGMENT_NOTE if entry.is_none() => {
                    within(segment.offset, segment.file_len, image_len, "a note")?;
                    if segment.file_len <= MAX_NOTES {
                        let notes = read_at(image, segment.offset, segment.file_len)?;
                        entry = pvh_entry(&notes);
                    }
                }
                _ => {}
            }
        }
        // Before the segments: any other program is best told apart from a kernel by this.
        let entry = entry.ok_or(KernelError::NoPvhEntry)?;
        let segments = segments
            .into_iter()
            .map(|segment| segment.checked(image_len, ram))
            .collect::<Result<Vec<_>, _>>()?;
        if !segments.iter().any(|s| s.holds(entry)) {
            return Err(KernelError::Damaged(
                "the PVH entry point lies outside the kernel",
            ));
        }
        // `checked` has seen that none wraps around.
        let end = segments
            .iter()
            .map(|s| s.address.saturating_add(s.memory_len))
            .max();
        Ok(Self {
            segments,
            entry,
            end: end.unwrap_or(HIGH_MEMORY_START),
        })
    }

    /// Copies the kernel into guest memory; what its segments leave zero already is.
    ///
    /// # Errors
    /// The file has changed since it was parsed, or cannot be read.
    pub fn load(&self, image: &mut File, memory: &GuestMemoryMmap) -> Result<(), KernelError> {
        for segment in &self.segments {
            image
                .seek(SeekFrom::Start(segment.offset))
                .and_then(|_| super::read_into(memory, image, segment.address, segment.file_len))
                .map_err(KernelError::Load)?;
        }
        Ok(())
    }
}

impl Segment {
    fn checked(self, image_len: u64, ram: u64) -> Result<Self, KernelError> {
        const MIB: u64 = 1 << 20;
        within(self.offset, self.file_len, image_len, "a segment")?;
        if self.file_len > self.memory_len {
            return Err(KernelError::Damaged(
                "a segment is longer in the file than in memory",
            ));
        }
        if self.address < HIGH_MEMORY_START {
            return Err(KernelError::Damaged("a segment loads below 1 MiB"));
        }
        let Some(end) = self.address.checked_add(self.memory_len) else {
            return Err(KernelError::Damaged("a segment wraps around"));
        };
        if end > ram {
            return Err(KernelError::TooBig {
                needed_mib: end.div_ceil(MIB),
                ram_mib: ram / MIB,
            });
        }
        Ok(self)
    }

    fn holds(&self, address: u64) -> bool {
        address
            .checked_sub(self.address)
            .is_some_and(|offset| offset < self.file_len)
    }
}

fn within(offset: u64, len: u64, image_len: u64, what: &'static str) -> Result<(), KernelError> {
    match offset.checked_add(len) {
        Some(end) if end <= image_len => Ok(()),
        _ => Err(KernelError::Truncated(what)),
    }
}

/// Reads a piece that the caller has bounded.
fn read_at(image: &mut (impl Read + Seek), offset: u64, len: u64) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    image
        .seek(SeekFrom::Start(offset))
        .and_then(|_| image.take(len).read_to_end(&mut bytes))
        .map_err(KernelError::Read)?;
    Ok(bytes)
}

/// Tells what a file is by its first bytes, where it is not a 64-bit x86 ELF executable.
fn check_kind(start: &[u8]) -> Result<(), KernelError> {
    let header = Fields(start);
    let wrong = match start {
        [] => "an empty file",
        // Offset 0x202 of a bzImage's set-up header.
        _ if header.array(0x202) == Some(*b"HdrS") => "a compressed bzImage",
        [0x1f, 0x8b, ..] | [0xfd, b'7', ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] => "a compressed file",
        [0x7f, b'E', b'L', b'F', class, data, ..] => {
            let machine = header.u16(18);
            if (*class, *data) == (ELF_CLASS_64, ELF_DATA_LITTLE_ENDIAN)
                && machine == Some(MACHINE_X86_64)
            {
                return Ok(());
            }
            "an ELF file, but not for x86-64"
        }
        _ => "not an ELF file",
    };
    Err(KernelError::WrongKind(wrong))
}

/// Looks for the PVH note. Each note is name length, descriptor length, type, then both padded to four bytes.
fn pvh_entry(notes: &[u8]) -> Option<u64> {
    let fields = Fields(notes);
    let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(4);
    let mut at = 0usize;
    loop {
        let (name_len, desc_len) = (fields.u32(at)?, fields.u32(at.checked_add(4)?)?);
        let kind = fields.u32(at.checked_add(8)?)?;
        let name_at = at.checked_add(12)?;
        let desc_at = name_at.checked_add(padded(name_len)?)?;
        if kind == NOTE_PVH_ENTRY && name_len == 4 && fields.array(name_at) == Some(*b"Xen\0") {
            return match desc_len {
                4 => fields.u32(desc_at).map(u64::from),
                8 => fields.u64(desc_at),
                _ => None,
            };
        }
        at = desc_at.checked_add(padded(desc_len)?)?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A minimal kernel: one loadable segment of `code` at 16 MiB with 64 KiB of memory, and notes.
    fn image(code: &[u8], notes: &[u8]) -> Vec<u8> {
        let headers = (ELF_HEADER + 2 * PROGRAM_HEADER) as u64;
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for value in [16 * MIB, ELF_HEADER as u64, 0] {
            elf.extend(value.to_le_bytes());
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let mut segment = |kind: u32, offset: u64, at: u64, len: usize, memory: u64| {
            elf.extend(kind.to_le_bytes());
            elf.extend(5u32.to_le_bytes());
            for value in [offset, at, at, len as u64, memory, 4096] {
                elf.extend(value.to_le_bytes());
            }
        };
        segment(SEGMENT_LOAD, headers, 16 * MIB, code.len(), 65536);
        segment(SEGMENT_NOTE, headers + code.len() as u64, 0, notes.len(), 0);
        elf.extend(code);
        elf.extend(notes);
        elf
    }

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for value in [name.len() as u32, desc.len() as u32, kind] {
            bytes.extend(value.to_le_bytes());
        }
        for part in [name, desc] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    fn good() -> Vec<u8> {
        let entry = (16 * MIB as u32 + 16).to_le_bytes();
        let notes = [note(b"Linux\0", 1, b"x"), note(b"Xen\0", 18, &entry)].concat();
        image(&[0x90; 32], &notes)
    }

    fn parse(image: &[u8], ram: u64) -> Result<Kernel, KernelError> {
        Kernel::parse(&mut Cursor::new(image), ram)
    }

    #[test]
    fn a_kernel_is_parsed_and_loaded() {
        let kernel = parse(&good(), 64 * MIB).unwrap();
        assert_eq!(kernel.entry, 16 * MIB + 16);
        assert_eq!(kernel.end, 16 * MIB + 65536);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&good()).unwrap();
        let memory = crate::memory::allocate(64).unwrap();
        kernel.load(&mut file, &memory).unwrap();
        let mut code = [0; 33];
        memory
            .read_slice(&mut code, GuestAddress(16 * MIB))
            .unwrap();
        assert_eq!(code[..32], [0x90; 32]);
        assert_eq!(code[32], 0);
    }

    #[test]
    fn a_wrong_file_says_what_it_is() {
        let mut bz = vec![0; 1024];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        let mut arm = good();
        arm[18] = 183;
        for (file, says) in [
            (&b""[..], "an empty file"),
            (b"#!/bin/sh\n", "not an ELF file"),
            (b"\x1f\x8b\x08", "a compressed file"),
            (&bz, "a compressed bzImage"),
            (&arm, "not for x86-64"),
        ] {
            let message = parse(file, 64 * MIB).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
            assert!(message.contains("vmlinux"), "{message}");
        }
    }

    #[test]
    fn a_cut_file_is_refused_wherever_it_is_cut() {
        let good = good();
        for len in 20..good.len() {
            let error = parse(&good[..len], 64 * MIB).unwrap_err();
            assert!(matches!(error, KernelError::Truncated(_)), "{len}: {error}");
        }
    }

    #[test]
    fn no_pvh_note_names_the_option() {
        for notes in [
            vec![],
            note(b"Xen\0", 17, &[0; 4]),
            note(b"Xen\0", 18, &[0; 2]),
        ] {
            let error = parse(&image(&[0; 32], &notes), 64 * MIB).unwrap_err();
            assert!(matches!(error, KernelError::NoPvhEntry), "{error}");
        }
    }

    #[test]
    fn an_entry_outside_the_kernel_is_refused() {
        let notes = note(b"Xen\0", 18, &[0; 8]);
        let error = parse(&image(&[0; 32], &notes), 64 * MIB).unwrap_err();
        assert!(matches!(error, KernelError::Damaged(_)));
    }

    #[test]
    fn a_kernel_beyond_ram_is_refused_with_figures() {
        let message = parse(&good(), 16 * MIB).unwrap_err().to_string();
        assert!(
            message.contains("17 MiB") && message.contains("16 MiB"),
            "{message}"
        );
    }

    proptest! {
        #[test]
        fn hostile_headers_are_refused_or_bounded(changes in prop::collection::vec((0usize..200, any::<u8>()), 1..8)) {
            let mut bytes = good();
            let len = bytes.len();
            for (at, value) in changes {
                bytes[at % len] = value;
            }
            if let Ok(kernel) = parse(&bytes, 64 * MIB) {
                for s in kernel.segments {
                    prop_assert!(s.offset + s.file_len <= len as u64);
                    prop_assert!(s.address >= MIB && s.address + s.memory_len <= 64 * MIB);
                }
            }
        }

        #[test]
        fn any_notes_end(notes in prop::collection::vec(prop_oneof![Just(0u8), Just(4), Just(18), Just(0xff), any::<u8>()], 0..256)) {
            let _ = pvh_entry(&notes);
        }
    }
}
