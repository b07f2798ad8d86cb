//! The ioctls of a tap (`linux/if_tun.h`).
#![allow(unsafe_code, reason = "ioctl(2)")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::raw::{c_int, c_short, c_uint};
use std::os::unix::fs::OpenOptionsExt as _;

use libc::ifreq;

/// What a tap's interface is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name, without its NUL.
    pub name: String,
    /// `IFF_TAP` and its like.
    pub flags: c_int,
}

/// The interface whose queue `fd` is.
///
/// # Errors
/// `ENOTTY` if it is nothing of the kind, `EBADFD` if it has no interface.
pub fn interface(fd: BorrowedFd<'_>) -> io::Result<Interface> {
    let mut request = request("", 0)?;
    with_request(fd, libc::TUNGETIFF, &mut request)?;
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| *byte as u8)
        .take_while(|byte| *byte != 0)
        .collect();
    // SAFETY: TUNGETIFF has written the flags; any bits are a value of theirs.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(Interface {
        name: String::from_utf8_lossy(&bytes).into_owned(),
        flags: c_int::from(flags as u16),
    })
}

/// Sets the length of the header in front of each packet, in bytes.
///
/// # Errors
/// As the kernel says.
pub fn set_header_len(fd: BorrowedFd<'_>, len: c_int) -> io::Result<()> {
    with_int(fd, libc::TUNSETVNETHDRSZ, len)
}

/// Makes that header little-endian, whatever the host is.
///
/// # Errors
/// As the kernel says.
pub fn set_header_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    with_int(fd, libc::TUNSETVNETLE, 1)
}

/// Sets what the interface may leave to the reader (`TUN_F_CSUM` and its like).
///
/// # Errors
/// As the kernel says.
pub fn set_offloads(fd: BorrowedFd<'_>, offloads: c_uint) -> io::Result<()> {
    // SAFETY: this request takes a number, no pointer.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    };
    check(result)
}

/// Takes a queue of a multi-queue interface into use, or out of it.
///
/// # Errors
/// `EINVAL` if it is so already.
pub fn set_queue_in_use(fd: BorrowedFd<'_>, in_use: bool) -> io::Result<()> {
    let flag = if in_use {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    with_request(fd, libc::TUNSETQUEUE, &mut request("", flag)?)
}

/// Opens the tap `name` (at most 15 bytes), with so many queues, as a network device wants it; makes it if there is none.
///
/// # Errors
/// As the kernel says; `InvalidInput` for a name that is too long.
pub fn open(name: &str, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
    (0..queues)
        .map(|_| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")?;
            create(file.as_fd(), name, flags)?;
            Ok(file.into())
        })
        .collect()
}

/// Makes `fd`, which is `/dev/net/tun`, a queue of the interface `name`, which is made if there is none.
///
/// # Errors
/// As [`open`].
pub fn create(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<()> {
    with_request(fd, libc::TUNSETIFF, &mut request(name, flags)?)
}

fn request(name: &str, flags: c_int) -> io::Result<ifreq> {
    // SAFETY: an ifreq is plain data, for which zeros are a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of an interface has at most 15 bytes",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The flags are 16 bits wide there.
    request.ifr_ifru.ifru_flags = c_short::try_from(flags).map_err(io::Error::other)?;
    Ok(request)
}

fn with_request(fd: BorrowedFd<'_>, number: libc::Ioctl, request: &mut ifreq) -> io::Result<()> {
    // SAFETY: the callers' requests read and write one ifreq, which is borrowed exclusively.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) })
}

fn with_int(fd: BorrowedFd<'_>, number: libc::Ioctl, value: c_int) -> io::Result<()> {
    // SAFETY: the callers' requests read one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_ref(&value)) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
