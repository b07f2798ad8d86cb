//! `husk doctor`: what this host can do and what it cannot, each trouble with its remedy.

mod containerd;
mod crio;
mod docker;
mod files;
mod parts;
mod podman;
mod process;
mod settings;

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use serde::Serialize;

use crate::{args, args::Format, command::Code, jail, network};

/// How it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// Something is slower, or not to be had.
    Warning,
    /// Nothing runs.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

/// The oldest kernel: mount_setattr(2) makes bind mounts read-only before the guest sees them.
const KERNEL: (u32, u32) = (5, 12);

pub(crate) fn doctor(args: &args::Doctor) -> Result<()> {
    let findings = match &args.pod {
        Some(pod) => jail::check(pod)?,
        None => of_the_host(),
    };
    tell(&findings, args.format)
}

fn of_the_host() -> Vec<Finding> {
    let host = Host {
        root: PathBuf::from("/"),
    };
    [
        host.kvm(),
        host.kernel(),
        host.cgroups(),
        host.overlay(),
        host.tun(),
        host.vhost(),
        host.traffic(),
        parts::there(),
        parts::versions(),
        plugins(),
        certificates(),
    ]
    .into_iter()
    .chain(settings::findings(&host.root))
    .chain(containerd::findings(&host))
    .chain(docker::findings(&host))
    .chain(podman::findings(&host))
    .chain(crio::findings(&host))
    .collect()
}

fn tell(findings: &[Finding], format: Format) -> Result<()> {
    let mut out = io::stdout().lock();
    for finding in findings {
        if format == Format::Json {
            writeln!(out, "{}", serde_json::to_string(finding)?)?;
            continue;
        }
        let word = match finding.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warning => "WARN",
            Verdict::Failure => "FAIL",
        };
        writeln!(out, "{word}  {}: {}", finding.check, finding.found)?;
        if finding.verdict != Verdict::Ok {
            writeln!(out, "      -> {}", finding.remedy)?;
        }
    }
    match findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Failure)
    {
        true => Err(Code::silent(1)),
        false => Ok(()),
    }
}

impl Finding {
    #[cfg(test)]
    pub(crate) fn verdict(&self) -> Verdict {
        self.verdict
    }
}

pub(crate) fn finding(
    check: &'static str,
    verdict: Verdict,
    found: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        check,
        verdict,
        found: found.into(),
        remedy: remedy.into(),
    }
}

/// The host's files; another directory in tests.
struct Host {
    root: PathBuf,
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn has_module(&self, name: &str) -> bool {
        self.path("sys/module").join(name).exists()
    }

    /// Loaded, built in, or there to be loaded.
    fn can_have_module(&self, name: &str) -> bool {
        let release = self.read("proc/sys/kernel/osrelease");
        let lists = ["modules.dep", "modules.builtin"]
            .map(|file| self.read(&format!("lib/modules/{}/{file}", release.trim())));
        let file = format!("/{name}.ko");
        self.has_module(name) || lists.iter().any(|list| list.contains(&file))
    }

    fn kvm(&self) -> Finding {
        const CHECK: &str = "KVM";
        let path = self.path("dev/kvm");
        let flags = self.read("proc/cpuinfo");
        let has = |flag: &str| {
            let mut lines = flags.lines().filter(|line| line.starts_with("flags"));
            lines
                .next()
                .is_some_and(|line| line.split(' ').any(|word| word == flag))
        };
        if !path.exists() {
            return finding(
                CHECK,
                Verdict::Failure,
                "there is no /dev/kvm",
                "load kvm_amd or kvm_intel; in a VM, enable nested virtualisation",
            );
        }
        if self.has_module("kvm_pvm") {
            return finding(
                CHECK,
                Verdict::Failure,
                "/dev/kvm is served by kvm_pvm, which cannot run an ordinary guest",
                "use a machine with AMD-V or VT-x",
            );
        }
        if let Err(error) = fs::File::options().read(true).write(true).open(&path) {
            return finding(
                CHECK,
                Verdict::Failure,
                format!("/dev/kvm cannot be opened: {error}"),
                "run husk as root",
            );
        }
        match (has("svm"), has("vmx")) {
            (true, _) => finding(CHECK, Verdict::Ok, "AMD-V", ""),
            (_, true) => finding(CHECK, Verdict::Ok, "VT-x", ""),
            _ => finding(
                CHECK,
                Verdict::Failure,
                "the CPU shows neither svm nor vmx",
                "use a machine with AMD-V or VT-x; in a VM, enable nested virtualisation",
            ),
        }
    }

