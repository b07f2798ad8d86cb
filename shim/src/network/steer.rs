//! Brings every TCP connection to the loopback addresses of a network namespace to one listener, whatever port was dialled.
//!
//! A `BPF_PROG_TYPE_SK_LOOKUP` program (Linux 5.9) is asked which socket a new connection is for, before the kernel looks for a
//! listener of that port; ours names the one socket of its map. The socket that is accepted has the dialled address as its own, so
//! getsockname tells the port. A link holds the program at the namespace, the program its map; the map lets go of the
//! listener when that is closed. Nothing has a name: all of it goes with the link's fd, or with the namespace.
//!
//! A redirection by nftables would do the same with a table that outlives a killed shim, in a namespace whose tables are those of CNI's
//! plugins, and needs connection tracking to find the port again.

#![allow(unsafe_code, reason = "no crate in use wraps bpf(2)")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

/// Commands of bpf(2), linux/bpf.h.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;

/// Of linux/bpf.h.
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Whose loopback addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// 127.0.0.0/8.
    V4,
    /// ::1.
    V6,
}

/// Steers the connections of a network namespace to a listener in it, for as long as the link is open that is returned.
///
/// # Errors
/// Those of bpf(2): the kernel is too old (`EINVAL`), or the caller lacks CAP_BPF and CAP_NET_ADMIN (`EPERM`).
pub fn steer(
    listener: BorrowedFd<'_>,
    family: Family,
    namespace: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let map = make_map()?;
    put(&map, listener)?;
    let program = load(&assemble(family.conditions(), &map))?;
    link(&program, namespace)
}

/// A word of the program's context that must be `value` once `mask` has been applied.
struct Condition {
    /// Its place in `struct bpf_sk_lookup` of linux/bpf.h.
    offset: i16,
    mask: u32,
    value: u32,
}

const fn is(offset: i16, value: u32) -> Condition {
    Condition {
        offset,
        mask: u32::MAX,
        value,
    }
}

/// Offsets in `struct bpf_sk_lookup`. The local addresses are those that were dialled, in network byte order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

const TCP: u32 = libc::IPPROTO_TCP.cast_unsigned();

impl Family {
    fn conditions(self) -> &'static [Condition] {
        const V4: [Condition; 3] = [
            is(FAMILY, libc::AF_INET.cast_unsigned()),
            is(PROTOCOL, TCP),
            Condition {
                offset: LOCAL_IP4,
                mask: u32::from_ne_bytes([255, 0, 0, 0]),
                value: u32::from_ne_bytes([127, 0, 0, 0]),
            },
        ];
        const V6: [Condition; 6] = [
            is(FAMILY, libc::AF_INET6.cast_unsigned()),
            is(PROTOCOL, TCP),
            is(LOCAL_IP6, 0),
            is(LOCAL_IP6 + 4, 0),
            is(LOCAL_IP6 + 8, 0),
            is(LOCAL_IP6 + 12, u32::from_ne_bytes([0, 0, 0, 1])),
        ];
        match self {
            Self::V4 => &V4,
            Self::V6 => &V6,
        }
    }
}

/// eBPF's registers, by what they hold here.
#[derive(Debug, Clone, Copy)]
enum Register {
    /// The answer of a call, and the program's own.
    R0 = 0,
    /// Arguments of a call; R1 is the context first.
    R1 = 1,
    R2 = 2,
    R3 = 3,
    /// The context.
    R6 = 6,
    /// The listener.
    R7 = 7,
    /// The end of the stack.
    R10 = 10,
}

use Register::{R0, R1, R2, R3, R6, R7, R10};

// Operation codes of linux/bpf_common.h and linux/bpf.h: class | source or size | operation.
/// r = *(u32 *)(r + offset)
const LOAD_WORD: u8 = 0x61;
/// *(u32 *)(r + offset) = immediate
const STORE_WORD: u8 = 0x62;
/// r = the 64 bits of two immediates
const LOAD_WIDE: u8 = 0x18;
/// r = immediate
const MOVE: u8 = 0xb7;
/// r = r
const MOVE_REGISTER: u8 = 0xbf;
/// r += immediate
const ADD: u8 = 0x07;
/// The lower 32 bits of r &= immediate
const AND_WORD: u8 = 0x54;
/// if the lower 32 bits of r != immediate goto
const IF_WORD_NOT_EQUAL: u8 = 0x56;
/// if r == immediate goto
const IF_EQUAL: u8 = 0x15;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// In a LOAD_WIDE's source register: the immediate is a map's fd (BPF_PSEUDO_MAP_FD).
const MAP_FD: Register = R1;

