//! From the spec's limits, which speak cgroup v1, to the files of cgroup v2.
//!
//! First the list of writes is worked out, which is a pure function and tested as one; then they are made, in that
//! order. The conversions are runc's (opencontainers/cgroups), so that a limit means the same under husk.

use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::cpu_list;
use crate::container::error::{LaunchError, OsError};

/// One file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    file: String,
    value: String,
    tolerate: Tolerate,
}

/// Which failures to write a file are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tolerate {
    /// The limit must be enforced.
    Nothing,
    /// No such file: the value lifts a limit that does not exist, or another file says the same.
    Missing,
    /// Any: the write comes again.
    Anything,
}

/// What a plan needs to know of the cgroup as it is.
#[derive(Debug, Clone, Default)]
struct Current {
    /// BFQ schedules the guest's disks.
    bfq: bool,
    /// The quota in cpu.max.
    quota: Option<String>,
}

fn write(file: impl Into<String>, value: impl ToString) -> Write {
    Write {
        file: file.into(),
        value: value.to_string(),
        tolerate: Tolerate::Nothing,
    }
}

/// Writes the limits into a cgroup's files.
pub(super) fn apply(cgroup: &Path, resources: &LinuxResources) -> Result<(), LaunchError> {
    check_before_update(cgroup, resources)?;
    let current = Current {
        bfq: cgroup.join("io.bfq.weight").exists(),
        quota: fs::read_to_string(cgroup.join("cpu.max"))
            .ok()
            .and_then(|text| text.split_ascii_whitespace().next().map(str::to_owned)),
    };
    for mut write in plan(resources, &current)? {
        if write.file == "cpuset.cpus" || write.file == "cpuset.mems" {
            let Some(value) = within_guest(cgroup, &write) else {
                continue;
            };
            write.value = value;
        }
        apply_one(cgroup, &write)?;
    }
    Ok(())
}

fn apply_one(cgroup: &Path, write: &Write) -> Result<(), LaunchError> {
    // Files of one line per device take one line per write.
    for line in write.value.split('\n').filter(|line| !line.is_empty()) {
        match fs::write(cgroup.join(&write.file), line) {
            Ok(()) => {}
            Err(_) if write.tolerate == Tolerate::Anything => {}
            // Specs name the host's devices. What reaches those is limited there, by the pod's own cgroup.
            Err(error)
                if write.file.starts_with("io.") && error.raw_os_error() == Some(libc::ENODEV) =>
            {
                tracing::warn!(
                    "{} {line:?} is not applied: the guest has no such device",
                    write.file
                );
            }
            // Creating a file is what cgroupfs forbids.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) && !cgroup.join(&write.file).exists() =>
            {
                if write.tolerate == Tolerate::Nothing {
                    return Err(LaunchError::invalid(format!(
                        "cannot set {} to {line:?}: the guest's kernel has no such control",
                        write.file
                    )));
                }
            }
            Err(error) => {
                return Err(LaunchError::invalid(format!(
                    "failed to write {line:?} to {}: {}",
                    write.file,
                    error.text()
                )));
            }
        }
    }
    Ok(())
}

/// The host's CPUs are not the guest's: of a list, those that the guest has. `None`, with a word in the
/// log, where none is left: then the pod's own placement on the host is what counts.
fn within_guest(cgroup: &Path, write: &Write) -> Option<String> {
    let effective = fs::read_to_string(cgroup.parent()?.join(format!("{}.effective", write.file)))
        .ok()
        .and_then(|text| cpu_list::parse(&text));
    let (Some(wanted), Some(there)) = (cpu_list::parse(&write.value), effective) else {
        // Malformed: the kernel says so.
        return Some(write.value.clone());
    };
    let both = wanted.intersection(&there).copied().collect();
    let text = cpu_list::format(&both);
    if text.is_empty() {
        tracing::warn!(
            "{} {:?} names nothing that the guest has: not applied",
            write.file,
            write.value
        );
        return None;
    }
    Some(text)
}

/// memory.checkBeforeUpdate: refuse a limit below what is in use rather than kill for it.
fn check_before_update(cgroup: &Path, resources: &LinuxResources) -> Result<(), LaunchError> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok());
    let (Some(true), Some(limit)) = (memory.check_before_update(), limit.filter(|l| *l > 0)) else {
        return Ok(());
    };
    let usage = fs::read_to_string(cgroup.join("memory.current"))
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0);
    if usage > limit {
        return Err(LaunchError::invalid(format!(
            "rejecting memory limit {limit}: the current memory usage {usage} is higher"
        )));
    }
    Ok(())
}

