//! virtio-fs (virtio 1.2, 5.11): a host directory in the guest, served by the virtiofsd crate in this process.
//!
//! The crate's `Server` answers one FUSE request from a reader to a writer; this module brings requests to it from our own
//! queues. A few threads share the queues: each waits for a kick itself, takes one request, wakes the next thread
//! if there is another, and answers. So a lone request never crosses threads, and one that blocks on the host's
//! disk keeps nobody waiting.
//!
//! **What the guest may believe.** Files are served as they are: owners, modes, setuid bits, xattrs, POSIX ACLs. The guest's
//! kernel checks permissions; privileged bits are killed on the host (`killpriv_v2`), which the guest is told, so that it
//! need not ask for `security.capability` before every write. Each mount below the share is announced and becomes a
//! mount of its own in the guest, because inode numbers of different file systems collide.
//!
//! Under [`CachePolicy::Auto`] an open shows what was written on the host before it; [`kept`] has what the guest need not read again for that.
//!
//! Not there, because virtiofsd has none: `O_TMPFILE` (programs fall back to a named file) and locks that reach the host
//! (`flock` and POSIX locks hold within the pod).
//!
//! **Mounts that come and go.** The shim mounts and unmounts below the share while the guest runs. The server holds an
//! `O_PATH` fd for each inode that the guest knows, and such an fd keeps a detached mount alive until the guest forgets the
//! inode. So the shim unmounts with `MNT_DETACH`, which succeeds in any case and takes full effect at the latest when the VMM ends.
//! Where a pod outlives a container, the order that leaves nothing behind is: the agent unmounts its bind mount *and* the
//! announced submount, whereupon the guest forgets all inodes below but the submount's root, which its parent's entry still
//! names; the shim unmounts with `MNT_DETACH`; and the next time the guest looks the path up, a second or more later, it finds
//! the entry stale and forgets that one too. The agent does look (`agent/src/share.rs`). Under [`CachePolicy::Always`] the entry stays
//! good, so there the disk's room comes back with the end of the pod.

mod files;
mod kept;
mod memory;
mod pool;
mod request;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::vm::CachePolicy;
use virtiofsd::passthrough::{self, NegotiationMode, PassthroughFs};
use virtiofsd::server::Server;

use self::files::Files;
use self::kept::{Kept, SETTLED};
use self::pool::{Shared, threads};
use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_bytes};
use crate::jail::{privileges, root::Root, seccomp::Kind};

const DEVICE_ID: u32 = 26;

/// One request of 1 MiB is 256 pages and a few headers, so that a queue of this size holds several.
const QUEUE_SIZE: u16 = 1024;

/// High-priority (forget) and request queues. The guest's kernel spreads its CPUs over request queues; since threads and
/// queues are not tied to each other here, one is enough.
const REQUEST_QUEUES: u32 = 1;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];

/// Size of the tag field (5.11.4), in bytes.
const TAG_LEN: usize = 36;

/// Fds of the process that the guest's files may not take: devices, vsock connections, and what one request opens for a moment.
const RESERVED_FDS: u64 = 2048;

/// How long an entry or attribute is good for under [`CachePolicy::Always`].
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);

/// A shared directory.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    root: Root,
    cache: CachePolicy,
    /// How many share the process's fds, this one included.
    shares: u64,
    /// How old a file's last change has to be for the guest to keep what it has of it ([`kept`]).
    settled: Duration,
    worker: Option<Worker>,
}

impl Fs {
    /// Serves the directory `root` under `tag` (1 to 36 bytes), as one of so many `shares` of this process.
    ///
    /// # Errors
    /// [`BadTag`] when the tag does not fit.
    pub fn new(tag: &str, root: Root, cache: CachePolicy, shares: usize) -> Result<Self, BadTag> {
        let mut config = [0; TAG_LEN + 4];
        let (name, queues) = config.split_at_mut(TAG_LEN);
        match name.get_mut(..tag.len()) {
            Some(name) if !tag.is_empty() => name.copy_from_slice(tag.as_bytes()),
            _ => return Err(BadTag(tag.to_owned())),
        }
        queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Ok(Self {
            config,
            root,
            cache,
            shares: shares as u64,
            settled: SETTLED,
            worker: None,
        })
    }

    fn server(&self) -> io::Result<Server<Files>> {
        let limit = privileges::descriptor_limit();
        // What differs from one policy to the next: how long, which mode, and whether listing looks up as well.
        let (timeout, cache_policy) = match self.cache {
            CachePolicy::Never => (Duration::ZERO, passthrough::CachePolicy::Never),
            CachePolicy::Auto => (Duration::from_secs(1), passthrough::CachePolicy::Auto),
            CachePolicy::Always => (FOREVER, passthrough::CachePolicy::Always),
        };
        let config = passthrough::Config {
            root_dir: self.root.path().to_owned(),
            proc_sfd_rawfd: Some(self.root.descriptors().try_clone_to_owned()?.into()),
            entry_timeout: timeout,
            attr_timeout: timeout,
            cache_policy,
            readdirplus: self.cache != CachePolicy::Never,
            xattr: true,
            posix_acl: NegotiationMode::Auto,
            killpriv_v2: true,
            announce_submounts: true,
            allow_direct_io: true,
            allow_mmap: true,
            guest_fd_limit: fd_limit(limit, self.shares),
            ..passthrough::Config::default()
        };
        let kept = (self.cache == CachePolicy::Auto).then(|| Kept::new(self.settled));
        Ok(Server::new(Files::new(PassthroughFs::new(config)?, kept)))
    }
}

/// The fds that the guest's files in one of so many `shares` may take of a process that may open `limit`.
fn fd_limit(limit: u64, shares: u64) -> u64 {
    let all = limit.saturating_sub(RESERVED_FDS).max(limit / 2);
    all.checked_div(shares).unwrap_or(all)
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let server = self.server().map_err(ActivateError::host(
            "starting the file server on the shared directory",
        ))?;
        let interrupt = Arc::clone(&activation.interrupt);
        let shared = Shared::new(server, activation)?;
        let threads = threads(&Arc::new(shared)).map_err(ActivateError::host(
            "mapping a file server thread's private pages",
        ))?;
        self.worker = Some(Worker::spawn(Kind::Fs, &interrupt, threads)?);
        Ok(())
    }

    fn reset(&mut self) {
        // The server goes with the last thread, and with it every fd it held for the guest.
        self.worker = None;
    }
}

/// A tag that does not fit.
#[derive(Debug, thiserror::Error)]
#[error("virtio-fs tag {0:?} does not fit: 1 to 36 bytes")]
pub struct BadTag(pub String);

#[cfg(test)]
mod tests;
