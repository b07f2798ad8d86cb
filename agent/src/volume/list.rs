//! A request to change a volume, checked.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use husk_protocol::agent::{SyncVolumeRequest, VolumeEntry, volume_entry::Content};
use husk_protocol::volume::{MAX_BYTES, MAX_DEPTH, MAX_ENTRIES, TEMPORARY};

use crate::error::AgentError;

/// Longest file name (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// Longest path and link text (`PATH_MAX`, which counts the NUL).
const PATH_MAX: usize = 4095;

/// A path inside a volume: names that lead down, and none else. The empty one is the volume itself. They sort a directory before
/// what is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryPath(Vec<u8>);

impl EntryPath {
    /// `None` for a path that could lead anywhere else, or that no volume needs.
    pub(super) fn parse(path: Vec<u8>) -> Option<Self> {
        let names = || path.split(|&byte| byte == b'/');
        let fits = path.len() <= PATH_MAX && names().count() <= MAX_DEPTH && names().all(is_name);
        (path.is_empty() || fits).then_some(Self(path))
    }

    /// The directory that holds it, and its name there. The volume itself has neither.
    pub(super) fn split(&self) -> Option<(&OsStr, &OsStr)> {
        if self.0.is_empty() {
            return None;
        }
        let (parent, name) = match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(at) => (self.0.get(..at)?, self.0.get(at + 1..)?),
            None => (&[][..], &*self.0),
        };
        Some((OsStr::from_bytes(parent), OsStr::from_bytes(name)))
    }

    fn parent(&self) -> Option<Self> {
        self.split()
            .map(|(parent, _)| Self(parent.as_bytes().to_owned()))
    }

    /// The path of something in this directory, whatever its name.
    pub(super) fn join(&self, name: &OsStr) -> Self {
        let mut path = self.0.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        Self(path)
    }
}

impl std::fmt::Display for EntryPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", OsStr::from_bytes(&self.0))
    }
}

/// Whether this names something in its directory that a host may ask for.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name != TEMPORARY.as_bytes()
        && name.len() <= NAME_MAX
        && !name.contains(&0)
        && !name.contains(&b'/')
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Directory(Attributes),
    File(Attributes, Vec<u8>),
    Link(Vec<u8>),
}

/// Who may do what with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// What a volume is to become: every entry's directory is an entry, too. Without entries it goes.
#[derive(Debug)]
pub struct Plan {
    pub(super) id: String,
    pub(super) entries: BTreeMap<EntryPath, Kind>,
    /// It is one of huge pages: its own directory is the only entry.
    pub(super) has_huge_pages: bool,
}

impl Plan {
    /// Checks a request; changes nothing.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming what cannot be used.
    pub fn new(request: SyncVolumeRequest) -> Result<Self, AgentError> {
        let id = request.volume_id;
        let invalid = |what: String| AgentError::Invalid(format!("volume {id:?}: {what}"));
        if !is_name(id.as_bytes()) {
            return Err(invalid("the id cannot be used as a directory name".into()));
        }
        if request.entries.len() > MAX_ENTRIES {
            return Err(invalid(format!("it has more than {MAX_ENTRIES} entries")));
        }
        let mut entries = BTreeMap::new();
        let mut bytes = 0;
        for entry in request.entries {
            bytes += entry.path.len() + content_len(&entry);
            let (path, kind) = check(entry).map_err(&invalid)?;
            let is_placed = match path.parent() {
                Some(parent) => matches!(entries.get(&parent), Some(Kind::Directory(_))),
                None => matches!(kind, Kind::Directory(_)),
            };
            if !is_placed {
                return Err(invalid(format!("no directory holds entry {path}")));
            }
            let text = path.to_string();
            if entries.insert(path, kind).is_some() {
                return Err(invalid(format!("entry {text} comes twice")));
            }
        }
        if bytes > MAX_BYTES {
            return Err(invalid(format!("it has more than {MAX_BYTES} bytes")));
        }
        if request.huge_pages && entries.len() != 1 {
            return Err(invalid(
                "one of huge pages has its root and nothing else".into(),
            ));
        }
        Ok(Self {
            id,
            entries,
            has_huge_pages: request.huge_pages,
        })
    }
}

fn content_len(entry: &VolumeEntry) -> usize {
    match &entry.content {
        Some(Content::File(bytes) | Content::Link(bytes)) => bytes.len(),
        _ => 0,
    }
}

