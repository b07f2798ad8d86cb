//! Kernel parameters of a container.
//!
//! Only parameters that belong to a namespace may be set: the others are the whole guest's. runc also wants the
//! namespace to be the container's own; here the pod's namespaces are the guest's, so a parameter of
//! the shared ones is the pod's to set.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use super::error::{LaunchError, Step};

/// IPC parameters that the kernel keeps per namespace.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// `net/ipv4/x` and `net.ipv4.x` are one parameter. As sysctl(8) has it, the first separator decides: after
/// a slash, dots are part of a name (an interface's, say).
fn components(name: &str) -> Vec<String> {
    let slash_first = name
        .chars()
        .find(|c| matches!(c, '.' | '/'))
        .is_some_and(|c| c == '/');
    if slash_first {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|part| part.replace('/', ".")).collect()
    }
}

/// Refuses parameters that no namespace contains, and names that lead elsewhere.
pub(crate) fn check(sysctls: Option<&HashMap<String, String>>) -> Result<(), LaunchError> {
    for name in sysctls.into_iter().flat_map(HashMap::keys) {
        let parts = components(name);
        let dotted = parts.join(".");
        let plain = parts
            .iter()
            .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
        let allowed = IPC.contains(&dotted.as_str())
            || dotted.starts_with("fs.mqueue.")
            || dotted.starts_with("net.")
            || dotted == "kernel.domainname";
        if dotted == "kernel.hostname" {
            return Err(LaunchError::invalid(
                "sysctl \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field",
            ));
        }
        if !plain || !allowed {
            return Err(LaunchError::invalid(format!(
                "sysctl {name:?} is not in a separate kernel namespace"
            )));
        }
    }
    Ok(())
}

/// Writes them, from inside the container's namespaces, through the guest's /proc.
pub(crate) fn apply(sysctls: Option<&HashMap<String, String>>) -> Result<(), LaunchError> {
    for (name, value) in sysctls.into_iter().flatten() {
        let mut path = PathBuf::from("/proc/sys");
        path.extend(components(name));
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .spec_step(|| format!("setting sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(name: &str) -> bool {
        check(Some(&HashMap::from([(name.to_owned(), "1".to_owned())]))).is_ok()
    }

    #[test]
    fn only_what_a_namespace_contains() {
        for good in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.100/forwarding",
            "kernel.shmmax",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            assert!(verdict(good), "{good}");
        }
        for bad in [
            "vm.swappiness",
            "kernel.hostname",
            "kernel.panic",
            "net/../kernel/panic",
            "net..x",
            "",
            "net./../x",
        ] {
            assert!(!verdict(bad), "{bad}");
        }
        assert_eq!(components("net/ipv4/conf/eth0.1/f")[3], "eth0.1");
        assert_eq!(components("net.ipv4.conf.eth0/1.f")[3], "eth0.1");
    }
}
