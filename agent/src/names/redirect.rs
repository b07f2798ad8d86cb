//! Has the kernel send what is meant for the resolver's port to another one of the same address.
//!
//! Programs of a cgroup (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, Linux 4.18) see each address that a process connects or sends to, and each that
//! it is told a datagram came from, and may change them. So port 53 stays free: a nameserver in a container listens there on all
//! addresses. Docker itself has two rules of nftables for it, which need connection tracking.
//!
//! What a container has made a network namespace of its own for is none of ours: an engine in it has a resolver there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use husk_protocol::names::RESOLVER;

use crate::container::sys::{bpf_attach, bpf_load, network_cookie};

/// BPF_PROG_TYPE_CGROUP_SOCK_ADDR of linux/bpf.h.
const PROGRAM_TYPE: u32 = 18;

/// Of `enum bpf_attach_type`: where an address is given by the process, and where it is told one.
const GIVEN: [u32; 2] = [10, 14]; // BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_UDP4_SENDMSG
const TOLD: [u32; 2] = [19, 29]; // BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_INET4_GETPEERNAME

/// Offsets in `struct bpf_sock_addr`; both in network byte order.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// Of `enum bpf_func_id`: the cookie of the socket's network namespace.
const GET_NETNS_COOKIE: i32 = 122;

// Operation codes of linux/bpf_common.h and linux/bpf.h: class | source or size | operation.
/// r = *(u32 *)(r + offset)
const LOAD_WORD: u8 = 0x61;
/// *(u32 *)(r + offset) = r
const STORE_WORD: u8 = 0x63;
/// r = the 64 bits of two immediates
const LOAD_WIDE: u8 = 0x18;
/// r = immediate
const MOVE: u8 = 0xb7;
/// r = r
const MOVE_REGISTER: u8 = 0xbf;
/// if the lower 32 bits of r != immediate goto
const IF_WORD_NOT_EQUAL: u8 = 0x56;
/// if r != r goto
const IF_NOT_EQUAL_REGISTER: u8 = 0x5d;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// eBPF's registers: the answer, the context first, and what the program keeps its words in.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R6: u8 = 6;

/// Redirects what processes in and below `cgroup` send to the resolver to this port of its address, in the network namespace of `socket`. Until the
/// cgroup goes.
///
/// # Errors
/// Those of bpf(2).
pub(super) fn redirect(cgroup: &Path, socket: BorrowedFd<'_>, port: u16) -> io::Result<()> {
    let cookie = network_cookie(socket)?;
    let directory = File::open(cgroup)?;
    for (places, from, to) in [
        (GIVEN, RESOLVER.port(), port),
        (TOLD, port, RESOLVER.port()),
    ] {
        for place in places {
            let program = bpf_load(PROGRAM_TYPE, place, &assemble(cookie, from, to))?;
            bpf_attach(directory.as_fd(), program.as_fd(), place, None)?;
        }
    }
    Ok(())
}

/// One instruction as the kernel's eight bytes.
fn encode(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> u64 {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate) << 32
}

/// A port of the resolver's address becomes another.
fn assemble(cookie: u64, from: u16, to: u16) -> [u64; 14] {
    let in_network_order = |port: u16| u32::from(u16::from_ne_bytes(port.to_be_bytes()));
    let address = u32::from_ne_bytes(RESOLVER.ip().octets());
    let (low, high) = (cookie as u32, (cookie >> 32) as u32);
    [
        encode(MOVE_REGISTER, R6, R1, 0, 0),
        encode(LOAD_WORD, R2, R6, USER_IP4, 0),
        // The counts of instructions lead to the answer.
        encode(IF_WORD_NOT_EQUAL, R2, 0, 9, address),
        encode(LOAD_WORD, R2, R6, USER_PORT, 0),
        encode(IF_WORD_NOT_EQUAL, R2, 0, 7, in_network_order(from)),
        encode(MOVE_REGISTER, R1, R6, 0, 0),
        encode(CALL, 0, 0, 0, GET_NETNS_COOKIE.cast_unsigned()),
        encode(LOAD_WIDE, R2, 0, 0, low),
        encode(0, 0, 0, 0, high),
        encode(IF_NOT_EQUAL_REGISTER, R0, R2, 2, 0),
        encode(MOVE, R2, 0, 0, in_network_order(to)),
        encode(STORE_WORD, R6, R2, USER_PORT, 0),
        // It may go on.
        encode(MOVE, R0, 0, 0, 1),
        encode(EXIT, 0, 0, 0, 0),
    ]
}
