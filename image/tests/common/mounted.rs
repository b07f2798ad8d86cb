//! Layers as a container has them, beside what umoci makes of them.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use husk_image::{layer::Limits, manifest::Platform, store::Store};

use crate::common::{listing, run, same};

/// An image of a store, unpacked here and by umoci: the trees must be the same. This is umoci's.
pub fn as_umoci_has_it(dir: &Path, store: &str, name: &str) -> BTreeMap<PathBuf, String> {
    let root = dir.join(store);
    let mut umoci = Command::new("umoci");
    umoci
        .args(["unpack", "--image"])
        .arg(format!("{}:{name}", root.display()));
    run(umoci.arg(dir.join("umoci")));
    let store = Store::open(&root).unwrap();
    let image = store.image(name, &Platform::here()).unwrap().unwrap();
    let layers = store.unpack(&image.layers, Limits::default()).unwrap();
    let mounted = Mounted::new(&layers, dir.join("merged"), "ro");
    let theirs = listing(&dir.join("umoci/rootfs"));
    same(&listing(mounted.path()), &theirs);
    theirs
}

/// An image's layers, the topmost first, mounted upon each other. Dropped, they are unmounted.
pub struct Mounted(PathBuf);

impl Mounted {
    /// With these options besides.
    pub fn new(layers: &[PathBuf], at: PathBuf, options: &str) -> Self {
        fs::create_dir(&at).unwrap();
        let lower: Vec<_> = layers
            .iter()
            .map(|layer| layer.display().to_string())
            .collect();
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o"]);
        run(mount
            .arg(format!("{options},lowerdir={}", lower.join(":")))
            .arg(&at));
        Self(at)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}