/// The writes that a set of limits comes to, in the order to make them in.
fn plan(resources: &LinuxResources, current: &Current) -> Result<Vec<Write>, LaunchError> {
    let mut writes = Vec::new();
    if let Some(pids) = resources.pids() {
        // 0 means unset, as in runc.
        if pids.limit() != 0 {
            writes.push(write("pids.max", or_max(pids.limit())));
        }
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut writes)?;
    }
    if let Some(io) = resources.block_io() {
        plan_io(io, current.bfq, &mut writes);
    }
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, current.quota.as_deref(), &mut writes);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        if limit.page_size().contains('/') {
            return Err(LaunchError::invalid(format!(
                "invalid huge page size {:?}",
                limit.page_size()
            )));
        }
        // Callers list every page size of the host. One that the guest lacks cannot be used either.
        for file in ["max", "rsvd.max"] {
            writes.push(Write {
                tolerate: Tolerate::Missing,
                ..write(
                    format!("hugetlb.{}.{file}", limit.page_size()),
                    or_max(limit.limit()),
                )
            });
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(LaunchError::invalid(format!(
                "unified resource {file:?} must be a file of a controller, like \"memory.high\""
            )));
        }
        writes.push(write(file, value));
    }
    Ok(writes)
}

fn or_max(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

fn plan_memory(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), LaunchError> {
    let limit = memory.limit().unwrap_or(0);
    let swap_total = memory.swap().unwrap_or(0);
    let swap = swap_limit(swap_total, limit)?;
    // 0 means unset, unless it is what remains of an explicit memory+swap limit.
    if swap != 0 || swap_total > 0 {
        writes.push(Write {
            // Without swap there is nothing to limit, and lifting a limit needs none.
            tolerate: Tolerate::Missing,
            ..write("memory.swap.max", or_max(swap))
        });
    }
    if limit != 0 {
        writes.push(write("memory.max", or_max(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        writes.push(write("memory.low", or_max(reservation)));
    }
    Ok(())
}

/// v1 limits memory and swap together, v2 swap alone.
fn swap_limit(memory_and_swap: i64, memory: i64) -> Result<i64, LaunchError> {
    match (memory_and_swap, memory) {
        // Lifting the memory limit lifts that of swap too, for v1's sake.
        (0, -1) => Ok(-1),
        (-1 | 0, _) => Ok(memory_and_swap),
        (_, 0) => Err(LaunchError::invalid(
            "unable to set swap limit without memory limit",
        )),
        (_, ..0) => Err(LaunchError::invalid(format!(
            "invalid memory value: {memory}"
        ))),
        _ if memory_and_swap < memory => Err(LaunchError::invalid(
            "memory+swap limit should be >= memory limit",
        )),
        _ => Ok(memory_and_swap - memory),
    }
}

fn plan_cpu(cpu: &LinuxCpu, current_quota: Option<&str>, writes: &mut Vec<Write>) {
    let idle = cpu.idle();
    if let Some(idle) = idle {
        writes.push(write("cpu.idle", idle));
    }
    // An idle group has no weight.
    if let Some(shares) = cpu
        .shares()
        .filter(|shares| *shares != 0 && idle != Some(1))
    {
        writes.push(write("cpu.weight", cpu_weight(shares)));
    }
    let burst = cpu.burst().map(|burst| write("cpu.max.burst", burst));
    if let Some(burst) = &burst {
        // A burst may not exceed the quota: where both shrink it has to go first, where both grow last.
        writes.push(Write {
            tolerate: Tolerate::Anything,
            ..burst.clone()
        });
    }
    let quota = cpu.quota().filter(|quota| *quota != 0).map(or_max);
    let period = cpu.period().filter(|period| *period != 0);
    match (quota, period) {
        (None, None) => {}
        (Some(quota), None) => writes.push(write("cpu.max", quota)),
        (quota, Some(period)) => {
            let quota = quota.or(current_quota.map(str::to_owned));
            let quota = quota.unwrap_or_else(|| "max".to_owned());
            writes.push(write("cpu.max", format!("{quota} {period}")));
        }
    }
    writes.extend(burst);
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            writes.push(write(file, list));
        }
    }
}

/// Shares (2 to 262144, default 1024) to a weight (1 to 10000, default 100): a curve through both ends
/// and the two defaults, as opencontainers/cgroups has since 0.0.3.
fn cpu_weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

/// blkio weight (10 to 1000) to io.weight (1 to 10000).
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.max(10)) - 10) * 9999 / 990
}

fn plan_io(io: &LinuxBlockIo, bfq: bool, writes: &mut Vec<Write>) {
    // BFQ takes blkio's own scale.
    let (file, scale): (_, fn(u16) -> u64) = if bfq {
        ("io.bfq.weight", u64::from)
    } else {
        ("io.weight", io_weight)
    };
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        writes.push(write(file, scale(weight)));
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            writes.push(write(
                file,
                format!("{}:{} {}", device.major(), device.minor(), scale(weight)),
            ));
        }
    }
    for (key, devices) in [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ] {
        for device in devices.iter().flatten() {
            writes.push(throttle(key, device));
        }
    }
}

