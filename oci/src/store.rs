//! The containers, each a directory below the root: its name is the container's id, `state.json` in it what later commands need.
//!
//! The directory is also the bundle that the shim gets, with a `config.json` made for it ([`crate::spec`]) and the files that the shim keeps in
//! a bundle. A directory without a state is a container that is being made, or whose making was killed.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use husk_client::shim::Shim;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{hooks::Hooks, id::Id, process::ProcessId};

const STATE: &str = "state.json";
const LOCK: &str = "lock";

/// All containers of a root.
pub(crate) struct Store {
    root: PathBuf,
    namespace: String,
}

/// One container.
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: Id,
    /// Its directory, the shim's bundle.
    pub(crate) dir: PathBuf,
    namespace: String,
}

/// `state.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The version of its spec.
    pub(crate) oci_version: String,
    /// The engine's bundle.
    pub(crate) bundle: PathBuf,
    /// RFC 3339.
    pub(crate) created: String,
    /// Where its shim serves.
    pub(crate) address: String,
    /// Its proxy.
    pub(crate) proxy: ProcessId,
    /// The spec's.
    pub(crate) annotations: BTreeMap<String, String>,
    /// What is to be run on the host.
    pub(crate) hooks: Hooks,
    /// Whether it has opened the VM of a pod, for others to join.
    #[serde(default)]
    pub(crate) is_infra: bool,
}

#[cfg(test)]
impl Record {
    pub(crate) fn example() -> Self {
        Self {
            oci_version: "1.2.0".into(),
            bundle: "/b".into(),
            created: "now".into(),
            address: "unix:///s".into(),
            proxy: ProcessId::of(std::process::id()).unwrap(),
            annotations: BTreeMap::new(),
            hooks: Hooks::default(),
            is_infra: false,
        }
    }
}

impl Store {
    /// Makes the root where it is missing.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let make = || {
            DirBuilder::new().recursive(true).mode(0o700).create(root)?;
            fs::canonicalize(root)
        };
        let root = make().with_context(|| format!("making {}", root.display()))?;
        // The shim tells containers apart by namespace and id, and another root may have the same id.
        let digest = Sha256::digest(root.as_os_str().as_encoded_bytes());
        let hex = digest.iter().take(6).map(|byte| format!("{byte:02x}"));
        Ok(Self {
            namespace: format!("oci-{}", hex.collect::<String>()),
            root,
        })
    }

    fn at(&self, id: &Id) -> Container {
        Container {
            id: id.clone(),
            dir: self.root.join(id.as_str()),
            namespace: self.namespace.clone(),
        }
    }

    /// Takes the id for a new container.
    pub(crate) fn create(&self, id: &Id) -> Result<Container> {
        let container = self.at(id);
        match DirBuilder::new().mode(0o700).create(&container.dir) {
            Ok(()) => Ok(container),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("container `{id}` already exists")
            }
            Err(error) => Err(error).with_context(|| format!("making {}", container.dir.display())),
        }
    }

    /// One that is there, if only half.
    pub(crate) fn find(&self, id: &Id) -> Result<Container> {
        let container = self.at(id);
        if !container.dir.is_dir() {
            bail!("container `{id}` does not exist: No such file or directory");
        }
        Ok(container)
    }

    /// All that are there whole, by id.
    pub(crate) fn all(&self) -> Result<Vec<(Container, Record)>> {
        let entries = fs::read_dir(&self.root);
        let entries = entries.with_context(|| format!("reading {}", self.root.display()))?;
        let mut all: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<Id>().ok())
            .map(|id| self.at(&id))
            .filter_map(|container| container.record().ok().map(|record| (container, record)))
            .collect();
        all.sort_by(|(one, _), (other, _)| one.id.cmp(&other.id));
        Ok(all)
    }
}

impl Container {
    /// What is known of it.
    pub(crate) fn record(&self) -> Result<Record> {
        let path = self.dir.join(STATE);
        match fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.dir.is_dir() => bail!(
                "container `{}` is being created, or its creation was cut short: `delete --force` removes it",
                self.id
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!(
                    "container `{}` does not exist: No such file or directory",
                    self.id
                )
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Whole or not at all.
    pub(crate) fn set_record(&self, record: &Record) -> Result<()> {
        write_whole(&self.dir.join(STATE), &serde_json::to_vec(record)?)
    }

    /// Until it is dropped no other command changes the container. Waits.
    pub(crate) fn lock(&self) -> Result<Flock<File>> {
        let path = self.dir.join(LOCK);
        let open = || {
            let file = File::options()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&path)?;
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
        };
        let locked: io::Result<_> = open();
        match locked {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!(
                    "container `{}` does not exist: No such file or directory",
                    self.id
                )
            }
            locked => locked.with_context(|| format!("locking {}", path.display())),
        }
    }

    /// Its shim.
    pub(crate) fn shim(&self) -> Shim<'_> {
        Shim {
            namespace: &self.namespace,
            id: self.id.as_str(),
            bundle: &self.dir,
        }
    }

    /// Where the pipes of its first process are.
    pub(crate) fn pipes(&self) -> PathBuf {
        self.dir.join("pipes")
    }

    /// Its id is free again.
    pub(crate) fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", self.dir.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a file by renaming, so that nobody reads a part of it.
pub(crate) fn write_whole(path: &Path, text: &[u8]) -> Result<()> {
    let write = || {
        let mut new = path.to_owned().into_os_string();
        new.push(".new");
        let mut file = File::create(&new)?;
        file.write_all(text)?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        text.parse().unwrap()
    }

    #[test]
    fn an_id_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let container = store.create(&id("a")).unwrap();
        let error = |result: Result<Container>| result.err().unwrap().to_string();
        assert_eq!(
            error(store.create(&id("a"))),
            "container `a` already exists"
        );
        assert_eq!(
            error(store.find(&id("b"))),
            "container `b` does not exist: No such file or directory"
        );
        let half = container.record().unwrap_err().to_string();
        assert!(half.contains("delete --force"), "{half}");
        assert!(store.all().unwrap().is_empty());
        container.set_record(&Record::example()).unwrap();
        assert_eq!(store.all().unwrap().len(), 1);
        assert_eq!(container.record().unwrap().address, "unix:///s");
        container.remove().unwrap();
        container.remove().unwrap();
        assert!(container.lock().is_err() && store.create(&id("a")).is_ok());
    }

    #[test]
    fn roots_do_not_share_the_shims_names() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, other] = dirs
            .each_ref()
            .map(|dir| Store::open(dir.path()).unwrap().namespace);
        assert_ne!(one, other);
        let again = Store::open(&dirs[0].path().join(".")).unwrap();
        assert_eq!(one, again.namespace);
    }
}
