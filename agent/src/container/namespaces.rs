//! The container's namespaces: which to join, which to make, and the identity maps of a user namespace.
//!
//! Existing ones are joined first, while the process still has the guest's full rights; the new ones are made
//! by the clone that makes the container's init, all at once, so that the kernel gives them to the new user
//! namespace where there is one. A joined user namespace comes last of the joins, since it ends those rights.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use husk_protocol::JOINED_NAMESPACE;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, LinuxTimeOffset};

use super::error::{LaunchError, Step};
use super::mounts::set_root_propagation;
use super::paths::open_file;
use super::spec::has_path;

/// What to do about the container's namespaces.
#[derive(Debug)]
pub(crate) struct Plan {
    join: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// Another container's, by its init: a pidfd, and CLONE_NEW* bits.
    joined: Option<(OwnedFd, i32)>,
    /// CLONE_NEW* bits to make, without CLONE_NEWTIME.
    pub(crate) create: i32,
    time: bool,
}

impl Plan {
    /// Opens the namespaces to join; `joined` is the init of another container of which some may be.
    pub(crate) fn open(linux: &Linux, joined: Option<OwnedFd>) -> Result<Self, LaunchError> {
        let mut plan = Self {
            join: Vec::new(),
            joined: joined.map(|init| (init, 0)),
            create: 0,
            time: false,
        };
        for namespace in linux.namespaces().iter().flatten() {
            let typ = namespace.typ();
            match namespace.path() {
                Some(path) if path == Path::new(JOINED_NAMESPACE) => match &mut plan.joined {
                    Some((_, types)) => *types |= typ as i32,
                    None => {
                        return Err(LaunchError::invalid(format!(
                            "the {typ} namespace is to be another container's, and the request names none"
                        )));
                    }
                },
                Some(path) if has_path(Some(path)) => {
                    let fd = open_file(path)
                        .spec_step(|| format!("opening {typ} namespace {path:?} to join"))?;
                    plan.join.push((typ, fd));
                }
                _ if typ == LinuxNamespaceType::Time => plan.time = true,
                _ => plan.create |= typ as i32,
            }
        }
        Ok(plan)
    }

    /// Whether this type is made anew.
    pub(crate) fn creates(&self, typ: LinuxNamespaceType) -> bool {
        self.create & typ as i32 != 0
    }

    /// Whether the container lives in a user namespace other than the guest's.
    pub(crate) fn has_user(&self) -> bool {
        self.has(LinuxNamespaceType::User)
    }

    /// Whether the spec lists this type; where it does not the container shares the guest's.
    pub(crate) fn has(&self, typ: LinuxNamespaceType) -> bool {
        let anew = self.creates(typ) || typ == LinuxNamespaceType::Time && self.time;
        let by_init = self
            .joined
            .as_ref()
            .is_some_and(|(_, types)| types & typ as i32 != 0);
        anew || by_init || self.join.iter().any(|(joined, _)| *joined == typ)
    }

    /// Joins what exists and prepares the time namespace; children are then in them.
    pub(crate) fn enter(&self, linux: &Linux) -> Result<(), LaunchError> {
        if self.time {
            unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
                .step(|| "making a time namespace".to_owned())?;
            if let Some(offsets) = linux.time_offsets() {
                write_time_offsets(offsets)?;
            }
        }
        let is_user = |(typ, _): &&(LinuxNamespaceType, OwnedFd)| *typ == LinuxNamespaceType::User;
        for one in self.join.iter().filter(|one| !is_user(one)) {
            join(one)?;
        }
        if let Some((init, types)) = &self.joined
            && *types != 0
        {
            setns(init.as_fd(), CloneFlags::from_bits_retain(*types)).map_err(
                |errno| match errno {
                    Errno::ESRCH => LaunchError::NotRunning(
                        "cannot join the namespaces of another container of the pod: it has ended"
                            .into(),
                    ),
                    errno => LaunchError::internal(format!(
                        "joining another container's namespaces: {errno}"
                    )),
                },
            )?;
        }
        self.join.iter().filter(is_user).try_for_each(join)
    }
}

