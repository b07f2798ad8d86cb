//! `husk doctor --pod ID`: the jail of a running pod's VMM, as the kernel tells it in /proc, beside what docs/security.md promises.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    doctor::{Finding, Verdict, finding},
    proc::{self, field},
};

/// What all of them are remedied by.
const REMEDY: &str = "stop the pod: its VMM is not jailed as docs/security.md promises; report it as a security bug, with this output";

/// The capabilities that the file server needs, by their numbers (linux/capability.h).
const CAPABILITIES: [(u8, &str); 8] = [
    (0, "chown"),
    (1, "dac_override"),
    (3, "fowner"),
    (4, "fsetid"),
    (6, "setgid"),
    (7, "setuid"),
    (27, "mknod"),
    (31, "setfcap"),
];

/// Namespaces in which a VMM is alone.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// Looks at the VMMs of the pods of this id, one in each of containerd's namespaces at most.
///
/// # Errors
/// There is none.
pub(crate) fn check(pod: &str) -> Result<Vec<Finding>> {
    let proc = Path::new("/proc");
    let vmms = vmms(proc)?;
    let found: Vec<_> = vmms.iter().filter(|vmm| vmm.pod == pod).collect();
    if found.is_empty() {
        let running: Vec<_> = vmms.iter().map(|vmm| vmm.pod.as_str()).collect();
        match running.is_empty() {
            true => bail!("no pod of husk's runs on this host"),
            false => bail!(
                "no pod {pod:?} runs on this host under husk; those that do: {}",
                running.join(", ")
            ),
        }
    }
    let mut findings = Vec::new();
    for vmm in found {
        let process = Process {
            dir: proc.join(vmm.pid.to_string()),
            own: proc.join("self"),
        };
        let looked = process.findings();
        findings.extend(looked.with_context(|| {
            format!(
                "reading /proc/{} of the pod {pod}: it may have ended",
                vmm.pid
            )
        })?);
    }
    Ok(findings)
}

/// A VMM, and the pod that its shim was started for.
struct Vmm {
    pid: u32,
    pod: String,
}

fn vmms(proc: &Path) -> io::Result<Vec<Vmm>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc)? {
        let dir = entry?.path();
        let pid = dir.file_name().and_then(|name| name.to_str()?.parse().ok());
        // Processes end while one looks.
        let (Some(pid), Ok(status)) = (pid, fs::read_to_string(dir.join("status"))) else {
            continue;
        };
        if field(&status, "Name") != Some("husk-vmm") {
            continue;
        }
        let shim = field(&status, "PPid").map(|parent| proc.join(parent).join("cmdline"));
        let arguments = shim.and_then(|path| fs::read_to_string(path).ok());
        let mut arguments = arguments.as_deref().unwrap_or_default().split('\0');
        if let Some(pod) = arguments.find(|a| *a == "-id").and(arguments.next()) {
            let pod = pod.to_owned();
            found.push(Vmm { pid, pod });
        }
    }
    Ok(found)
}

/// Told, or what is told instead.
fn verdict(check: &'static str, is_kept: bool, promise: &str, instead: String) -> Finding {
    match is_kept {
        true => finding(check, Verdict::Ok, promise, ""),
        false => finding(check, Verdict::Failure, instead, REMEDY),
    }
}

/// A process' directory below /proc, and that of the one who looks.
struct Process {
    dir: PathBuf,
    own: PathBuf,
}

impl Process {
    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.dir.join(name))
    }

    fn findings(&self) -> io::Result<Vec<Finding>> {
        let mountinfo = self.read("mountinfo")?;
        let mut statuses = Vec::new();
        for task in fs::read_dir(self.dir.join("task"))? {
            statuses.push(fs::read_to_string(task?.path().join("status"))?);
        }
        Ok(vec![
            user(&statuses, &self.read("uid_map")?),
            capabilities(&statuses),
            groups(&statuses),
            no_new_privs(&statuses),
            seccomp(&statuses),
            self.namespaces()?,
            root(&mountinfo),
            mounts(&mountinfo),
            self.descriptors()?,
            environment(&self.read("environ")?),
            core_dumps(&self.read("limits")?),
        ])
    }

    fn namespaces(&self) -> io::Result<Finding> {
        let mut shared = Vec::new();
        for name in NAMESPACES {
            let of = |dir: &Path| fs::read_link(dir.join("ns").join(name));
            if of(&self.dir)? == of(&self.own)? {
                shared.push(name);
            }
        }
        Ok(verdict(
            "namespaces",
            shared.is_empty(),
            &NAMESPACES.join(" "),
            format!("shared with the host: {}", shared.join(" ")),
        ))
    }

    fn descriptors(&self) -> io::Result<Finding> {
        let mut outside = Vec::new();
        for entry in fs::read_dir(self.dir.join("fd"))? {
            let target = fs::read_link(entry?.path());
            let target = target.map(|t| t.to_string_lossy().into_owned());
            match target {
                Ok(target) if !is_harmless(&target) => outside.push(target),
                _ => {}
            }
        }
        Ok(verdict(
            "descriptors",
            outside.is_empty(),
            "devices, sockets, pipes, the share's files",
            outside.join(" "),
        ))
    }
}

