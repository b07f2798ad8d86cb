//! The OCI spec as it arrives: parsed, completed and checked before anything is set up.
//!
//! oci-spec's types are strict where runc is lenient (an unknown capability is a warning there, a parse error
//! here) and lose one distinction (a uid of 0 and no uid), so the JSON is read as a tree first, amended, and
//! then typed.

use std::path::{Component, Path};

use oci_spec::runtime::{
    Linux, LinuxNamespaceType, LinuxResources, LinuxSeccompAction, Process, Spec,
};
use serde_json::Value;

use super::error::LaunchError;
use super::mount_options::{MountOptions, Propagation};
use super::{sysctl, unsupported};

/// A process and, where its uid was left out, the name to look up in the container's passwd file.
#[derive(Debug, Clone)]
pub(crate) struct ParsedProcess {
    pub(crate) process: Process,
    pub(crate) user_name: Option<String>,
}

/// A container's spec, checked.
#[derive(Debug, Clone)]
pub(crate) struct ParsedSpec {
    pub(crate) spec: Spec,
    pub(crate) user_name: Option<String>,
    /// `process` as it came, to complete exec's.
    process_json: Value,
}

impl ParsedSpec {
    /// Parses and checks a container's config.json. Fields that husk does not honour are logged.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, LaunchError> {
        let mut tree: Value = serde_json::from_slice(json)
            .map_err(|error| LaunchError::invalid(format!("config.json is not JSON: {error}")))?;
        let mut process_json = tree.get("process").cloned().unwrap_or(Value::Null);
        if let Some(process) = tree.get_mut("process") {
            drop_unknown_capabilities(process);
        }
        drop_unknown_capabilities(&mut process_json);
        // oci-spec's own idea of a missing `linux` is not empty.
        if let Some(fields) = tree.as_object_mut()
            && fields.get("linux").is_none_or(Value::is_null)
        {
            fields.insert("linux".to_owned(), Value::Object(serde_json::Map::new()));
        }
        let spec: Spec = serde_json::from_value(tree.clone())
            .map_err(|error| LaunchError::invalid(format!("config.json: {error}")))?;
        unsupported::report_unknown(&tree, &spec, "");
        unsupported::report_spec(&spec);
        check(&spec)?;
        Ok(Self {
            user_name: user_name(&process_json),
            spec,
            process_json,
        })
    }

    /// Parses exec's process; what it leaves out is as the container's own process has it.
    pub(crate) fn exec_process(&self, json: &[u8]) -> Result<ParsedProcess, LaunchError> {
        let mut tree: Value = serde_json::from_slice(json)
            .map_err(|error| LaunchError::invalid(format!("process is not JSON: {error}")))?;
        let Some(given) = tree.as_object_mut() else {
            return Err(LaunchError::invalid("process is not a JSON object"));
        };
        if let Some(own) = self.process_json.as_object() {
            for (key, value) in own {
                let inherited = !matches!(
                    key.as_str(),
                    "args" | "terminal" | "consoleSize" | "commandLine"
                );
                if inherited && given.get(key).is_none_or(Value::is_null) {
                    given.insert(key.clone(), value.clone());
                }
            }
        }
        drop_unknown_capabilities(&mut tree);
        let user_name = user_name(&tree);
        let process: Process = serde_json::from_value(tree.clone())
            .map_err(|error| LaunchError::invalid(format!("process: {error}")))?;
        unsupported::report_unknown(&tree, &process, "process");
        unsupported::report_process(&process);
        check_process(&process)?;
        Ok(ParsedProcess { process, user_name })
    }

    /// The `linux` object: [`Self::parse`] has made an empty one where there was none.
    pub(crate) fn linux(&self) -> Option<&Linux> {
        self.spec.linux().as_ref()
    }

    /// CLONE_NEW* bits of the namespaces that the container does not share with the agent.
    pub(crate) fn namespaces(&self) -> i32 {
        namespace_flags(&self.spec)
    }
}

/// CLONE_NEW* bits of every namespace that the spec lists, new or joined.
pub(crate) fn namespace_flags(spec: &Spec) -> i32 {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten()
        .fold(0, |flags, namespace| flags | namespace.typ() as i32)
}

/// Parses an Update's resources.
pub(crate) fn parse_resources(json: &[u8]) -> Result<LinuxResources, LaunchError> {
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| LaunchError::invalid(format!("resources: {error}")))?;
    unsupported::report_resources(&resources);
    Ok(resources)
}