fn join((typ, fd): &(LinuxNamespaceType, OwnedFd)) -> Result<(), LaunchError> {
    setns(fd.as_fd(), CloneFlags::from_bits_retain(*typ as i32))
        .spec_step(|| format!("joining the {typ} namespace"))
}

/// Leaves the agent's mount namespace for a copy that ends with the launch. Opening a path on a virtio-fs share mounts what
/// the host has mounted there, and in the agent's own namespace it would stay for good and keep the host from unmounting
/// it. What the agent mounts still arrives.
pub(crate) fn leave_agents_mounts() -> Result<(), LaunchError> {
    unshare(CloneFlags::CLONE_NEWNS).step(|| "leaving the agent's mount namespace".to_owned())?;
    set_root_propagation(libc::MS_SLAVE, true)
}

fn write_time_offsets(
    offsets: &std::collections::HashMap<String, LinuxTimeOffset>,
) -> Result<(), LaunchError> {
    let mut lines = String::new();
    for (clock, offset) in offsets {
        if clock != "monotonic" && clock != "boottime" {
            return Err(LaunchError::invalid(format!(
                "invalid clock {clock:?} in linux.timeOffsets: \"monotonic\" or \"boottime\""
            )));
        }
        let (seconds, nanoseconds) = (
            offset.secs().unwrap_or_default(),
            offset.nanosecs().unwrap_or_default(),
        );
        lines.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
    }
    if lines.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", lines)
        .spec_step(|| "setting linux.timeOffsets".to_owned())
}

/// Writes the maps of a process that has just got a user namespace of its own.
pub(crate) fn write_id_maps(pid: i32, linux: &Linux) -> Result<(), LaunchError> {
    for (file, mappings) in [
        ("uid_map", linux.uid_mappings()),
        ("gid_map", linux.gid_mappings()),
    ] {
        let lines: String = mappings.iter().flatten().map(map_line).collect();
        fs::write(format!("/proc/{pid}/{file}"), &lines)
            .spec_step(|| format!("writing {file} {lines:?}"))?;
    }
    Ok(())
}

fn map_line(mapping: &LinuxIdMapping) -> String {
    format!(
        "{} {} {}\n",
        mapping.container_id(),
        mapping.host_id(),
        mapping.size()
    )
}

/// Whom the root of the spec's user namespace is to the guest, user and group: `None` where that has no root.
pub(crate) fn root_of(linux: &Linux) -> Option<(u32, u32)> {
    let root = |map: &Option<Vec<LinuxIdMapping>>| {
        let mut ranges = map.iter().flatten();
        ranges
            .find(|range| range.container_id() == 0)
            .map(LinuxIdMapping::host_id)
    };
    Some((root(linux.uid_mappings())?, root(linux.gid_mappings())?))
}

/// The same of a process's user namespace.
pub(crate) fn root_in(pid: i32) -> Option<(u32, u32)> {
    let root = |file: &str| {
        let map = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        let mut ranges = map.lines().map(str::split_whitespace);
        ranges.find_map(|mut range| (range.next()? == "0").then(|| range.next()?.parse().ok())?)
    };
    Some((root("uid_map")?, root("gid_map")?))
}

/// Becomes root of the user namespace that the process is in: until then its ids are unmapped.
pub(crate) fn become_root() -> Result<(), LaunchError> {
    use rustix::process::{Gid, Uid};
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)
        .step(|| "becoming group 0 of the user namespace".to_owned())?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .step(|| "becoming user 0 of the user namespace".to_owned())
}

/// The namespaces of a running container, joined through its init's pidfd. Some may be the guest's
/// own, which joining again leaves as they are; a user namespace can only be joined when it is another one.
pub(crate) fn join_all(init: impl AsFd, namespaces: i32) -> Result<(), LaunchError> {
    setns(init.as_fd(), CloneFlags::from_bits_retain(namespaces)).map_err(|errno| match errno {
        Errno::ESRCH => LaunchError::NotRunning(
            "cannot exec in a container whose init process has ended".into(),
        ),
        errno => LaunchError::internal(format!("joining the container's namespaces: {errno}")),
    })
}
