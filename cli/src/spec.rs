//! The OCI runtime specification of a container: docker's defaults (moby, oci/defaults.go and profiles), the image's configuration, and what
//! the command line says.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use oci_spec::image::Config;
use serde_json::{Value, json};

use crate::{args, files::Identity};

/// What a container may do unless somebody says otherwise (moby, oci/caps/defaults.go).
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// All there are (linux/capability.h), for `--cap-add ALL`.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Of /proc and /sys, what a container does not see, and what it does not change (moby, oci/defaults.go).
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The profile of system calls: containerd's default for the default capabilities.
const SECCOMP: &str = include_str!("../../deploy/seccomp-default.json");

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a specification is made of.
pub(crate) struct Parts<'a> {
    pub(crate) id: &'a str,
    pub(crate) args: &'a args::Create,
    /// The image's.
    pub(crate) config: &'a Config,
    /// What it runs.
    pub(crate) command: &'a [String],
    /// As whom.
    pub(crate) identity: &'a Identity,
    /// Its environment.
    pub(crate) env: &'a BTreeMap<String, String>,
    /// Volumes and the like.
    pub(crate) mounts: Vec<Value>,
}

/// What a container runs: the image's entry point and command, each replaced by the command line's.
pub(crate) fn command(args: &args::Create, config: &Config) -> Result<Vec<String>> {
    let own = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let mut command = match &args.entrypoint {
        Some(word) if word.is_empty() => Vec::new(),
        Some(word) => vec![word.clone()],
        None => own(config.entrypoint()),
    };
    if !args.command.is_empty() {
        command.extend(args.command.iter().cloned());
    } else if args.entrypoint.is_none() {
        command.extend(own(config.cmd()));
    }
    if command.is_empty() {
        bail!("no command is given, and the image has none of its own");
    }
    Ok(command)
}

/// The environment: the image's, then files', then flags'; a word without "=" is the caller's own variable.
pub(crate) fn environment(
    args: &args::Create,
    config: &Config,
    identity: &Identity,
    caller: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, String>> {
    let mut env = BTreeMap::new();
    let set = |env: &mut BTreeMap<String, String>, line: &str| {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        env.insert(key.to_owned(), value.to_owned());
    };
    set(&mut env, PATH);
    if let Some(name) = &args.hostname {
        set(&mut env, &format!("HOSTNAME={name}"));
    }
    if args.tty {
        set(&mut env, "TERM=xterm");
    }
    set(&mut env, &format!("HOME={}", identity.home));
    for line in config.env().iter().flatten() {
        set(&mut env, line);
    }
    let mut lines = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("reading the environment in {}", path.display()))?;
        let own = text.lines().map(str::trim_start);
        lines.extend(
            own.filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
    }
    lines.extend(args.env.iter().cloned());
    for line in lines {
        match line.split_once('=') {
            Some(("", _)) => bail!("{line:?} sets a variable without a name"),
            Some(_) => set(&mut env, &line),
            None => match caller(&line) {
                Some(value) => set(&mut env, &format!("{line}={value}")),
                // As docker does: not even the image's.
                None => drop(env.remove(&line)),
            },
        }
    }
    Ok(env)
}

