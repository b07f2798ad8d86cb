//! A spec as engines write it, in which each part may be changed.

use husk_agent::container::fuzzing;
use serde_json::{Value, json};

/// A part of a spec.
#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
pub enum Field {
    Args,
    Cwd,
    Env,
    User,
    Bounding,
    Rlimits,
    Mounts,
    MountOptions,
    MountDestination,
    Namespaces,
    Namespace,
    Mappings,
    Sysctl,
    Resources,
    Devices,
    Seccomp,
    SeccompCalls,
    SeccompArguments,
    Masked,
    Propagation,
    Hooks,
    Root,
    Process,
    Linux,
    Hostname,
    TimeOffsets,
    Annotations,
}

/// What a field may be.
#[derive(arbitrary::Arbitrary, Debug)]
pub enum Json {
    Null,
    Number(i64),
    Large(u64),
    Bool(bool),
    Word(u8),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(u8, Json)>),
}

/// Words that mean something somewhere in a spec.
const WORDS: [&str; 48] = [
    "mount",
    "pid",
    "network",
    "user",
    "uts",
    "ipc",
    "cgroup",
    "time",
    "/proc",
    "/",
    "/a",
    "proc",
    "bind",
    "rbind",
    "ro",
    "nosuid",
    "rslave",
    "tmpcopyup",
    "mode=755",
    "CAP_SYS_ADMIN",
    "CAP_NONE",
    "type",
    "path",
    "options",
    "source",
    "destination",
    "names",
    "action",
    "args",
    "op",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_ALLOW",
    "SCMP_CMP_EQ",
    "SCMP_CMP_MASKED_EQ",
    "index",
    "value",
    "valueTwo",
    "read",
    "clone",
    "hostID",
    "containerID",
    "size",
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_forward",
    "uid",
    "gid",
    "major",
    "minor",
];

impl Json {
    fn value(&self, depth: u8) -> Value {
        match self {
            Self::Number(number) => (*number).into(),
            Self::Large(number) => (*number).into(),
            Self::Bool(flag) => (*flag).into(),
            Self::Word(which) => WORDS[usize::from(*which) % WORDS.len()].into(),
            Self::Text(text) => text.clone().into(),
            Self::Array(all) if depth < 6 => all.iter().map(|one| one.value(depth + 1)).collect(),
            Self::Object(all) if depth < 6 => {
                let field = |(key, one): &(u8, Self)| {
                    let key = WORDS[usize::from(*key) % WORDS.len()];
                    (key.to_owned(), one.value(depth + 1))
                };
                Value::Object(all.iter().map(field).collect())
            }
            _ => Value::Null,
        }
    }
}

/// A spec as engines write it, in which each part may be changed.
fn usual() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": "/run/husk/share/c/rootfs", "readonly": true },
        "hostname": "pod",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/", "env": ["PATH=/bin"],
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }]
        },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec"] }],
        "annotations": { "io.husk.init": "true" },
        "linux": {
            "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "uts" }],
            "resources": { "memory": { "limit": 1 << 20 }, "devices": [{ "allow": false, "access": "rwm" }] },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{ "names": ["read", "clone"], "action": "SCMP_ACT_ALLOW",
                    "args": [{ "index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ" }] }]
            },
            "maskedPaths": ["/proc/kcore"], "sysctl": { "kernel.shm_rmid_forced": "1" }
        }
    })
}

impl Field {
    fn place(self) -> &'static str {
        match self {
            Self::Args => "/process/args",
            Self::Cwd => "/process/cwd",
            Self::Env => "/process/env",
            Self::User => "/process/user",
            Self::Bounding => "/process/capabilities/bounding",
            Self::Rlimits => "/process/rlimits",
            Self::Mounts => "/mounts",
            Self::MountOptions => "/mounts/0/options",
            Self::MountDestination => "/mounts/0/destination",
            Self::Namespaces => "/linux/namespaces",
            Self::Namespace => "/linux/namespaces/1",
            Self::Mappings => "/linux/uidMappings",
            Self::Sysctl => "/linux/sysctl",
            Self::Resources => "/linux/resources",
            Self::Devices => "/linux/resources/devices",
            Self::Seccomp => "/linux/seccomp",
            Self::SeccompCalls => "/linux/seccomp/syscalls",
            Self::SeccompArguments => "/linux/seccomp/syscalls/0/args/0",
            Self::Masked => "/linux/maskedPaths",
            Self::Propagation => "/linux/rootfsPropagation",
            Self::Hooks => "/hooks",
            Self::Root => "/root/path",
            Self::Process => "/process",
            Self::Linux => "/linux",
            Self::Hostname => "/hostname",
            Self::TimeOffsets => "/linux/timeOffsets",
            Self::Annotations => "/annotations",
        }
    }
}

/// A spec in which these fields are changed, and an exec's process.
pub fn spec(changes: &[(Field, Json)], exec: &Json) {
    let mut tree = usual();
    for (field, json) in changes.iter().take(16) {
        let place = field.place();
        if let Some(old) = tree.pointer_mut(place) {
            *old = json.value(0);
        } else if let Some((parent, name)) = place.rsplit_once('/')
            && let Some(fields) = tree.pointer_mut(parent).and_then(Value::as_object_mut)
        {
            fields.insert(name.to_owned(), json.value(0));
        }
    }
    let written = serde_json::to_vec(&tree).unwrap();
    let exec = serde_json::to_vec(&exec.value(0)).unwrap();
    match fuzzing::spec(&written, &exec) {
        Ok((spec, exec)) => {
            assert!(spec.root().as_ref().unwrap().path().is_absolute());
            let process = [spec.process().as_ref(), exec.as_ref().ok()];
            for process in process.into_iter().flatten() {
                assert!(!process.args().as_ref().unwrap().is_empty());
                assert!(process.cwd().is_absolute());
                let strings = process.args().iter().chain(process.env()).flatten();
                assert!(strings.into_iter().all(|text| !text.contains('\0')));
            }
            if let Err(error) = exec {
                let _ = error.to_string();
            }
        }
        Err(error) => drop(error.to_string()),
    }
}
