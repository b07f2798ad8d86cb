//! How big a pod's VM is.
//!
//! The pod's own limits say it where the engine passes them on (the annotations of SHIM-CONTRACT "Grouping"), else the
//! limits of the one container; what is not set takes the configured default. A limit is what the containers may use, so
//! the guest's kernel and agent come on top of it: a container must be able to reach its limit, and to be stopped by its own
//! cgroup there rather than by an empty VM.

use std::collections::HashMap;

use husk_protocol::vm::{MAX_VCPUS, MIN_MEMORY_MIB};

/// Memory of the guest's kernel, agent and page tables, in MiB, before the share that grows with the VM.
pub const GUEST_OVERHEAD_MIB: u64 = 64;

/// One part in this many of a limit is added for what the kernel keeps per page (`struct page` is 1/64 of the memory it describes) and
/// for page tables and slabs.
const OVERHEAD_DIVISOR: u64 = 32;

/// What the VMM itself takes of the pod's cgroup, in MiB, before the share that grows with the VM: its heap, threads and buffers.
pub const HOST_OVERHEAD_MIB: u64 = 16;

/// One part in this many of a VM's memory is the host's page tables: 8 bytes for each page of 4 KiB, for the process and for the guest.
const PAGE_TABLES_DIVISOR: u64 = 256;

/// Kubernetes' shares for one whole CPU.
const SHARES_PER_CPU: u64 = 1024;

const MIB: u64 = 1024 * 1024;

/// vCPUs and memory of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// At least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
}

impl Size {
    /// No part is larger than that of `max`.
    #[must_use]
    pub fn at_most(self, max: Self) -> Self {
        Self {
            vcpus: self.vcpus.min(max.vcpus),
            memory_mib: self.memory_mib.min(max.memory_mib),
        }
    }

    /// No part is smaller than that of `min`.
    #[must_use]
    pub fn at_least(self, min: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(min.vcpus),
            memory_mib: self.memory_mib.max(min.memory_mib),
        }
    }
}

/// The node's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Where nothing else is said.
    pub default: Size,
    /// Never more than this.
    pub max: Size,
}

/// What is known of the pod's needs. Zero and negative values mean "not set", as in the runtime spec.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hints {
    /// Bytes.
    pub memory_limit: i64,
    /// Microseconds of CPU time a period.
    pub cpu_quota: i64,
    /// Microseconds; the kernel's default is 100 ms.
    pub cpu_period: u64,
    /// Relative weight, 1024 a CPU in Kubernetes.
    pub cpu_shares: u64,
    /// CPUs that the containers may run on.
    pub cpuset_cpus: u32,
    /// Bytes of huge pages, which no memory limit counts.
    pub huge_pages: u64,
}

/// Annotation prefix of containerd's CRI plugin.
const CRI: &str = "io.kubernetes.cri.sandbox-";

impl Hints {
    /// The pod's own figures, where the engine gives any. Unreadable ones count as absent: they are hints.
    pub fn from_annotations(annotations: &HashMap<String, String>) -> Option<Self> {
        let get = |name: &str| annotations.get(&format!("{CRI}{name}")).map(|v| v.trim());
        let names = ["memory", "cpu-quota", "cpu-period", "cpu-shares"];
        if names.iter().all(|name| get(name).is_none()) {
            return None;
        }
        let number = |name: &str| get(name).and_then(|v| v.parse::<i64>().ok()).unwrap_or(0);
        Some(Self {
            memory_limit: number("memory"),
            cpu_quota: number("cpu-quota"),
            cpu_period: u64::try_from(number("cpu-period")).unwrap_or(0),
            cpu_shares: u64::try_from(number("cpu-shares")).unwrap_or(0),
            cpuset_cpus: 0,
            huge_pages: 0,
        })
    }

    /// MiB of a VM in which this limit can be reached; `None` without a limit.
    pub fn memory_mib(&self) -> Option<u64> {
        let limit = u64::try_from(self.memory_limit).ok().filter(|&l| l > 0)?;
        let limit = limit.div_ceil(MIB);
        Some(
            limit
                .saturating_add(limit / OVERHEAD_DIVISOR)
                .saturating_add(GUEST_OVERHEAD_MIB),
        )
    }

