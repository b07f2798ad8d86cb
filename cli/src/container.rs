//! What is known of containers, on the disk: it outlives this process, and a reboot.
//!
//! ```text
//! ROOT/containers/ID/container.json   what it is, as it was created; never changed
//!                    status.json      how far it is; written by its monitor
//!                    lock             held by its monitor as long as there is one
//!                    files            held by who copies its files while it runs
//!                    bundle/          what the shim is given
//!                    upper/, work/    what the container changes of its root file system
//!                    log              its output, as docker's json-file
//! /run/husk-cli/ID/                   pipes and sockets, while it runs
//! ```
//!
//! A container runs as long as its monitor holds the lock: the kernel lets go of it with the process, whatever ends that.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::network::Port;

/// Where pipes and sockets are.
const RUN: &str = "/run/husk-cli";

/// A container as it was created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// 64 hex digits.
    pub(crate) id: String,
    /// Nobody else's.
    pub(crate) name: String,
    /// The image, as its user called it.
    pub(crate) image: String,
    /// The digest of its manifest.
    pub(crate) image_id: String,
    /// The image's layers by chainID: they are kept.
    pub(crate) chain: Vec<String>,
    /// The directories of the image's layers, the topmost first.
    pub(crate) layers: Vec<PathBuf>,
    /// RFC 3339.
    pub(crate) created: String,
    /// What it runs.
    pub(crate) command: Vec<String>,
    /// It has a terminal.
    pub(crate) terminal: bool,
    /// It has an input.
    pub(crate) stdin: bool,
    /// Its input ends when the first who is attached to it goes.
    pub(crate) stdin_once: bool,
    /// It goes when it has ended.
    pub(crate) remove: bool,
    /// The signal that asks it to end.
    pub(crate) stop_signal: String,
    /// The network that it is in.
    pub(crate) network: String,
    /// Its ports that the host has too.
    pub(crate) ports: Vec<Port>,
    /// The OCI runtime specification; the rest is the monitor's to add.
    pub(crate) spec: serde_json::Value,
}

/// How far a container is.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) state: State,
    /// Of the shim's process that stands for it on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<u32>,
    /// Where its shim serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) started: Option<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) finished: Option<String>,
    /// Its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<u32>,
    /// Why it did not start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// The states, in docker's words.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// It has not been started.
    #[default]
    Created,
    /// It runs.
    Running,
    /// It has ended, or could not be started.
    Exited,
}

/// All containers of a root directory.
#[derive(Debug, Clone)]
pub(crate) struct Containers {
    dir: PathBuf,
}

/// One of them.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) dir: PathBuf,
    pub(crate) record: Record,
}

impl Containers {
    pub(crate) fn new(dir: &Path) -> Self {
        let dir = dir.to_owned();
        Self { dir }
    }

    /// All, the youngest first. What is half made or half removed is none.
    pub(crate) fn all(&self) -> Result<Vec<Container>> {
        let entries =
            fs::read_dir(&self.dir).with_context(|| format!("listing {}", self.dir.display()))?;
        let mut all = Vec::new();
        for entry in entries {
            let dir = entry?.path();
            match read::<Record>(&dir.join("container.json")) {
                Ok(Some(record)) => all.push(Container { dir, record }),
                Ok(None) => {}
                Err(error) => tracing::warn!("{error:#}"),
            }
        }
        all.sort_by(|a, b| b.record.created.cmp(&a.record.created));
        Ok(all)
    }