fn user_name(process: &Value) -> Option<String> {
    let user = process.get("user")?;
    match user.get("uid") {
        Some(uid) if !uid.is_null() => None,
        _ => user
            .get("username")
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty())
            .map(str::to_owned),
    }
}

/// runc ignores capability names that it does not know, with a warning; so must we.
fn drop_unknown_capabilities(process: &mut Value) {
    let Some(sets) = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    for (set, names) in sets {
        let Some(names) = names.as_array_mut() else {
            continue;
        };
        names.retain(|name| {
            let known =
                serde_json::from_value::<oci_spec::runtime::Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!("ignoring unknown capability {name} in process.capabilities.{set}");
            }
            known
        });
    }
}

fn check(spec: &Spec) -> Result<(), LaunchError> {
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| LaunchError::invalid("config.json has no root"))?;
    if !root.path().is_absolute() {
        return Err(LaunchError::invalid(format!(
            "root.path {:?} is not an absolute path in the guest",
            root.path()
        )));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| LaunchError::invalid("config.json has no process"))?;
    check_process(process)?;
    for mount in spec.mounts().iter().flatten() {
        MountOptions::parse(mount.options().as_deref().unwrap_or_default())?;
        if mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()) {
            return Err(LaunchError::invalid(format!(
                "mount {:?}: uidMappings are not supported: the guest's shared file system has no idmapped mounts",
                mount.destination()
            )));
        }
    }
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| LaunchError::invalid("config.json has no linux"))?;
    check_namespaces(spec, linux)?;
    sysctl::check(linux.sysctl().as_ref())?;
    if let Some(propagation) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|p| !p.is_empty())
    {
        Propagation::parse(propagation).ok_or_else(|| {
            LaunchError::invalid(format!("invalid rootfsPropagation {propagation:?}"))
        })?;
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
        if notifies(seccomp.default_action())
            || seccomp
                .syscalls()
                .iter()
                .flatten()
                .any(|rule| notifies(rule.action()))
        {
            return Err(LaunchError::invalid(
                "seccomp action SCMP_ACT_NOTIFY is not supported: no agent outside the VM can answer for the guest's kernel",
            ));
        }
    }
    Ok(())
}

fn check_process(process: &Process) -> Result<(), LaunchError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(LaunchError::invalid("process.args must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(LaunchError::invalid(format!(
            "cwd {:?} must be an absolute path",
            process.cwd()
        )));
    }
    let strings = process
        .args()
        .iter()
        .flatten()
        .chain(process.env().iter().flatten());
    for text in strings {
        if text.contains('\0') {
            return Err(LaunchError::invalid(format!(
                "process: {text:?} contains a NUL byte"
            )));
        }
    }
    Ok(())
}

fn check_namespaces(spec: &Spec, linux: &Linux) -> Result<(), LaunchError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let listed = |typ| namespaces.iter().filter(|n| n.typ() == typ).count();
    for namespace in namespaces {
        if listed(namespace.typ()) > 1 {
            return Err(LaunchError::invalid(format!(
                "malformed spec: duplicated ns {}",
                namespace.typ()
            )));
        }
    }
    if listed(LinuxNamespaceType::Mount) == 0 {
        return Err(LaunchError::invalid(
            "a container needs a mount namespace: add {\"type\": \"mount\"} to linux.namespaces",
        ));
    }
    let named = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    if listed(LinuxNamespaceType::Uts) == 0 {
        if named(spec.hostname()) {
            return Err(LaunchError::invalid(
                "unable to set hostname without a private UTS namespace",
            ));
        }
        if named(spec.domainname()) {
            return Err(LaunchError::invalid(
                "unable to set domainname without a private UTS namespace",
            ));
        }
    }
    let user = namespaces
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::User);
    let mapped = linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        && linux.gid_mappings().as_ref().is_some_and(|m| !m.is_empty());
    if user.is_some_and(|n| !has_path(n.path().as_deref())) && !mapped {
        return Err(LaunchError::invalid(
            "user namespaces enabled, but no uid or gid mappings found",
        ));
    }
    if linux.time_offsets().as_ref().is_some_and(|o| !o.is_empty())
        && listed(LinuxNamespaceType::Time) == 0
    {
        return Err(LaunchError::invalid(
            "time namespace offsets specified, but time namespace isn't enabled in the config",
        ));
    }
    Ok(())
}

