//! The spec fields that husk does not honour, in one place: each is logged once, by its name.

use std::collections::BTreeSet;
use std::sync::Mutex;

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::Serialize;
use serde_json::Value;

static REPORTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Logs that a field is not honoured, the first time it is seen. Returns whether this was the first.
fn report(field: &str, why: &str) -> bool {
    let first = REPORTED
        .lock()
        .is_ok_and(|mut reported| reported.insert(field.to_owned()));
    if first {
        tracing::warn!("spec field {field} is not honoured: {why}");
    }
    first
}

/// Whether a test has come across a field that is not honoured.
#[cfg(test)]
pub(crate) fn is_reported(field: &str) -> bool {
    REPORTED.lock().unwrap().contains(field)
}

const NO_LSM: &str = "the guest's kernel has no such security module; the VM is the boundary";
const NOT_V2: &str = "cgroup v2 has no such control";
const NOT_LINUX: &str = "it is for another platform";

/// Reports fields that no type of ours knows: what the parsed spec, or a part of it at `path`, lacks when written again.
pub(crate) fn report_unknown(given: &Value, parsed: &impl Serialize, path: &str) {
    if let Ok(known) = serde_json::to_value(parsed) {
        for field in missing(given, &known, path.to_owned()) {
            report(&field, "husk does not know it");
        }
    }
}

fn missing(given: &Value, known: &Value, path: String) -> Vec<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given
            .iter()
            .filter(|(_, value)| !is_empty(value))
            .flat_map(|(key, value)| {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match known.get(key) {
                    Some(known) => missing(value, known, path),
                    None => vec![path],
                }
            })
            .collect(),
        (Value::Array(given), Value::Array(known)) if given.len() == known.len() => given
            .iter()
            .zip(known)
            .flat_map(|(given, known)| missing(given, known, path.clone()))
            .collect(),
        _ => Vec::new(),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Reports what a container's spec asks for in vain.
pub(crate) fn report_spec(spec: &Spec) {
    for (present, field) in [
        (spec.solaris().is_some(), "solaris"),
        (spec.windows().is_some(), "windows"),
        (spec.vm().is_some(), "vm"),
        (spec.zos().is_some(), "zos"),
    ] {
        if present {
            report(field, NOT_LINUX);
        }
    }
    if let Some(process) = spec.process() {
        report_process(process);
    }
    let mappings = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|m| !m.is_empty());
    for mount in spec.mounts().iter().flatten() {
        // With uidMappings the mount is refused.
        if mappings(mount.gid_mappings()) && !mappings(mount.uid_mappings()) {
            report(
                "mounts.gidMappings",
                "the guest's shared file system has no idmapped mounts",
            );
        }
    }
    let Some(linux) = spec.linux() else {
        return;
    };
    if linux.mount_label().as_ref().is_some_and(|l| !l.is_empty()) {
        report("linux.mountLabel", NO_LSM);
    }
    if linux.intel_rdt().is_some() {
        report("linux.intelRdt", "the guest has no resctrl file system");
    }
    if linux.memory_policy().is_some() {
        report("linux.memoryPolicy", "the guest has one memory node");
    }
    if linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()) {
        report(
            "linux.netDevices",
            "the pod's interfaces are the VM's, set up for all its containers",
        );
    }
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        report(
            "linux.seccomp.listenerPath",
            "no filter of husk's notifies anyone",
        );
    }
    if let Some(resources) = linux.resources() {
        report_resources(resources);
    }
}

/// Reports what a process asks for in vain.
pub(crate) fn report_process(process: &Process) {
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if set(process.apparmor_profile()) {
        report("process.apparmorProfile", NO_LSM);
    }
    if set(process.selinux_label()) {
        report("process.selinuxLabel", NO_LSM);
    }
    if set(process.command_line()) {
        report("process.commandLine", NOT_LINUX);
    }
}

