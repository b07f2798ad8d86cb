//! The host's side of a network device for tests: a network namespace of its own, taps, and what is at their other end.
#![allow(unsafe_code, reason = "unshare(2), ioctl(2) and packet(7) sockets")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::virtio::net::{ioctl, open_tap};

/// Ethertype for experiments, which no one else in the namespace uses.
pub const EXPERIMENT: u16 = 0x88b5;
pub const IPV4: u16 = 0x0800;

/// `struct virtio_net_hdr` of a packet that nothing is to be done with.
pub const PLAIN: [u8; 10] = [0; 10];

/// Puts this test's thread into a network namespace of its own, which ends with it. Nothing is sent there but by the test: an
/// interface that speaks IPv6 would greet its neighbours.
pub fn namespace() {
    // SAFETY: touches no memory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    // Absent from a kernel without IPv6.
    let ipv6 = std::path::Path::new("/proc/sys/net/ipv6/conf/default/disable_ipv6");
    if ipv6.exists() {
        std::fs::write(ipv6, "1").unwrap();
    }
}

/// A tap that is up.
pub fn tap(name: &str, queues: usize) -> Vec<OwnedFd> {
    let fds = open_tap(name, queues).unwrap();
    up(&fds[0]);
    fds
}

/// An interface whose queue is `fd`, made in whichever way `flags` say.
pub fn tun(name: &str, flags: libc::c_int) -> OwnedFd {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    ioctl::create(file.as_fd(), name, flags).unwrap();
    file.into()
}

fn up(fd: &OwnedFd) {
    let name = ioctl::interface(fd.as_fd()).unwrap().name;
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    // SAFETY: an ifreq is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: the request reads one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) });
}

/// The interface as the host's kernel has it: what is sent here comes out of the tap, and what goes into the tap is received
/// here. Each packet has a `struct virtio_net_hdr` of ten bytes.
pub struct Wire(OwnedFd);

impl Wire {
    /// For packets of one ethertype.
    pub fn new(interface: &str, ethertype: u16) -> Self {
        let protocol = ethertype.to_be();
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: reads a string that ends.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0);
        let on = 1i32;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on);
        let patience = libc::timeval {
            tv_sec: 60,
            tv_usec: 0,
        };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience);
        // SAFETY: plain data, for which zeros are a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as u32;
        // SAFETY: reads so many bytes of the address.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) });
        Self(socket)
    }

    pub fn send(&self, header: &[u8; 10], frame: &[u8]) {
        let packet = [&header[..], frame].concat();
        let count = nix::unistd::write(&self.0, &packet).unwrap();
        assert_eq!(count, packet.len());
    }

    /// The next frame, without its header.
    pub fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        let count = nix::unistd::read(&self.0, &mut packet).unwrap();
        packet.truncate(count);
        packet.split_off(PLAIN.len())
    }
}

/// An Ethernet frame of this ethertype.
pub fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let addresses = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    [&addresses[..], &ethertype.to_be_bytes(), payload].concat()
}

/// A TCP segment of so many bytes that wants to be cut into pieces of `piece`, with the header that says so.
pub fn large_segment(payload: &[u8], piece: u16) -> ([u8; 10], Vec<u8>) {
    let len = (40 + payload.len()) as u16;
    let mut ip = vec![
        0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    // Ports, numbers, an offset of five words, ACK, a window; the checksum is left to whoever comes later.
    let tcp = [
        0, 80, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 255, 255, 0, 0, 0, 0,
    ];
    let [p0, p1] = piece.to_le_bytes();
    // NEEDS_CSUM, TCPV4, 54 bytes of headers, the piece, the checksum at 34 + 16.
    let header = [1, 1, 54, 0, p0, p1, 34, 0, 16, 0];
    (header, frame(IPV4, &[&ip, &tcp[..], payload].concat()))
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    check(fd);
    // SAFETY: it is new, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn set_option<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) {
    let len = size_of::<T>() as u32;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: reads so many bytes of the value.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) });
}

fn check(result: i32) {
    assert!(result >= 0, "{}", io::Error::last_os_error());
}
