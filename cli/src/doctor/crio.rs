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

/// What CRI-O's files say. A later file's keys take the place of an earlier one's.
#[derive(Default)]
struct Configuration {
    /// By name, with the file that has spoken of each last.
    runtimes: BTreeMap<String, (PathBuf, Table)>,
    /// drop_infra_ctr: a pod that does without has no container of its own.
    keeps_infra: bool,
}

fn read(root: &Path) -> Result<Configuration, String> {
    let mut found = Configuration::default();
    let mut files = vec![PathBuf::from(FILE)];
    files.extend(files::matching(root, Path::new("/etc/crio/crio.conf.d/*")));
    for path in files {
        let Some(table) = files::table(root, &path)? else {
            continue;
        };
        let Some(table) = ["crio", "runtime"]
            .iter()
            .try_fold(&table, |table, key| table.get(*key)?.as_table())
        else {
            continue;
        };
        if let Some(drops) = table.get("drop_infra_ctr") {
            found.keeps_infra = drops == &Value::Boolean(false);
        }
        let runtimes = table.get("runtimes").and_then(Value::as_table);
        for (name, runtime) in runtimes.into_iter().flatten() {
            let (last, all) = found.runtimes.entry(name.clone()).or_default();
            last.clone_from(&path);
            all.extend(runtime.as_table().cloned().unwrap_or_default());
        }
    }
    Ok(found)
}

/// A line for each mistake; without any, one that names husk's runtimes.
fn runtimes(root: &Path) -> Vec<Finding> {
    let configuration = match read(root) {
        Ok(configuration) => configuration,
        Err(error) => {
            let remedy = "CRI-O does not start with it either: mend it; `crio config` says more";
            return vec![finding(CHECK, Verdict::Warning, error, remedy)];
        }
    };
    let mut husks = Vec::new();
    let mut found = Vec::new();
    let mut wrong = |what, remedy| found.push(finding(CHECK, Verdict::Warning, what, remedy));
    for (name, (path, runtime)) in &configuration.runtimes {
        let program = runtime
            .get("runtime_path")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if !name.contains("husk") && !program.contains("husk") {
            continue;
        }
        husks.push(name.as_str());
        let said = |what: &str| format!("{}: the runtime {name} {what}", path.display());
        let (kind, mistakes) = mistakes(root, program, runtime);
        for (what, line) in mistakes {
            let remedy = format!("write below [crio.runtime.runtimes.{name}]: {line}");
            wrong(said(&what), remedy);
        }
        if kind == Kind::Oci && !configuration.keeps_infra {
            wrong(
                said(
                    "is of the type oci, whose pods have no VM where CRI-O makes no container of their own",
                ),
                "write below [crio.runtime]: drop_infra_ctr = false".to_owned(),
            );
        }
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

/// How CRI-O starts pods: its `runtime_type`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vm,
    Oci,
}

impl Kind {
    /// The name of the program that it is done with.
    fn program(self) -> &'static str {
        match self {
            Self::Vm => SHIM,
            Self::Oci => "husk-oci",
        }
    }
}

/// What is wrong with a runtime that is husk, each with the line to write below its name.
fn mistakes(root: &Path, program: &str, runtime: &Table) -> (Kind, Vec<(String, String)>) {
    let mut found = Vec::new();
    let mut wrong = |what: String, line: &str| found.push((what, line.to_owned()));
    let kind = match runtime.get("runtime_type").and_then(Value::as_str) {
        // CRI-O's default is oci.
        None | Some("" | "oci") if program.ends_with(Kind::Oci.program()) => Kind::Oci,
        Some("vm") => Kind::Vm,
        kind => {
            let what = match kind {
                Some(kind) => format!("has the runtime_type {kind:?}"),
                None => "has no runtime_type".to_owned(),
            };
            wrong(what, "runtime_type = \"vm\"");
            Kind::Vm
        }
    };
    let name = kind.program();
    let line = format!("runtime_path = \"/usr/local/bin/{name}\"");
    if program.is_empty() {
        wrong("has no runtime_path".to_owned(), &line);
    } else if !program.ends_with(name) {
        let what = format!("has the runtime_path {program}, which is not that of {name}");
        wrong(what, &line);
    } else if !is_executable(&below(root, Path::new(program))) {
        let what = format!("has the runtime_path {program}, where no program is");
        wrong(what, &line);
    }
    // CRI-O reads it for the type vm alone.
    if kind == Kind::Vm && runtime.contains_key("runtime_config_path") {
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
    (kind, found)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const SHIPPED: &str = include_str!("../../../deploy/crio.conf");
    const OURS: &str = "etc/crio/crio.conf.d/10-husk.conf";

    fn said(files: &[(&str, &str)]) -> Vec<Finding> {
        let dir = tempfile::tempdir().unwrap();
        let programs = ["containerd-shim-husk-v2", "husk-oci"]
            .map(|name| (format!("usr/local/bin/{name}"), String::new()));
        let files = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        for (name, text) in files.chain(programs) {
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

    /// docs/engines/cri-o.md has both ways.
    #[test]
    fn husk_oci_is_well_where_pods_have_a_container_of_their_own() {
        let oci = "[crio.runtime.runtimes.husk]\nruntime_path = \"/usr/local/bin/husk-oci\"\nprivileged_without_host_devices = true\n";
        let keeps = "[crio.runtime]\ndrop_infra_ctr = false\n";
        for kind in ["", "runtime_type = \"oci\"\n", "runtime_type = \"\"\n"] {
            let found = said(&[
                (OURS, &format!("{oci}{kind}")),
                ("etc/crio/crio.conf", keeps),
            ]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].verdict, Verdict::Ok, "{found:?}");
        }
        for other in ["", "[crio.runtime]\ndrop_infra_ctr = true\n"] {
            let found = said(&[(OURS, oci), ("etc/crio/crio.conf.d/20-other.conf", other)]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].verdict, Verdict::Warning, "{found:?}");
            let remedy = "write below [crio.runtime]: drop_infra_ctr = false";
            assert_eq!(found[0].remedy, remedy);
        }
        let gone = said(&[
            (OURS, &oci.replace("/usr/local", "/opt")),
            ("etc/crio/crio.conf", keeps),
        ]);
        assert!(
            gone[0].found.contains("where no program is")
                && gone[0].remedy.contains("/usr/local/bin/husk-oci"),
            "{gone:?}"
        );
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
