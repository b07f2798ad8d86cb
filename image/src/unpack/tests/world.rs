//! Layers to unpack, and a place to unpack them in.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use tar::{Builder, EntryType, Header};

use crate::{
    archive::Archive,
    unpack::{Options, UnpackError, Unpacked, unpack},
};

/// An archive, put together in a line an entry.
pub(super) struct Layer(pub(super) Builder<Vec<u8>>);

impl Layer {
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    pub(super) fn entry(
        mut self,
        kind: EntryType,
        name: &str,
        change: impl FnOnce(&mut Header),
        data: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        // Names that a well-behaved writer refuses.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000_000);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(super) fn file(self, name: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, name, |_| {}, data.as_bytes())
    }

    pub(super) fn dir(self, name: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, name, |h| h.set_mode(mode), &[])
    }

    pub(super) fn link(self, kind: EntryType, name: &str, target: &str) -> Self {
        let set = |header: &mut Header| {
            let field = &mut header.as_old_mut().linkname;
            field[..target.len()].copy_from_slice(target.as_bytes());
        };
        self.entry(kind, name, set, &[])
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Symlink, name, target)
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Link, name, target)
    }

    pub(super) fn device(self, name: &str, numbers: (u32, u32)) -> Self {
        let set = |header: &mut Header| {
            header.set_device_major(numbers.0).unwrap();
            header.set_device_minor(numbers.1).unwrap();
        };
        self.entry(EntryType::Char, name, set, &[])
    }

    pub(super) fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(&*key, value)]).unwrap();
        self
    }

    pub(super) fn unpack_to(self, dir: &Path, lowers: &[&Path]) -> Result<Unpacked, UnpackError> {
        let bytes = self.0.into_inner().unwrap();
        let options = Options {
            lowers,
            ..Options::default()
        };
        unpack(&mut Archive::new(&*bytes), dir, options)
    }
}

/// A layer's directory, with one beside it that nothing may touch.
pub(super) struct Dirs {
    pub(super) all: tempfile::TempDir,
}

impl Dirs {
    pub(super) fn new() -> Self {
        let all = tempfile::tempdir().unwrap();
        fs::create_dir(all.path().join("root")).unwrap();
        fs::create_dir(all.path().join("outside")).unwrap();
        fs::write(all.path().join("outside/file"), "untouched").unwrap();
        Self { all }
    }

    pub(super) fn outside(&self) -> PathBuf {
        self.all.path().join("outside")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.all.path().join("root").join(name)
    }

    pub(super) fn unpack(&self, layer: Layer) -> Result<Unpacked, UnpackError> {
        let result = layer.unpack_to(&self.path(""), &[]);
        assert_eq!(fs::read_dir(self.outside()).unwrap().count(), 1);
        assert_eq!(
            fs::read_to_string(self.outside().join("file")).unwrap(),
            "untouched"
        );
        result
    }

    pub(super) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(super) fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.path(name)).unwrap().mode() & 0o7777
    }

    pub(super) fn is_whiteout(&self, name: &str) -> bool {
        let file = fs::symlink_metadata(self.path(name)).unwrap();
        file.file_type().is_char_device() && file.rdev() == 0
    }

    pub(super) fn is_opaque(&self, name: &str) -> bool {
        xattr(&self.path(name), "trusted.overlay.opaque").as_deref() == Some(b"y")
    }
}

pub(super) fn unpacked(layer: Layer) -> Dirs {
    let dirs = Dirs::new();
    dirs.unpack(layer).unwrap();
    dirs
}

pub(super) fn refusal(layer: Layer) -> String {
    Dirs::new().unpack(layer).unwrap_err().to_string()
}

pub(super) fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 100];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}
