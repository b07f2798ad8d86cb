//! What the host's CRI-O knows of husk (docs/engines/cri-o.md).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    Finding, Host, Verdict, below, containerd::SHIM, engine, files, finding, is_executable,
};

const CHECK: &str = "CRI-O's runtimes";
const FILE: &str = "/etc/crio/crio.conf";
const LINES: &str = "copy deploy/crio.conf of husk's sources to /etc/crio/crio.conf.d/10-husk.conf, and reload CRI-O";

/// Nothing where there is no CRI-O.
pub(super) fn findings(host: &Host) -> Vec<Finding> {
    match engine(&host.root, "crio") {
        Some(_) => runtimes(&host.root),
        None => Vec::new(),
    }
}

/// Runtimes by name, with the file that has spoken of each last. A later file's keys take the place of an earlier one's.
type Runtimes = BTreeMap<String, (PathBuf, Table)>;

fn read(root: &Path) -> Result<Runtimes, String> {
    let mut found = Runtimes::new();
    let mut files = vec![PathBuf::from(FILE)];
    files.extend(files::matching(root, Path::new("/etc/crio/crio.conf.d/*")));
    for path in files {
        let Some(table) = files::table(root, &path)? else {
            continue;
        };
        let runtimes = ["crio", "runtime", "runtimes"]
            .iter()
            .try_fold(&table, |table, key| table.get(*key)?.as_table());
        for (name, runtime) in runtimes.into_iter().flatten() {
            let (last, all) = found.entry(name.clone()).or_default();
            last.clone_from(&path);
            all.extend(runtime.as_table().cloned().unwrap_or_default());
        }
    }
    Ok(found)
}

/// A line for each mistake; without any, one that names husk's runtimes.
fn runtimes(root: &Path) -> Vec<Finding> {
    let runtimes = match read(root) {
        Ok(runtimes) => runtimes,
        Err(error) => {
            let remedy = "CRI-O does not start with it either: mend it; `crio config` says more";
            return vec![finding(CHECK, Verdict::Warning, error, remedy)];
        }
    };
    let mut husks = Vec::new();
    let mut found = Vec::new();
    for (name, (path, runtime)) in &runtimes {
        let program = runtime
            .get("runtime_path")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if !name.contains("husk") && !program.contains("husk") {
            continue;
        }
        husks.push(name.as_str());
        found.extend(
            mistakes(root, program, runtime)
                .into_iter()
                .map(|(what, line)| {
                    finding(
                        CHECK,
                        Verdict::Warning,
                        format!("{}: the runtime {name} {what}", path.display()),
                        format!("write below [crio.runtime.runtimes.{name}]: {line}"),
                    )
                }),
        );
    }
    if husks.is_empty() {
        return vec![finding(CHECK, Verdict::Warning, "none is husk", LINES)];
    }
    if found.is_empty() {
        let text = format!("husk is the runtime {}", husks.join(", "));
        found.push(finding(CHECK, Verdict::Ok, text, ""));
    }
    found
}

/// What is wrong with a runtime that is husk, each with the line to write.
fn mistakes(root: &Path, program: &str, runtime: &Table) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut wrong = |what: String, line: &str| found.push((what, line.to_owned()));
    let kind = runtime.get("runtime_type").and_then(Value::as_str);
    if kind != Some("vm") {
        wrong(
            match kind {
                Some(kind) => format!("has the runtime_type {kind:?}"),
                None => "has no runtime_type".to_owned(),
            },
            "runtime_type = \"vm\"",
        );
    }
    let shim = format!("runtime_path = \"/usr/local/bin/{SHIM}\"");
    if program.is_empty() {
        wrong("has no runtime_path".to_owned(), &shim);
    } else if !program.ends_with(SHIM) {
        wrong(
            format!("has the runtime_path {program}, which is not that of {SHIM}"),
            &shim,
        );
    } else if !is_executable(&below(root, Path::new(program))) {
        wrong(
            format!("has the runtime_path {program}, where no program is"),
            &shim,
        );
    }
    if runtime.contains_key("runtime_config_path") {
        wrong(
            "has a runtime_config_path, with which no pod starts: it comes when the VM runs"
                .to_owned(),
            "no runtime_config_path; the settings are /etc/husk/config.toml",
        );
    }
    if runtime.get("privileged_without_host_devices") != Some(&Value::Boolean(true)) {
        wrong(
            "gives privileged containers the host's devices, which a guest does not have"
                .to_owned(),
            "privileged_without_host_devices = true",
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const SHIPPED: &str = include_str!("../../../deploy/crio.conf");
    const OURS: &str = "etc/crio/crio.conf.d/10-husk.conf";

    fn said(files: &[(&str, &str)]) -> Vec<Finding> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [files, &[("usr/local/bin/containerd-shim-husk-v2", "")]].concat() {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        runtimes(dir.path())
    }

    #[test]
    fn what_husk_ships_is_well() {
        for files in [
            &[(OURS, SHIPPED)][..],
            &[("etc/crio/crio.conf", SHIPPED)],
            &[
                (
                    "etc/crio/crio.conf",
                    "[crio.runtime.runtimes.husk]\nruntime_type = \"oci\"\n",
                ),
                (OURS, SHIPPED),
            ],
        ] {
            let found = said(files);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].verdict, Verdict::Ok, "{found:?}");
            assert_eq!(found[0].found, "husk is the runtime husk");
        }
        let none = tempfile::tempdir().unwrap();
        let host = Host {
            root: none.path().to_owned(),
        };
        assert!(findings(&host).is_empty());
    }

    #[test]
    fn mistakes_are_told_with_file_and_line_to_write() {
        let path = "runtime_path = \"/usr/local/bin/containerd-shim-husk-v2\"";
        for (old, new, found, remedy) in [
            (
                "runtime_type = \"vm\"",
                "",
                "has no runtime_type",
                "runtime_type = \"vm\"",
            ),
            (
                "\"vm\"",
                "\"oci\"",
                "runtime_type \"oci\"",
                "runtime_type = \"vm\"",
            ),
            (path, "", "has no runtime_path", path),
            (
                "/bin/containerd-shim-husk-v2",
                "/bin/husk-oci",
                "husk-oci, which is not that of",
                path,
            ),
            ("/usr/local/bin/c", "/opt/c", "where no program is", path),
            (
                "privileged_without_host_devices = true",
                "",
                "the host's devices",
                "privileged_without_host_devices = true",
            ),
            (
                "runtime_type",
                "runtime_config_path = \"/etc/husk/config.toml\"\nruntime_type",
                "runtime_config_path",
                "/etc/husk/config.toml",
            ),
        ] {
            let text = SHIPPED.replace(old, new);
            assert_ne!(text, SHIPPED);
            let all = said(&[(OURS, &text)]);
            assert_eq!(all.len(), 1, "{all:?}");
            let one = &all[0];
            assert_eq!(one.verdict, Verdict::Warning);
            assert!(
                one.found.contains(found) && one.found.contains("10-husk.conf"),
                "{one:?}"
            );
            assert!(one.remedy.contains(remedy), "{one:?}");
        }
        let none = said(&[(
            "etc/crio/crio.conf",
            "[crio.runtime.runtimes.crun]\nruntime_path = \"/usr/bin/crun\"\n",
        )]);
        assert!(
            none[0].found == "none is husk" && none[0].remedy.contains("10-husk.conf"),
            "{none:?}"
        );
        let broken = said(&[(OURS, "[crio\n")]);
        assert!(
            broken[0].found.contains("10-husk.conf, line 1"),
            "{broken:?}"
        );
    }
}