    /// MiB that a VM needs for the huge pages, on top of all else.
    pub fn huge_pages_mib(&self) -> u64 {
        huge_pages_mib(self.huge_pages)
    }

    /// Thousandths of a CPU that the quota allows, on the CPUs that the cpuset allows; 0 without a quota.
    pub fn milli_cpus(&self) -> u64 {
        let quota = u64::try_from(self.cpu_quota).unwrap_or(0);
        let allowed = quota.saturating_mul(1000).div_ceil(self.period());
        match self.cpuset_cpus {
            0 => allowed,
            cpus => allowed.min(u64::from(cpus) * 1000),
        }
    }

    fn period(&self) -> u64 {
        match self.cpu_period {
            0 => 100_000,
            period => period,
        }
    }

    /// vCPUs that can use these up; `default` where nothing is said.
    pub fn vcpus(&self, default: u8) -> u64 {
        let quota = u64::try_from(self.cpu_quota).unwrap_or(0);
        let wanted = if quota > 0 {
            quota.div_ceil(self.period())
        } else {
            // Shares are a request, not a limit: they can ask for more than the default, not for less.
            (self.cpu_shares / SHARES_PER_CPU).max(u64::from(default))
        };
        match self.cpuset_cpus {
            0 => wanted,
            cpus if quota > 0 => wanted.min(u64::from(cpus)),
            cpus => u64::from(cpus),
        }
    }
}

/// MiB of a VM for so many bytes of huge pages.
pub fn huge_pages_mib(bytes: u64) -> u64 {
    let mib = bytes.div_ceil(MIB);
    mib + mib / OVERHEAD_DIVISOR
}

/// The VM's size for these hints.
pub fn size(hints: &Hints, bounds: &Bounds) -> Size {
    let max_vcpus = bounds.max.vcpus.clamp(1, MAX_VCPUS);
    let vcpus = hints
        .vcpus(bounds.default.vcpus)
        .clamp(1, u64::from(max_vcpus));
    let max_memory = bounds.max.memory_mib.max(MIN_MEMORY_MIB);
    let memory_mib = hints
        .memory_mib()
        .unwrap_or(bounds.default.memory_mib)
        .saturating_add(hints.huge_pages_mib())
        .clamp(MIN_MEMORY_MIB, max_memory);
    Size {
        vcpus: u8::try_from(vcpus).unwrap_or(max_vcpus),
        memory_mib,
    }
}

/// MiB of a VM that is to have `memory_mib` and stays within this limit of the pod's cgroup (bytes), where there is one; it is
/// never brought below [`MIN_MEMORY_MIB`].
///
/// The host's kernel would otherwise end the whole pod where the guest's could have stopped one container.
pub fn within(memory_mib: u64, limit: Option<u64>) -> u64 {
    limit.map_or(memory_mib, |limit| memory_mib.min(room_mib(limit)))
}

fn room_mib(limit: u64) -> u64 {
    let limit = limit / MIB;
    limit
        .saturating_sub(HOST_OVERHEAD_MIB + limit / PAGE_TABLES_DIVISOR)
        .max(MIN_MEMORY_MIB)
}

