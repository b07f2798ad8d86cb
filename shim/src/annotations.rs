//! What a pod may change by annotation: `io.husk.NAME`, each only where the node's `enabled_annotations` lists it. `io.husk.init` is none of
//! these: it changes nothing but its own container's first process, so everybody may ask for it, and the agent reads it.

use std::collections::HashMap;
use std::fmt;

use husk_protocol::{INIT_ANNOTATION, vm::MIN_MEMORY_MIB};
use serde::Deserialize;

use crate::config::{Config, ConfigError, DEFAULT_PATH};

/// Prefix of the annotations that are ours.
const ANNOTATION_PREFIX: &str = "io.husk.";

/// An annotation `io.husk.NAME` of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Annotation {
    /// `io.husk.vcpus`: vCPUs of the pod's VM, whatever its limits say.
    Vcpus,
    /// `io.husk.memory_mib`: memory of the pod's VM in MiB, whatever its limits say.
    MemoryMib,
    /// `io.husk.max_vcpus`: vCPUs that the pod's VM may grow to.
    MaxVcpus,
    /// `io.husk.max_memory_mib`: memory in MiB that the pod's VM may grow to.
    MaxMemoryMib,
    /// `io.husk.kernel_params`: appended to the guest kernel's command line.
    KernelParams,
    /// `io.husk.debug_console`: `true` or `false`.
    DebugConsole,
}

impl Annotation {
    const ALL: [Self; 6] = [
        Self::Vcpus,
        Self::MemoryMib,
        Self::MaxVcpus,
        Self::MaxMemoryMib,
        Self::KernelParams,
        Self::DebugConsole,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::MemoryMib => "memory_mib",
            Self::MaxVcpus => "max_vcpus",
            Self::MaxMemoryMib => "max_memory_mib",
            Self::KernelParams => "kernel_params",
            Self::DebugConsole => "debug_console",
        }
    }
}

/// What a pod's annotations change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// vCPUs, within the node's maximum.
    pub vcpus: Option<u8>,
    /// Memory in MiB, within the node's maximum.
    pub memory_mib: Option<u64>,
    /// vCPUs to grow to, within the node's maximum.
    pub max_vcpus: Option<u8>,
    /// Memory to grow to in MiB, within the node's maximum.
    pub max_memory_mib: Option<u64>,
    /// Appended after the node's `kernel_params`.
    pub kernel_params: Option<String>,
    /// Replaces the node's `debug_console`.
    pub debug_console: Option<bool>,
}

impl Config {
    /// Reads the pod's `io.husk.*` annotations; others are not ours.
    ///
    /// # Errors
    /// [`ConfigError::Annotation`] for one that is unknown, not enabled on this node, or out of range.
    pub fn overrides(
        &self,
        annotations: &HashMap<String, String>,
    ) -> Result<Overrides, ConfigError> {
        let mut overrides = Overrides::default();
        for (full, value) in annotations {
            let Some(name) = full.strip_prefix(ANNOTATION_PREFIX) else {
                continue;
            };
            if full == INIT_ANNOTATION {
                continue;
            }
            let error = |reason: String| ConfigError::Annotation {
                name: full.clone(),
                reason,
            };
            let Some(annotation) = Annotation::ALL.into_iter().find(|a| a.name() == name) else {
                let known = Annotation::ALL.map(Annotation::name).join(", ");
                return Err(error(format!(
                    "unknown; husk has {ANNOTATION_PREFIX}{{{known}}}"
                )));
            };
            if !self.enabled_annotations.contains(&annotation) {
                return Err(error(format!(
                    "not enabled on this node; to allow it, add {name:?} to enabled_annotations in {DEFAULT_PATH}"
                )));
            }
            match annotation {
                Annotation::Vcpus => {
                    overrides.vcpus = Some(in_range(value, 1, self.max_vcpus).map_err(error)?);
                }
                Annotation::MemoryMib => {
                    overrides.memory_mib =
                        Some(in_range(value, MIN_MEMORY_MIB, self.max_memory_mib).map_err(error)?);
                }
                Annotation::MaxVcpus => {
                    overrides.max_vcpus = Some(in_range(value, 1, self.max_vcpus).map_err(error)?);
                }
                Annotation::MaxMemoryMib => {
                    overrides.max_memory_mib =
                        Some(in_range(value, MIN_MEMORY_MIB, self.max_memory_mib).map_err(error)?);
                }
                Annotation::KernelParams => overrides.kernel_params = Some(value.clone()),
                Annotation::DebugConsole => {
                    let flag = value.trim().parse();
                    overrides.debug_console =
                        Some(flag.map_err(|_| error(format!("{value:?} is not true or false")))?);
                }
            }
        }
        Ok(overrides)
    }
}

fn in_range<T: std::str::FromStr + PartialOrd + fmt::Display>(
    value: &str,
    min: T,
    max: T,
) -> Result<T, String> {
    match value.trim().parse::<T>() {
        Ok(n) if n >= min && n <= max => Ok(n),
        _ => Err(format!("{value:?} is not a number from {min} to {max}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/husk/config.toml"))
    }

    fn overrides(config: &str, annotations: &[(&str, &str)]) -> Result<Overrides, String> {
        let map = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        parse(config)
            .unwrap()
            .overrides(&map)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn annotations_count_where_the_node_allows_them() {
        let all = "max_vcpus = 4\nmax_memory_mib = 1024\nenabled_annotations = [\"vcpus\", \"memory_mib\", \"max_vcpus\", \"max_memory_mib\", \"debug_console\", \"kernel_params\"]";
        let given = [
            ("io.husk.vcpus", "2"),
            ("io.husk.memory_mib", "1024"),
            ("io.husk.max_vcpus", "4"),
            ("io.husk.max_memory_mib", "512"),
            ("io.husk.debug_console", "true"),
            ("io.husk.kernel_params", "quiet"),
            ("io.kubernetes.cri.container-type", "sandbox"),
        ];
        let got = overrides(all, &given).unwrap();
        assert_eq!(
            got,
            Overrides {
                vcpus: Some(2),
                memory_mib: Some(1024),
                max_vcpus: Some(4),
                max_memory_mib: Some(512),
                kernel_params: Some("quiet".into()),
                debug_console: Some(true)
            }
        );
        let none = overrides("", &[("io.husk.init", "true")]).unwrap();
        assert_eq!(none, Overrides::default());
        let message = overrides("", &[("io.husk.vcpus", "2")]).unwrap_err();
        assert!(
            message.contains("io.husk.vcpus") && message.contains("enabled_annotations"),
            "{message}"
        );
        let message = overrides(all, &[("io.husk.vcpu", "2")]).unwrap_err();
        assert!(
            message.contains("io.husk.vcpu:") && message.contains("memory_mib"),
            "{message}"
        );
        let message = overrides(all, &[("io.husk.vcpus", "5")]).unwrap_err();
        assert!(message.contains("from 1 to 4"), "{message}");
        let message = overrides(all, &[("io.husk.max_memory_mib", "1025")]).unwrap_err();
        assert!(message.contains("from 64 to 1024"), "{message}");
        let message = overrides(all, &[("io.husk.debug_console", "yes")]).unwrap_err();
        assert!(message.contains("true or false"), "{message}");
    }
}
