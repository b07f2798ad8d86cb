//! Other settings of the node for one test, which has to run alone.

use std::{fs, io, path::PathBuf};

use anyhow::Result;

/// The node's settings, for as long as this lives.
pub struct Settings {
    path: PathBuf,
    before: Option<Vec<u8>>,
}

impl Settings {
    /// Replaces them by `text`.
    pub fn set(text: &str) -> Result<Self> {
        let path = PathBuf::from("/etc/husk/config.toml");
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let before = match fs::read(&path) {
            Ok(before) => Some(before),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        fs::write(&path, text)?;
        Ok(Self { path, before })
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // A test that follows with the wrong settings says so.
        let _ = match &self.before {
            Some(before) => fs::write(&self.path, before),
            None => fs::remove_file(&self.path),
        };
    }
}
