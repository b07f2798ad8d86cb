//! What the host's Docker knows of husk. It takes `--runtime io.containerd.husk.v2` without any settings; what its daemon.json says more is checked
//! here, as a mistake there keeps the daemon, or a container, from starting (docs/engines/docker.md).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{
    Finding, Host, Verdict,
    containerd::{RUNTIME, SHIM, has_shim},
    engine, files, finding,
    process::{Process, processes},
    settings, version_of,
};

const CHECK: &str = "Docker";
const RUNTIMES: &str = "Docker's runtimes";
const CONTAINERD: &str = "Docker's containerd";
const DAEMON: &str = "dockerd";

/// The oldest that knows `runtimeType`.
const OLDEST: (u32, u32) = (23, 0);
const SETTINGS: &str = "/etc/docker/daemon.json";

/// Nothing where there is no Docker.
pub(super) fn findings(host: &Host) -> Vec<Finding> {
    let Some(program) = engine(&host.root, DAEMON) else {
        return Vec::new();
    };
    let running = processes(&host.root, DAEMON).next();
    let mut found = vec![version(version_of(&program))];
    found.extend(runtimes(&host.root, &path(running.as_ref())));
    found.extend(running.and_then(|docker| own_containerd(host, &docker)));
    found
}

fn version(version: Option<(u32, u32)>) -> Finding {
    let told = |(major, minor)| format!("version {major}.{minor}");
    match version {
        Some(version) if version >= OLDEST => finding(CHECK, Verdict::Ok, told(version), ""),
        Some(version) => finding(
            CHECK,
            Verdict::Warning,
            told(version),
            "husk is a runtime by its type, which Docker knows from 23.0 on: install a newer one",
        ),
        None => finding(
            CHECK,
            Verdict::Warning,
            "it does not tell its version",
            "`dockerd --version` says why",
        ),
    }
}

/// The daemon's settings: those that the running one has been given, else where it looks.
fn path(running: Option<&Process>) -> PathBuf {
    let given = running.and_then(|docker| docker.flag("--config-file"));
    given.unwrap_or_else(|| SETTINGS.to_owned()).into()
}

/// A line for each mistake; without any, one that says how husk is had.
fn runtimes(root: &Path, path: &Path) -> Vec<Finding> {
    let wrong = |found: String, remedy: String| finding(RUNTIMES, Verdict::Warning, found, remedy);
    let settings = match read(root, path) {
        Ok(settings) => settings,
        Err(error) => {
            let remedy = "dockerd does not start with it: mend it; `dockerd --validate` says more";
            return vec![wrong(error, remedy.to_owned())];
        }
    };
    let runtimes = field(&settings, "runtimes").and_then(Value::as_object);
    let mut husks = Vec::new();
    let mut found = Vec::new();
    for (name, runtime) in runtimes.into_iter().flatten() {
        let runtime = runtime.as_object().cloned().unwrap_or_default();
        match judge(root, name, &runtime) {
            Ok(false) => {}
            Ok(true) => husks.push(name.as_str()),
            Err((what, remedy)) => found.push(wrong(
                format!("{}: the runtime {name} {what}", path.display()),
                remedy,
            )),
        }
    }
    let default = field(&settings, "default-runtime").and_then(Value::as_str);
    let is_known = |name: &str| {
        name == "runc"
            || name.starts_with("io.containerd.")
            || runtimes.is_some_and(|runtimes| runtimes.contains_key(name))
    };
    if let Some(name) = default.filter(|name| !is_known(name)) {
        found.push(wrong(
            format!(
                "{}: the default-runtime {name} is none of its runtimes",
                path.display()
            ),
            format!("dockerd does not start with it: write {}", line(name)),
        ));
    }
    if !found.is_empty() {
        return found;
    }
    let mut text = match husks.as_slice() {
        [] => format!("none is husk by a name; `docker run --runtime {RUNTIME}` needs none"),
        names => format!("husk is the runtime {}", names.join(", ")),
    };
    if default.is_some_and(|name| name == RUNTIME || husks.contains(&name)) {
        text += ", and the default";
    }
    vec![finding(RUNTIMES, Verdict::Ok, text, "")]
}

