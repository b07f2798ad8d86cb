//! A node's settings and a pod's annotations: what is taken is within the bounds that the settings name, whatever order it is in.
//!
//! Two modules of the shim by their files: the shim as a crate would double the time that all targets take to compile.
#![no_main]

use std::{collections::HashMap, path::Path};

use husk_protocol::vm::{MAX_VCPUS, MIN_MEMORY_MIB};
use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/annotations.rs"]
mod annotations;
#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/config.rs"]
mod config;

use config::{Config, ConfigError};

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    Lines(Vec<(Key, Value)>, Vec<(Annotation, Value)>),
    Text(String),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Key {
    Known(u8),
    Any(String),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Annotation {
    Known(u8),
    Other(String),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Value {
    Small(u16),
    Number(i64),
    Flag(bool),
    Path(String),
    Word(u8),
    All,
    Text(String),
}

const KEYS: [&str; 18] = [
    "kernel",
    "initramfs",
    "vmm",
    "default_vcpus",
    "default_memory_mib",
    "max_vcpus",
    "max_memory_mib",
    "grow_vcpus",
    "grow_memory_mib",
    "cache",
    "kernel_params",
    "vhost_net",
    "debug_console",
    "log_level",
    "state_dir",
    "socket_dir",
    "start_timeout_ms",
    "enabled_annotations",
];

const ANNOTATIONS: [&str; 6] = [
    "vcpus",
    "memory_mib",
    "max_vcpus",
    "max_memory_mib",
    "kernel_params",
    "debug_console",
];

impl Value {
    fn toml(&self) -> String {
        match self {
            Self::Small(number) => number.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Path(path) => format!("{:?}", format!("/{path}")),
            Self::Word(which) => {
                let words = ["never", "auto", "always", "info", "trace", "error"];
                format!("{:?}", words[usize::from(which % 6)])
            }
            Self::All => format!("{ANNOTATIONS:?}"),
            Self::Text(text) => text.clone(),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Small(number) => format!(" {number} "),
            Self::Text(text) | Self::Path(text) => text.clone(),
            other => other.toml(),
        }
    }
}

fuzz_target!(|input: Input| {
    let (text, annotations) = match input {
        Input::Lines(lines, annotations) => {
            let line = |(key, value): &(Key, Value)| {
                let key = match key {
                    Key::Known(which) => KEYS[usize::from(*which) % KEYS.len()],
                    Key::Any(key) => key,
                };
                format!("{key} = {}\n", value.toml())
            };
            (lines.iter().map(line).collect(), annotations)
        }
        Input::Text(text) => (text, Vec::new()),
    };
    let config = match Config::parse(&text, Path::new("/etc/husk/config.toml")) {
        Ok(config) => config,
        Err(error) => {
            let sentence = error.to_string();
            if let ConfigError::Line { line, .. } = error {
                assert!(
                    (1..=text.matches('\n').count() + 1).contains(&line),
                    "{sentence}"
                );
            }
            return;
        }
    };
    assert!((1..=MAX_VCPUS).contains(&config.max_vcpus));
    assert!((1..=config.max_vcpus).contains(&config.default_vcpus));
    assert!(config.grow_vcpus <= config.max_vcpus);
    assert!(config.max_memory_mib >= MIN_MEMORY_MIB);
    assert!((MIN_MEMORY_MIB..=config.max_memory_mib).contains(&config.default_memory_mib));
    assert!(config.grow_memory_mib <= config.max_memory_mib);
    assert!((100..=600_000).contains(&config.start_timeout.as_millis()));
    for path in [
        &config.kernel,
        &config.initramfs,
        &config.vmm,
        &config.state_dir,
        &config.socket_dir,
    ] {
        assert!(path.is_absolute());
    }
    pod(&config, &annotations);
});

/// What a pod may say of itself.
fn pod(config: &Config, annotations: &[(Annotation, Value)]) {
    let mut map = HashMap::new();
    for (name, value) in annotations {
        let name = match name {
            Annotation::Known(which) => {
                format!("io.husk.{}", ANNOTATIONS[usize::from(*which) % 6])
            }
            Annotation::Other(name) => name.clone(),
        };
        map.insert(name, value.text());
    }
    let has_ours = map
        .keys()
        .any(|name| name.starts_with("io.husk.") && name != "io.husk.init");
    match config.overrides(&map) {
        Ok(overrides) => {
            let vcpus = [overrides.vcpus, overrides.max_vcpus];
            let range = 1..=config.max_vcpus;
            assert!(vcpus.iter().flatten().all(|vcpus| range.contains(vcpus)));
            let memory = [overrides.memory_mib, overrides.max_memory_mib];
            let range = MIN_MEMORY_MIB..=config.max_memory_mib;
            assert!(memory.iter().flatten().all(|mib| range.contains(mib)));
            assert!(
                !has_ours || !config.enabled_annotations.is_empty(),
                "an annotation that this node has not enabled"
            );
        }
        Err(error) => {
            let _ = error.to_string();
            assert!(has_ours, "{error}");
        }
    }
}
