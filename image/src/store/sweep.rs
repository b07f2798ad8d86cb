//! What nothing leads to any more.
//!
//! From the names in index.json one gets to every manifest, configuration and layer that is wanted; the rest goes. A pull has blobs that no
//! name leads to yet, so it holds the store [`Use`]d, as does whoever unpacks; a sweep waits for nobody and takes place when there is none.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{BLOBS, INGEST, LAYERS, Store, StoreError, failed, layers::chain};
use crate::{
    layer::Sha256Digest,
    manifest::{Document, Named},
    tree,
};

/// What is held by whoever adds to the store.
const USE: &str = "ingest";

/// Keeps sweeps away until it is dropped, or its process ends.
#[derive(Debug)]
pub struct Use {
    _lock: File,
}

/// What a sweep has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Blobs that went, unfinished ones too.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Unpacked layers that went.
    pub layers: u64,
}

impl Store {
    /// Says that the store is being added to, until what this gives is dropped. Waits for a sweep. Blocks.
    ///
    /// # Errors
    /// When the store cannot be locked.
    pub fn begin(&self) -> Result<Use, StoreError> {
        let path = self.root.join(USE);
        let lock = || {
            let dir = File::open(&path)?;
            flock(&dir, FlockOperation::LockShared)?;
            Ok(Use { _lock: dir })
        };
        lock().map_err(failed("lock", &path))
    }

    /// Removes what no name leads to, but the layers that `kept` names by chainID: those of containers. It is asked when nobody can be
    /// adding to the store any more. `None`: somebody is, and nothing was removed. Blocks.
    ///
    /// # Errors
    /// When something that a name leads to cannot be understood, or `kept` fails: then nothing is removed. Or the file system refuses.
    pub fn sweep<E: From<StoreError>>(
        &self,
        kept: impl FnOnce() -> Result<BTreeSet<Sha256Digest>, E>,
    ) -> Result<Option<Swept>, E> {
        let path = self.root.join(USE);
        let dir = File::open(&path).map_err(failed("lock", &path))?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.map_err(|e| failed("lock", &path)(e.into()))?,
        }
        let kept = &kept()?;
        let wanted = self.wanted()?;
        let hex = |ids: &BTreeSet<Sha256Digest>| -> BTreeSet<String> {
            ids.iter().map(Sha256Digest::hex).collect()
        };
        let mut swept = Swept::default();
        for (place, wanted) in [(BLOBS, hex(&wanted.blobs)), (INGEST, BTreeSet::new())] {
            self.each(place, |path, name| {
                if wanted.contains(name) {
                    return Ok(());
                }
                swept.bytes += fs::symlink_metadata(path)?.len();
                swept.blobs += 1;
                fs::remove_file(path)
            })?;
        }
        let layers = hex(&wanted.layers.union(kept).copied().collect());
        self.each(LAYERS, |path, name| {
            if layers.contains(name) {
                return Ok(());
            }
            swept.layers += 1;
            // Half of one must not have a whole one's name.
            let going = path.with_extension("new");
            if going != path {
                fs::rename(path, &going)?;
            }
            tree::remove_path(&going)
        })?;
        Ok(Some(swept))
    }

    fn each(
        &self,
        place: &str,
        mut act: impl FnMut(&Path, &str) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let dir = self.root.join(place);
        let names = || {
            fs::read_dir(&dir)?
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()
        };
        for name in names().map_err(failed("list", &dir))? {
            let path = dir.join(&name);
            act(&path, &name.to_string_lossy()).map_err(failed("remove", &path))?;
        }
        Ok(())
    }

    /// All that the names lead to.
    fn wanted(&self) -> Result<Wanted, StoreError> {
        let mut wanted = Wanted::default();
        for descriptor in self.index()?.manifests() {
            let named = Named::of(descriptor)?;
            self.add_wanted(&mut wanted, &named)?;
        }
        Ok(wanted)
    }

    /// The blobs that one image, or those of an index, is made of.
    pub(super) fn led_to(&self, named: &Named) -> Result<BTreeSet<Sha256Digest>, StoreError> {
        let mut wanted = Wanted::default();
        self.add_wanted(&mut wanted, named)?;
        Ok(wanted.blobs)
    }

    fn add_wanted(&self, wanted: &mut Wanted, named: &Named) -> Result<(), StoreError> {
        if !wanted.blobs.insert(named.digest) {
            return Ok(());
        }
        match self.document(named)? {
            Document::Manifest(manifest) => {
                for part in manifest.layers.iter().chain([&manifest.config]) {
                    wanted.blobs.insert(part.digest);
                }
                // An image that was not pulled to its end has none yet.
                if self.blob(&manifest.config.digest)?.is_some() {
                    let config = self.config(&manifest)?;
                    let ids = config.rootfs().diff_ids().iter();
                    // What is no digest is no layer of the store.
                    let ids: Vec<Sha256Digest> = ids.map_while(|id| id.parse().ok()).collect();
                    wanted.layers.extend(chain(&ids));
                }
            }
            Document::Index(index) => {
                for descriptor in index.manifests() {
                    let named = Named::of(descriptor)?;
                    // Of the platforms only those that somebody wanted.
                    if self.blob(&named.digest)?.is_some() {
                        self.add_wanted(wanted, &named)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What stays: blobs by digest, layers by chainID.
#[derive(Debug, Default)]
struct Wanted {
    blobs: BTreeSet<Sha256Digest>,
    layers: BTreeSet<Sha256Digest>,
}
