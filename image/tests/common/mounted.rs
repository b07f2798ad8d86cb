//! Layers as a container has them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::run;

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