/// Whether a namespace is to be joined rather than made.
pub(crate) fn has_path(path: Option<&Path>) -> bool {
    path.is_some_and(|path| !path.as_os_str().is_empty())
}

/// Whether `id` can name a directory of cgroups: one plain component of the characters runc allows.
pub(crate) fn check_id(id: &str) -> Result<(), LaunchError> {
    let plain = id
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.'));
    let one_component = matches!(
        Path::new(id).components().collect::<Vec<_>>().as_slice(),
        [Component::Normal(_)]
    );
    if plain && one_component && id.len() <= 255 {
        Ok(())
    } else {
        Err(LaunchError::invalid(format!(
            "invalid container ID {id:?}: letters, digits, '_', '+', '-' and '.' only"
        )))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/run/husk/share/c/rootfs"},
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh"], "env": ["A=1"],
                "capabilities": {"bounding": ["CAP_KILL", "CAP_FUTURE"]},
            },
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        })
    }

    fn parse(tree: &Value) -> Result<ParsedSpec, LaunchError> {
        ParsedSpec::parse(tree.to_string().as_bytes())
    }

    #[test]
    fn unknown_capability_is_dropped() {
        let parsed = parse(&base()).unwrap();
        let process = parsed.spec.process().as_ref().unwrap();
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 1);
        assert_eq!(parsed.namespaces(), libc::CLONE_NEWNS | libc::CLONE_NEWPID);
    }

    #[test]
    fn exec_inherits_what_it_leaves_out() {
        let parsed = parse(&base()).unwrap();
        let exec = parsed
            .exec_process(br#"{"args": ["ps"], "user": {"username": "www"}}"#)
            .unwrap();
        assert_eq!(exec.process.args().as_ref().unwrap(), &["ps"]);
        assert_eq!(exec.process.env().as_ref().unwrap(), &["A=1"]);
        assert_eq!(exec.process.cwd(), Path::new("/"));
        assert_eq!(exec.user_name.as_deref(), Some("www"));
        assert!(parsed.exec_process(b"{\"env\":[]}").is_err());
        assert!(parsed.exec_process(b"[]").is_err());
    }

    #[test]
    fn refusals_name_the_field() {
        let change = |pointer: &str, value: Value| {
            let mut tree = base();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            tree.pointer_mut(parent).unwrap()[key] = value;
            parse(&tree).unwrap_err().to_string()
        };
        assert!(change("/root/path", json!("rootfs")).contains("root.path"));
        assert!(change("/process/args", json!([])).contains("process.args"));
        assert!(change("/process/cwd", json!("tmp")).contains("cwd"));
        assert!(change("/hostname", json!("h")).contains("UTS"));
        assert!(
            change(
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "user"}])
            )
            .contains("mappings")
        );
        assert!(change("/linux/sysctl", json!({"vm.swappiness": "1"})).contains("vm.swappiness"));
        assert!(
            change(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                       "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]})
            )
            .contains("SCMP_ACT_NOTIFY")
        );
        assert!(ParsedSpec::parse(b"{").is_err());
    }

    /// It must not come to namespaces of its own for the init and the guest's for an exec.
    #[test]
    fn a_spec_without_linux_has_an_empty_one() {
        for linux in [None, Some(Value::Null), Some(json!({}))] {
            let mut tree = base();
            tree.as_object_mut().unwrap().remove("linux");
            if let Some(linux) = linux {
                tree["linux"] = linux;
            }
            let error = parse(&tree).unwrap_err();
            assert!(error.to_string().contains("mount namespace"), "{error}");
        }
        let empty: Linux = serde_json::from_value(json!({})).unwrap();
        assert!(empty.namespaces().is_none() && empty.masked_paths().is_none());
    }

    #[test]
    fn fields_of_an_exec_that_nobody_knows_are_reported() {
        let parsed = parse(&base()).unwrap();
        parsed
            .exec_process(
                br#"{"args": ["ps"], "fromTheFuture": {"a": 1}, "user": {"shoeSize": 44}}"#,
            )
            .unwrap();
        assert!(unsupported::is_reported("process.fromTheFuture"));
        assert!(unsupported::is_reported("process.user.shoeSize"));
        assert!(!unsupported::is_reported("process.args"));
    }

    #[test]
    fn ids_are_one_plain_component() {
        for good in ["a", "A-b_c.d+1", "0123"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", "a\n"] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }
}