/// Reports limits that the guest cannot enforce.
#[allow(
    deprecated,
    reason = "memory.kernel is deprecated in the spec, and reported for that reason"
)]
pub(crate) fn report_resources(resources: &LinuxResources) {
    if let Some(memory) = resources.memory() {
        for (present, field) in [
            (memory.kernel().is_some(), "linux.resources.memory.kernel"),
            (
                memory.kernel_tcp().is_some(),
                "linux.resources.memory.kernelTCP",
            ),
            (
                memory.swappiness().is_some(),
                "linux.resources.memory.swappiness",
            ),
            (
                memory.disable_oom_killer() == Some(true),
                "linux.resources.memory.disableOOMKiller",
            ),
        ] {
            if present {
                report(field, NOT_V2);
            }
        }
    }
    if let Some(cpu) = resources.cpu() {
        let realtime = cpu.realtime_period().is_some_and(|p| p != 0)
            || cpu.realtime_runtime().is_some_and(|r| r != 0);
        if realtime {
            report("linux.resources.cpu.realtimeRuntime", NOT_V2);
        }
    }
    if let Some(io) = resources.block_io() {
        let per_device = io
            .weight_device()
            .iter()
            .flatten()
            .any(|device| device.leaf_weight().is_some());
        if io.leaf_weight().is_some() || per_device {
            report("linux.resources.blockIO.leafWeight", NOT_V2);
        }
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some()
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        report("linux.resources.network", NOT_V2);
    }
    if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
        report("linux.resources.rdma", "the guest has no RDMA devices");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_usual_spec_is_known_throughout() {
        let given = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/r", "readonly": true},
            "hostname": "h", "domainname": "d", "annotations": {"a.b/c": "d"},
            "process": {
                "terminal": true, "consoleSize": {"height": 1, "width": 2},
                "user": {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [1]},
                "args": ["sh"], "env": ["A=b"], "cwd": "/", "noNewPrivileges": true, "oomScoreAdj": 1,
                "capabilities": {"bounding": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_CPU", "hard": 1, "soft": 1}],
                "apparmorProfile": "p", "selinuxLabel": "l",
                "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 1},
                "scheduler": {"policy": "SCHED_FIFO", "priority": 1, "flags": ["SCHED_RESET_ON_FORK"]},
                "execCPUAffinity": {"initial": "0", "final": "1"},
            },
            "mounts": [{"destination": "/d", "type": "t", "source": "s", "options": ["o"],
                "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}]}],
            "hooks": {"createRuntime": [{"path": "/h", "args": ["h"], "env": ["A=b"], "timeout": 1}]},
            "linux": {
                "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}], "sysctl": {"net.a": "1"},
                "cgroupsPath": "/p", "namespaces": [{"type": "network", "path": "/n"}],
                "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 3, "uid": 4, "gid": 5}],
                "rootfsPropagation": "slave", "maskedPaths": ["/m"], "readonlyPaths": ["/r"], "mountLabel": "l",
                "personality": {"domain": "LINUX"}, "timeOffsets": {"boottime": {"secs": 1, "nanosecs": 2}},
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"], "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 1, "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]}]},
                "resources": {
                    "devices": [{"allow": true, "type": "c", "major": 1, "minor": 2, "access": "r"}],
                    "memory": {"limit": 1, "reservation": 2, "swap": 3, "kernelTCP": 4, "checkBeforeUpdate": true},
                    "cpu": {"shares": 1, "quota": 2, "period": 3, "burst": 4, "idle": 0, "cpus": "0", "mems": "0"},
                    "pids": {"limit": 1}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
                    "blockIO": {"weight": 10, "weightDevice": [{"major": 1, "minor": 2, "weight": 3}],
                        "throttleReadBpsDevice": [{"major": 1, "minor": 2, "rate": 3}],
                        "throttleWriteIOPSDevice": [{"major": 1, "minor": 2, "rate": 3}]},
                    "network": {"classID": 1}, "rdma": {"r": {"hcaHandles": 1}}, "unified": {"a.b": "c"},
                },
            },
        });
        let spec: Spec = serde_json::from_value(given.clone()).unwrap();
        let known = serde_json::to_value(spec).unwrap();
        assert_eq!(missing(&given, &known, String::new()), [""; 0]);
        report_spec(&serde_json::from_value(given).unwrap());
        for field in [
            "mounts.gidMappings",
            "process.apparmorProfile",
            "process.selinuxLabel",
            "linux.mountLabel",
            "linux.resources.memory.kernelTCP",
            "linux.resources.network",
            "linux.resources.rdma",
        ] {
            assert!(is_reported(field), "{field}");
        }
    }

    #[test]
    fn unknown_fields_are_named_and_reported_once() {
        let given = json!({"a": 1, "b": {"c": 2, "d": {}}, "e": [{"f": 1}], "g": ""});
        let known = json!({"a": 1, "b": {}, "e": [{}]});
        assert_eq!(missing(&given, &known, String::new()), ["b.c", "e.f"]);
        assert!(report("test.field", "a test"));
        assert!(!report("test.field", "a test"));
    }
}
