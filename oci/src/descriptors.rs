//! Descriptors that a caller has left open.

#![allow(
    unsafe_code,
    reason = "close_range(2), for which rustix and nix have nothing"
)]

use std::io;

/// Keeps what is open beyond the standard streams from every program that is run from here on. buildah has pipes of its own open across our
/// start, and waits until nobody holds them any more: a shim would, for as long as its pod.
///
/// # Errors
/// The kernel's.
pub(crate) fn keep_from_programs() -> io::Result<()> {
    // SAFETY: three integers; descriptors stay open until execve, so that no owner loses its own.
    let kept = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match kept {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd as _, process::Command};

    use rustix::io::{FdFlags, fcntl_setfd};

    use super::*;

    #[test]
    fn a_program_gets_the_standard_streams_alone() {
        let file = File::open("/dev/null").unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let is_given = || {
            Command::new("test")
                .args(["-e", &path])
                .status()
                .unwrap()
                .success()
        };
        assert!(is_given());
        keep_from_programs().unwrap();
        assert!(!is_given());
    }
}
