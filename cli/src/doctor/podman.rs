//! What the host's podman and buildah know of husk, by containers.conf(5) (docs/engines/podman.md).

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    Finding, Host, Verdict, below, containerd::SHIM, engine, files, finding, in_path,
    is_executable, version_finding, version_of,
};

const CHECK: &str = "podman";
const RUNTIMES: &str = "podman's runtimes";
const CONMON: &str = "conmon";
const BUILDAH: &str = "buildah";

/// The oldest that husk is tested with.
const OLDEST: (u32, u32) = (5, 0);
/// husk as an OCI runtime's command line.
const PROGRAM: &str = "husk-oci";

/// Where podman looks for conmon when nothing else is said, before its PATH (containers-common, `pkg/config/default.go`).
const CONMON_PATHS: [&str; 7] = [
    "/usr/libexec/podman/conmon",
    "/usr/local/libexec/podman/conmon",
    "/usr/local/lib/podman/conmon",
    "/usr/bin/conmon",
    "/usr/sbin/conmon",
    "/usr/local/bin/conmon",
    "/usr/local/sbin/conmon",
];

const REMEDY: &str = "podman does not start with it either: mend it";

/// Nothing where neither is there.
pub(super) fn findings(host: &Host) -> Vec<Finding> {
    let (podman, buildah) = (engine(&host.root, CHECK), engine(&host.root, BUILDAH));
    let mut found = Vec::new();
    if podman.is_none() && buildah.is_none() {
        return found;
    }
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let files = files(
        &host.root,
        variable("CONTAINERS_CONF"),
        variable("CONTAINERS_CONF_OVERRIDE"),
    );
    let conf = read(&host.root, &files);
    if let Some(program) = podman {
        found.push(version(version_of(&program)));
        if let Ok(conf) = &conf {
            found.push(conmon(&host.root, conf));
        }
    }
    if buildah.is_some() {
        found.push(of_buildah(&host.root));
    }
    match conf {
        Ok(conf) => found.extend(runtimes(&host.root, &conf)),
        Err(error) => found.push(finding(RUNTIMES, Verdict::Warning, error, REMEDY)),
    }
    found
}

fn version(told: Option<(u32, u32)>) -> Finding {
    version_finding(CHECK, told, OLDEST, "husk is tested with podman 5")
}

/// What the files say together: a later one's values take the place of an earlier one's.
#[derive(Debug, Default)]
struct Conf {
    /// By name: the file that says so last, and what it says.
    runtimes: BTreeMap<String, (PathBuf, Value)>,
    default: Option<(PathBuf, String)>,
    conmon: Vec<String>,
}

/// Those that podman reads, the first one first. The variables are its own.
fn files(root: &Path, only: Option<PathBuf>, further: Option<PathBuf>) -> Vec<PathBuf> {
    let mut files = match only.filter(|path| !path.as_os_str().is_empty()) {
        Some(path) => vec![path],
        None => {
            let mut usual = vec![
                "/usr/share/containers/containers.conf".into(),
                "/etc/containers/containers.conf".into(),
            ];
            let pattern = Path::new("/etc/containers/containers.conf.d/*.conf");
            usual.extend(files::matching(root, pattern));
            usual
        }
    };
    files.extend(further.filter(|path| !path.as_os_str().is_empty()));
    files
}

fn read(root: &Path, files: &[PathBuf]) -> Result<Conf, String> {
    let mut conf = Conf::default();
    for path in files {
        let Some(table) = files::table(root, path)? else {
            continue;
        };
        let Some(engine) = table.get("engine").and_then(Value::as_table) else {
            continue;
        };
        let runtimes = engine.get("runtimes").and_then(Value::as_table);
        for (name, value) in runtimes.into_iter().flatten() {
            conf.runtimes
                .insert(name.clone(), (path.clone(), value.clone()));
        }
        if let Some(name) = engine.get("runtime").and_then(Value::as_str) {
            conf.default = Some((path.clone(), name.to_owned()));
        }
        if let Some(paths) = strings(engine, "conmon_path") {
            conf.conmon = paths;
        }
    }
    Ok(conf)
}

fn strings(table: &Table, key: &str) -> Option<Vec<String>> {
    table.get(key).and_then(as_strings)
}

fn as_strings(value: &Value) -> Option<Vec<String>> {
    let list = value.as_array()?.iter();
    list.map(|item| item.as_str().map(str::to_owned)).collect()
}

