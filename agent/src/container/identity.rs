//! Who the process is and what it may: limits, user and groups, capabilities, privileges.
//!
//! The order is what makes it work: limits while CAP_SYS_RESOURCE is there; the bounding set and the seccomp
//! filter of a process that may gain privileges while CAP_SETPCAP and CAP_SYS_ADMIN are; the user with the
//! capabilities kept across the change; the final sets last.

use std::collections::HashMap;
use std::os::fd::AsFd;

use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, PosixRlimit, PosixRlimitType, Process,
};
use rustix::fs::{FileType, Mode, Stat, fchown, fstat};
use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::error::{LaunchError, OsError, Step};
use super::{StdioFds, passwd};

/// The highest capability number that a set can hold.
const MAX_CAPABILITY: u32 = 63;

/// The user and groups to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    umask: Option<Mode>,
    home: Option<String>,
}

impl Identity {
    /// Works out who the process is to be; names come from the container's passwd file.
    pub(crate) fn of(process: &Process, user_name: Option<&str>) -> Result<Self, LaunchError> {
        let user = process.user();
        let mut groups: Vec<u32> = user.additional_gids().clone().unwrap_or_default();
        let (uid, gid, home) = match user_name {
            Some(name) => {
                let account = passwd::by_name(name)?;
                groups.extend(account.groups);
                (account.uid, account.gid, Some(account.home))
            }
            None => (user.uid(), user.gid(), None),
        };
        // The kernel's "no change".
        if uid == u32::MAX || gid == u32::MAX || groups.contains(&u32::MAX) {
            return Err(LaunchError::invalid(format!(
                "{} is not a user or group id",
                u32::MAX
            )));
        }
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.into_iter().map(Gid::from_raw).collect(),
            umask: user.umask().map(|mask| Mode::from_raw_mode(mask & 0o777)),
            home,
        })
    }

    /// The environment with HOME where the spec has none, as runc adds it.
    pub(crate) fn complete_environment(&self, process: &Process) -> Vec<String> {
        let mut env = process.env().clone().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("HOME=")) {
            let home = self
                .home
                .clone()
                .unwrap_or_else(|| passwd::home_of(self.uid.as_raw()));
            env.push(format!("HOME={home}"));
        }
        env
    }

    /// Gives the user the standard streams, so that /dev/stdout can be opened again by its owner.
    pub(crate) fn own_streams(&self) -> Result<(), LaunchError> {
        for stream in [
            std::io::stdin().as_fd(),
            std::io::stdout().as_fd(),
            std::io::stderr().as_fd(),
        ] {
            let Ok(stat) = fstat(stream) else {
                continue;
            };
            if is_null(&stat) || stat.st_uid == self.uid.as_raw() {
                continue;
            }
            match fchown(stream, Some(self.uid), None) {
                // Unmapped ids, file systems without owners: reopening then fails, writing does not.
                Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => {}
                Err(errno) => {
                    return Err(LaunchError::internal(format!(
                        "giving the standard streams to user {}: {}",
                        self.uid.as_raw(),
                        errno.text()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Becomes the user, keeping permitted capabilities for [`apply_capabilities`].
    pub(crate) fn assume(&self) -> Result<(), LaunchError> {
        set_keep_capabilities(true).step(|| "keeping capabilities".to_owned())?;
        if !self.groups_denied() {
            set_thread_groups(&self.groups)
                .spec_step(|| "setting the additional groups".to_owned())?;
        }
        set_thread_res_gid(self.gid, self.gid, self.gid)
            .spec_step(|| format!("setgid {}", self.gid.as_raw()))?;
        set_thread_res_uid(self.uid, self.uid, self.uid)
            .spec_step(|| format!("setuid {}", self.uid.as_raw()))?;
        set_keep_capabilities(false).step(|| "dropping kept capabilities".to_owned())?;
        if let Some(umask) = self.umask {
            rustix::process::umask(umask);
        }
        Ok(())
    }

    /// A user namespace may forbid setgroups; with no groups to set that is no loss.
    fn groups_denied(&self) -> bool {
        self.groups.is_empty()
            && std::fs::read_to_string("/proc/self/setgroups")
                .is_ok_and(|state| state.trim() == "deny")
    }
}

/// Gives the standard streams to user and group `root`, those of the guest that are 0 in the user namespace which the process is about
/// to enter. Inside, nobody could change an owner that the namespace does not know, and [`Identity::own_streams`] is to.
pub(crate) fn hand_to_root(
    streams: &StdioFds,
    root: Option<(u32, u32)>,
) -> Result<(), LaunchError> {
    let Some((uid, gid)) = root else {
        return Ok(());
    };
    for stream in [&streams.stdin, &streams.stdout, &streams.stderr] {
        let given = fstat(stream).and_then(|stat| {
            if is_null(&stat) {
                return Ok(());
            }
            fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        });
        given
            .step(|| format!("giving the standard streams to user {uid}, the container's root"))?;
    }
    Ok(())
}

/// Whether this is /dev/null, which is everybody's.
fn is_null(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3)
}

/// Applies the process's resource limits.
pub(crate) fn set_limits(process: &Process) -> Result<(), LaunchError> {
    for limit in process.rlimits().iter().flatten() {
        let (resource, wanted) = limit_of(limit);
        setrlimit(resource, wanted)
            .spec_step(|| format!("error setting rlimit type {}", limit.typ()))?;
    }
    Ok(())
}

/// Raises the hard limits to what the spec asks for. A user namespace's root cannot.
pub(crate) fn raise_hard_limits(process: &Process) -> Result<(), LaunchError> {
    for limit in process.rlimits().iter().flatten() {
        let (resource, wanted) = limit_of(limit);
        let now = getrlimit(resource);
        let raises = match (now.maximum, wanted.maximum) {
            (Some(now), Some(wanted)) => wanted > now,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if raises {
            let raised = Rlimit {
                current: now.current,
                maximum: wanted.maximum,
            };
            setrlimit(resource, raised)
                .spec_step(|| format!("error setting rlimit type {}", limit.typ()))?;
        }
    }
    Ok(())
}

fn limit_of(limit: &PosixRlimit) -> (Resource, Rlimit) {
    let value = |value: u64| (value != u64::MAX).then_some(value);
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    };
    let limits = Rlimit {
        current: value(limit.soft()),
        maximum: value(limit.hard()),
    };
    (resource, limits)
}

/// Narrows the bounding set to the spec's.
pub(crate) fn limit_bounding_set(
    capabilities: Option<&LinuxCapabilities>,
) -> Result<(), LaunchError> {
    let keep = set_of(capabilities.and_then(|all| all.bounding().as_ref()));
    for number in 0..=MAX_CAPABILITY {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(one) {
            continue;
        }
        match remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // The first number that the kernel does not know: no more follow.
            Err(Errno::INVAL) => break,
            Err(errno) => {
                return Err(LaunchError::internal(format!(
                    "dropping capability {number} from the bounding set: {}",
                    errno.text()
                )));
            }
        }
    }
    Ok(())
}

/// Sets the effective, permitted, inheritable and ambient sets. A spec without capabilities has none.
pub(crate) fn apply_capabilities(
    capabilities: Option<&LinuxCapabilities>,
) -> Result<(), LaunchError> {
    let set = |select: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        set_of(capabilities.and_then(|all| select(all).as_ref()))
    };
    let inheritable = set(LinuxCapabilities::inheritable);
    let permitted = set(LinuxCapabilities::permitted);
    set_capabilities(
        None,
        CapabilitySets {
            effective: set(LinuxCapabilities::effective),
            permitted,
            inheritable,
        },
    )
    .spec_step(|| "setting process.capabilities".to_owned())?;
    clear_ambient_capability_set().step(|| "clearing the ambient capabilities".to_owned())?;
    // As runc: a capability that is not both permitted and inheritable cannot be ambient and is left out.
    let ambient = set(LinuxCapabilities::ambient) & permitted & inheritable;
    for one in ambient.iter() {
        configure_capability_in_ambient_set(one, true)
            .spec_step(|| "setting the ambient capabilities".to_owned())?;
    }
    Ok(())
}

fn set_of(capabilities: Option<&Capabilities>) -> CapabilitySet {
    let numbers = numbers();
    capabilities
        .into_iter()
        .flatten()
        .filter_map(|capability| numbers.get(capability))
        .fold(CapabilitySet::empty(), |set, number| {
            set | CapabilitySet::from_bits_retain(1 << number)
        })
}

/// Numbers of linux/capability.h.
fn numbers() -> HashMap<Capability, u32> {
    use Capability::*;
    [
        Chown,
        DacOverride,
        DacReadSearch,
        Fowner,
        Fsetid,
        Kill,
        Setgid,
        Setuid,
        Setpcap,
        LinuxImmutable,
        NetBindService,
        NetBroadcast,
        NetAdmin,
        NetRaw,
        IpcLock,
        IpcOwner,
        SysModule,
        SysRawio,
        SysChroot,
        SysPtrace,
        SysPacct,
        SysAdmin,
        SysBoot,
        SysNice,
        SysResource,
        SysTime,
        SysTtyConfig,
        Mknod,
        Lease,
        AuditWrite,
        AuditControl,
        Setfcap,
        MacOverride,
        MacAdmin,
        Syslog,
        WakeAlarm,
        BlockSuspend,
        AuditRead,
        Perfmon,
        Bpf,
        CheckpointRestore,
    ]
    .into_iter()
    .zip(0..)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_numbers_are_the_kernels() {
        let one = |capability| set_of(Some(&Capabilities::from([capability])));
        assert_eq!(one(Capability::Chown), CapabilitySet::CHOWN);
        assert_eq!(one(Capability::Setpcap), CapabilitySet::SETPCAP);
        assert_eq!(one(Capability::SysAdmin), CapabilitySet::SYS_ADMIN);
        assert_eq!(one(Capability::Mknod), CapabilitySet::MKNOD);
        assert_eq!(one(Capability::Setfcap), CapabilitySet::SETFCAP);
        assert_eq!(one(Capability::Syslog), CapabilitySet::SYSLOG);
        assert_eq!(one(Capability::AuditRead), CapabilitySet::AUDIT_READ);
        assert_eq!(
            one(Capability::CheckpointRestore),
            CapabilitySet::CHECKPOINT_RESTORE
        );
        assert_eq!(numbers().len(), 41);
    }
}
