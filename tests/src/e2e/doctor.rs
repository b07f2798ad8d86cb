//! `husk doctor` on a host with engines: what it says of their settings, right and wrong.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use husk_tests::ctr;
use serde_json::Value;

use crate::context::Context;

/// What it says under this heading, with a variable of its environment set: verdict, finding and remedy in a line each.
fn said(suite: &Context, check: &str, variable: (&str, &str)) -> Result<Vec<String>> {
    let mut doctor = Command::new(suite.bin.join("husk"));
    doctor
        .args(["doctor", "--format", "json"])
        .env(variable.0, variable.1);
    let text = ctr::output(&mut doctor)?.ok()?.text();
    let mut lines = Vec::new();
    for line in text.lines() {
        let finding: Value = serde_json::from_str(line)?;
        if finding["Check"] == check {
            let part = |name: &str| finding[name].as_str().unwrap_or_default().to_owned();
            lines.push(["Verdict", "Found", "Remedy"].map(part).join(" "));
        }
    }
    ensure!(!lines.is_empty(), "nothing is said of {check}: {text}");
    Ok(lines)
}

/// The suite's daemon has three runtimes of husk's with a mistake each.
pub fn docker(suite: &Context) -> Result<()> {
    suite.docker()?;
    let version = said(suite, "Docker", ("A", "b"))?;
    ensure!(version[0].starts_with("ok version 2"), "{version:?}");
    let found = said(suite, "Docker's runtimes", ("A", "b"))?;
    for parts in [
        ["the runtime husk-missing ", "missing.toml", "make the file"],
        ["the runtime husk-wrong ", "no_such_key", "shows every key"],
        ["the runtime husk-odd ", "NoSuchOption", "ConfigPath"],
    ] {
        let is_told = |line: &String| {
            line.starts_with("warning ") && parts.iter().all(|part| line.contains(part))
        };
        ensure!(found.iter().any(is_told), "{parts:?}: {found:?}");
    }
    ensure!(found.len() == 3, "{found:?}");
    Ok(())
}

/// The file that husk ships, and one that names a program that is not there, as podman would be given them.
pub fn podman(suite: &Context) -> Result<()> {
    const SHIPPED: &str = include_str!("../../../deploy/podman.conf");
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("husk.conf");
    let path = file.to_str().context("its name")?;
    let said = |check: &str, text: &str| {
        fs::write(&file, text)?;
        said(suite, check, ("CONTAINERS_CONF", path))
    };
    for check in ["podman", "conmon", "buildah"] {
        let found = said(check, SHIPPED)?;
        ensure!(found[0].starts_with("ok "), "{found:?}");
    }
    let program = suite.bin.join("husk-oci").display().to_string();
    let right = SHIPPED.replace("/usr/local/bin/husk-oci", &program);
    let found = said("podman's runtimes", &right)?;
    ensure!(found == ["ok husk is the runtime husk "], "{found:?}");
    let wrong = SHIPPED.replace("/usr/local/bin/husk-oci", "/nowhere/husk-oci");
    let found = said("podman's runtimes", &wrong)?;
    let is_told = found[0].starts_with("warning ")
        && found[0].contains(&format!("{path}: the runtime husk has no program"))
        && found[0].contains("husk = [\"");
    ensure!(found.len() == 1 && is_told, "{found:?}");
    Ok(())
}