/// Whether a runtime is husk; the error is what is wrong with one that is meant to be, and what to write.
fn judge(root: &Path, name: &str, runtime: &Map<String, Value>) -> Result<bool, (String, String)> {
    let text = |key| {
        field(runtime, key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (kind, program) = (text("runtimeType"), text("path"));
    let is_shim = Path::new(kind).is_absolute() && kind.ends_with(SHIM);
    if kind != RUNTIME && !is_shim {
        let is_meant = [name, kind, program]
            .iter()
            .any(|text| text.contains("husk"));
        return match (is_meant, kind.is_empty()) {
            (false, _) => Ok(false),
            (true, true) => Err((
                "has no runtimeType: with a path alone it is a program like runc, which husk is not".to_owned(),
                format!("write {}, without a path", line(name)),
            )),
            (true, false) => Err((
                format!("has the runtimeType {kind}"),
                format!("write {}", line(name)),
            )),
        };
    }
    if !program.is_empty() {
        return Err((
            "has both a path and a runtimeType: dockerd takes one alone".to_owned(),
            format!("write {}", line(name)),
        ));
    }
    let options = field(runtime, "options").and_then(Value::as_object);
    for (key, value) in options.into_iter().flatten() {
        if !["ConfigPath", "TypeUrl"]
            .iter()
            .any(|known| known.eq_ignore_ascii_case(key))
        {
            return Err((
                format!("has the option {key}, which means nothing to husk"),
                "\"options\": { \"ConfigPath\": FILE } names settings in the form of /etc/husk/config.toml; there are no others".to_owned(),
            ));
        }
        let file = value.as_str().unwrap_or_default();
        if key.eq_ignore_ascii_case("ConfigPath") {
            match settings::check(root, Path::new(file)) {
                Ok(true) => {}
                Ok(false) => {
                    return Err((
                        format!("has the ConfigPath {file:?}, which is not there"),
                        "make the file, in the form of /etc/husk/config.toml, or take the option out".to_owned(),
                    ));
                }
                Err(error) => {
                    return Err((
                        format!("has a ConfigPath with a mistake: {error}"),
                        "no container starts with it; deploy/config.toml of husk's sources shows every key".to_owned(),
                    ));
                }
            }
        }
    }
    Ok(true)
}

/// The settings; none where the file is not there.
fn read(root: &Path, path: &Path) -> Result<Map<String, Value>, String> {
    let Some(text) = files::text(root, path)? else {
        return Ok(Map::new());
    };
    serde_json::from_str(&text)
        .map_err(|error| format!("{} is no JSON object: {error}", path.display()))
}

/// A field, named as Go's decoder takes it: in any case.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let exact = object.get(name);
    exact.or_else(|| {
        let mut fields = object.iter();
        fields.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(value))
    })
}

fn line(name: &str) -> String {
    format!("\"runtimes\": {{ \"{name}\": {{ \"runtimeType\": \"{RUNTIME}\" }} }}")
}

