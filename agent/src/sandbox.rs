//! Sets the guest up for one pod, in one call.

#![allow(unsafe_code, reason = "the RNDADDENTROPY ioctl")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use husk_protocol::agent::{CreateSandboxRequest, CreateSandboxResponse, Share};
use husk_protocol::guest_path;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::sysinfo::sysinfo;
use nix::sys::time::TimeSpec;
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_settime};
use nix::unistd::{SysconfVar, sethostname, sysconf};

use crate::boot::RESOLV_CONF;
use crate::container::sysctl;
use crate::error::AgentError;
use crate::net;
use crate::users::{self, Users};

/// Most entropy a request may carry, in bytes.
const ENTROPY_MAX: usize = 512;

/// `_IOW('R', 0x03, int[2])`, `linux/random.h`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;

/// Longest host name (`__NEW_UTS_LEN`).
const HOSTNAME_MAX: usize = 64;

/// How far a share is read ahead, in KiB: one virtio-fs request of the largest size. With Linux's own 128 the
/// round trips are most of a sequential read's time: a quarter of the rate in the testbed.
const SHARE_READ_AHEAD_KIB: u32 = 1024;

/// When PID 1 came to where, in nanoseconds of guest monotonic time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Milestones {
    /// It began.
    pub started_ns: u64,
    /// It dialled the host.
    pub dialled_ns: u64,
}

/// A request that can be carried out: everything that can be wrong with one has been checked.
#[derive(Debug)]
pub struct Plan {
    request: CreateSandboxRequest,
    network: Option<net::Config>,
    /// The files of the request's sysctls, with their values.
    sysctls: Vec<(PathBuf, String)>,
}

impl Plan {
    /// Checks a request; changes nothing.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] for what cannot be carried out.
    pub fn new(mut request: CreateSandboxRequest) -> Result<Self, AgentError> {
        check(&request)?;
        let network = request.network.take().map(net::Config::new);
        Ok(Self {
            network: network.transpose()?,
            sysctls: sysctl_files(&request.sysctls)?,
            request,
        })
    }

    /// The pod's users, where they are not the guest's: to be made first.
    pub fn users(&self) -> Option<Users> {
        let CreateSandboxRequest {
            uid_map, gid_map, ..
        } = &self.request;
        (!uid_map.is_empty()).then(|| Users::new(uid_map, gid_map))
    }

    /// Sets the guest up as asked. Blocks on the host's file server: not for the runtime's own thread.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] for a network that does not fit the guest's devices, [`AgentError::Guest`] naming the step that
    /// failed.
    pub fn set_up(self, milestones: Milestones) -> Result<CreateSandboxResponse, AgentError> {
        let Self {
            request,
            network,
            sysctls,
        } = self;
        users::enter_network()?;
        // First: it can still be refused. And before the sysctls, which may name its interfaces.
        if let Some(network) = network {
            net::configure(&network)?;
        }
        if request.wall_clock_ns != 0 {
            set_clock(request.wall_clock_ns)
                .map_err(|e| AgentError::guest("setting the clock", e))?;
        }
        if !request.entropy.is_empty() {
            add_entropy(&request.entropy)
                .map_err(|e| AgentError::guest("seeding the random pool", e))?;
        }
        if !request.hostname.is_empty() {
            sethostname(&request.hostname).map_err(|e| {
                AgentError::guest(format!("setting the host name {:?}", request.hostname), e)
            })?;
        }
        if let Some(text) = resolv_conf(&request) {
            fs::write(RESOLV_CONF, text)
                .map_err(|e| AgentError::guest("writing /etc/resolv.conf", e))?;
        }
        for (file, value) in sysctls {
            fs::write(&file, &value).map_err(|e| {
                AgentError::guest(format!("writing {value:?} to {}", file.display()), e)
            })?;
        }
        for share in &request.shares {
            mount_share(share).map_err(|e| {
                AgentError::guest(
                    format!("mounting the share {:?} at {}", share.tag, share.path),
                    e,
                )
            })?;
        }
        if request.shm_size_bytes != 0 {
            mount_shm(request.shm_size_bytes)
                .map_err(|e| AgentError::guest("mounting the pod's /dev/shm", e))?;
        }
        describe(milestones).map_err(|e| AgentError::guest("describing the guest", e))
    }
}

fn check(request: &CreateSandboxRequest) -> Result<(), AgentError> {
    if request.entropy.len() > ENTROPY_MAX {
        return Err(AgentError::Invalid(format!(
            "{} bytes of entropy: at most {ENTROPY_MAX} are taken",
            request.entropy.len()
        )));
    }
    if request.hostname.len() > HOSTNAME_MAX {
        return Err(AgentError::Invalid(format!(
            "the host name {:?} is longer than {HOSTNAME_MAX} bytes",
            request.hostname
        )));
    }
    if request.uid_map.is_empty() != request.gid_map.is_empty() {
        return Err(AgentError::Invalid(
            "the pod's users need both a uid_map and a gid_map".into(),
        ));
    }
    for share in &request.shares {
        if share.tag.is_empty() || !Path::new(&share.path).is_absolute() {
            return Err(AgentError::Invalid(format!(
                "a share needs a tag and an absolute path, not {:?} and {:?}",
                share.tag, share.path
            )));
        }
    }
    Ok(())
}

