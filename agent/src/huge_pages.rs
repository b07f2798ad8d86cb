//! The guest's huge pages.
//!
//! A host sets its huge pages aside for good, and its administrator says how many. A guest has none until a container may use some: one with a
//! limit on them, or a volume of them. From then on the kernel makes them of free memory when a program maps them, and takes them back
//! when it is done (`nr_overcommit_hugepages`); where there is no memory for one, mmap fails. How many a container may have, its
//! cgroup says.

use std::fs;
use std::io;
use std::path::Path;

/// How many pages may be made on demand.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

const PAGE_KIB: u64 = husk_protocol::HUGE_PAGE_BYTES / 1024;

/// KiB that never become huge pages: what an idle guest touches, its kernel and the agent. No memory limit counts huge pages and nothing
/// reclaims them, so that programs could leave the guest without any memory else.
const RESERVE_KIB: u64 = 32 * 1024;

/// Lets the containers have huge pages: up to all of the guest's memory but a reserve. To be called again when it has more.
///
/// # Errors
/// The kernel's reason.
pub(crate) fn give() -> io::Result<()> {
    let pages = most(&fs::read_to_string("/proc/meminfo")?);
    fs::write(POOL, pages.to_string())
}

/// As [`give`], where this container's cgroup lets it have some. A cgroup without a limit is no claim.
pub(crate) fn give_to(cgroup: &Path) {
    let limit = fs::read_to_string(cgroup.join("hugetlb.2MB.max")).unwrap_or_default();
    let limit: u64 = limit.trim().parse().unwrap_or(0);
    if limit > 0
        && let Err(error) = give()
    {
        tracing::warn!(%error, "the guest has no huge pages for its containers");
    }
}

fn most(meminfo: &str) -> u64 {
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let total: u64 = total.and_then(|kib| kib.parse().ok()).unwrap_or(0);
    total.saturating_sub(RESERVE_KIB) / PAGE_KIB
}

#[cfg(test)]
mod tests {
    use super::most;

    #[test]
    fn a_guest_keeps_a_reserve() {
        let of = |total: &str| {
            most(&format!(
                "MemTotal:       {total} kB\nMemFree:  9999999 kB\n"
            ))
        };
        assert_eq!(of("229376"), 96);
        assert_eq!(of("34816"), 1);
        assert_eq!(of("34815"), 0);
        assert_eq!(of("1000"), 0);
        assert_eq!(most(""), 0);
    }
}
