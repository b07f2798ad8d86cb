//! A container's figures, from the guest's cgroup v2 files into containerd's messages; and a pod's, which are its VMM's.
//!
//! containerd takes the version that its host has, so a host with cgroup v1 gets the old message; both come from the
//! same figures.

use std::{collections::HashMap, io};

use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{Message, well_known_types::any::Any},
};
use husk_protocol::agent::{
    ContainerStatsResponse, CpuStats, HugetlbStats, MemoryStats, PidsStats,
};

/// containerd's type name, without a prefix: it compares the whole string.
const V2_URL: &str = "io.containerd.cgroups.v2.Metrics";
const V1_URL: &str = "io.containerd.cgroups.v1.Metrics";

/// The answer to Stats.
///
/// # Errors
/// When a message cannot be encoded.
pub fn metrics(
    stats: &ContainerStatsResponse,
    unified: bool,
) -> Result<Any, containerd_shim_protos::protobuf::Error> {
    let (type_url, value) = if unified {
        (V2_URL, v2_metrics(stats).write_to_bytes()?)
    } else {
        (V1_URL, v1_metrics(stats).write_to_bytes()?)
    };
    Ok(Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    })
}

/// What a process has used, all its threads together: a VMM's is what its pod costs the host.
///
/// # Errors
/// When the process has gone.
pub fn of_process(pid: u32, memory_limit: u64) -> io::Result<ContainerStatsResponse> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    // Fields 14, 15 and 20 of proc_pid_stat(5); the second, a name in parentheses, may hold anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |text: &str, n: usize| -> u64 {
        let field = text.split_ascii_whitespace().nth(n);
        field.and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    let usec = |n: usize| field(fields, n).saturating_mul(1_000_000) / ticks;
    let (user, system) = (usec(11), usec(12));
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
    let cpu = CpuStats {
        usage_usec: user.saturating_add(system),
        user_usec: user,
        system_usec: system,
        ..Default::default()
    };
    let memory = MemoryStats {
        usage: field(&statm, 1).saturating_mul(page),
        usage_limit: memory_limit,
        ..Default::default()
    };
    let pids = PidsStats {
        current: field(fields, 17),
        ..Default::default()
    };
    Ok(ContainerStatsResponse {
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        pids: Some(pids).into(),
        ..Default::default()
    })
}

/// Most devices that a guest may tell of: each becomes a time series of containerd's metrics.
const MAX_DEVICES: usize = 256;

/// Its huge pages, of the sizes that there are on any machine and under their names.
fn page_sizes(stats: &ContainerStatsResponse) -> impl Iterator<Item = &HugetlbStats> {
    const SIZES: [&str; 4] = ["64KB", "2MB", "32MB", "1GB"];
    let is_known = |pages: &&HugetlbStats| SIZES.contains(&pages.page_size.as_str());
    stats.hugetlb.iter().filter(is_known).take(SIZES.len())
}

struct Named<'a>(&'a HashMap<String, u64>);

impl Named<'_> {
    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

fn v2_metrics(stats: &ContainerStatsResponse) -> v2::Metrics {
    let io = stats.io.iter().take(MAX_DEVICES).map(|io| v2::IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    });
    let hugetlb = page_sizes(stats).map(|h| v2::HugeTlbStat {
        current: h.current,
        max: h.max,
        pagesize: h.page_size.clone(),
        ..Default::default()
    });
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(v2_cpu(&stats.cpu)).into(),
        memory: Some(v2_memory(&stats.memory)).into(),
        memory_events: Some(v2_events(&stats.memory)).into(),
        io: Some(v2::IOStat {
            usage: io.collect(),
            ..Default::default()
        })
        .into(),
        hugetlb: hugetlb.collect(),
        ..Default::default()
    }
}

fn v2_cpu(cpu: &CpuStats) -> v2::CPUStat {
    v2::CPUStat {
        usage_usec: cpu.usage_usec,
        user_usec: cpu.user_usec,
        system_usec: cpu.system_usec,
        nr_periods: cpu.nr_periods,
        nr_throttled: cpu.nr_throttled,
        throttled_usec: cpu.throttled_usec,
        ..Default::default()
    }
}

