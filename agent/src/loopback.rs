//! Brings the guest's loopback interface up.

#![allow(unsafe_code, reason = "the SIOCSIFFLAGS ioctl")]

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Brings `lo` of this network namespace up; the kernel gives it its addresses.
///
/// # Errors
/// The socket's or the ioctl's.
pub fn up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            // The flags fit: IFF_UP is 1.
            ifru_flags: libc::IFF_UP as libc::c_short,
        },
    };
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })?;
    Ok(())
}
