//! What a pod's containers may use together, and so what its VM must have.
//!
//! At the start of the VM only the pod's own size or its first container is known ([`crate::sizing`]). From then on each container's
//! limits are kept here, from its Create to its end, and the need of the pod follows from all of them by the same rules. Where a limit is missing, the
//! container shares what the pod has: the default size, once, unless the engine has given the pod a size of its own.

use std::collections::BTreeMap;

use crate::{
    pod::PodSpec,
    sizing::{self, GUEST_OVERHEAD_MIB, Hints, Size},
    spec::BundleSpec,
};

/// The limits of one container, or of the pod as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// The limits.
    pub hints: Hints,
    /// They are the pod's: its sandbox container uses nothing, and its limits hold for all of them.
    pub is_pods: bool,
}

impl Demand {
    /// What the pod as a whole may use, where no sandbox container says so.
    pub fn of_pod(pod: &PodSpec) -> Self {
        Self {
            hints: pod.hints,
            is_pods: true,
        }
    }

    /// What the spec of a container asks for.
    pub fn of_spec(spec: &BundleSpec) -> Self {
        let is_pods = spec.is_sandbox();
        Self {
            hints: if is_pods {
                spec.hints()
            } else {
                spec.own_hints()
            },
            is_pods,
        }
    }
}

/// The demands of one pod, by container id.
#[derive(Debug, Default)]
pub struct Demands(BTreeMap<String, Demand>);

impl Demands {
    /// Takes a container in, or changes its demand; returns the one before.
    pub fn set(&mut self, id: &str, demand: Demand) -> Option<Demand> {
        self.0.insert(id.to_owned(), demand)
    }

    /// The container's demand.
    pub fn get(&self, id: &str) -> Option<Demand> {
        self.0.get(id).copied()
    }

