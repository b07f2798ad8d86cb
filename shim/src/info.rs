//! `-info` and `-v`: what the runtime is and can do, for containerd 2 (and CRI) and for people.

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::json;

/// The runtime's name in containerd.
pub const RUNTIME: &str = "io.containerd.husk.v2";
/// Type under which containerd expects the OCI features document (`core/runtime/typeurl.go` of containerd 2). It refuses any other.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The text of `-v`.
pub fn version() -> String {
    format!(
        "containerd-shim-husk-v2\n  Runtime: {RUNTIME}\n  Version: {}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The answer to `-info`.
pub fn info() -> RuntimeInfo {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    };
    let features = Any {
        type_url: FEATURES.to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    }
}

/// OCI features (runtime-spec features.md): what the guest's agent does with a spec. No AppArmor, SELinux or
/// Intel RDT, which are the host kernel's; the VM stands in their place. Mounts are id-mapped by the shim, on the host.
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev",
            "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind",
            "relatime", "remount", "ro", "rprivate", "rshared", "rslave", "runbindable", "rw", "shared", "slave", "strictatime",
            "suid", "sync", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true, "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64"] },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::Message as _;

    #[test]
    fn info_survives_the_wire_and_holds_a_features_document() {
        let bytes = info().write_to_bytes().unwrap();
        let back = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(back.name, RUNTIME);
        let features: serde_json::Value = serde_json::from_slice(&back.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        // containerd 2 asks for it before it gives a container of a user namespace any mount.
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
    }
}