/// What a descriptor is of, by its link: the kernel's objects; what the shim opened for the VM; the share; and the directory of descriptors
/// itself, whose mount is attached nowhere.
fn is_harmless(target: &str) -> bool {
    let objects = ["anon_inode:", "socket:", "pipe:"];
    let devices = ["/dev/kvm", "/dev/null", "/dev/net/tun", "/dev/vhost-net"];
    objects.iter().any(|object| target.starts_with(object))
        || devices.contains(&target)
        || target == "/"
        || target.starts_with("/share")
}

/// Whose process it is on the host: nobody's. Its files' owners may be anybody else: threads of the file server act for them.
fn user(statuses: &[String], uid_map: &str) -> Finding {
    let map: Vec<_> = uid_map.split_whitespace().collect();
    let roots: Vec<_> = statuses
        .iter()
        .filter(|status| {
            ["Uid", "Gid"].iter().any(|ids| {
                field(status, ids).is_none_or(|ids| ids.split_whitespace().any(|id| id == "0"))
            })
        })
        .map(|status| field(status, "Name").unwrap_or("?"))
        .collect();
    let maps_root = map.chunks(3).any(|range| range.get(1) == Some(&"0"));
    verdict(
        "user",
        roots.is_empty() && !maps_root,
        "0 is one of the pod's own, nobody on the host",
        match roots.is_empty() {
            true => format!("root of the host is one of its users: {}", map.join(" ")),
            false => "root of the host: its kernel (Linux 5.19 it takes) or husk's configuration has no user namespace for it, or the engine has mounted the root file system (Docker, CRI-O)".into(),
        },
    )
}

fn capabilities(statuses: &[String]) -> Finding {
    let names = CAPABILITIES.map(|(_, name)| name).join(" ");
    let kept = CAPABILITIES
        .iter()
        .fold(0u64, |set, (number, _)| set | 1 << number);
    let strays: Vec<_> = statuses
        .iter()
        .flat_map(|status| {
            let sets = [
                ("CapInh", 0),
                ("CapPrm", kept),
                ("CapEff", kept),
                ("CapBnd", kept),
                ("CapAmb", 0),
            ];
            sets.into_iter().filter_map(|(set, most)| {
                let told = field(status, set)?;
                let has = u64::from_str_radix(told, 16).unwrap_or(u64::MAX);
                (has & !most != 0).then(|| format!("{set} {told}"))
            })
        })
        .collect();
    verdict("capabilities", strays.is_empty(), &names, strays.join(" "))
}

fn groups(statuses: &[String]) -> Finding {
    let all: Vec<_> = statuses
        .iter()
        .filter_map(|status| field(status, "Groups"))
        .filter(|groups| !groups.is_empty())
        .collect();
    verdict("groups", all.is_empty(), "none", all.join(" "))
}

fn no_new_privs(statuses: &[String]) -> Finding {
    let set = statuses
        .iter()
        .all(|status| field(status, "NoNewPrivs") == Some("1"));
    verdict("no_new_privs", set, "set", "not set".into())
}

fn seccomp(statuses: &[String]) -> Finding {
    // SECCOMP_MODE_FILTER (linux/seccomp.h).
    let without: Vec<_> = statuses
        .iter()
        .filter(|status| field(status, "Seccomp") != Some("2"))
        .map(|status| field(status, "Name").unwrap_or("?"))
        .collect();
    verdict(
        "seccomp",
        without.is_empty(),
        "a filter on every thread",
        format!("threads without a filter: {}", without.join(" ")),
    )
}

fn root(text: &str) -> Finding {
    let mut strays: Vec<_> = proc::mounts(text)
        .filter(|mount| mount.at != "/" && !mount.at.starts_with("/share"))
        .map(|mount| mount.at)
        .collect();
    let is_read_only =
        proc::mounts(text).any(|mount| mount.at == "/" && mount.options.contains(&"ro"));
    if !is_read_only {
        strays.push("the root directory can be written");
    }
    verdict(
        "root",
        strays.is_empty(),
        "read-only, the pod's share in it and nothing else",
        strays.join(" "),
    )
}

fn mounts(text: &str) -> Finding {
    let locked = ["nosuid", "nodev", "noexec"];
    let open: Vec<_> = proc::mounts(text)
        .filter(|mount| !locked.iter().all(|flag| mount.options.contains(flag)))
        .map(|mount| mount.at)
        .collect();
    verdict(
        "mounts",
        open.is_empty(),
        &locked.join(" "),
        format!("without these flags: {}", open.join(" ")),
    )
}

fn environment(environ: &str) -> Finding {
    let names: Vec<_> = environ
        .split('\0')
        .filter_map(|variable| variable.split('=').next())
        .filter(|name| !name.is_empty())
        .collect();
    verdict("environment", names.is_empty(), "empty", names.join(" "))
}

