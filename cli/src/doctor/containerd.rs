//! What the host's containerd, if there is one, knows of husk: `husk` itself does without.

use std::{
    collections::{BTreeSet, VecDeque},
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    Finding, Host, Verdict,
    files::{matching, table},
    finding, in_path,
    process::processes,
    version_finding, version_of,
};

const CHECK: &str = "containerd";
const HANDLER: &str = "containerd's runtimes";
const SHIM_CHECK: &str = "containerd's PATH";

/// husk's name as a runtime, and that of its shim (containerd, "Runtime v2").
pub(super) const RUNTIME: &str = "io.containerd.husk.v2";
pub(super) const SHIM: &str = "containerd-shim-husk-v2";

/// The CRI plugin's key, by the version of the configuration that has it (containerd, docs/PLUGINS.md and docs/cri/config.md).
const KEYS: [(i64, &str); 3] = [
    (1, "cri"),
    (2, "io.containerd.grpc.v1.cri"),
    (3, "io.containerd.cri.v1.runtime"),
];

/// The oldest that husk is tested with.
const OLDEST: (u32, u32) = (1, 7);

/// The most files of the configuration.
const FILES: usize = 100;

/// Where systemd's services look for programs, when nothing else is said.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const LINES: &str = "deploy/containerd-1.7.toml or containerd-2.toml of husk's sources has the lines; restart containerd";

pub(super) fn findings(host: &Host) -> Vec<Finding> {
    let path = env::var_os("PATH").unwrap_or_default();
    let Some(program) = in_path(&host.root, &path, "containerd") else {
        return vec![finding(
            CHECK,
            Verdict::Ok,
            "none here; husk needs none",
            "",
        )];
    };
    let version = version_of(&program);
    vec![
        told(version),
        handler_finding(&host.root, version),
        path_finding(host),
    ]
}

fn told(version: Option<(u32, u32)>) -> Finding {
    let remedy = "husk is tested with containerd 1.7 and newer";
    version_finding(CHECK, version, OLDEST, remedy)
}