/// What may be called, of `enum bpf_func_id`.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// The program's answer: the connection may come, to the assigned socket or else to whom the kernel finds.
const SK_PASS: i32 = 1;

/// One instruction as the kernel's eight bytes.
fn encode(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | (to as u64) << 8
        | (from as u64) << 12
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

fn simple(code: u8, to: Register, immediate: i32) -> u64 {
    encode(code, to, R0, 0, immediate)
}

/// The program: where all conditions hold, the map's first socket takes the connection.
fn assemble(conditions: &[Condition], map: &OwnedFd) -> Vec<u64> {
    // A key of 0 on the stack, the socket for it, and the socket given back after its use.
    let assign = [
        encode(STORE_WORD, R10, R0, -4, 0),
        encode(LOAD_WIDE, R1, MAP_FD, 0, map.as_raw_fd()),
        0,
        encode(MOVE_REGISTER, R2, R10, 0, 0),
        simple(ADD, R2, -4),
        simple(CALL, R0, MAP_LOOKUP_ELEM),
        // None: seven instructions on is the answer.
        encode(IF_EQUAL, R0, R0, 7, 0),
        encode(MOVE_REGISTER, R7, R0, 0, 0),
        encode(MOVE_REGISTER, R1, R6, 0, 0),
        encode(MOVE_REGISTER, R2, R7, 0, 0),
        simple(MOVE, R3, 0),
        simple(CALL, R0, SK_ASSIGN),
        encode(MOVE_REGISTER, R1, R7, 0, 0),
        simple(CALL, R0, SK_RELEASE),
    ];
    let answer = [simple(MOVE, R0, SK_PASS), simple(EXIT, R0, 0)];
    let mut program = vec![encode(MOVE_REGISTER, R6, R1, 0, 0)];
    for (position, condition) in conditions.iter().enumerate() {
        // Three instructions a condition; there are few.
        let skip = (conditions.len() - position - 1) * 3 + assign.len();
        program.extend([
            encode(LOAD_WORD, R2, R6, condition.offset, 0),
            simple(AND_WORD, R2, condition.mask.cast_signed()),
            encode(
                IF_WORD_NOT_EQUAL,
                R2,
                R0,
                skip as i16,
                condition.value.cast_signed(),
            ),
        ]);
    }
    program.extend(assign);
    program.extend(answer);
    program
}

/// A map for one socket.
fn make_map() -> io::Result<OwnedFd> {
    /// The start of `union bpf_attr` for BPF_MAP_CREATE; the rest counts as zero, here and below.
    #[repr(C)]
    struct Attributes {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    let attributes = Attributes {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
    };
    // SAFETY: the attributes hold no pointers.
    unsafe { bpf_open(BPF_MAP_CREATE, &attributes) }
}

/// Puts a socket into the map.
fn put(map: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    /// `union bpf_attr` for BPF_MAP_UPDATE_ELEM.
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let (key, value) = (0u32, number(socket));
    let attributes = Attributes {
        map: number(map.as_fd()),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value are of the map's sizes and outlive the call, which only reads them.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    /// `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Attributes {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let license = c"Apache-2.0";
    let attributes = Attributes {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"husk_forward\0\0\0\0",
        interface: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: the attributes point to as many instructions as they say and to a C string; both outlive the call, which only reads them.
    unsafe { bpf_open(BPF_PROG_LOAD, &attributes) }
}

fn link(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `union bpf_attr` for BPF_LINK_CREATE.
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: number(program.as_fd()),
        target: number(namespace),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes hold no pointers.
    unsafe { bpf_open(BPF_LINK_CREATE, &attributes) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A command that opens an fd.
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_open<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just opened it for this call, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2).
///
/// # Safety
/// `T` is laid out as the start of `union bpf_attr` for this command, and what it points to outlives the call.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are of the size passed; the rest is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