    fn kernel(&self) -> Finding {
        let release = self.read("proc/sys/kernel/osrelease").trim().to_owned();
        let mut numbers = release
            .split(|c: char| !c.is_ascii_digit())
            .map(str::parse::<u32>);
        let version = match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
            _ => (0, 0),
        };
        let verdict = if version >= KERNEL {
            Verdict::Ok
        } else {
            Verdict::Failure
        };
        finding("kernel", verdict, release, "husk wants Linux 5.12 or newer")
    }

    fn cgroups(&self) -> Finding {
        match self.path("sys/fs/cgroup/cgroup.controllers").exists() {
            true => finding("cgroups", Verdict::Ok, "version 2", ""),
            false => finding(
                "cgroups",
                Verdict::Failure,
                "there is no cgroup v2 at /sys/fs/cgroup",
                "boot with systemd.unified_cgroup_hierarchy=1",
            ),
        }
    }

    fn overlay(&self) -> Finding {
        let known = self.read("proc/filesystems");
        let has = known
            .lines()
            .any(|line| line.trim_start_matches("nodev").trim() == "overlay");
        match has || self.can_have_module("overlay") {
            true => finding("overlayfs", Verdict::Ok, "there", ""),
            false => finding(
                "overlayfs",
                Verdict::Failure,
                "the kernel has none",
                "a kernel with CONFIG_OVERLAY_FS, as every distribution's",
            ),
        }
    }

    fn tun(&self) -> Finding {
        self.device(
            "network devices",
            "dev/net/tun",
            "/dev/net/tun",
            "there is no /dev/net/tun: containers have no network",
            "load the module tun",
        )
    }

    fn vhost(&self) -> Finding {
        self.device(
            "packets",
            "dev/vhost-net",
            "carried by the kernel (/dev/vhost-net)",
            "there is no /dev/vhost-net: the VMM carries them, more slowly",
            "load the module vhost_net",
        )
    }

    /// A device without which something is slower, or not to be had.
    fn device(
        &self,
        check: &'static str,
        path: &str,
        there: &str,
        missing: &str,
        remedy: &'static str,
    ) -> Finding {
        match self.path(path).exists() {
            true => finding(check, Verdict::Ok, there, ""),
            false => finding(check, Verdict::Warning, missing, remedy),
        }
    }

    fn traffic(&self) -> Finding {
        let missing: Vec<&str> = ["sch_ingress", "cls_u32", "act_mirred"]
            .into_iter()
            .filter(|module| !self.can_have_module(module))
            .collect();
        match missing.is_empty() {
            true => finding("traffic control", Verdict::Ok, "there", ""),
            false => finding(
                "traffic control",
                Verdict::Warning,
                format!(
                    "neither loaded nor below /lib/modules: {}; without them containers have no network",
                    missing.join(", ")
                ),
                "a kernel that has them, as every distribution's; built in, they may go unseen here",
            ),
        }
    }
}

/// Where an absolute path of the host is, below the root directory that is looked at.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// A program in the directories of a PATH.
fn in_path(root: &Path, path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|dir| below(root, &dir).join(program))
        .find(|path| path.exists())
}

/// An engine's program, where it is installed: in this process' PATH, or where services look.
fn engine(root: &Path, program: &str) -> Option<PathBuf> {
    let own = env::var_os("PATH").unwrap_or_default();
    in_path(root, &own, program).or_else(|| in_path(root, OsStr::new(containerd::PATH), program))
}

