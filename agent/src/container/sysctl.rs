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
/// a slash, dots are part of a name (an interface's, say), and after a dot `eth0/1` is what `eth0.1` has to be written as.
/// `None` for a name that leads elsewhere.
fn components(name: &str) -> Option<Vec<String>> {
    let slash_first = name
        .chars()
        .find(|c| matches!(c, '.' | '/'))
        .is_some_and(|c| c == '/');
    let parts: Vec<String> = if slash_first {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|part| part.replace('/', ".")).collect()
    };
    let plain = parts
        .iter()
        .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    plain.then_some(parts)
}

/// Where a parameter lives; `None` where its name is none.
pub(crate) fn file(name: &str) -> Option<PathBuf> {
    let mut file = PathBuf::from("/proc/sys");
    file.extend(components(name)?);
    Some(file)
}

fn outside(name: &str) -> LaunchError {
    LaunchError::invalid(format!(
        "sysctl {name:?} is not in a separate kernel namespace"
    ))
}

/// Refuses parameters that no namespace contains, and names that lead elsewhere.
pub(crate) fn check(sysctls: Option<&HashMap<String, String>>) -> Result<(), LaunchError> {
    for name in sysctls.into_iter().flat_map(HashMap::keys) {
        let dotted = components(name).ok_or_else(|| outside(name))?.join(".");
        if dotted == "kernel.hostname" {
            return Err(LaunchError::invalid(
                "sysctl \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field",
            ));
        }
        let allowed = IPC.contains(&dotted.as_str())
            || dotted.starts_with("fs.mqueue.")
            || dotted.starts_with("net.")
            || dotted == "kernel.domainname";
        if !allowed {
            return Err(outside(name));
        }
    }
    Ok(())
}

/// Writes them, from inside the container's namespaces, through the guest's /proc.
pub(crate) fn apply(sysctls: Option<&HashMap<String, String>>) -> Result<(), LaunchError> {
    for (name, value) in sysctls.into_iter().flatten() {
        let path = file(name).ok_or_else(|| outside(name))?;
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
    }

    #[test]
    fn a_name_becomes_a_file_below_proc_sys() {
        let file = |name| file(name).map(|file| file.display().to_string());
        for (name, path) in [
            ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.1/f", "net/ipv4/conf/eth0.1/f"),
            ("net.ipv4.conf.eth0/1.f", "net/ipv4/conf/eth0.1/f"),
        ] {
            assert_eq!(file(name), Some(format!("/proc/sys/{path}")));
        }
        for bad in [
            "",
            ".",
            "a..b",
            "../x",
            "a/../../etc",
            "/etc/passwd",
            "kernel.//",
        ] {
            assert_eq!(file(bad), None, "{bad:?}");
        }
    }
}