fn core_dumps(limits: &str) -> Finding {
    let limit = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .unwrap_or_default();
    let none = limit.split_whitespace().take(2).all(|value| value == "0");
    verdict(
        "core dumps",
        none,
        "none",
        format!("up to {}", limit.trim()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const JAILED: &str = "Name:\tvcpu0\nPPid:\t7\nCapInh:\t0000000000000000\nCapPrm:\t00000000880000db\n\
        CapEff:\t00000000880000db\nCapBnd:\t00000000880000db\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nGroups:\t \n";

    fn is_ok(finding: &Finding) -> bool {
        finding.verdict() == Verdict::Ok
    }

    #[test]
    fn each_thread_counts() {
        let with = |from: &str, to: &str| vec![JAILED.to_owned(), JAILED.replace(from, to)];
        let same = with("", "");
        for check in [capabilities, groups, no_new_privs, seccomp] {
            assert!(is_ok(&check(&same)), "{:?}", check(&same));
        }
        // CAP_SYS_ADMIN; one that nobody knows yet.
        for set in ["00000000882000db", "80000000880000db", "no number"] {
            let more = with("CapEff:\t00000000880000db", &format!("CapEff:\t{set}"));
            assert!(!is_ok(&capabilities(&more)), "{set}");
        }
        assert!(!is_ok(&capabilities(&with(
            "CapAmb:\t0000000000000000",
            "CapAmb:\t0000000000000001"
        ))));
        assert!(!is_ok(&groups(&with("Groups:\t ", "Groups:\t4 6"))));
        assert!(!is_ok(&no_new_privs(&with("Privs:\t1", "Privs:\t0"))));
        assert!(!is_ok(&seccomp(&with("Seccomp:\t2", "Seccomp:\t0"))));
    }

    #[test]
    fn root_of_the_host_is_seen() {
        let status = |ids: &str| vec![format!("{JAILED}Uid:\t{ids}\nGid:\t{ids}\n")];
        let own = status("4026531847\t4026531847\t4026531847\t4026531847");
        let map = "0 4026531847 1\n1 1 4026531846\n";
        assert!(is_ok(&user(&own, map)));
        assert!(!is_ok(&user(&status("0\t0\t0\t0"), "0 0 4294967295\n")));
        assert!(!is_ok(&user(&own, "0 4026531847 1\n1 0 1\n")));
        assert!(!is_ok(&user(&status("7\t0\t7\t7"), map)));
        // Of a process that cannot be read.
        assert!(!is_ok(&user(&[JAILED.to_owned()], map)));
    }

    #[test]
    fn mounts_are_few_and_locked() {
        let jail = "1 0 0:40 / / ro,nosuid,nodev,noexec,relatime - tmpfs husk ro\n\
            2 1 0:41 /s /share0 ro,nosuid,nodev,noexec - ext4 /dev/vda rw\n";
        assert!(is_ok(&root(jail)) && is_ok(&mounts(jail)));
        let proc = format!("{jail}3 1 0:5 / /proc rw,nosuid,nodev,noexec - proc proc rw\n");
        assert!(!is_ok(&root(&proc)) && is_ok(&mounts(&proc)));
        let volume = format!("{jail}3 2 0:6 / /share0/c/mounts/0 rw,nosuid,noexec - ext4 v rw\n");
        assert!(is_ok(&root(&volume)) && !is_ok(&mounts(&volume)));
        let writable = jail.replace("/ / ro", "/ / rw");
        assert!(!is_ok(&root(&writable)));
    }

    #[test]
    fn what_is_left_open_is_seen() {
        for harmless in [
            "anon_inode:kvm-vm",
            "socket:[1]",
            "/share0/c/rootfs/etc",
            "/",
        ] {
            assert!(is_harmless(harmless), "{harmless}");
        }
        for harm in [
            "/usr/lib/husk/vmlinux",
            "/run/husk",
            "/dev/sda",
            "/proc/1/fd",
        ] {
            assert!(!is_harmless(harm), "{harm}");
        }
    }

    #[test]
    fn limits_and_environment() {
        let limits = |soft: &str| format!("Max core file size        {soft}   0   bytes\n");
        assert!(is_ok(&core_dumps(&limits("0"))));
        assert!(!is_ok(&core_dumps(&limits("unlimited"))));
        assert!(is_ok(&environment("")));
        assert!(!is_ok(&environment("TOKEN=secret\0")));
    }

    #[test]
    fn vmms_are_found_by_the_pod_of_their_shim() {
        let dir = tempfile::tempdir().unwrap();
        let process = |pid: &str, status: &str, command: &str| {
            let dir = dir.path().join(pid);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("status"), status).unwrap();
            fs::write(dir.join("cmdline"), command).unwrap();
        };
        process(
            "7",
            "Name:\tcontainerd-shim\n",
            "shim\0-namespace\0n\0-id\0web\0",
        );
        process("8", "Name:\thusk-vmm\nPPid:\t7\n", "husk-vmm\0");
        process("9", "Name:\tother\nPPid:\t7\n", "other\0");
        fs::create_dir(dir.path().join("sys")).unwrap();
        let found = vmms(dir.path()).unwrap();
        let found: Vec<_> = found.iter().map(|v| (v.pid, v.pod.as_str())).collect();
        assert_eq!(found, [(8, "web")]);
    }
}
