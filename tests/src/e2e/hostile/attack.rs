//! A guest that attacks, and the things on the host that it is after.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context as _, Result, bail, ensure};
use husk_tests::{host::Traces, wait};
use tempfile::TempDir;

use crate::context::{Context, sha256};

/// The file of the volume by which the guest knows it.
const MARKER: &str = "this-is-the-volume";

/// What the VMM says of a chain that no driver makes.
const FAULT: &str = "device stopped";

/// A hostile guest and its pod.
#[derive(Clone, Copy, Default)]
pub struct Guest<'a> {
    /// Parameters that say what to try.
    pub what: &'a str,
    /// The safeguards that the weakened VMM leaves out; the VMM as it is installed where that is `None`.
    pub without: Option<&'a str>,
    /// Lines of husk's configuration.
    pub settings: &'a str,
    /// More flags of `ctr run`.
    pub flags: &'a [&'a str],
    /// How many descriptors the VMM may have, where that is not what the suite has.
    pub descriptors: Option<u64>,
}

impl<'a> Guest<'a> {
    /// One in the plainest pod.
    pub fn new(what: &'a str) -> Self {
        Self {
            what,
            ..Self::default()
        }
    }

    /// The same on the weakened VMM.
    pub fn without(self, without: &'a str) -> Self {
        Self {
            without: Some(without),
            ..self
        }
    }
}

/// What a guest is after: a directory of the host, and a process.
pub struct Attack {
    canary: TempDir,
    before: String,
    victim: Child,
    /// What the pod is given.
    volume: TempDir,
}

impl Attack {
    /// Puts it there.
    pub fn prepare() -> Result<Self> {
        let (canary, volume) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let at = canary.path();
        fs::write(at.join("secret"), "a secret")?;
        fs::write(at.join("other"), "another")?;
        program(
            at.join("program"),
            &format!("#!/bin/sh\n: > {}/planted\n", at.display()),
        )?;
        fs::write(volume.path().join(MARKER), "")?;
        Ok(Self {
            before: tree(at)?,
            victim: Command::new("sleep").arg("1000000").spawn()?,
            canary,
            volume,
        })
    }

    /// Starts a pod with the hostile guest, and waits for its end.
    pub fn run(&self, suite: &Context, guest: &Guest<'_>) -> Result<Report> {
        let Guest {
            what,
            without,
            settings,
            flags,
            descriptors,
        } = *guest;
        let lib = suite.bin.join("../lib/husk");
        let vmm = match without {
            Some(_) => "husk-vmm-weakened",
            None => "husk-vmm",
        };
        let params = format!(
            "{what} canary={} marker={MARKER} victim={} weakened={}",
            self.canary.path().display(),
            self.victim.id(),
            without.unwrap_or_default(),
        );
        let dir = tempfile::tempdir()?;
        let mut vmm = lib.join(vmm);
        if let Some(most) = descriptors {
            // Without this capability it cannot raise what it is given.
            let script = format!(
                "#!/bin/sh\nulimit -n {most}\nexec setpriv --bounding-set -sys_resource {} \"$@\"\n",
                vmm.display()
            );
            vmm = program(dir.path().join("vmm"), &script)?;
        }
        let settings = format!(
            "kernel = {:?}\nvmm = {vmm:?}\nkernel_params = {params:?}\nstart_timeout_ms = 300000\n{settings}",
            lib.join("hostile.elf"),
        );
        let path = dir.path().join("config.toml");
        fs::write(&path, settings)?;
        let mount = format!(
            "type=bind,src={},dst=/volume,options=rbind:rw",
            self.volume.path().display()
        );
        let traces = Traces::now();
        let length = suite.containerd.log().len();
        let path = path.to_string_lossy();
        let own = ["--runtime-config-path", &*path, "--mount", &mount];
        let out = suite.run(&[&own, flags].concat(), &["true"])?;
        ensure!(
            out.code != 0,
            "a guest without an agent has started: {out:?}"
        );
        traces.restored()?;
        let log = suite.containerd.log_since(length);
        let panics: Vec<_> = log.lines().filter(|l| l.contains("\"thread '")).collect();
        ensure!(panics.is_empty(), "husk-vmm panicked: {panics:#?}");
        Ok(Report {
            lines: log.lines().filter_map(message).collect(),
            faults: log.lines().filter(|l| l.contains(FAULT)).count(),
            error: out.errors(),
        })
    }

    /// The host's directory.
    pub fn canary(&self) -> &Path {
        self.canary.path()
    }

    /// The directory that the pod is given.
    pub fn volume(&self) -> &Path {
        self.volume.path()
    }