    /// The one that a user means: by its name, its id, or the id's beginning.
    pub(crate) fn find(&self, word: &str) -> Result<Container> {
        let all = self.all()?;
        let exact = |c: &&Container| c.record.name == word || c.record.id == word;
        if let Some(found) = all.iter().find(exact) {
            return Ok(found.clone());
        }
        let begins = |c: &&Container| !word.is_empty() && c.record.id.starts_with(word);
        let mut found = all.iter().filter(begins);
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => {
                bail!("{word:?} is the beginning of several containers' ids: write more of it")
            }
            _ => bail!("no such container: {word} (`husk ps -a` shows those that there are)"),
        }
    }

    /// Makes a container. Its name is nobody's afterwards but its own.
    pub(crate) fn create(&self, record: Record) -> Result<Container> {
        // One at a time: names are looked for and given under this lock.
        let _lock = lock(&self.dir.join(".lock"), FlockOperation::LockExclusive)
            .with_context(|| format!("locking {}", self.dir.display()))?;
        let all = self.all()?;
        if let Some(other) = all.iter().find(|c| c.record.name == record.name) {
            bail!(
                "the name {:?} is in use by container {}: remove that, or choose another name",
                record.name,
                other.short_id()
            );
        }
        let dir = self.dir.join(&record.id);
        let make = || {
            for name in ["upper", "work", "bundle/rootfs"] {
                fs::create_dir_all(dir.join(name))?;
            }
            write(&dir, "container.json", &record)
        };
        if let Err(error) = make() {
            // The error tells what is wrong with the directory.
            let _ = fs::remove_dir_all(&dir);
            return Err(error)
                .with_context(|| format!("making the container in {}", dir.display()));
        }
        Ok(Container { dir, record })
    }
}

impl Container {
    pub(crate) fn short_id(&self) -> &str {
        self.record.id.get(..12).unwrap_or(&self.record.id)
    }

    /// The directory of its pipes and sockets.
    pub(crate) fn run_dir(&self) -> PathBuf {
        // The paths of sockets have 107 bytes at most (unix(7)), so this does not lie below the root.
        Path::new(RUN).join(&self.record.id)
    }