fn conmon(root: &Path, conf: &Conf) -> Finding {
    let usual = CONMON_PATHS.iter().map(|path| (*path).to_owned());
    let places: Vec<String> = match conf.conmon.is_empty() {
        true => usual.collect(),
        false => conf.conmon.clone(),
    };
    let found = places
        .iter()
        .find(|path| is_executable(&below(root, Path::new(path))));
    let in_own = || {
        let own = env::var_os("PATH").unwrap_or_default();
        in_path(root, &own, CONMON).filter(|path| is_executable(path))
    };
    match found.map(PathBuf::from).or_else(in_own) {
        Some(path) => finding(CONMON, Verdict::Ok, path.display().to_string(), ""),
        None => finding(
            CONMON,
            Verdict::Warning,
            format!("there is none at {}", places.join(", ")),
            "install conmon; [engine] conmon_path in /etc/containers/containers.conf names other places",
        ),
    }
}

/// A line for each mistake; without any, one that says how husk is had.
fn runtimes(root: &Path, conf: &Conf) -> Vec<Finding> {
    let wrong = |found: String, remedy: String| finding(RUNTIMES, Verdict::Warning, found, remedy);
    let program = engine(root, PROGRAM);
    let place = program.clone().map_or_else(
        || "/usr/local/bin/husk-oci".to_owned(),
        |path| {
            Path::new("/")
                .join(path.strip_prefix(root).unwrap_or(&path))
                .display()
                .to_string()
        },
    );
    let mut husks = Vec::new();
    let mut found = Vec::new();
    for (name, (path, value)) in &conf.runtimes {
        let line = format!("write below [engine.runtimes]: {name} = [\"{place}\"]");
        let Some(paths) = as_strings(value) else {
            if name.contains("husk") {
                let what = format!("{}: the runtime {name} is no list of paths", path.display());
                found.push(wrong(what, line));
            }
            continue;
        };
        let ends = |end: &str| paths.iter().any(|path| path.ends_with(end));
        if !name.contains("husk") && !ends(PROGRAM) && !ends(SHIM) {
            continue;
        }
        match judge(root, &paths) {
            Ok(()) => husks.push(name.as_str()),
            Err(what) => found.push(wrong(
                format!("{}: the runtime {name} {what}", path.display()),
                match program {
                    Some(_) => line,
                    None => format!("install husk-oci (`make install`) and {line}"),
                },
            )),
        }
    }
    if let Some((path, name)) = &conf.default
        && name.contains("husk")
        && !Path::new(name).is_absolute()
        && !conf.runtimes.contains_key(name)
    {
        found.push(wrong(
            format!(
                "{}: the default runtime {name} is none of [engine.runtimes]",
                path.display()
            ),
            format!("write below [engine.runtimes]: {name} = [\"{place}\"]"),
        ));
    }
    if !found.is_empty() {
        return found;
    }
    let mut text = match (husks.as_slice(), program) {
        ([], None) => "none is husk, and there is no husk-oci".to_owned(),
        ([], Some(_)) => format!("none is husk by a name; `podman --runtime {place}` needs none"),
        (names, _) => format!("husk is the runtime {}", names.join(", ")),
    };
    if let Some((_, name)) = &conf.default
        && husks.contains(&name.as_str())
    {
        text += ", and the default";
    }
    vec![finding(RUNTIMES, Verdict::Ok, text, "")]
}

/// Whether podman finds husk by these paths; it takes the first that is there.
fn judge(root: &Path, paths: &[String]) -> Result<(), String> {
    let Some(first) = paths
        .iter()
        .find(|path| below(root, Path::new(path)).exists())
    else {
        return Err(format!("has no program: there is no {}", paths.join(", ")));
    };
    if first.ends_with(SHIM) {
        return Err(format!(
            "is {first}, which is containerd's way to husk; podman's is husk-oci"
        ));
    }
    if !is_executable(&below(root, Path::new(first))) {
        return Err(format!("is {first}, which is not executable"));
    }
    Ok(())
}