fn v2_memory(memory: &MemoryStats) -> v2::MemoryStat {
    let stat = Named(&memory.stat);
    v2::MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        // Split into anon and file since Linux 5.9.
        workingset_refault: stat
            .get("workingset_refault_anon")
            .saturating_add(stat.get("workingset_refault_file")),
        workingset_activate: stat
            .get("workingset_activate_anon")
            .saturating_add(stat.get("workingset_activate_file")),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.usage_limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        ..Default::default()
    }
}

fn v2_events(memory: &MemoryStats) -> v2::MemoryEvents {
    let events = Named(&memory.events);
    v2::MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..Default::default()
    }
}

fn v1_metrics(stats: &ContainerStatsResponse) -> v1::Metrics {
    let stat = Named(&stats.memory.stat);
    let nanos = |usec: u64| usec.saturating_mul(1000);
    let cpu = v1::CPUStat {
        usage: Some(v1::CPUUsage {
            total: nanos(stats.cpu.usage_usec),
            kernel: nanos(stats.cpu.system_usec),
            user: nanos(stats.cpu.user_usec),
            ..Default::default()
        })
        .into(),
        throttling: Some(v1::Throttle {
            periods: stats.cpu.nr_periods,
            throttled_periods: stats.cpu.nr_throttled,
            throttled_time: nanos(stats.cpu.throttled_usec),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let memory = v1::MemoryStat {
        cache: stat.get("file"),
        rss: stat.get("anon"),
        mapped_file: stat.get("file_mapped"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        // kubelet computes the working set from this one.
        total_inactive_file: stat.get("inactive_file"),
        usage: Some(v1::MemoryEntry {
            usage: stats.memory.usage,
            limit: stats.memory.usage_limit,
            ..Default::default()
        })
        .into(),
        swap: Some(v1::MemoryEntry {
            usage: stats.memory.swap_usage,
            limit: stats.memory.swap_limit,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    v1::Metrics {
        pids: Some(v1::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use husk_protocol::agent::IoStats;

    use super::*;

    #[test]
    fn a_process_is_measured() {
        let own = of_process(std::process::id(), 7).unwrap();
        assert!(own.memory.usage > 0 && own.pids.current > 0);
        assert_eq!(own.memory.usage_limit, 7);
        assert_eq!(own.cpu.usage_usec, own.cpu.user_usec + own.cpu.system_usec);
        assert!(of_process(u32::MAX, 0).is_err());
    }

    /// A guest may say anything: sums do not overflow, and containerd does not get a series for each thing that a guest can think of.
    #[test]
    fn absurd_figures_are_carried_and_absurd_lists_are_not() {
        let stat = [
            "workingset_refault_anon",
            "workingset_refault_file",
            "workingset_activate_anon",
            "workingset_activate_file",
        ];
        let stats = ContainerStatsResponse {
            cpu: Some(CpuStats {
                usage_usec: u64::MAX,
                throttled_usec: u64::MAX,
                ..Default::default()
            })
            .into(),
            memory: Some(MemoryStats {
                stat: stat.map(|name| (name.to_owned(), u64::MAX)).into(),
                ..Default::default()
            })
            .into(),
            io: vec![IoStats::default(); 100_000],
            hugetlb: ["2MB", "1GB", "x", "2MB"]
                .into_iter()
                .cycle()
                .take(1000)
                .map(|size| HugetlbStats {
                    page_size: size.to_owned(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        let any = metrics(&stats, true).unwrap();
        let new = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(new.memory.workingset_refault, u64::MAX);
        assert_eq!(new.memory.workingset_activate, u64::MAX);
        assert_eq!(new.io.usage.len(), MAX_DEVICES);
        let sizes: Vec<_> = new.hugetlb.iter().map(|h| h.pagesize.as_str()).collect();
        assert_eq!(sizes, ["2MB", "1GB", "2MB", "2MB"]);
        let any = metrics(&stats, false).unwrap();
        let old = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(old.cpu.usage.total, u64::MAX);
        assert_eq!(old.cpu.throttling.throttled_time, u64::MAX);
    }
}