fn sysctl_files(sysctls: &HashMap<String, String>) -> Result<Vec<(PathBuf, String)>, AgentError> {
    sysctls
        .iter()
        .map(|(name, value)| match sysctl::file(name) {
            Some(file) => Ok((file, value.clone())),
            None => Err(AgentError::Invalid(format!(
                "{name:?} is not the name of a sysctl"
            ))),
        })
        .collect()
}

fn set_clock(since_epoch_ns: u64) -> nix::Result<()> {
    let part = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let time = TimeSpec::new(
        part(since_epoch_ns / 1_000_000_000),
        part(since_epoch_ns % 1_000_000_000),
    );
    clock_settime(ClockId::CLOCK_REALTIME, time)
}

/// Mixes bytes into the random pool and credits them, so that the guest need not gather any itself.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` of `linux/random.h`, with room for the most.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; ENTROPY_MAX],
    }
    let mut info = PoolInfo {
        entropy_bits: 0,
        size: 0,
        bytes: [0; ENTROPY_MAX],
    };
    for (to, from) in info.bytes.iter_mut().zip(bytes) {
        *to = *from;
        info.size += 1;
    }
    info.entropy_bits = info.size * 8;
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: RNDADDENTROPY reads the head and `size` bytes after it, all within `info`.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    Ok(())
}

/// The resolver's configuration, `None` where the request has nothing to say. It is the guest's own; a
/// container's comes with its mounts.
fn resolv_conf(request: &CreateSandboxRequest) -> Option<String> {
    let mut text = String::new();
    for server in &request.dns_servers {
        // Writing to a String does not fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    if !request.dns_searches.is_empty() {
        let _ = writeln!(text, "search {}", request.dns_searches.join(" "));
    }
    if !request.dns_options.is_empty() {
        let _ = writeln!(text, "options {}", request.dns_options.join(" "));
    }
    (!text.is_empty()).then_some(text)
}

fn mount_share(share: &Share) -> io::Result<()> {
    fs::create_dir_all(&share.path)?;
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_RDONLY, share.read_only);
    mount(
        Some(share.tag.as_str()),
        share.path.as_str(),
        Some("virtiofs"),
        flags,
        None::<&str>,
    )?;
    // It only makes reading slower.
    if let Err(error) = read_ahead(Path::new(&share.path)) {
        tracing::warn!("reading ahead on the share {:?}: {error}", share.tag);
    }
    Ok(())
}

/// The `/dev/shm` of the pod's containers. What is in it counts against the container that wrote it, as a tmpfs's pages do.
fn mount_shm(size_bytes: u64) -> io::Result<()> {
    fs::create_dir_all(guest_path::SHM)?;
    let options = format!("mode=1777,size={size_bytes}");
    mount(
        Some("shm"),
        guest_path::SHM,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some(options.as_str()),
    )?;
    Ok(())
}

/// Sets the read-ahead of the file system at `path`; a share's submounts have the same backing device.
fn read_ahead(path: &Path) -> io::Result<()> {
    let device = fs::metadata(path)?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    fs::write(
        format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
        SHARE_READ_AHEAD_KIB.to_string(),
    )
}

fn describe(milestones: Milestones) -> nix::Result<CreateSandboxResponse> {
    let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN)?.unwrap_or(1);
    Ok(CreateSandboxResponse {
        kernel_release: uname()?.release().to_string_lossy().into_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        online_cpus: u32::try_from(cpus).unwrap_or(1),
        memory_bytes: sysinfo()?.ram_total(),
        agent_started_ns: milestones.started_ns,
        agent_dialled_ns: milestones.dialled_ns,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_gets_what_was_asked() {
        let mut request = CreateSandboxRequest::new();
        assert_eq!(resolv_conf(&request), None);
        request.dns_servers = vec!["10.0.0.1".into(), "10.0.0.2".into()];
        request.dns_searches = vec!["a.b".into(), "b".into()];
        request.dns_options = vec!["ndots:5".into()];
        assert_eq!(
            resolv_conf(&request).unwrap(),
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\nsearch a.b b\noptions ndots:5\n"
        );
    }

    #[test]
    fn a_request_is_refused_before_anything_is_changed() {
        let refused = |change: fn(&mut CreateSandboxRequest)| {
            let mut request = CreateSandboxRequest::new();
            change(&mut request);
            Plan::new(request).unwrap_err().code()
        };
        assert_eq!(
            refused(|r| {
                r.network
                    .mut_or_insert_default()
                    .interfaces
                    .push(Default::default());
            }),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            refused(|r| r.entropy = vec![0; 513]),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            refused(|r| r.hostname = "x".repeat(65)),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            refused(|r| r.shares.push(Default::default())),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            refused(|r| r.uid_map = "0 1000 1\n".into()),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            refused(|r| drop(r.sysctls.insert("../x".into(), "1".into()))),
            ttrpc::Code::INVALID_ARGUMENT
        );
    }
}