    /// Is all as it was put there?
    pub fn nothing_moved(&self) -> Result<()> {
        let after = tree(self.canary.path())?;
        ensure!(
            after == self.before,
            "the host's files were:\n{}and are:\n{after}",
            self.before
        );
        // A zombie is seen as well: nobody has waited for it.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.victim.id()))?;
        ensure!(stat.contains(") S "), "the host's process: {stat}");
        Ok(())
    }

    /// Has something been made in the host's directory?
    pub fn has_planted(&self) -> bool {
        self.canary.path().join("planted").exists()
    }

    /// Waits for that.
    pub fn planted_in_time(&self) -> Result<()> {
        wait::until("the host's program to run", || {
            self.has_planted().then_some(())
        })
    }

    /// What is in the host's file.
    pub fn secret(&self) -> Result<String> {
        Ok(fs::read_to_string(self.canary.path().join("secret"))?)
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        // Killed already, where the attack has succeeded.
        let _ = self.victim.kill();
        let _ = self.victim.wait();
    }
}

/// What the guest told and how the pod's start ended.
#[derive(Debug)]
pub struct Report {
    lines: Vec<String>,
    /// How often the VMM has said so in the pod's log, which has a bound.
    faults: usize,
    error: String,
}

impl Report {
    /// Of a guest whose console was at hand, and whose VM ended so.
    pub fn of(console: &[String], error: String) -> Self {
        Self {
            lines: console.iter().filter(|l| is_told(l)).cloned().collect(),
            faults: 0,
            error,
        }
    }

    /// What the guest told of so many of something: `held: N WORDS`.
    pub fn count(&self, words: &str) -> Result<usize> {
        let told = self.lines.iter().find_map(|line| {
            let line = line.strip_prefix("held: ")?;
            line.strip_suffix(words)?.trim_end().parse().ok()
        });
        told.with_context(|| format!("no number of {words}: {self:#?}"))
    }

    /// Each attempt was held, at least so many of them, and the guest got to its end.
    pub fn all_held(&self, least: usize) -> Result<()> {
        let moved: Vec<_> = self
            .lines
            .iter()
            .filter(|l| l.starts_with("MOVED"))
            .collect();
        ensure!(moved.is_empty(), "{moved:#?}");
        ensure!(
            self.is_done(),
            "the guest did not come to its end: {self:#?}"
        );
        let held = self.lines.len() - 1;
        ensure!(held >= least, "{held} attempts: {self:#?}");
        Ok(())
    }

    /// An attempt succeeded.
    pub fn has_moved(&self) -> bool {
        self.lines.iter().any(|line| line.starts_with("MOVED"))
    }

    /// The guest got to its end.
    pub fn is_done(&self) -> bool {
        self.lines.iter().any(|line| line == "done")
    }

    /// The pod's log says that a device has stopped, and why.
    pub fn names_faults(&self) -> bool {
        self.faults > 0
    }

    /// An attempt of these words succeeded.
    pub fn moved(&self, words: &str) -> bool {
        self.lines
            .iter()
            .filter_map(|line| line.strip_prefix("MOVED: "))
            .any(|line| line.starts_with(words))
    }

    /// The pod's error says so.
    pub fn ended(&self, words: &str) -> Result<()> {
        if !self.error.contains(words) {
            bail!("no {words:?} in {self:#?}");
        }
        Ok(())
    }
}

/// Writes a script.
fn program(path: PathBuf, script: &str) -> Result<PathBuf> {
    fs::write(&path, script)?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&path, executable)?;
    Ok(path)
}

/// A line of the guest's in containerd's log, where it is the message of one of the shim's, in quotes.
fn message(line: &str) -> Option<String> {
    let (_, message) = line.split_once("msg=\"")?;
    let (message, _) = message.split_once("\" pod=")?;
    is_told(message).then(|| message.replace("\\\"", "\"").replace("\\\\", "\\"))
}

/// Is this a line of the guest's?
fn is_told(line: &str) -> bool {
    let words = ["held: ", "MOVED: "];
    line == "done" || words.iter().any(|word| line.starts_with(word))
}

/// Names, kinds, modes, owners, times and contents of all that is below a directory, and of itself.
pub fn tree(at: &Path) -> Result<String> {
    let found = fs::symlink_metadata(at)?;
    let contents = if found.is_file() {
        sha256(&fs::read(at)?)
    } else {
        String::new()
    };
    let mut text = format!(
        "{} {:o} {}:{} {} {}.{} {}.{} {} {contents}\n",
        at.display(),
        found.mode(),
        found.uid(),
        found.gid(),
        found.len(),
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec(),
        found.nlink(),
    );
    if found.is_dir() {
        let mut entries = fs::read_dir(at)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            text += &tree(&entry.path())?;
        }
    }
    Ok(text)
}