    /// The container has ended, or never was.
    pub fn remove(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// What the VM must have for all of them, unbounded but for the types; nothing (0) for nobody. `huge_pages`: bytes of them that the pod
    /// may use, where that is known; else it is what its containers may.
    pub fn need(&self, default: Size, huge_pages: Option<u64>) -> Size {
        let pod = self.0.values().find(|d| d.is_pods).map(|d| d.hints);
        let containers: Vec<Hints> = self
            .0
            .values()
            .filter(|demand| !demand.is_pods)
            .map(|demand| demand.hints)
            .collect();
        Size {
            vcpus: vcpus(pod, &containers, default.vcpus),
            memory_mib: memory_mib(pod, &containers, default.memory_mib)
                .saturating_add(huge_pages_mib(&containers, huge_pages)),
        }
    }
}

fn memory_mib(pod: Option<Hints>, containers: &[Hints], default: u64) -> u64 {
    let pod_limit = pod.and_then(|hints| hints.memory_mib());
    let limited = Hints {
        memory_limit: containers
            .iter()
            .map(|hints| hints.memory_limit.max(0))
            .fold(0, i64::saturating_add),
        ..Hints::default()
    }
    .memory_mib();
    let has_unlimited = containers.iter().any(|hints| hints.memory_limit <= 0);
    let together = match limited {
        // The default has room for the guest's own.
        Some(mib) if has_unlimited && pod_limit.is_none() => {
            (mib - GUEST_OVERHEAD_MIB).saturating_add(default)
        }
        Some(mib) => mib,
        None if has_unlimited && pod_limit.is_none() => default,
        None => 0,
    };
    together.max(pod_limit.unwrap_or(0))
}

fn huge_pages_mib(containers: &[Hints], of_pod: Option<u64>) -> u64 {
    let claims = containers.iter().map(Hints::huge_pages_mib);
    match of_pod {
        Some(_) if containers.is_empty() => 0,
        Some(bytes) => sizing::huge_pages_mib(bytes),
        None => claims.fold(0, u64::saturating_add),
    }
}

fn vcpus(pod: Option<Hints>, containers: &[Hints], default: u8) -> u8 {
    let is_limited = |hints: &&Hints| hints.cpu_quota > 0;
    let limited: u64 = containers
        .iter()
        .filter(is_limited)
        .map(Hints::milli_cpus)
        .fold(0, u64::saturating_add);
    let pod_limit = pod.filter(|hints| hints.cpu_quota > 0);
    let default = if pod_limit.is_some() { 1 } else { default };
    let most = containers
        .iter()
        .filter(|hints| !is_limited(hints))
        .chain(&pod_limit)
        .map(|hints| hints.vcpus(default))
        .fold(limited.div_ceil(1000), u64::max);
    u8::try_from(most).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEFAULT: Size = Size {
        vcpus: 2,
        memory_mib: 512,
    };
    const MIB: i64 = 1 << 20;

    fn container(mib: i64, quota: i64) -> Demand {
        Demand {
            hints: Hints {
                memory_limit: mib * MIB,
                cpu_quota: quota,
                cpu_period: 100_000,
                ..Hints::default()
            },
            is_pods: false,
        }
    }

    fn need(demands: &[Demand]) -> Size {
        need_with(None, demands)
    }

    fn need_with(huge_pages: Option<u64>, demands: &[Demand]) -> Size {
        let mut all = Demands::default();
        for (id, demand) in demands.iter().enumerate() {
            all.set(&id.to_string(), *demand);
        }
        all.need(DEFAULT, huge_pages)
    }

    fn size(vcpus: u8, memory_mib: u64) -> Size {
        Size { vcpus, memory_mib }
    }

    fn pods(demand: Demand) -> Demand {
        Demand {
            is_pods: true,
            ..demand
        }
    }

    #[test]
    fn limits_add_up_and_the_guests_own_counts_once() {
        assert_eq!(need(&[]), size(0, 0));
        assert_eq!(need(&[container(256, 150_000)]), size(2, 256 + 8 + 64));
        assert_eq!(
            need(&[
                container(256, 150_000),
                container(64, 50_000),
                container(0, -1)
            ]),
            size(2, 320 + 10 + 512)
        );
        assert_eq!(
            need(&[container(256, 150_000), container(64, 160_000)]),
            size(4, 320 + 10 + 64)
        );
        assert_eq!(need(&[container(0, 0), container(0, 0)]), DEFAULT);
    }

    #[test]
    fn a_pod_with_a_size_gives_it_to_all() {
        let pod = pods(container(1024, 300_000));
        assert_eq!(need(&[pod]), size(3, 1024 + 32 + 64));
        let unlimited = container(0, 0);
        assert_eq!(
            need(&[pod, unlimited, container(256, 100_000)]),
            size(3, 1024 + 32 + 64)
        );
        // A container's own update may come before the pod's.
        assert_eq!(
            need(&[pod, container(2048, 400_000)]),
            size(4, 2048 + 64 + 64)
        );
        // A pod's sandbox container without limits is no container.
        assert_eq!(
            need(&[pods(unlimited), container(256, 100_000)]),
            size(1, 256 + 8 + 64)
        );
    }

    #[test]
    fn a_cpuset_bounds_the_quota_and_stands_for_a_missing_one() {
        let mut with_set = container(256, 400_000);
        with_set.hints.cpuset_cpus = 3;
        assert_eq!(need(&[with_set]).vcpus, 3);
        with_set.hints.cpu_quota = -1;
        assert_eq!(need(&[with_set, container(64, 100_000)]).vcpus, 3);
    }

    #[test]
    fn huge_pages_come_on_top() {
        let with_huge = |mib: u64| {
            let mut container = container(256, 100_000);
            container.hints.huge_pages = mib << 20;
            container
        };
        let need = |huge_pages, demands: &[Demand]| need_with(huge_pages, demands).memory_mib;
        let one = 256 + 8 + 64;
        assert_eq!(need(None, &[with_huge(64)]), one + 66);
        assert_eq!(
            need(None, &[with_huge(64), with_huge(32)]),
            one + 264 + 66 + 33
        );
        // The pod's count where they are known: containerd may have dropped the containers'.
        assert_eq!(need(Some(64 << 20), &[with_huge(0)]), one + 66);
        assert_eq!(need(Some(0), &[with_huge(64)]), one);
        assert_eq!(need(Some(64 << 20), &[]), 0);
    }

    fn any_demand() -> impl Strategy<Value = Demand> {
        (
            any::<i64>(),
            any::<i64>(),
            any::<u64>(),
            any::<u64>(),
            any::<u32>(),
            any::<u64>(),
            any::<bool>(),
        )
            .prop_map(
                |(
                    memory_limit,
                    cpu_quota,
                    cpu_period,
                    cpu_shares,
                    cpuset_cpus,
                    huge_pages,
                    is_pods,
                )| Demand {
                    hints: Hints {
                        memory_limit,
                        cpu_quota,
                        cpu_period,
                        cpu_shares,
                        cpuset_cpus,
                        huge_pages,
                    },
                    is_pods,
                },
            )
    }

    proptest! {
        /// Whatever the limits: the need is computed, and one more container never lowers it.
        #[test]
        fn more_containers_never_need_less(demands in prop::collection::vec(any_demand(), 0..6)) {
            let containers: Vec<Demand> = demands.into_iter().filter(|d| !d.is_pods).collect();
            let mut before = size(0, 0);
            for count in 0..=containers.len() {
                let now = need(&containers[..count]);
                prop_assert!(now.vcpus >= before.vcpus && now.memory_mib >= before.memory_mib);
                before = now;
            }
        }

        #[test]
        fn any_pod_has_a_need(demands in prop::collection::vec(any_demand(), 0..6)) {
            need(&demands);
        }

        /// The first container finds a VM that fits it.
        #[test]
        fn one_container_needs_what_its_vm_was_started_with(mib in 1i64..1 << 20, quota in 1i64..3_000_000) {
            let demand = container(mib, quota);
            let bounds = crate::sizing::Bounds { default: DEFAULT, max: size(32, u64::MAX) };
            prop_assert_eq!(need(&[demand]), crate::sizing::size(&demand.hints, &bounds));
        }
    }
}
