//! The host's processes, as /proc has them.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// One that runs, or has just ended: then it has nothing to say.
pub(super) struct Process {
    dir: PathBuf,
}

/// Those of a name.
pub(super) fn processes(root: &Path, name: &str) -> impl Iterator<Item = Process> {
    let entries = fs::read_dir(root.join("proc"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .map(|entry| Process { dir: entry.path() })
        .filter(move |process| {
            let own = fs::read_to_string(process.dir.join("comm"));
            own.is_ok_and(|own| own.trim_end() == name)
        })
}

impl Process {
    /// A variable of its environment.
    pub(super) fn variable(&self, name: &str) -> Option<OsString> {
        let text = fs::read(self.dir.join("environ")).ok()?;
        text.split(|byte| *byte == 0).find_map(|line| {
            let value = line.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            Some(OsString::from_vec(value.to_owned()))
        })
    }

    /// The value of a flag: its own argument, or after a "=".
    pub(super) fn flag(&self, flag: &str) -> Option<String> {
        let text = fs::read(self.dir.join("cmdline")).ok()?;
        let text = String::from_utf8_lossy(&text);
        let mut arguments = text.split('\0');
        while let Some(argument) = arguments.next() {
            match argument.strip_prefix(flag) {
                Some("") => return arguments.next().map(str::to_owned),
                Some(rest) if rest.starts_with('=') => {
                    return rest.get(1..).map(str::to_owned);
                }
                _ => {}
            }
        }
        None
    }

    /// Whether it is a child of this one.
    pub(super) fn is_parent_of(&self, other: &Self) -> bool {
        let status = fs::read_to_string(other.dir.join("status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        let own = self.dir.file_name().and_then(|name| name.to_str());
        parent.is_some() && parent.map(str::trim) == own
    }
}