/// buildah has no name for a runtime, only a path.
fn of_buildah(root: &Path) -> Finding {
    match env::var("BUILDAH_RUNTIME") {
        Ok(path) if path.contains("husk") && !is_executable(&below(root, Path::new(&path))) => {
            finding(
                BUILDAH,
                Verdict::Warning,
                format!("BUILDAH_RUNTIME is {path}, which is no program"),
                "set it to the path of husk-oci",
            )
        }
        _ => finding(
            BUILDAH,
            Verdict::Ok,
            "takes husk by its path: --isolation oci --runtime PATH-OF-husk-oci",
            "",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const CONF: &str = "etc/containers/containers.conf";
    const OURS: &str = "etc/containers/containers.conf.d/husk.conf";

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            if name.contains("bin/") {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        dir
    }

    fn said(files: &[(&str, &str)]) -> Vec<Finding> {
        let dir = root(&[files, &[("usr/local/bin/husk-oci", "")]].concat());
        let conf = read(dir.path(), &super::files(dir.path(), None, None)).unwrap();
        runtimes(dir.path(), &conf)
    }

    #[test]
    fn what_husk_ships_is_well() {
        const SHIPPED: &str = include_str!("../../../deploy/podman.conf");
        let default = "[engine]\nruntime = \"husk\"\n";
        for (files, part) in [
            (&[(OURS, SHIPPED)][..], "husk is the runtime husk"),
            (
                &[(CONF, default), (OURS, SHIPPED)],
                "husk is the runtime husk, and the default",
            ),
            (
                &[(CONF, "[engine]\nruntime = \"/usr/local/bin/husk-oci\"\n")],
                "none is husk by a name",
            ),
            (&[], "podman --runtime /usr/local/bin/husk-oci"),
            // A later file's word counts.
            (
                &[
                    (
                        CONF,
                        "[engine.runtimes]\nhusk = [\"/nowhere\"]\ncrun = [\"/nowhere\"]\n",
                    ),
                    (OURS, SHIPPED),
                ],
                "husk is the runtime husk",
            ),
        ] {
            let found = said(files);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].verdict, Verdict::Ok, "{found:?}");
            assert!(found[0].found.contains(part), "{found:?}");
        }
        let none = root(&[]);
        let host = Host {
            root: none.path().to_owned(),
        };
        assert!(findings(&host).is_empty());
    }

    #[test]
    fn mistakes_are_told_with_file_and_line_to_write() {
        let line = "husk = [\"/usr/local/bin/husk-oci\"]";
        for (text, found) in [
            (
                "[engine.runtimes]\nhusk = \"/usr/local/bin/husk-oci\"\n",
                "is no list of paths",
            ),
            (
                "[engine.runtimes]\nhusk = [\"/usr/bin/husk-oci\"]\n",
                "there is no /usr/bin/husk-oci",
            ),
            (
                "[engine.runtimes]\nhusk = [\"/etc/plain\"]\n",
                "is /etc/plain, which is not executable",
            ),
            (
                "[engine.runtimes]\nhusk = [\"/usr/local/bin/containerd-shim-husk-v2\"]\n",
                "is containerd's way",
            ),
            (
                "[engine]\nruntime = \"husk\"\n",
                "the default runtime husk is none of",
            ),
        ] {
            let found_all = said(&[
                (OURS, text),
                ("etc/plain", ""),
                ("usr/local/bin/containerd-shim-husk-v2", ""),
            ]);
            assert_eq!(found_all.len(), 1, "{found_all:?}");
            let one = &found_all[0];
            assert_eq!(one.verdict, Verdict::Warning, "{one:?}");
            assert!(
                one.found.contains(found) && one.found.starts_with("/etc/containers/"),
                "{one:?}"
            );
            assert!(one.remedy.contains(line), "{one:?}");
        }
        let broken = root(&[(OURS, "[engine\n")]);
        let error = read(broken.path(), &super::files(broken.path(), None, None)).unwrap_err();
        assert!(error.contains("conf.d/husk.conf, line 1"), "{error}");
    }

    #[test]
    fn its_variables_name_other_files() {
        let dir = root(&[(OURS, "")]);
        let named = |only: Option<&str>, further: Option<&str>| {
            super::files(
                dir.path(),
                only.map(PathBuf::from),
                further.map(PathBuf::from),
            )
        };
        assert_eq!(named(None, None).len(), 3);
        assert_eq!(
            named(Some("/a"), Some("/b")),
            ["/a", "/b"].map(PathBuf::from)
        );
        assert_eq!(named(Some(""), Some("")).len(), 3);
    }

    #[test]
    fn conmon_is_looked_for_where_podman_does() {
        let conf = |paths: &[&str]| Conf {
            conmon: paths.iter().map(|path| (*path).to_owned()).collect(),
            ..Conf::default()
        };
        let there = root(&[("usr/bin/conmon", "")]);
        assert_eq!(conmon(there.path(), &conf(&[])).verdict, Verdict::Ok);
        let bare = root(&[]);
        let missing = conmon(bare.path(), &conf(&["/opt/conmon"]));
        assert_eq!(missing.verdict, Verdict::Warning);
        assert!(missing.found.contains("/opt/conmon"), "{missing:?}");
        assert_eq!(version(Some((4, 3))).verdict, Verdict::Warning);
        assert_eq!(version(None).verdict, Verdict::Warning);
    }
}