/// What the configuration says of husk.
#[derive(Debug, Default)]
struct Found {
    /// Of the file that containerd reads first.
    version: i64,
    /// Names of runtimes that are husk.
    handlers: BTreeSet<String>,
    /// Those under a key that containerd does not look at, and that key.
    misplaced: BTreeSet<(String, &'static str)>,
}

fn handler_finding(root: &Path, version: Option<(u32, u32)>) -> Finding {
    let found = match read(root) {
        Ok(found) => found,
        Err(error) => {
            return finding(
                HANDLER,
                Verdict::Warning,
                error,
                "containerd does not start with it either: mend it, or see `containerd config dump`",
            );
        }
    };
    if version.is_some_and(|(major, _)| major < 2) && found.version > 2 {
        return finding(
            HANDLER,
            Verdict::Warning,
            format!(
                "its configuration has version {}, which containerd 1 does not know",
                found.version
            ),
            "containerd 1 wants version = 2, and the lines of deploy/containerd-1.7.toml",
        );
    }
    let names: Vec<&str> = found.handlers.iter().map(|name| &**name).collect();
    if !names.is_empty() {
        let found = format!("husk is the runtime {}", names.join(", "));
        return finding(HANDLER, Verdict::Ok, found, "");
    }
    match found.misplaced.first() {
        Some((name, key)) => finding(
            HANDLER,
            Verdict::Warning,
            format!(
                "{name} lies under plugins.\"{key}\", which is another version's than the file's: containerd does not see it"
            ),
            LINES,
        ),
        None => finding(
            HANDLER,
            Verdict::Warning,
            "none is husk: `ctr run --runtime io.containerd.husk.v2` works, RuntimeClass does not",
            LINES,
        ),
    }
}

/// Reads the configuration, with what it imports.
fn read(root: &Path) -> Result<Found, String> {
    let mut found = Found::default();
    let first = PathBuf::from("/etc/containerd/config.toml");
    let mut files = VecDeque::from([first.clone()]);
    let mut seen = BTreeSet::new();
    while let Some(path) = files.pop_front() {
        if !seen.insert(path.clone()) {
            continue;
        }
        if seen.len() > FILES {
            return Err(format!(
                "{} imports more than {FILES} files",
                first.display()
            ));
        }
        let Some(table) = table(root, &path)? else {
            continue;
        };
        let version = table.get("version").and_then(Value::as_integer);
        if path == first {
            found.version = version.unwrap_or(1);
        }
        look(&table, version, &mut found);
        let imports = table.get("imports").and_then(Value::as_array);
        for import in imports.into_iter().flatten().filter_map(Value::as_str) {
            let dir = path.parent().unwrap_or(Path::new("/"));
            files.extend(matching(root, &dir.join(import)));
        }
    }
    Ok(found)
}

/// Looks for husk among a file's runtimes. A file that does not tell its version is taken for any.
fn look(table: &Table, version: Option<i64>, found: &mut Found) {
    for (of, key) in KEYS {
        let runtimes = ["plugins", key, "containerd", "runtimes"];
        let runtimes = runtimes
            .iter()
            .try_fold(table, |table, key| table.get(*key)?.as_table());
        for (name, runtime) in runtimes.into_iter().flatten() {
            let text = |key: &str| runtime.get(key).and_then(Value::as_str).unwrap_or_default();
            let is_husk = text("runtime_type") == RUNTIME
                || [text("runtime_type"), text("runtime_path")]
                    .iter()
                    .any(|path| path.ends_with(SHIM));
            if !is_husk {
                continue;
            }
            // Whatever comes after 3 keeps its keys, as far as is known.
            if version.is_none_or(|version| version.min(3) == of) {
                found.handlers.insert(name.clone());
            } else {
                found.misplaced.insert((name.clone(), key));
            }
        }
    }
}

/// containerd looks for a shim in its own PATH.
fn path_finding(host: &Host) -> Finding {
    let running = processes(&host.root, CHECK).find_map(|process| process.variable("PATH"));
    has_shim(host, SHIM_CHECK, running)
}

/// Whether a containerd that runs with this PATH finds husk's shim.
pub(super) fn has_shim(host: &Host, check: &'static str, path: Option<OsString>) -> Finding {
    let path = path.unwrap_or_else(|| PATH.into());
    match in_path(&host.root, &path, SHIM) {
        Some(_) => finding(check, Verdict::Ok, format!("has {SHIM}"), ""),
        None => finding(
            check,
            Verdict::Warning,
            format!("{} has no {SHIM}", path.display()),
            "put it into /usr/local/bin, or the directory that it is in into the PATH of containerd's service",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::version_in, *};

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn said(files: &[(&str, &str)], major: u32) -> (Verdict, String) {
        let dir = root(files);
        let finding = handler_finding(dir.path(), Some((major, 1)));
        assert!(finding.verdict == Verdict::Ok || !finding.remedy.is_empty());
        (finding.verdict, finding.found)
    }

    const MAIN: &str = "etc/containerd/config.toml";

    #[test]
    fn the_lines_that_husk_ships_are_found() {
        let old = include_str!("../../../deploy/containerd-1.7.toml");
        let new = include_str!("../../../deploy/containerd-2.toml");
        let (old, new) = (
            &*format!("version = 2\n{old}"),
            &*format!("version = 3\n{new}"),
        );
        for (text, major) in [(old, 1), (old, 2), (new, 2)] {
            let (verdict, found) = said(&[(MAIN, text)], major);
            assert_eq!(verdict, Verdict::Ok, "{found}");
            assert!(found.contains("husk is the runtime husk"), "{found}");
        }
        let (verdict, found) = said(&[(MAIN, new)], 1);
        assert_eq!(verdict, Verdict::Warning);
        assert!(found.contains("version 3"), "{found}");
    }

    #[test]
    fn what_is_imported_counts() {
        let main = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml', 'own.toml', '/nowhere.toml']\n";
        let lines = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.vm]\nruntime_type = 'io.containerd.husk.v2'\n";
        for file in [
            "etc/containerd/conf.d/50-husk.toml",
            "etc/containerd/own.toml",
        ] {
            let (verdict, found) = said(&[(MAIN, main), (file, lines)], 2);
            assert_eq!(verdict, Verdict::Ok, "{file}: {found}");
            assert!(found.ends_with(" vm"), "{found}");
        }
        let (verdict, _) = said(
            &[(MAIN, main), ("etc/containerd/conf.d/husk.conf", lines)],
            2,
        );
        assert_eq!(verdict, Verdict::Warning);
        // Files that import each other.
        let circle = "imports = ['config.toml']\n";
        assert_eq!(said(&[(MAIN, circle)], 2).0, Verdict::Warning);
    }

    #[test]
    fn a_runtime_that_containerd_does_not_see_is_told() {
        let misplaced = "version = 2\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.husk]\nruntime_type = 'io.containerd.husk.v2'\n";
        let (verdict, found) = said(&[(MAIN, misplaced)], 2);
        assert_eq!(verdict, Verdict::Warning);
        assert!(
            found.contains("io.containerd.cri.v1.runtime") && found.contains("does not see"),
            "{found}"
        );
        // A comment, or another's options, are none.
        let other = "version = 2\n# io.containerd.husk.v2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
        assert!(said(&[(MAIN, other)], 1).1.contains("none is husk"));
        assert!(said(&[], 2).1.contains("none is husk"));
    }

    #[test]
    fn a_broken_configuration_is_told_with_its_line() {
        let (verdict, found) = said(&[(MAIN, "version = 2\n[plugins\n")], 1);
        assert_eq!(verdict, Verdict::Warning);
        assert!(found.contains("config.toml, line 2"), "{found}");
        let large = "#".repeat(2 << 20);
        assert!(said(&[(MAIN, &large)], 1).1.contains("more than"));
        // What it should be a table is none: nothing is found, nothing fails.
        assert!(
            said(&[(MAIN, "version = 'x'\nplugins = 3\nimports = 'y'\n")], 1)
                .1
                .contains("none is husk")
        );
    }

    #[test]
    fn versions_are_read_as_both_lines_tell_them() {
        let one = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+b4\n";
        let two = "containerd github.com/containerd/containerd/v2 v2.1.9 abcdef\n";
        assert_eq!(version_in(one), Some((1, 7)));
        assert_eq!(version_in(two), Some((2, 1)));
        assert_eq!(version_in("containerd"), None);
        for (told, verdict) in [
            (Some((1, 6)), Verdict::Warning),
            (Some((2, 1)), Verdict::Ok),
            (None, Verdict::Warning),
        ] {
            assert_eq!(super::told(told).verdict, verdict);
        }
    }

    #[test]
    fn the_shim_is_looked_for_where_containerd_looks() {
        let dir = root(&[
            ("opt/husk/bin/containerd-shim-husk-v2", ""),
            ("proc/1/comm", "init\n"),
            ("proc/1/environ", "PATH=/elsewhere\0"),
            ("proc/77/comm", "containerd\n"),
            ("proc/77/environ", "A=b\0PATH=/usr/bin:/opt/husk/bin\0"),
        ]);
        let host = Host {
            root: dir.path().to_owned(),
        };
        assert_eq!(path_finding(&host).verdict, Verdict::Ok);
        fs::remove_dir_all(dir.path().join("proc/77")).unwrap();
        let found = path_finding(&host);
        assert_eq!(found.verdict, Verdict::Warning);
        assert!(found.found.contains("/usr/local/sbin"), "{found:?}");
    }
}
