//! Reads a container's figures from the files of its cgroup (cgroup v2; the kernel's `cgroup-v2.rst`).
//!
//! A file that is not there belongs to a controller that is not on, and counts as zero.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use husk_protocol::agent::{
    ContainerStatsResponse, CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats,
};
use protobuf::MessageField;

/// Everything that the agent API reports.
pub fn read(cgroup: &Path) -> ContainerStatsResponse {
    ContainerStatsResponse {
        cpu: MessageField::some(cpu(cgroup)),
        memory: MessageField::some(memory(cgroup)),
        pids: MessageField::some(pids(cgroup)),
        io: io(&text(&cgroup.join("io.stat"))),
        hugetlb: hugetlb(cgroup),
        ..Default::default()
    }
}

/// Processes that the kernel has killed for memory, out of a `memory.events` file.
pub fn oom_kills(memory_events: &Path) -> u64 {
    flat_keyed(&text(memory_events))
        .get("oom_kill")
        .copied()
        .unwrap_or(0)
}

fn cpu(cgroup: &Path) -> CpuStats {
    let stat = flat_keyed(&text(&cgroup.join("cpu.stat")));
    let of = |key: &str| stat.get(key).copied().unwrap_or(0);
    CpuStats {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        ..Default::default()
    }
}

fn memory(cgroup: &Path) -> MemoryStats {
    let limit = |file: &str| {
        value(cgroup, file)
            .unwrap_or(Value::Max)
            .or_for_max(u64::MAX)
    };
    let usage = |file: &str| value(cgroup, file).map_or(0, |value| value.or_for_max(u64::MAX));
    MemoryStats {
        usage: usage("memory.current"),
        usage_limit: limit("memory.max"),
        swap_usage: usage("memory.swap.current"),
        swap_limit: limit("memory.swap.max"),
        stat: flat_keyed(&text(&cgroup.join("memory.stat"))),
        events: flat_keyed(&text(&cgroup.join("memory.events"))),
        ..Default::default()
    }
}

fn pids(cgroup: &Path) -> PidsStats {
    let of = |file: &str| value(cgroup, file).map_or(0, |value| value.or_for_max(0));
    PidsStats {
        current: of("pids.current"),
        limit: of("pids.max"),
        ..Default::default()
    }
}

/// Lines like `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<IoStats> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut stats = IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => stats.rbytes = value,
                    "wbytes" => stats.wbytes = value,
                    "rios" => stats.rios = value,
                    "wios" => stats.wios = value,
                    _ => {}
                }
            }
            Some(stats)
        })
        .collect()
}

/// One entry a page size, named by the files: `hugetlb.2MB.current`.
fn hugetlb(cgroup: &Path) -> Vec<HugetlbStats> {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return Vec::new();
    };
    let mut sizes: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // hugetlb.2MB.rsvd.current counts reservations.
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    sizes
        .into_iter()
        .map(|page_size| {
            let of = |what: &str| value(cgroup, &format!("hugetlb.{page_size}.{what}"));
            HugetlbStats {
                current: of("current").map_or(0, |value| value.or_for_max(u64::MAX)),
                max: of("max").map_or(u64::MAX, |value| value.or_for_max(u64::MAX)),
                page_size: page_size.clone(),
                ..Default::default()
            }
        })
        .collect()
}

/// A file of one number or `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Max,
    Number(u64),
}

impl Value {
    fn or_for_max(self, max: u64) -> u64 {
        match self {
            Self::Max => max,
            Self::Number(number) => number,
        }
    }
}

fn value(cgroup: &Path, file: &str) -> Option<Value> {
    match text(&cgroup.join(file)).trim() {
        "max" => Some(Value::Max),
        number => number.parse().ok().map(Value::Number),
    }
}

/// Lines of a key and a number.
fn flat_keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_throttled 1\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.swap.max", "0\n");
        put("memory.stat", "anon 12\nfile 34\n");
        put("memory.events", "oom 2\noom_kill 1\n");
        put("pids.current", "3\n");
        put("pids.max", "max\n");
        put(
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 \n",
        );
        put("hugetlb.2MB.current", "2097152\n");
        put("hugetlb.2MB.max", "max\n");
        put("hugetlb.2MB.rsvd.current", "0\n");

        let stats = read(dir.path());
        assert_eq!((stats.cpu.usage_usec, stats.cpu.nr_throttled), (10, 1));
        assert_eq!(
            (stats.memory.usage, stats.memory.usage_limit),
            (4096, u64::MAX)
        );
        assert_eq!((stats.memory.swap_usage, stats.memory.swap_limit), (0, 0));
        assert_eq!(stats.memory.stat.get("file"), Some(&34));
        assert_eq!(stats.memory.events.get("oom_kill"), Some(&1));
        assert_eq!((stats.pids.current, stats.pids.limit), (3, 0));
        assert_eq!(stats.io.len(), 2);
        assert_eq!((stats.io[0].major, stats.io[0].wios), (8, 4));
        assert_eq!(stats.io[1].minor, 16);
        assert_eq!(stats.hugetlb.len(), 1);
        assert_eq!(
            (stats.hugetlb[0].current, stats.hugetlb[0].max),
            (2_097_152, u64::MAX)
        );
        assert_eq!(oom_kills(&dir.path().join("memory.events")), 1);
    }

    #[test]
    fn what_is_not_there_is_zero_or_unlimited() {
        let stats = read(Path::new("/nonexistent"));
        assert_eq!(stats.cpu.usage_usec, 0);
        assert_eq!(stats.memory.usage_limit, u64::MAX);
        assert!(stats.io.is_empty());
    }
}