/// Builds it. Paths that only the container's own directory knows are the monitor's to add.
pub(crate) fn build(parts: &Parts<'_>) -> Result<Value> {
    let args = parts.args;
    let capabilities = capabilities(&args.cap_add, &args.cap_drop)?;
    let cwd = args
        .workdir
        .clone()
        .or_else(|| parts.config.working_dir().clone());
    let cwd = cwd
        .filter(|dir| !dir.is_empty())
        .unwrap_or_else(|| "/".to_owned());
    if !cwd.starts_with('/') {
        bail!("the working directory {cwd:?} is not absolute");
    }
    let env: Vec<String> = parts
        .env
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    // Only root keeps what it has when it becomes somebody else's process (capabilities(7)).
    let effective: &BTreeSet<String> = &if parts.identity.uid == 0 {
        capabilities.clone()
    } else {
        BTreeSet::new()
    };
    let mut process = json!({
        "terminal": args.tty,
        "user": {"uid": parts.identity.uid, "gid": parts.identity.gid, "additionalGids": parts.identity.groups},
        "args": parts.command, "env": env, "cwd": cwd, "noNewPrivileges": false,
        "capabilities": {"bounding": capabilities, "permitted": effective, "effective": effective},
        "rlimits": rlimits(&args.ulimit)?,
    });
    let mut seccomp: Option<Value> =
        Some(serde_json::from_str(SECCOMP).context("reading the default seccomp profile")?);
    for option in &args.security_opt {
        match option.split_once(['=', ':']) {
            Some(("seccomp", "unconfined")) => seccomp = None,
            Some(("seccomp", path)) => seccomp = Some(profile(path)?),
            Some(("no-new-privileges", "true")) => process["noNewPrivileges"] = json!(true),
            None if option == "no-new-privileges" => process["noNewPrivileges"] = json!(true),
            _ => bail!(
                "--security-opt {option:?}: husk knows seccomp=unconfined, seccomp=FILE and no-new-privileges"
            ),
        }
    }
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["ro", "nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
    ];
    for word in &args.tmpfs {
        let (target, options) = word.split_once(':').unwrap_or((word, ""));
        if !target.starts_with('/') {
            bail!("--tmpfs {word:?}: the directory is not absolute");
        }
        let mut all = vec!["nosuid", "noexec", "nodev"];
        all.extend(options.split(',').filter(|option| !option.is_empty()));
        mounts.push(mount(target, "tmpfs", "tmpfs", &all));
    }
    mounts.extend(parts.mounts.iter().cloned());
    let mut annotations: BTreeMap<&str, &str> = args
        .annotation
        .iter()
        .map(|word| {
            word.split_once('=')
                .with_context(|| format!("--annotation {word:?} is not KEY=VALUE"))
        })
        .collect::<Result<_>>()?;
    if args.init {
        annotations.insert("io.husk.init", "true");
    }
    let namespaces: Vec<Value> = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
        .iter()
        .map(|kind| json!({"type": kind}))
        .collect();
    let mut linux = json!({
        "cgroupsPath": format!("/husk/{}", parts.id), "namespaces": namespaces, "maskedPaths": MASKED, "readonlyPaths": READ_ONLY,
        "resources": resources(args)?,
    });
    if let Some(profile) = seccomp {
        linux["seccomp"] = profile;
    }
    Ok(json!({
        "ociVersion": "1.2.0", "process": process, "root": {"path": "rootfs", "readonly": args.read_only},
        "hostname": args.hostname, "mounts": mounts, "annotations": annotations, "linux": linux,
    }))
}

fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": target, "type": kind, "source": source, "options": options})
}

/// A profile of the OCI's form. Docker's, with conditions on capabilities and kernels, is told to be another.
fn profile(path: &str) -> Result<Value> {
    let text =
        std::fs::read(path).with_context(|| format!("reading the seccomp profile {path}"))?;
    let mut profile: Value = serde_json::from_slice(&text)
        .with_context(|| format!("reading the seccomp profile {path}"))?;
    // Docker's own profiles group architectures and make rules conditional.
    if let Some(map) = profile.get("archMap").and_then(Value::as_array) {
        let own = |entry: &Value| entry["architecture"] == "SCMP_ARCH_X86_64";
        let mut all = vec![json!("SCMP_ARCH_X86_64")];
        let found = map.iter().find(|entry| own(entry));
        all.extend(
            found
                .and_then(|entry| entry["subArchitectures"].as_array())
                .into_iter()
                .flatten()
                .cloned(),
        );
        profile["architectures"] = json!(all);
        if let Some(object) = profile.as_object_mut() {
            object.remove("archMap");
        }
    }
    let rules = profile.get("syscalls").and_then(Value::as_array);
    let conditions = ["includes", "excludes"];
    let has = |rule: &Value| {
        conditions.iter().any(|c| {
            rule.get(c)
                .is_some_and(|v| v.as_object().is_some_and(|o| !o.is_empty()))
        })
    };
    if rules.is_some_and(|rules| rules.iter().any(has)) {
        bail!(
            "the seccomp profile {path} has rules with \"includes\" or \"excludes\", which husk does not know: write what they come to"
        );
    }
    Ok(profile)
}

