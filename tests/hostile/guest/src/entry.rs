#![allow(
    unsafe_code,
    reason = "the first instructions, and what a compiler expects of a C library"
)]
//! From the PVH entry point (32-bit, no paging) to Rust (64-bit, the first 5 GiB mapped where they are), and the same for a second
//! processor, which begins in real mode.
//!
//! There is no interrupt table: an exception is a triple fault, which ends the VM with its registers in the report.

use core::arch::{asm, global_asm};

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

    .section .text.entry, "ax"
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    movl $stack_top, %esp
    movl %ebx, %esi
    # 2560 pages of 2 MiB, writable.
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    shll $21, %eax
    orl $0x83, %eax
    movl %eax, directories(, %ecx, 8)
    movl %ecx, %eax
    shrl $11, %eax
    movl %eax, directories + 4(, %ecx, 8)
    incl %ecx
    cmpl $2560, %ecx
    jne 2b
    movl $directories + 0x0003, pointers
    movl $directories + 0x1003, pointers + 8
    movl $directories + 0x2003, pointers + 16
    movl $directories + 0x3003, pointers + 24
    movl $directories + 0x4003, pointers + 32
    movl $pointers + 3, top
    lgdt gdt_pointer
    movl $long_mode, %ebp
paging:
    # PAE, and SSE, which compiled code uses.
    movl %cr4, %eax
    orl $0x620, %eax
    movl %eax, %cr4
    movl $top, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    # No emulation of an FPU, and caches, which a processor is woken without.
    andl $0x9ffffffb, %eax
    orl $0x80000002, %eax
    movl %eax, %cr0
    ljmp $8, $1f
    .code64
1:  movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %ebp, %ebp
    jmp *%rbp
long_mode:
    movq $stack_top, %rsp
    movl %esi, %edi
    call begin
1:  hlt
    jmp 1b

    # A woken processor begins with a copy of this at WAKE_AT, in real mode.
    .code16
    .globl second_start, second_end
second_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl second_gdt_pointer - second_start
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $24, $second_protected
second_gdt_pointer:
    .word 31
    .long gdt
second_end:
    .code32
second_protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $second_long_mode, %ebp
    jmp paging
    .code64
second_long_mode:
    movq $second_stack_top, %rsp
    call begin_second
1:  hlt
    jmp 1b

    .section .rodata.gdt, "a"
    .align 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
    .word 31
    .long gdt

    .section .bss.tables, "aw", @nobits
    .align 4096
directories: .skip 5 * 4096
pointers: .skip 4096
top: .skip 4096
    .skip 256 * 1024
stack_top:
    .skip 64 * 1024
second_stack_top:
    "#,
    options(att_syntax)
);

#[unsafe(no_mangle)]
extern "C" fn begin(start_info: u64) -> ! {
    crate::main(start_info)
}

#[unsafe(no_mangle)]
extern "C" fn begin_second() -> ! {
    crate::second::main()
}

unsafe extern "C" {
    static second_start: u8;
    static second_end: u8;
}

/// Where a woken processor begins: free memory below 640 KiB, between the VMM's start information and its command line
/// (`vmm/src/layout.rs`), at the start of a page by whose number it is woken.
pub const WAKE_AT: u64 = 0x1_0000;

/// Puts there what it begins with.
pub fn place_second() {
    let (from, end) = (&raw const second_start, &raw const second_end);
    for (offset, to) in (0..end.addr() - from.addr()).zip(WAKE_AT..) {
        // SAFETY: from this program's text to memory in which nothing lies.
        unsafe { (to as *mut u8).write_volatile(from.add(offset).read()) };
    }
}

/// What `core` was compiled with expects it; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's two ranges do not overlap and are its own.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: copied upwards, nothing is written before it has been read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: copied downwards, nothing is written before it has been read; the direction is set back at once.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            options(nostack)
        );
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the range is the caller's.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: both ranges are the caller's. By volatile reads, or the compiler would make this a call of memcmp.
        let (a, b) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: as the caller's.
    unsafe { memcmp(a, b, len) }
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller's text has an end.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
