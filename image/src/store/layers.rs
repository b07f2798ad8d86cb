//! Layers, unpacked once, by chainID.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, fchmod};

use super::{LAYERS, Store, StoreError, failed, lock_at, sync_dir};
use crate::{
    apply::{Expected, apply},
    layer::{Limits, Sha256Digest},
    tree,
    unpack::{Options, Owners},
};

/// Layers that are written out to the disk together: that waits for all that is not there yet, whoever wrote it.
const AT_ONCE: usize = 16;

/// A layer, unpacked whole, that has not got its name yet: nobody else makes it as long as this is there.
struct Made {
    lock: OwnedFd,
    /// Where it is.
    new: PathBuf,
    /// Where it will be.
    path: PathBuf,
}

/// Where blobs are read from that become layers.
pub trait Blobs {
    /// Opens one.
    ///
    /// # Errors
    /// When it cannot be had.
    fn open(&self, digest: &Sha256Digest) -> Result<Box<dyn Read>, StoreError>;

    /// Was what has been read of it something else, so that it is to be read anew?
    fn was_void(&self, _digest: &Sha256Digest) -> bool {
        false
    }

    /// The layer is there.
    fn unpacked(&self, _digest: &Sha256Digest) {}
}

/// The store's own.
impl Blobs for Store {
    fn open(&self, digest: &Sha256Digest) -> Result<Box<dyn Read>, StoreError> {
        let blob = self.blob(digest)?;
        Ok(Box::new(blob.ok_or(StoreError::NoBlob(*digest))?))
    }
}

impl Store {
    /// The directories of an image's layers, the topmost first, as overlayfs wants its lower ones. Those that are missing are unpacked from
    /// their blobs. The caller holds the store ([`Store::begin`]) until the next [`Store::sweep`] is told of their user. Blocks.
    ///
    /// # Errors
    /// When a blob is not in the store, is refused, or the file system refuses.
    pub fn unpack(&self, layers: &[Expected], limits: Limits) -> Result<Vec<PathBuf>, StoreError> {
        self.unpack_from(layers, limits, self)
    }

    /// The same with blobs that are on their way into the store.
    ///
    /// # Errors
    /// When a blob cannot be had, is refused, or the file system refuses.
    pub fn unpack_from(
        &self,
        layers: &[Expected],
        limits: Limits,
        blobs: &dyn Blobs,
    ) -> Result<Vec<PathBuf>, StoreError> {
        let mut made = Vec::new();
        let paths = self.unpack_all(layers, limits, blobs, &mut made);
        // What is whole stays, also where the next could not be had.
        let kept = self.keep_layers(&mut made);
        let paths = paths?;
        kept.map(|()| paths)
    }

    fn unpack_all(
        &self,
        layers: &[Expected],
        limits: Limits,
        blobs: &dyn Blobs,
        made: &mut Vec<Made>,
    ) -> Result<Vec<PathBuf>, StoreError> {
        let mut paths: Vec<PathBuf> = Vec::new();
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
        for (layer, id) in layers.iter().zip(chain(&diff_ids)) {
            let path = self.root.join(LAYERS).join(id.hex());
            if !path.exists() {
                let there = |path: &PathBuf| made.iter().find(|m| m.path == *path).map(|m| &m.new);
                let lowers: Vec<&Path> = paths
                    .iter()
                    .map(|path| there(path).unwrap_or(path).as_path())
                    .collect();
                made.extend(self.unpack_one(&path, layer, limits, &lowers, blobs)?);
                if made.len() >= AT_ONCE {
                    self.keep_layers(made)?;
                }
            }
            blobs.unpacked(&layer.digest);
            paths.insert(0, path);
        }
        Ok(paths)
    }

    /// Gives layers their final names, once they are on the disk.
    fn keep_layers(&self, made: &mut Vec<Made>) -> Result<(), StoreError> {
        let Some(last) = made.last() else {
            return Ok(());
        };
        // All of the file system, and so all of them.
        rustix::fs::syncfs(&last.lock)
            .map_err(io::Error::from)
            .map_err(failed("write out", &last.new))?;
        for Made { new, path, .. } in &*made {
            fs::rename(new, path).map_err(failed("rename", new))?;
        }
        made.clear();
        let dir = self.root.join(LAYERS);
        sync_dir(&dir).map_err(failed("write out", &dir))
    }

    /// Unpacks a layer under its unfinished name. `None`: another has finished it meanwhile.
    fn unpack_one(
        &self,
        path: &Path,
        layer: &Expected,
        limits: Limits,
        lowers: &[&Path],
        blobs: &dyn Blobs,
    ) -> Result<Option<Made>, StoreError> {
        let new = path.with_extension("new");
        let made = || match fs::create_dir(&new) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => File::open(&new).or_else(|error| {
                // An image may close its root to its owner, who is not always root.
                match error.kind() {
                    io::ErrorKind::PermissionDenied => {
                        fs::set_permissions(&new, Permissions::from_mode(0o700))?;
                        File::open(&new)
                    }
                    _ => Err(error),
                }
            }),
        };
        // Opened, it may be gone: another has finished it.
        let open = || loop {
            match made() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => return opened,
            }
        };
        let lock: OwnedFd = lock_at(&new, open).map_err(failed("make", &new))?.into();
        if path.exists() {
            tree::remove_path(&new).map_err(failed("remove", &new))?;
            return Ok(None);
        }
        let owners = Owners::here();
        let options = Options {
            owners,
            lowers,
            // Who is not root can mount an overlay in a user namespace only.
            user_xattrs: owners == Owners::Caller,
        };
        let applied = loop {
            // Somebody was cut off here.
            let cleared = fchmod(&lock, Mode::RWXU).and_then(|()| tree::remove_in(&lock));
            cleared.map_err(|e| failed("clear", &new)(e.into()))?;
            let blob = match blobs.open(&layer.digest) {
                Ok(blob) => blob,
                Err(error) => {
                    let _ = tree::remove_path(&new);
                    return Err(error);
                }
            };
            match apply(blob, layer, limits, &new, options) {
                Err(_) if blobs.was_void(&layer.digest) => {}
                applied => break applied,
            }
        };
        if let Err(source) = applied {
            // Whoever wants it next finds out for himself.
            let _ = tree::remove_path(&new);
            return Err(StoreError::Apply {
                blob: layer.digest,
                source,
            });
        }
        let path = path.to_owned();
        Ok(Some(Made { lock, new, path }))
    }
}

/// The chainIDs of layers, the lowest first (image-spec, config.md, "Layer ChainID").
pub(super) fn chain(diff_ids: &[Sha256Digest]) -> Vec<Sha256Digest> {
    let mut below: Option<Sha256Digest> = None;
    let upon = |id: &Sha256Digest| {
        let chain = below.map_or(*id, |below| {
            Sha256Digest::of(format!("{below} {id}").as_bytes())
        });
        below = Some(chain);
        chain
    };
    diff_ids.iter().map(upon).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_the_specifications() {
        let (a, b) = (Sha256Digest::of(b"a"), Sha256Digest::of(b"b"));
        let upon = |below, id| Sha256Digest::of(format!("{below} {id}").as_bytes());
        assert_eq!(chain(&[a, b, a]), [a, upon(a, b), upon(upon(a, b), a)]);
    }
}