fn capabilities(add: &[String], drop: &[String]) -> Result<BTreeSet<String>> {
    let named = |word: &String| -> Result<Vec<String>> {
        let upper = word.to_uppercase();
        if upper == "ALL" {
            return Ok(ALL_CAPABILITIES.map(str::to_owned).to_vec());
        }
        let name = match upper.starts_with("CAP_") {
            true => upper,
            false => format!("CAP_{upper}"),
        };
        if !ALL_CAPABILITIES.contains(&&*name) {
            bail!("there is no capability {word:?}");
        }
        Ok(vec![name])
    };
    let mut all: BTreeSet<String> = CAPABILITIES.map(str::to_owned).into();
    let is_all = |words: &[String]| words.iter().any(|word| word.eq_ignore_ascii_case("all"));
    if is_all(drop) {
        all.clear();
    }
    for word in add {
        all.extend(named(word)?);
    }
    for word in drop.iter().filter(|word| !word.eq_ignore_ascii_case("all")) {
        for name in named(word)? {
            all.remove(&name);
        }
    }
    Ok(all)
}

/// Everything, for `husk exec --privileged`.
pub(crate) fn all_capabilities() -> Value {
    let all = ALL_CAPABILITIES.as_slice();
    json!({"bounding": all, "permitted": all, "effective": all})
}

fn rlimits(words: &[String]) -> Result<Vec<Value>> {
    let mut all: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    all.insert("RLIMIT_NOFILE".to_owned(), (1 << 20, 1 << 20));
    for word in words {
        let bad = || format!("--ulimit {word:?} is not NAME=SOFT[:HARD]");
        let (name, values) = word.split_once('=').with_context(bad)?;
        let number = |text: &str| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            text => text.parse().with_context(bad),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            bail!("--ulimit {word:?}: the soft limit is above the hard one");
        }
        all.insert(format!("RLIMIT_{}", name.to_uppercase()), (soft, hard));
    }
    Ok(all
        .iter()
        .map(|(name, (soft, hard))| json!({"type": name, "soft": soft, "hard": hard}))
        .collect())
}

fn resources(args: &args::Create) -> Result<Value> {
    let mut resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
    });
    if let Some(memory) = &args.memory {
        let bytes = bytes(memory).with_context(|| format!("--memory {memory:?}"))?;
        if bytes < 6 << 20 {
            bail!("--memory {memory:?}: the least is 6 MB");
        }
        resources["memory"] = json!({"limit": bytes});
    }
    if let Some(cpus) = args.cpus {
        if !(cpus > 0.0 && cpus < 1e6) {
            bail!("--cpus {cpus}: it is a number above zero, as 1.5");
        }
        // The period that the kernel takes unasked, in microseconds.
        const PERIOD: u64 = 100_000;
        resources["cpu"] =
            json!({"quota": (cpus * PERIOD as f64).round() as i64, "period": PERIOD});
    }
    if let Some(limit) = args.pids_limit {
        resources["pids"] = json!({"limit": limit});
    }
    Ok(resources)
}

/// Bytes, as docker reads them: a number with b, k, m, g or t, powers of 1024.
pub(crate) fn bytes(text: &str) -> Result<u64> {
    let lower = text.to_ascii_lowercase();
    let word = lower
        .strip_suffix("ib")
        .or_else(|| lower.strip_suffix('b'))
        .unwrap_or(&lower);
    let split = word
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(word.len());
    let (number, unit) = word.split_at(split);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => bail!("it is a number with k, m or g behind it, as 512m"),
    };
    let number: f64 = number
        .parse()
        .ok()
        .context("it is a number with k, m or g behind it, as 512m")?;
    Ok((number * (1_u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests;
