//! Where an entry goes.

use std::ffi::CString;

/// Bytes of a name (Linux, NAME_MAX).
const NAME_MAX: usize = 255;
/// Bytes of a path with its NUL (Linux, PATH_MAX).
const PATH_MAX: usize = 4096;
/// Directories in each other.
const DEPTH_MAX: usize = 255;

/// A name that has been checked: it goes down from the root, in components that are names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// The root itself.
    Root,
    /// Something below it.
    Below {
        /// The path of its directory without leading or trailing slash; empty: the root.
        parent: Vec<u8>,
        /// Its name there.
        name: CString,
    },
}

impl Place {
    /// Checks a name. Empty components and "." count for nothing, as in any path.
    ///
    /// # Errors
    /// Why it is none.
    pub(super) fn new(name: &[u8]) -> Result<Self, &'static str> {
        if name.starts_with(b"/") {
            return Err("an absolute path");
        }
        let components: Vec<&[u8]> = name
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .collect();
        if components.iter().any(|part| *part == b"..") {
            return Err("a path with \"..\" in it");
        }
        if components.iter().any(|part| part.len() > NAME_MAX) {
            return Err("a name of more than 255 bytes");
        }
        let Some((last, parents)) = components.split_last() else {
            return Ok(Self::Root);
        };
        if parents.len() >= DEPTH_MAX {
            return Err("more than 255 directories in each other");
        }
        let parent = parents.join(&b'/');
        if parent.len() + last.len() + 2 > PATH_MAX {
            return Err("a path of more than 4095 bytes");
        }
        if parent.contains(&0) {
            return Err("a path with a NUL in it");
        }
        let name = CString::new(*last).map_err(|_| "a name with a NUL in it")?;
        Ok(Self::Below { parent, name })
    }

    /// Its name, where it is one alone.
    pub(super) fn into_name(self) -> Option<CString> {
        match self {
            Self::Below { parent, name } if parent.is_empty() => Some(name),
            Self::Root | Self::Below { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn below(parent: &str, name: &str) -> Result<Place, &'static str> {
        Ok(Place::Below {
            parent: parent.into(),
            name: CString::new(name).unwrap(),
        })
    }

    #[test]
    fn names_become_places() {
        for name in ["", ".", "./", ".//."] {
            assert_eq!(Place::new(name.as_bytes()), Ok(Place::Root), "{name:?}");
        }
        for name in ["usr/bin/sh", "./usr//bin/./sh", "usr/bin/sh/"] {
            assert_eq!(
                Place::new(name.as_bytes()),
                below("usr/bin", "sh"),
                "{name:?}"
            );
        }
        assert_eq!(Place::new(b"..."), below("", "..."));
    }

    #[test]
    fn what_leads_out_is_none() {
        for name in [
            "/etc/passwd",
            "//",
            "..",
            "a/../b",
            "a/..",
            "../x",
            "./../x",
        ] {
            assert!(Place::new(name.as_bytes()).is_err(), "{name:?}");
        }
        assert!(Place::new(b"a\0b").is_err());
        assert!(Place::new(b"a\0b/c").is_err());
        assert!(Place::new(&[b'x'; 256]).is_err());
        assert!(Place::new(&b"x/".repeat(256)).is_err());
        assert!(Place::new(&[&[b'y'; 200][..], b"/"].concat().repeat(21)).is_err());
    }

    proptest! {
        #[test]
        fn a_place_has_neither_dots_nor_slashes(name in proptest::collection::vec(prop_oneof![
            Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>(),
        ], 0..40)) {
            if let Ok(Place::Below { parent, name }) = Place::new(&name) {
                let parts: Vec<&[u8]> = parent.split(|byte| *byte == b'/').collect();
                let parents = parts.iter().filter(|_| !parent.is_empty()).copied();
                for part in parents.chain([name.as_bytes()]) {
                    prop_assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&b'/'));
                }
            }
        }
    }
}
