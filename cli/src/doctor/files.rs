//! Configuration files of the host's engines: read whole, if they are no larger than one may be, and parsed.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use toml::Table;

use super::below;

/// The most bytes of a file.
const MOST: u64 = 1 << 20;
/// The most files of a directory.
const FILES: usize = 100;

/// The text of a file, if it is there. The error is a sentence that names it.
pub(super) fn text(root: &Path, path: &Path) -> Result<Option<String>, String> {
    let file = match File::open(below(root, path)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    let mut text = String::new();
    match file.take(MOST + 1).read_to_string(&mut text) {
        Ok(count) if count as u64 <= MOST => Ok(Some(text)),
        Ok(_) => Err(format!("{} has more than {MOST} bytes", path.display())),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

/// A file of TOML, if it is there.
pub(super) fn table(root: &Path, path: &Path) -> Result<Option<Table>, String> {
    let Some(text) = text(root, path)? else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|error: toml::de::Error| {
        let line = error.span().map(|span| {
            let before = text.get(..span.start).unwrap_or_default();
            format!(", line {}", before.matches('\n').count() + 1)
        });
        let line = line.unwrap_or_default();
        format!("{}{line} is no TOML: {}", path.display(), error.message())
    })
}

/// What an import means: a file, or those of a directory that have such names.
pub(super) fn matching(root: &Path, pattern: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (
        pattern.parent(),
        pattern.file_name().and_then(OsStr::to_str),
    ) else {
        return Vec::new();
    };
    if !name.contains(['*', '?']) {
        return vec![pattern.to_owned()];
    }
    let entries = fs::read_dir(below(root, dir))
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|file| fits(name, file))
        })
        .map(|entry| dir.join(entry.file_name()))
        .collect();
    found.sort();
    found.truncate(FILES);
    found
}

/// Is it such a name? "*" is any part, "?" any letter.
fn fits(pattern: &str, name: &str) -> bool {
    let mut pattern_rest = pattern.chars();
    match pattern_rest.next() {
        None => name.is_empty(),
        Some('*') => name
            .char_indices()
            .map(|(at, _)| at)
            .chain([name.len()])
            .any(|at| fits(pattern_rest.as_str(), name.get(at..).unwrap_or_default())),
        Some(letter) => {
            let mut rest = name.chars();
            let fits_first = rest
                .next()
                .is_some_and(|own| letter == '?' || own == letter);
            fits_first && fits(pattern_rest.as_str(), rest.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_a_shells() {
        for (pattern, name) in [
            ("*.toml", "a.toml"),
            ("*", "x"),
            ("a?c*", "abcd"),
            ("*a*b*", "xaybz"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("*.toml", "a.conf"), ("?", ""), ("a*b", "ac")] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }
}