/// How many CPUs a cpuset list ("0-3,8") names; 0 where it is empty or unreadable.
pub fn count_cpus(list: &str) -> u32 {
    let mut count: u32 = 0;
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else {
            return 0;
        };
        let Some(span) = last.checked_sub(first) else {
            return 0;
        };
        count = count.saturating_add(span.saturating_add(1));
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        default: Size {
            vcpus: 2,
            memory_mib: 512,
        },
        max: Size {
            vcpus: 8,
            memory_mib: 16 * 1024,
        },
    };

    #[test]
    fn a_vm_leaves_the_vmm_its_part_of_the_cgroup() {
        assert_eq!(room_mib(512 * MIB), 512 - 16 - 2);
        assert_eq!(room_mib(0), MIN_MEMORY_MIB);
        assert!(room_mib(u64::MAX) < u64::MAX / MIB);
        assert_eq!(within(128, Some(512 * MIB)), 128);
        assert_eq!(within(1024, Some(512 * MIB)), 512 - 16 - 2);
        assert_eq!(within(1024, None), 1024);
    }

    #[test]
    fn nothing_set_is_the_default() {
        assert_eq!(size(&Hints::default(), &BOUNDS), BOUNDS.default);
        let unlimited = Hints {
            memory_limit: -1,
            cpu_quota: -1,
            cpu_shares: 2,
            ..Hints::default()
        };
        assert_eq!(size(&unlimited, &BOUNDS), BOUNDS.default);
    }

    #[test]
    fn cpus_follow_quota_then_shares_then_cpuset() {
        let vcpus = |hints: Hints| size(&hints, &BOUNDS).vcpus;
        let hints = Hints::default();
        assert_eq!(
            vcpus(Hints {
                cpu_quota: 150_000,
                cpu_period: 100_000,
                ..hints
            }),
            2
        );
        assert_eq!(
            vcpus(Hints {
                cpu_quota: 50_000,
                ..hints
            }),
            1
        );
        assert_eq!(
            vcpus(Hints {
                cpu_shares: 4096,
                ..hints
            }),
            4
        );
        assert_eq!(
            vcpus(Hints {
                cpu_shares: 512,
                ..hints
            }),
            2
        );
        assert_eq!(
            vcpus(Hints {
                cpuset_cpus: 3,
                ..hints
            }),
            3
        );
        assert_eq!(
            vcpus(Hints {
                cpuset_cpus: 3,
                cpu_quota: 100_000,
                ..hints
            }),
            1
        );
    }

    #[test]
    fn annotations_are_read_and_bad_ones_ignored() {
        assert_eq!(Hints::from_annotations(&HashMap::new()), None);
        let annotations = HashMap::from([
            (
                "io.kubernetes.cri.sandbox-memory".to_owned(),
                "268435456".to_owned(),
            ),
            (
                "io.kubernetes.cri.sandbox-cpu-quota".to_owned(),
                "many".to_owned(),
            ),
            (
                "io.kubernetes.cri.sandbox-cpu-period".to_owned(),
                "-5".to_owned(),
            ),
        ]);
        let hints = Hints::from_annotations(&annotations).unwrap();
        assert_eq!(
            size(&hints, &BOUNDS),
            Size {
                vcpus: 2,
                memory_mib: 256 + 8 + 64
            }
        );
    }

    #[test]
    fn cpu_lists_are_counted() {
        for (list, count) in [
            ("", 0),
            ("0", 1),
            ("0-3,8", 5),
            (" 1 , 3-4 ", 3),
            ("4-1", 0),
            ("x", 0),
            ("0-4294967295", u32::MAX),
        ] {
            assert_eq!(count_cpus(list), count, "{list:?}");
        }
    }

    proptest! {
        #[test]
        fn every_size_can_be_built_and_fits_its_limit(
            memory_limit: i64, cpu_quota: i64, cpu_period: u64, cpu_shares: u64, cpuset_cpus: u32, huge_pages: u64,
            default_vcpus in 1u8..40, default_memory in 64u64..4096, max_vcpus: u8, max_memory in 0u64..1_000_000,
        ) {
            let hints = Hints { memory_limit, cpu_quota, cpu_period, cpu_shares, cpuset_cpus, huge_pages };
            let bounds = Bounds {
                default: Size { vcpus: default_vcpus, memory_mib: default_memory },
                max: Size { vcpus: max_vcpus, memory_mib: max_memory },
            };
            let size = size(&hints, &bounds);
            prop_assert!((1..=MAX_VCPUS).contains(&size.vcpus));
            prop_assert!(size.vcpus <= max_vcpus.max(1));
            prop_assert!(size.memory_mib >= MIN_MEMORY_MIB);
            prop_assert!(size.memory_mib <= max_memory.max(MIN_MEMORY_MIB));
            if memory_limit <= 0 && max_memory >= default_memory && huge_pages == 0 {
                prop_assert_eq!(size.memory_mib, default_memory, "no limit is the default");
            }
            if memory_limit > 0 && size.memory_mib < max_memory {
                prop_assert!(size.memory_mib * MIB >= memory_limit as u64, "the limit can be reached inside");
            }
        }

        #[test]
        fn more_memory_asked_is_never_less_given(a in 1i64..1 << 40, b in 1i64..1 << 40) {
            let of = |memory_limit| size(&Hints { memory_limit, ..Hints::default() }, &BOUNDS).memory_mib;
            prop_assert!(of(a.min(b)) <= of(a.max(b)));
        }
    }
}
