//! The shim's socket: where it is, whether somebody serves it, and making it.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen as listen_on,
    socket,
};
use nix::sys::stat::{Mode, fchmod};
use sha2::{Digest as _, Sha256};

/// Longest path that fits `sun_path` with its NUL on every system containerd knows.
const MAX_PATH: usize = 105;

/// The path that stands for a group: short, and different for each containerd, namespace and group.
pub fn path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(format!("{address}/{namespace}/{group}"));
    let name: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    dir.join(name)
}

/// What containerd is told.
pub fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Whether somebody listens there.
pub fn is_served(path: &Path) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (Ok(socket), Ok(address)) = (
        socket(AddressFamily::Unix, SockType::Stream, flags, None),
        UnixAddr::new(path),
    ) else {
        return false;
    };
    // EAGAIN: somebody listens and has not got round to the others yet.
    matches!(
        connect(socket.as_raw_fd(), &address),
        Ok(()) | Err(Errno::EAGAIN)
    )
}

/// Binds and listens; mode 0600 in a directory of 0700. What nobody serves is replaced.
///
/// # Errors
/// With the path, when the file system refuses or the path is too long.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let about = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("cannot listen on {}: {e}", path.display()),
        )
    };
    if path.as_os_str().len() > MAX_PATH {
        let message = format!(
            "{} is longer than {MAX_PATH} bytes: choose a shorter socket_dir",
            path.display()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(about)?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(about(e)),
        _ => {}
    }
    let bind = || -> nix::Result<UnixListener> {
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        // Linux gives the file the mode of the unbound socket: there is no moment in which others could connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen_on(&socket, Backlog::new(128)?)?;
        Ok(UnixListener::from(socket))
    };
    bind().map_err(|e| about(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_group_has_one_short_path() {
        let path = path(
            Path::new("/run/containerd/s"),
            "/run/containerd/containerd.sock",
            "default",
            "c1",
        );
        assert_eq!(
            path.to_str().unwrap(),
            // printf %s /run/containerd/containerd.sock/default/c1 | sha256sum
            "/run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
        );
        assert!(path.as_os_str().len() <= MAX_PATH);
    }

    #[test]
    fn served_left_behind_and_served_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/sock");
        assert!(!is_served(&path));
        let listener = listen(&path).unwrap();
        assert!(is_served(&path));
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(listener);
        assert!(path.exists() && !is_served(&path));
        let _again = listen(&path).unwrap();
        assert!(is_served(&path));
    }

    #[test]
    fn a_path_that_does_not_fit_is_explained() {
        let error = listen(&Path::new("/tmp").join("x".repeat(200))).unwrap_err();
        assert!(error.to_string().contains("socket_dir"), "{error}");
    }
}
