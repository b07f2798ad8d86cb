#![allow(
    unsafe_code,
    reason = "takes over the file descriptors that the shim names by number"
)]
//! What a VM is built from: the typed configuration with its inherited file descriptors in hand.
//!
//! The shim names descriptors by number. Each number is checked once, here, and becomes an owned descriptor: open, not
//! standard input, output or error, and named only once. From then on nobody handles bare numbers.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use husk_protocol::vm::{BadConfig, CachePolicy, NicConfig, VmConfig};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::jail::root::Root;

/// Everything one VM is built from.
#[derive(Debug)]
pub struct Parts {
    /// Name for logs.
    pub id: String,
    /// vCPUs that the guest boots with.
    pub vcpus: u8,
    /// vCPUs that it may bring online later, those included.
    pub max_vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// How far that may grow, in MiB.
    pub max_memory_mib: u64,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// Uncompressed `vmlinux`.
    pub kernel: File,
    /// Initramfs.
    pub initramfs: File,
    /// Appended to the kernel command line.
    pub kernel_params: String,
    /// The vsock bridge.
    pub vsock: OwnedFd,
    /// virtio-fs devices.
    pub shares: Vec<Share>,
    /// Network devices, which get their taps later.
    pub nics: Vec<NicConfig>,
    /// Where console output goes as it comes.
    pub console: Option<OwnedFd>,
    /// The guest logs its boot on the console.
    pub debug_console: bool,
}

/// One virtio-fs device.
#[derive(Debug)]
pub struct Share {
    /// virtio-fs tag.
    pub tag: String,
    /// The directory.
    pub root: Root,
    /// Cache policy.
    pub cache: CachePolicy,
}

/// Why a configuration cannot be turned into [`Parts`].
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// A field is out of range.
    #[error(transparent)]
    Config(#[from] BadConfig),
    /// Not open.
    #[error(
        "{what} is fd {fd}, which is not open in the VMM: pass it to husk-vmm when starting it"
    )]
    Closed {
        /// Field.
        what: &'static str,
        /// Its value.
        fd: RawFd,
    },
    /// Named twice, or used by the VMM itself.
    #[error("{what} is fd {fd}, which already has another use")]
    Taken {
        /// Field.
        what: &'static str,
        /// Its value.
        fd: RawFd,
    },
    /// Files that are known by their descriptors are opened by it.
    #[error("cannot open /proc/self/fd, by which files are served")]
    Proc(#[source] nix::Error),
}

/// Takes over inherited descriptors, each once.
#[derive(Debug)]
pub struct Inherited {
    taken: BTreeSet<RawFd>,
}

impl Default for Inherited {
    /// Standard input, output and error stay where they are.
    fn default() -> Self {
        Self {
            taken: BTreeSet::from([0, 1, 2]),
        }
    }
}

impl Inherited {
    /// Takes over `fd`, which the configuration calls `what`.
    ///
    /// # Errors
    /// It is not open, or has been taken before.
    pub fn take(&mut self, what: &'static str, fd: RawFd) -> Result<OwnedFd, PartsError> {
        if fd < 0 {
            return Err(PartsError::Closed { what, fd });
        }
        if !self.taken.insert(fd) {
            return Err(PartsError::Taken { what, fd });
        }
        // SAFETY: only asks about the number, which is not -1.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        // Setting close-on-exec is also the question whether it is open.
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|_| PartsError::Closed { what, fd })?;
        // SAFETY: open, as just seen, and inherited for this very use: `taken` sees to it that no second owner is made, and
        // descriptors that the VMM opens itself are not named in a configuration, which is read before any is opened.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Inherited {
    /// Takes over the user namespace that the VMM goes into, if it does: no part of the VM.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_users(&mut self, config: &VmConfig) -> Result<Option<OwnedFd>, PartsError> {
        let fd = config.user_namespace_fd;
        fd.map(|fd| self.take("user_namespace_fd", fd)).transpose()
    }
}

impl Parts {
    /// Checks `config` and takes over its descriptors.
    ///
    /// # Errors
    /// A field is out of range, or a descriptor is not what it should be.
    pub fn inherit(config: VmConfig, fds: &mut Inherited) -> Result<Self, PartsError> {
        config.check()?;
        let shares = config
            .shares
            .into_iter()
            .map(|share| {
                Ok(Share {
                    root: Root::outside(fds.take("a share's root_fd", share.root_fd)?)
                        .map_err(PartsError::Proc)?,
                    tag: share.tag,
                    cache: share.cache,
                })
            })
            .collect::<Result<_, PartsError>>()?;
        Ok(Self {
            id: config.id,
            vcpus: config.vcpus,
            max_vcpus: config.max_vcpus,
            memory_mib: config.memory_mib,
            max_memory_mib: config.max_memory_mib,
            kvm: fds.take("kvm_fd", config.kvm_fd)?,
            kernel: fds.take("kernel_fd", config.kernel_fd)?.into(),
            initramfs: fds.take("initramfs_fd", config.initramfs_fd)?.into(),
            kernel_params: config.kernel_params,
            vsock: fds.take("vsock_fd", config.vsock_fd)?,
            shares,
            nics: config.nics,
            console: config
                .console_fd
                .map(|fd| fds.take("console_fd", fd))
                .transpose()?,
            debug_console: config.debug_console,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd as _, IntoRawFd as _};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once() {
        let fd = File::open("/dev/null").unwrap().into_raw_fd();
        let mut fds = Inherited::default();
        let owned = fds.take("kernel_fd", fd).unwrap();
        assert_eq!(owned.as_raw_fd(), fd);
        let again = fds.take("vsock_fd", fd).unwrap_err();
        assert!(matches!(
            again,
            PartsError::Taken {
                what: "vsock_fd",
                ..
            }
        ));
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        let mut fds = Inherited::default();
        for fd in [-1, i32::MIN, i32::MAX] {
            let error = fds.take("kvm_fd", fd).unwrap_err();
            assert!(matches!(error, PartsError::Closed { .. }), "{error}");
        }
        let stdout = fds.take("console_fd", 1).unwrap_err();
        assert!(matches!(stdout, PartsError::Taken { .. }));
    }
}
