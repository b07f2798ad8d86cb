//! husk's own programs: whether they are there, and of one build.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Finding, Verdict, finding, in_path};
use crate::shim;

/// Where the shim is, and where it looks for what it starts.
fn places() -> Option<(PathBuf, PathBuf)> {
    let program = shim::program();
    let shim = match program.is_absolute() {
        true => program,
        false => {
            let path = env::var_os("PATH").unwrap_or_default();
            in_path(Path::new("/"), &path, &program.display().to_string())?
        }
    };
    let lib = shim.parent().and_then(Path::parent);
    let lib = lib.map_or_else(
        || PathBuf::from("/usr/lib/husk"),
        |prefix| prefix.join("lib/husk"),
    );
    Some((shim, lib))
}

pub(super) fn there() -> Finding {
    const CHECK: &str = "husk's parts";
    const REMEDY: &str = "`make install` puts them where they are looked for";
    let Some((shim, lib)) = places() else {
        let found = "there is no containerd-shim-husk-v2";
        return finding(CHECK, Verdict::Failure, found, REMEDY);
    };
    let missing: Vec<&str> = ["husk-vmm", "vmlinux", "initramfs.cpio"]
        .into_iter()
        .filter(|name| !lib.join(name).exists())
        .collect();
    match missing.is_empty() {
        true => finding(
            CHECK,
            Verdict::Ok,
            format!("{} and {}", shim.display(), lib.display()),
            "",
        ),
        // /etc/husk/config.toml may name others.
        false => finding(
            CHECK,
            Verdict::Warning,
            format!("{} has no {}", lib.display(), missing.join(", ")),
            REMEDY,
        ),
    }
}

pub(super) fn versions() -> Finding {
    let told = places().map(|(shim, lib)| {
        [(shim, "-v"), (lib.join("husk-vmm"), "--version")].map(|(program, flag)| {
            let output = Command::new(&program).arg(flag).output();
            let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            (program, text.unwrap_or_default())
        })
    });
    compare(told.iter().flatten())
}

/// What each program says of its version, against husk's own.
fn compare<'a>(told: impl Iterator<Item = &'a (PathBuf, String)>) -> Finding {
    const CHECK: &str = "versions";
    const OWN: &str = env!("CARGO_PKG_VERSION");
    let others: Vec<String> = told
        .filter_map(|(program, text)| {
            // The last word of what both of them say.
            let version = text.split_whitespace().last().unwrap_or("of no version");
            (version != OWN).then(|| format!("{} is {version}", program.display()))
        })
        .collect();
    match others.is_empty() {
        true => finding(CHECK, Verdict::Ok, format!("all {OWN}"), ""),
        false => finding(
            CHECK,
            Verdict::Warning,
            format!("husk is {OWN}, but {}", others.join(", ")),
            "install all of husk's parts from one build: they speak with each other without looking back",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_another_build_are_named() {
        let own = env!("CARGO_PKG_VERSION");
        let shim = format!("containerd-shim-husk-v2\n  Runtime: x\n  Version: {own}\n");
        let told = |text: &str, vmm: &str| {
            let told = [
                (PathBuf::from("/shim"), text.to_owned()),
                (PathBuf::from("/vmm"), vmm.to_owned()),
            ];
            compare(told.iter())
        };
        assert_eq!(
            told(&shim, &format!("husk-vmm {own}\n")).verdict,
            Verdict::Ok
        );
        let found = told(&shim, "husk-vmm 0.0.1\n");
        assert_eq!(found.verdict, Verdict::Warning);
        assert!(
            found.found.contains("/vmm is 0.0.1") && !found.found.contains("/shim"),
            "{found:?}"
        );
        assert!(told(&shim, "").found.contains("/vmm is of no version"));
    }
}
