//! What husk has on the host at one moment, so that a test can compare before and after.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{ctr, wait};

/// Names of husk's processes, as the kernel cuts them (15 characters).
const PROCESSES: [&str; 2] = ["containerd-shim", "husk-vmm"];

/// Everything a start makes on the host, one line each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks now: processes, mounts, sockets, cgroups, network interfaces, state directories.
    pub fn now() -> Self {
        let mut found = BTreeSet::new();
        for process in processes() {
            if PROCESSES.contains(&process.name.as_str()) {
                found.insert(format!("process {} {}", process.pid, process.name));
            }
        }
        for mount in fs::read_to_string("/proc/self/mounts")
            .unwrap_or_default()
            .lines()
        {
            let point = mount.split(' ').nth(1).unwrap_or_default();
            if ["husk", "io.containerd.runtime", "containerd/io."]
                .iter()
                .any(|part| point.contains(part))
            {
                found.insert(format!("mount {point}"));
            }
        }
        for (what, dir) in [
            ("socket", "/run/containerd/s"),
            ("interface", "/sys/class/net"),
            ("namespace", "/run/netns"),
            ("pipes", "/run/husk-cli"),
        ] {
            list(what, Path::new(dir), 0, &mut found);
        }
        list("state", Path::new("/run/husk"), 2, &mut found);
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        Self(found)
    }

    /// Waits until nothing is there that was not there in `self`.
    ///
    /// # Errors
    /// Something stays; names it.
    pub fn restored(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = wait::until("husk to leave nothing behind", || {
            left = Self::now()
                .0
                .difference(&self.0)
                .cloned()
                .collect::<Vec<_>>();
            left.is_empty().then_some(())
        });
        match gone {
            Ok(()) => Ok(()),
            Err(_) => bail!("left behind:\n  {}", left.join("\n  ")),
        }
    }
}

fn list(what: &str, dir: &Path, deeper: u32, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        found.insert(format!("{what} {}", path.display()));
        if deeper > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            list(what, &path, deeper - 1, found);
        }
    }
}

fn cgroups(dir: &Path, depth: u32, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.insert(format!("cgroup {}", entry.path().display()));
            if depth < 4 {
                cgroups(&entry.path(), depth + 1, found);
            }
        }
    }
}

/// A network namespace with a name; dropped, it goes.
pub struct Netns(pub &'static str);

impl Netns {
    /// Makes it, empty.
    ///
    /// # Errors
    /// iproute2's.
    pub fn new(name: &'static str) -> Result<Self> {
        run(&["ip", "netns", "add", name])?;
        Ok(Self(name))
    }

    /// Where it is mounted.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// Wires it to the host with a veth pair: the host's end and address, which is the gateway, and its own, in one /24.
    ///
    /// # Errors
    /// iproute2's.
    pub fn wire(&self, host: &str, gateway: &str, device: &str, address: &str) -> Result<()> {
        let n = self.0;
        for command in [
            format!("ip link add {host} type veth peer name {device} netns {n}"),
            format!("ip addr add {gateway}/24 dev {host}"),
            format!("ip link set {host} up"),
            format!("ip -n {n} addr add {address}/24 dev {device}"),
            format!("ip -n {n} link set {device} up"),
            format!("ip -n {n} route add default via {gateway}"),
        ] {
            run(&command.split(' ').collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A test that leaves something behind is caught by the leak checks.
        let _ = run(&["ip", "netns", "del", self.0]);
    }
}

/// Runs a program of the host and gives what it printed.
///
/// # Errors
/// It could not be started, or failed; with what it printed.
pub fn run(command: &[&str]) -> Result<String> {
    let (program, arguments) = command.split_first().context("no command")?;
    let output = ctr::output(Command::new(program).args(arguments))?.ok()?;
    Ok(output.text())
}

/// A process of the host.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its parent's pid.
    pub parent: u32,
    /// The kernel's name for it, at most 15 characters.
    pub name: String,
    /// Its command line.
    pub command: Vec<String>,
}

/// Every process that can be seen; one that ends meanwhile is left out, and so is a zombie.
pub fn processes() -> Vec<Process> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| process(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name stands in parentheses and may itself hold some.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    (state != "Z").then(|| Process {
        pid,
        parent,
        name: name.to_owned(),
        command: command
            .split(|b| *b == 0)
            .filter(|part| !part.is_empty())
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect(),
    })
}

/// The shim of a container or pod.
pub fn shim_of(id: &str) -> Option<Process> {
    processes()
        .into_iter()
        .find(|p| p.name == PROCESSES[0] && p.command.iter().any(|a| a == id))
}

/// The VMM that this shim has started.
pub fn vmm_of(shim: &Process) -> Option<Process> {
    processes()
        .into_iter()
        .find(|p| p.name == PROCESSES[1] && p.parent == shim.pid)
}

/// A figure of `/proc/PID/smaps_rollup` in KiB, `Pss` say.
pub fn smaps(pid: u32, field: &str) -> Option<u64> {
    field_of(
        &fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?,
        field,
    )
}

/// A field of a `Name:  123 kB` text.
pub fn field_of(text: &str, field: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_this_process() {
        let me = std::process::id();
        let found = processes().into_iter().find(|p| p.pid == me).unwrap();
        assert_eq!(
            found.parent,
            nix::unistd::getppid().as_raw().cast_unsigned()
        );
        assert!(!found.command.is_empty());
    }

    #[test]
    fn reads_a_field() {
        let text = "Rss:      12 kB\nPss:     7 kB\nPss_Anon:   3 kB\n";
        assert_eq!(field_of(text, "Pss"), Some(7));
        assert_eq!(field_of(text, "Swap"), None);
    }

    #[test]
    fn nothing_new_is_nothing_left() {
        let traces = Traces(Traces::now().0);
        let mut more = traces.clone();
        more.0.insert("socket /x".into());
        assert_eq!(more.0.difference(&traces.0).count(), 1);
        assert_eq!(traces.0.difference(&more.0).count(), 0);
    }
}