fn check(entry: VolumeEntry) -> Result<(EntryPath, Kind), String> {
    let shown = OsStr::from_bytes(&entry.path).to_owned();
    let path = EntryPath::parse(entry.path)
        .ok_or_else(|| format!("{shown:?} is no path inside a volume"))?;
    let attributes = Attributes {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
    };
    // chown(2) takes the highest id for none.
    if entry.mode > 0o7777 || entry.uid == u32::MAX || entry.gid == u32::MAX {
        return Err(format!(
            "entry {path} has no possible mode and owner: {attributes:?}"
        ));
    }
    let kind = match entry.content {
        Some(Content::File(bytes)) => Kind::File(attributes, bytes),
        Some(Content::Link(text))
            if text.is_empty() || text.len() > PATH_MAX || text.contains(&0) =>
        {
            return Err(format!("entry {path} is a link of an impossible text"));
        }
        Some(Content::Link(text)) => Kind::Link(text),
        _ => Kind::Directory(attributes),
    };
    Ok((path, kind))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A request for a volume of these entries: no content is a directory, `@text` a link.
    pub(in crate::volume) fn request(entries: &[(&str, Option<&str>)]) -> SyncVolumeRequest {
        let entry = |&(path, content): &(&str, Option<&str>)| VolumeEntry {
            path: path.into(),
            mode: if content.is_some() { 0o640 } else { 0o755 },
            content: content.map(|content| match content.strip_prefix('@') {
                Some(text) => Content::Link(text.into()),
                None => Content::File(content.into()),
            }),
            ..Default::default()
        };
        SyncVolumeRequest {
            volume_id: "v".into(),
            entries: entries.iter().map(entry).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_volume_of_huge_pages_has_a_root_and_nothing_else() {
        let huge = |entries| {
            let mut request = request(entries);
            request.huge_pages = true;
            Plan::new(request)
        };
        assert!(huge(&[("", None)]).unwrap().has_huge_pages);
        assert!(huge(&[]).is_err());
        assert!(huge(&[("", None), ("a", None)]).is_err());
    }

    #[test]
    fn a_kubelets_volume_is_taken() {
        let plan = Plan::new(request(&[
            ("", None),
            ("..2024_05_01_10_00_00.123", None),
            ("..2024_05_01_10_00_00.123/key", Some("value")),
            ("..data", Some("@..2024_05_01_10_00_00.123")),
            ("key", Some("@..data/key")),
        ]))
        .unwrap();
        assert_eq!(plan.entries.len(), 5);
        assert!(Plan::new(request(&[])).unwrap().entries.is_empty());
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let root = ("", None);
        let long = "x".repeat(NAME_MAX + 1);
        let deep = vec!["d"; MAX_DEPTH + 1].join("/");
        for entries in [
            &[("", Some("file"))][..],
            &[("d", None)],
            &[root, ("a/b", Some("x"))],
            &[root, ("a", Some("x")), ("a/b", Some("x"))],
            &[root, ("a", Some("@b")), ("a/b", Some("x"))],
            &[root, ("a", Some("x")), ("a", Some("y"))],
            &[root, root],
            &[root, ("l", Some("@"))],
            &[root, ("l", Some("@a\0"))],
            &[root, (&long, None)],
            &[root, (&deep, None)],
            &[root, (TEMPORARY, None)],
            &[root, ("..", None)],
            &[root, ("/etc", None)],
        ] {
            let error = Plan::new(request(entries)).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{entries:?}");
        }
        let changed = |change: fn(&mut SyncVolumeRequest)| {
            let mut request = request(&[root, ("f", Some("x"))]);
            change(&mut request);
            Plan::new(request)
        };
        assert!(changed(|_| ()).is_ok());
        for id in ["", ".", "..", "a/b", "a\0"] {
            let mut request = request(&[root]);
            request.volume_id = id.into();
            assert!(Plan::new(request).is_err(), "{id:?}");
        }
        assert!(changed(|r| r.entries[1].mode = 0o10000).is_err());
        assert!(changed(|r| r.entries[1].uid = u32::MAX).is_err());
        assert!(
            changed(|r| r.entries[1].content = Some(Content::File(vec![0; MAX_BYTES + 1])))
                .is_err()
        );
        assert!(
            changed(|r| {
                let entry = |n: usize| VolumeEntry {
                    path: n.to_string().into(),
                    ..Default::default()
                };
                r.entries.extend((0..MAX_ENTRIES).map(entry));
            })
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn a_path_that_is_taken_leads_down(path in "[./a\\x00]{0,8}|(\\.\\.?/|a/){0,20}\\.{0,4}") {
            let Some(parsed) = EntryPath::parse(path.clone().into_bytes()) else {
                return Ok(());
            };
            let path = std::path::Path::new(&path);
            let normal = path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
            prop_assert!(normal && path.components().count() <= MAX_DEPTH);
            // And it is spelt in one way only.
            let again: std::path::PathBuf = path.components().collect();
            prop_assert_eq!(again.as_os_str(), path.as_os_str());
            if let Some((parent, name)) = parsed.split() {
                prop_assert_eq!(std::path::Path::new(parent).join(name), path);
                let parent = EntryPath::parse(parent.as_bytes().to_owned()).unwrap();
                prop_assert_eq!(parent.join(name), parsed);
            }
        }
    }
}