fn throttle(key: &str, device: &LinuxThrottleDevice) -> Write {
    // 0 lifts the limit.
    let rate = match device.rate() {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    write(
        "io.max",
        format!("{}:{} {key}={rate}", device.major(), device.minor()),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn planned(resources: serde_json::Value) -> Result<Vec<String>, LaunchError> {
        let resources = serde_json::from_value(resources).unwrap();
        Ok(plan(&resources, &Current::default())?
            .into_iter()
            .map(|write| format!("{}={}", write.file, write.value))
            .collect())
    }

    #[test]
    fn docker_run_with_everything() {
        let writes = planned(json!({
            "memory": {"limit": 536870912, "swap": 1073741824, "reservation": 268435456},
            "cpu": {"shares": 1024, "quota": 150000, "period": 100000, "burst": 5000, "cpus": "0-1"},
            "pids": {"limit": 100},
            "blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1048576}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
            "unified": {"memory.high": "400M", "cpu.weight.nice": "5"},
        }))
        .unwrap();
        assert_eq!(
            writes,
            [
                "pids.max=100",
                "memory.swap.max=536870912",
                "memory.max=536870912",
                "memory.low=268435456",
                "io.weight=4950",
                "io.max=8:0 rbps=1048576",
                "cpu.weight=100",
                "cpu.max.burst=5000",
                "cpu.max=150000 100000",
                "cpu.max.burst=5000",
                "cpuset.cpus=0-1",
                "hugetlb.2MB.max=4194304",
                "hugetlb.2MB.rsvd.max=4194304",
                "cpu.weight.nice=5",
                "memory.high=400M",
            ]
        );
    }

    #[test]
    fn unlimited_and_unset() {
        let unlimited = json!({"memory": {"limit": -1, "swap": -1}, "pids": {"limit": -1}, "cpu": {"quota": -1}});
        assert_eq!(
            planned(unlimited).unwrap(),
            [
                "pids.max=max",
                "memory.swap.max=max",
                "memory.max=max",
                "cpu.max=max"
            ]
        );
        let unset = json!({"memory": {"limit": 0, "swap": 0}, "pids": {"limit": 0}, "cpu": {"shares": 0, "quota": 0}});
        assert!(planned(unset).unwrap().is_empty());
        assert!(planned(json!({})).unwrap().is_empty());
        let idle = json!({"cpu": {"idle": 1, "shares": 512}});
        assert_eq!(planned(idle).unwrap(), ["cpu.idle=1"]);
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(swap_limit(300, 100), Ok(200));
        assert_eq!(swap_limit(100, 100), Ok(0));
        assert_eq!(swap_limit(-1, 100), Ok(-1));
        assert_eq!(swap_limit(0, -1), Ok(-1));
        assert_eq!(swap_limit(0, 100), Ok(0));
        assert!(swap_limit(50, 100).is_err());
        assert!(swap_limit(50, 0).is_err());
        assert!(swap_limit(50, -1).is_err());
        // No swap at all, explicitly.
        let none = json!({"memory": {"limit": 100, "swap": 100}});
        assert_eq!(
            planned(none).unwrap(),
            ["memory.swap.max=0", "memory.max=100"]
        );
    }

    #[test]
    fn weights() {
        // Ends and defaults, and figures of the published table.
        for (shares, weight) in [
            (0, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(cpu_weight(shares), weight, "{shares}");
        }
        assert_eq!((io_weight(10), io_weight(1000)), (1, 10_000));
        assert_eq!(io_weight(0), 1);
    }

    #[test]
    fn unified_names_are_plain() {
        for bad in ["../cgroup.procs", "cgroup.procs", "memory"] {
            assert!(planned(json!({"unified": {bad: "1"}})).is_err(), "{bad}");
        }
        assert!(planned(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]})).is_err());
    }

    #[test]
    fn limits_are_written() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pids.max"), "").unwrap();
        let resources = |value| serde_json::from_value::<LinuxResources>(value).unwrap();
        apply(dir.path(), &resources(json!({"pids": {"limit": 9}}))).unwrap();
        assert_eq!(
            fs::read_to_string(dir.path().join("pids.max")).unwrap(),
            "9"
        );
    }

    proptest! {
        #[test]
        fn weights_grow_with_shares(a in 0u64..300_000, b in 0u64..300_000) {
            prop_assert!(cpu_weight(a.min(b)) <= cpu_weight(a.max(b)));
            prop_assert!((1..=10_000).contains(&cpu_weight(a)));
        }
    }
}
