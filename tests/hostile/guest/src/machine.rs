#![allow(
    unsafe_code,
    reason = "ports, registers and memory by their addresses: this program is all that there is in its machine"
)]
//! The machine as husk-vmm makes it (`vmm/src/layout.rs`): ports, device registers, and memory by guest-physical address.

use core::arch::asm;
use core::fmt::{self, Write};

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
/// `SLP_EN`, and S5 in `SLP_TYPx`.
const POWER_OFF: u8 = 1 << 5 | 5 << 2;
/// Memory that attacks may use, above the program and below what any VM has.
pub const FREE: core::ops::Range<u64> = 0x100_0000..0x300_0000;
/// Where memory of a small VM may be plugged, as far as it is mapped here.
pub const PLUGGABLE: core::ops::Range<u64> = 0x1_0000_0000..0x1_4000_0000;

/// Writes a byte to a port.
pub fn out(port: u16, value: u8) {
    // SAFETY: a port is a device's; this program's memory is not touched by any write to one.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem)) };
}

/// Writes four bytes to a port, by which a device may read and write [`FREE`] memory.
pub fn out_long(port: u16, value: u32) {
    // SAFETY: as above, and the memory that the device may change is only looked at by volatile reads.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

/// Turns the machine off, as a guest's kernel does.
pub fn power_off() -> ! {
    out(SLEEP_CONTROL, POWER_OFF);
    loop {
        // SAFETY: interrupts are off and stay so: it waits for the VMM to end this.
        unsafe { asm!("hlt", options(nostack, nomem)) };
    }
}

/// Executes what is no instruction. Without an interrupt table that is a triple fault.
pub fn undefined() -> ! {
    // SAFETY: ends the machine.
    unsafe { asm!("ud2", options(noreturn)) };
}

/// Goes on in a device's registers, where no instructions are.
pub fn run_registers(address: u64) -> ! {
    // SAFETY: ends the machine, as KVM finds nothing to fetch there.
    unsafe { asm!("jmp {}", in(reg) address, options(noreturn)) };
}

/// Reads a device's registers by an instruction that KVM does not know how to emulate.
pub fn add_registers(address: u64) {
    // SAFETY: as of any register; the sum goes nowhere.
    unsafe { asm!("haddps xmm0, [{}]", in(reg) address, out("xmm0") _, options(nostack)) };
}

/// The processor's time stamp.
pub fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A device's 32-bit register.
pub fn read_register(address: u64) -> u32 {
    // SAFETY: the address is one of the identity-mapped MMIO gap's, where no memory of this program lies.
    unsafe { (address as *const u32).read_volatile() }
}

/// Sets a device's 32-bit register.
pub fn write_register(address: u64, value: u32) {
    // SAFETY: as above.
    unsafe { (address as *mut u32).write_volatile(value) };
}

/// Reads memory, which may be anybody's: devices write to it.
pub fn read(address: u64, bytes: &mut [u8]) {
    assert!(address.saturating_add(bytes.len() as u64) <= 0xc000_0000);
    for (at, byte) in (address..).zip(bytes) {
        // SAFETY: mapped where it is (entry.rs); by volatile reads, whatever writes it meanwhile.
        *byte = unsafe { (at as *const u8).read_volatile() };
    }
}

/// Writes [`FREE`] memory.
pub fn write(address: u64, bytes: &[u8]) {
    let end = address.saturating_add(bytes.len() as u64);
    assert!(FREE.contains(&address) && end <= FREE.end, "not free");
    for (at, byte) in (address..).zip(bytes) {
        // SAFETY: mapped, and no Rust object lies there.
        unsafe { (at as *mut u8).write_volatile(*byte) };
    }
}

/// Writes an integer of 2, 4 or 8 bytes at once, where a device or another processor may be reading it.
pub fn put(address: u64, width: u8, value: u64) {
    assert!(FREE.contains(&address) && address.is_multiple_of(width.into()));
    // SAFETY: free memory, in which no Rust object lies; aligned.
    unsafe {
        match width {
            2 => (address as *mut u16).write_volatile(value as u16),
            4 => (address as *mut u32).write_volatile(value as u32),
            _ => (address as *mut u64).write_volatile(value),
        }
    }
}

/// Reads where memory may be plugged.
pub fn read_pluggable(address: u64) -> u64 {
    assert!(PLUGGABLE.contains(&address) && address.is_multiple_of(8));
    // SAFETY: mapped where it is (entry.rs); what the VMM has there, if anything, is no Rust object's.
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes there.
pub fn write_pluggable(address: u64, value: u64) {
    assert!(PLUGGABLE.contains(&address) && address.is_multiple_of(8));
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(value) };
}

/// Writes a few bytes at the end of the machine's RAM.
pub fn write_at_end(ram: u64, bytes: &[u8]) {
    assert!(ram > FREE.end && bytes.len() < 4096);
    for (at, byte) in (ram - bytes.len() as u64..).zip(bytes) {
        // SAFETY: above [`FREE`], where nothing of this program lies but what this wrote.
        unsafe { (at as *mut u8).write_volatile(*byte) };
    }
}

/// A little-endian integer in memory.
pub fn word<const N: usize>(address: u64) -> u64 {
    let mut bytes = [0; N];
    read(address, &mut bytes);
    bytes
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// The console.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out(SERIAL, byte));
        Ok(())
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::machine::Serial, $($words)*);
    }};
}