/// Major and minor of the first such numbers in what a program says of itself.
fn version_of(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").output().ok()?;
    version_in(&String::from_utf8_lossy(&output.stdout))
}

fn version_in(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.trim_start_matches('v').split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    })
}

/// What is said of a program's version; `remedy` goes with any that it tells.
fn version_finding(
    check: &'static str,
    version: Option<(u32, u32)>,
    oldest: (u32, u32),
    remedy: &str,
) -> Finding {
    match version {
        Some((major, minor)) => {
            let verdict = match (major, minor) >= oldest {
                true => Verdict::Ok,
                false => Verdict::Warning,
            };
            finding(check, verdict, format!("version {major}.{minor}"), remedy)
        }
        None => finding(
            check,
            Verdict::Warning,
            "it does not tell its version",
            format!("`{check} --version` says why"),
        ),
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn plugins() -> Finding {
    let missing = network::missing_plugins();
    match missing.is_empty() {
        true => finding("CNI plugins", Verdict::Ok, "there", ""),
        false => finding(
            "CNI plugins",
            Verdict::Warning,
            format!(
                "there is no {}: husk run wants --network none",
                missing.join(", ")
            ),
            "install containernetworking-plugins",
        ),
    }
}

fn certificates() -> Finding {
    let count = rustls_native_certs::load_native_certs().certs.len();
    match count {
        0 => finding(
            "certificates",
            Verdict::Warning,
            "the host has none: registries are checked against Mozilla's of husk's build",
            "install ca-certificates",
        ),
        count => finding(
            "certificates",
            Verdict::Ok,
            format!("{count} of the host's"),
            "",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host of these files.
    pub(super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = dir.path().to_owned();
        (dir, Host { root })
    }

    #[test]
    fn a_host_that_has_all_is_well() {
        let modules = "kernel/net/sched/sch_ingress.ko.xz:\nkernel/net/sched/cls_u32.ko.xz:\nkernel/net/sched/act_mirred.ko:\nkernel/fs/overlayfs/overlay.ko:\n";
        let (_dir, host) = host(&[
            ("dev/kvm", ""),
            ("dev/net/tun", ""),
            ("dev/vhost-net", ""),
            ("proc/cpuinfo", "processor : 0\nflags\t\t: fpu svm npt\n"),
            ("proc/sys/kernel/osrelease", "6.12.3-amd64\n"),
            ("proc/filesystems", "nodev\ttmpfs\n\text4\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu"),
            ("lib/modules/6.12.3-amd64/modules.dep", modules),
        ]);
        for finding in [
            host.kvm(),
            host.kernel(),
            host.cgroups(),
            host.overlay(),
            host.tun(),
            host.vhost(),
            host.traffic(),
        ] {
            assert_eq!(finding.verdict, Verdict::Ok, "{finding:?}");
        }
    }

    #[test]
    fn what_is_missing_is_told_with_a_remedy() {
        let (_dir, bare) = host(&[("proc/sys/kernel/osrelease", "5.10.0-9-amd64\n")]);
        for (finding, verdict) in [
            (bare.kvm(), Verdict::Failure),
            (bare.kernel(), Verdict::Failure),
            (bare.cgroups(), Verdict::Failure),
            (bare.overlay(), Verdict::Failure),
            (bare.tun(), Verdict::Warning),
            (bare.vhost(), Verdict::Warning),
            (bare.traffic(), Verdict::Warning),
        ] {
            assert_eq!(finding.verdict, verdict, "{finding:?}");
            assert!(!finding.remedy.is_empty());
        }
        let (_dir, pvm) = host(&[
            ("dev/kvm", ""),
            ("sys/module/kvm_pvm/x", ""),
            ("proc/cpuinfo", "flags : svm\n"),
        ]);
        assert!(pvm.kvm().found.contains("kvm_pvm"));
        let (_dir, plain) = host(&[("dev/kvm", ""), ("proc/cpuinfo", "flags : fpu\n")]);
        assert!(plain.kvm().found.contains("neither"));
    }
}