    /// Holds the container's lock, if nobody does.
    pub(crate) fn try_lock(&self) -> io::Result<Option<File>> {
        match lock(&self.lock_path(), FlockOperation::NonBlockingLockExclusive) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What mounts its root file system, as overlayfs takes it: upon layers of these paths.
    pub(crate) fn overlay_options(&self, lower: &[String]) -> [String; 3] {
        let dir = |name: &str| self.dir.join(name).display().to_string();
        [
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={}", dir("upper")),
            format!("workdir={}", dir("work")),
        ]
    }

    /// Holds its files while they are copied, though it may end meanwhile: it does not start again before that is over.
    pub(crate) fn hold_files(&self) -> io::Result<File> {
        lock(&self.files_path(), FlockOperation::NonBlockingLockShared)
    }

    /// Does anybody hold its files? Its root file system must not be mounted twice then.
    pub(crate) fn has_held_files(&self) -> bool {
        let held = lock(&self.files_path(), FlockOperation::NonBlockingLockExclusive);
        held.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    fn files_path(&self) -> PathBuf {
        self.dir.join("files")
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// Waits until it has no monitor, or is gone.
    pub(crate) fn wait_for_monitor(&self) -> io::Result<()> {
        self.look_at_lock(FlockOperation::LockShared).map(drop)
    }

    /// Has it a monitor?
    fn has_monitor(&self) -> bool {
        let held = self.look_at_lock(FlockOperation::NonBlockingLockShared);
        held.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Takes the lock for a moment, if there is one. It is not made here: that would put a file into a directory that is being removed.
    fn look_at_lock(&self, operation: FlockOperation) -> io::Result<()> {
        match File::open(self.lock_path()) {
            Ok(file) => Ok(flock(&file, operation)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// How far it is. One whose monitor has gone without a word has ended: killed, or with the host.
    pub(crate) fn status(&self) -> Result<Status> {
        let has_monitor = self.has_monitor();
        let mut status: Status = read(&self.dir.join("status.json"))?.unwrap_or_default();
        if status.state == State::Running && !has_monitor {
            // It may have ended between the two looks.
            let again = read::<Status>(&self.dir.join("status.json"))?;
            status = again.unwrap_or_default();
            if status.state == State::Running {
                status.state = State::Exited;
                status.exit_code = Some(255);
                status.error = Some("the host or its monitor went down under it".to_owned());
            }
        }
        Ok(status)
    }

    pub(crate) fn set_status(&self, status: &Status) -> Result<()> {
        write(&self.dir, "status.json", status)
            .with_context(|| format!("writing the status of container {}", self.short_id()))
    }

    /// Keeps something beside it.
    pub(crate) fn keep<T: Serialize>(&self, name: &str, document: &T) -> Result<()> {
        write(&self.dir, name, document)
            .with_context(|| format!("writing {}", self.dir.join(name).display()))
    }

    /// What is kept beside it.
    pub(crate) fn kept<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        read(&self.dir.join(name))
    }

    /// Nothing is kept any more.
    pub(crate) fn forget(&self, name: &str) {
        // It may never have been.
        let _ = fs::remove_file(self.dir.join(name));
    }

    /// Removes what there is of it on the disk. It does not run.
    pub(crate) fn remove(&self) -> Result<()> {
        // First it is no container any more: half of one must not be taken for a whole.
        let record = self.dir.join("container.json");
        fs::remove_file(&record).with_context(|| format!("removing {}", record.display()))?;
        fs::remove_dir_all(&self.dir)
            .with_context(|| format!("removing {}", self.dir.display()))?;
        // Nothing is there unless it ended badly.
        let _ = fs::remove_dir_all(self.run_dir());
        Ok(())
    }
}

fn lock(path: &Path, operation: FlockOperation) -> io::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    flock(&file, operation)?;
    Ok(file)
}

/// A document, if it is there.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => {
            let document = serde_json::from_slice(&text);
            Ok(Some(
                document.with_context(|| format!("reading {}", path.display()))?,
            ))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Writes a document: there is the old one or the new one, whatever happens.
fn write<T: Serialize>(dir: &Path, name: &str, document: &T) -> io::Result<()> {
    let new = dir.join(format!("{name}.{}.new", std::process::id()));
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(document)?)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(name))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, name: &str) -> Record {
        Record {
            id: id.to_owned(),
            name: name.to_owned(),
            image: "x".to_owned(),
            image_id: String::new(),
            chain: Vec::new(),
            layers: Vec::new(),
            created: id.to_owned(),
            command: Vec::new(),
            terminal: false,
            stdin: false,
            stdin_once: false,
            remove: false,
            stop_signal: "SIGTERM".to_owned(),
            network: "none".to_owned(),
            ports: Vec::new(),
            spec: serde_json::Value::Null,
        }
    }

    #[test]
    fn containers_are_found_by_name_and_by_the_beginning_of_their_id() {
        let dir = tempfile::tempdir().unwrap();
        let all = Containers::new(dir.path());
        all.create(record("aa11", "one")).unwrap();
        all.create(record("aa22", "two")).unwrap();
        assert!(
            all.create(record("bb", "two"))
                .unwrap_err()
                .to_string()
                .contains("in use")
        );
        assert_eq!(all.find("two").unwrap().record.id, "aa22");
        assert_eq!(all.find("aa1").unwrap().record.id, "aa11");
        assert!(all.find("aa").unwrap_err().to_string().contains("several"));
        for word in ["", "three", "aa3"] {
            assert!(
                all.find(word)
                    .unwrap_err()
                    .to_string()
                    .contains("no such container")
            );
        }
        let ids = |all: &Containers| -> Vec<String> {
            all.all()
                .unwrap()
                .into_iter()
                .map(|c| c.record.id)
                .collect()
        };
        assert_eq!(ids(&all), ["aa22", "aa11"]);
        all.find("one").unwrap().remove().unwrap();
        assert_eq!(ids(&all), ["aa22"]);
        // What a power cut leaves of one that was being made.
        fs::create_dir(dir.path().join("cc")).unwrap();
        assert_eq!(ids(&all), ["aa22"]);
    }

    #[test]
    fn a_container_runs_as_long_as_its_monitor() {
        let dir = tempfile::tempdir().unwrap();
        let all = Containers::new(dir.path());
        let container = all.create(record("aa", "one")).unwrap();
        assert_eq!(container.status().unwrap().state, State::Created);
        container.wait_for_monitor().unwrap();
        // Whoever looks leaves nothing there: the container may be going.
        assert!(!container.dir.join("lock").exists());
        assert!(!container.has_held_files());
        let files = [container.hold_files(), container.hold_files()].map(Result::unwrap);
        assert!(container.has_held_files());
        drop(files);
        assert!(!container.has_held_files());
        let lock = container.try_lock().unwrap().unwrap();
        assert!(container.try_lock().unwrap().is_none());
        assert!(container.has_monitor());
        let running = Status {
            state: State::Running,
            ..Status::default()
        };
        container.set_status(&running).unwrap();
        assert_eq!(container.status().unwrap(), running);
        drop(lock);
        let status = container.status().unwrap();
        assert_eq!((status.state, status.exit_code), (State::Exited, Some(255)));
    }
}
