//! The limits of a container, as far as the size of its VM depends on them.

use serde::Deserialize;

use crate::sizing::{self, Hints};

/// The huge pages that a guest has, as a spec and a cgroup's files name them.
pub const HUGE_PAGE_SIZE: &str = "2MB";

/// Of an OCI `LinuxResources`: a spec's, or an Update's. What is absent is not changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Resources {
    memory: Option<Memory>,
    cpu: Option<Cpu>,
    hugepage_limits: Option<Vec<HugePages>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct HugePages {
    page_size: String,
    limit: i64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Memory {
    limit: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Cpu {
    shares: Option<u64>,
    quota: Option<i64>,
    period: Option<u64>,
    cpus: Option<String>,
}

impl Resources {
    /// Those of an Update.
    ///
    /// # Errors
    /// When they are not JSON.
    pub fn of_update(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// What `hints` become with these. As runc does, a zero in an Update changes nothing: engines fill in what they do not mean.
    pub fn applied_to(&self, hints: Hints) -> Hints {
        let memory = self.memory.clone().unwrap_or_default();
        let cpu = self.cpu.clone().unwrap_or_default();
        let mut limits = self.hugepage_limits.iter().flatten();
        let huge_pages = limits.find(|huge| huge.page_size == HUGE_PAGE_SIZE);
        let cpus = cpu.cpus.filter(|list| !list.trim().is_empty());
        Hints {
            memory_limit: set(memory.limit).unwrap_or(hints.memory_limit),
            cpu_quota: set(cpu.quota).unwrap_or(hints.cpu_quota),
            cpu_period: set(cpu.period).unwrap_or(hints.cpu_period),
            cpu_shares: set(cpu.shares).unwrap_or(hints.cpu_shares),
            cpuset_cpus: cpus.map_or(hints.cpuset_cpus, |list| sizing::count_cpus(&list)),
            huge_pages: huge_pages.map_or(hints.huge_pages, |huge| {
                // No limit is no claim.
                u64::try_from(huge.limit).unwrap_or(0)
            }),
        }
    }
}

fn set<T: Default + PartialEq>(value: Option<T>) -> Option<T> {
    value.filter(|value| *value != T::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_names() {
        let before = Hints {
            memory_limit: 1 << 28,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            cpu_shares: 512,
            cpuset_cpus: 2,
            huge_pages: 0,
        };
        let after = |json: &str| {
            Resources::of_update(json.as_bytes())
                .unwrap()
                .applied_to(before)
        };
        assert_eq!(after("{}"), before);
        assert_eq!(
            after(r#"{"memory": {"limit": 0}, "cpu": {"quota": 0, "cpus": ""}, "unified": {}}"#),
            before
        );
        assert_eq!(
            after(r#"{"memory": {"limit": 1073741824}}"#),
            Hints {
                memory_limit: 1 << 30,
                ..before
            }
        );
        assert_eq!(
            after(r#"{"cpu": {"quota": -1, "shares": 2048, "cpus": "0-3"}}"#),
            Hints {
                cpu_quota: -1,
                cpu_shares: 2048,
                cpuset_cpus: 4,
                ..before
            }
        );
        assert_eq!(
            after(
                r#"{"hugepageLimits": [{"pageSize": "1GB", "limit": 1}, {"pageSize": "2MB", "limit": 4194304}]}"#
            ),
            Hints {
                huge_pages: 4 << 20,
                ..before
            }
        );
        assert!(Resources::of_update(b"{").is_err());
    }
}