/// dockerd starts a containerd of its own where it is not given one; the host's has a line of its own.
fn own_containerd(host: &Host, docker: &Process) -> Option<Finding> {
    let own = processes(&host.root, "containerd").find(|process| docker.is_parent_of(process))?;
    Some(has_shim(host, CONTAINERD, own.variable("PATH")))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::tests::host;

    fn said(json: &str) -> Vec<Finding> {
        let (_dir, host) = host(&[
            ("etc/docker/daemon.json", json),
            ("etc/husk/large.toml", "default_memory_mib = 2048\n"),
            ("etc/husk/wrong.toml", "no_such_key = 1\n"),
        ]);
        runtimes(&host.root, &path(None))
    }

    #[test]
    fn what_the_page_shows_is_well() {
        const PAGE: &str = include_str!("../../../docs/engines/docker.md");
        let (_, block) = PAGE.split_once("```json\n").unwrap();
        let (block, rest) = block.split_once("```").unwrap();
        let (_, large) = rest.split_once("```json\n").unwrap();
        let (large, _) = large.split_once("```").unwrap();
        let large = format!("{{ \"runtimes\": {{ {large} }} }}");
        for (json, part) in [
            (block, "husk is the runtime husk, and the default"),
            (&large, "husk is the runtime husk-large"),
            (
                r#"{"default-runtime": "io.containerd.husk.v2"}"#,
                "none is husk by a name",
            ),
            (
                r#"{"Runtimes": {"vm": {"RuntimeType": "/opt/containerd-shim-husk-v2"}}, "default-runtime": "runc"}"#,
                "the runtime vm",
            ),
            (
                r#"{"runtimes": {"crun": {"path": "/usr/bin/crun"}}, "default-runtime": "crun"}"#,
                "none is husk",
            ),
            ("{}", "none is husk"),
        ] {
            let found = said(json);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].verdict, Verdict::Ok, "{found:?}");
            assert!(found[0].found.contains(part), "{found:?}");
        }
        let (_dir, none) = host(&[]);
        assert!(findings(&none).is_empty());
        assert_eq!(runtimes(&none.root, &path(None))[0].verdict, Verdict::Ok);
    }

    #[test]
    fn mistakes_are_told_with_what_to_write() {
        let runtime = |text: &str| format!(r#"{{"runtimes": {{"husk": {text}}}}}"#);
        let typ = "\"runtimeType\": \"io.containerd.husk.v2\"";
        for (json, found, remedy) in [
            (
                "{,}".to_owned(),
                "daemon.json is no JSON object: ",
                "mend it",
            ),
            ("[]".to_owned(), "is no JSON object", "mend it"),
            (
                runtime(r#"{"path": "/usr/local/bin/husk-oci"}"#),
                "has no runtimeType",
                typ,
            ),
            (
                runtime(r#"{"runtimeType": "io.containerd.husk.v1"}"#),
                "io.containerd.husk.v1",
                typ,
            ),
            (
                runtime(&format!(r#"{{{typ}, "path": "/x"}}"#)),
                "both a path and a runtimeType",
                typ,
            ),
            (
                runtime(&format!(r#"{{{typ}, "options": {{"BinaryName": "x"}}}}"#)),
                "the option BinaryName",
                "ConfigPath",
            ),
            (
                runtime(&format!(
                    r#"{{{typ}, "options": {{"ConfigPath": "/etc/husk/none.toml"}}}}"#
                )),
                "not there",
                "make the file",
            ),
            (
                runtime(&format!(
                    r#"{{{typ}, "options": {{"ConfigPath": "/etc/husk/wrong.toml"}}}}"#
                )),
                "a key no_such_key",
                "every key",
            ),
            (
                r#"{"default-runtime": "husk"}"#.to_owned(),
                "the default-runtime husk is none",
                typ,
            ),
        ] {
            let said = said(&json);
            assert_eq!(said.len(), 1, "{json}: {said:?}");
            let one = &said[0];
            assert_eq!(one.verdict, Verdict::Warning, "{one:?}");
            assert!(
                one.found.contains(found) && one.found.contains("daemon.json"),
                "{one:?}"
            );
            assert!(one.remedy.contains(remedy), "{one:?}");
        }
        // Each is told.
        let two = r#"{"runtimes": {"husk": {"path": "x"}, "vm": {"runtimeType": "husk"}}}"#;
        assert_eq!(said(two).len(), 2);
    }

    #[test]
    fn a_running_daemons_own_settings_and_containerd_count() {
        let (_dir, host) = host(&[
            ("proc/7/comm", "dockerd\n"),
            (
                "proc/7/cmdline",
                "dockerd\0--debug\0--config-file\0/etc/other.json\0",
            ),
            ("proc/8/comm", "containerd\n"),
            ("proc/8/status", "Name:\tcontainerd\nPPid:\t7\n"),
            ("proc/8/environ", "PATH=/opt/bin\0"),
        ]);
        let docker = processes(&host.root, DAEMON).next().unwrap();
        assert_eq!(path(Some(&docker)), Path::new("/etc/other.json"));
        let missing = own_containerd(&host, &docker).unwrap();
        assert_eq!(missing.verdict, Verdict::Warning);
        assert!(missing.found.contains("/opt/bin"), "{missing:?}");
        fs::create_dir_all(host.path("opt/bin")).unwrap();
        fs::write(host.path("opt/bin/containerd-shim-husk-v2"), "").unwrap();
        assert_eq!(own_containerd(&host, &docker).unwrap().verdict, Verdict::Ok);
        // Somebody else's child is the host's.
        fs::write(host.path("proc/8/status"), "PPid:\t1\n").unwrap();
        assert!(own_containerd(&host, &docker).is_none());
        fs::write(
            host.path("proc/7/cmdline"),
            "dockerd\0--config-file=/a.json\0",
        )
        .unwrap();
        assert_eq!(path(Some(&docker)), Path::new("/a.json"));
    }

    #[test]
    fn versions() {
        let told = super::super::version_in("Docker version 26.1.5+dfsg1, build a72d7cd\n");
        assert_eq!(told, Some((26, 1)));
        assert_eq!(version(told).verdict, Verdict::Ok);
        assert_eq!(version(Some((20, 10))).verdict, Verdict::Warning);
        assert_eq!(version(None).verdict, Verdict::Warning);
    }
}
