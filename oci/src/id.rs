//! A container's id, fit to be a directory's name here and in the shim.

use std::{fmt, str::FromStr};

/// The longest that the shim takes, in bytes.
const MOST: usize = 200;

/// A word that is no id, in crun's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadId {
    /// Nothing.
    #[error("empty container ID")]
    Empty,
    /// A hidden file's name, or a way up.
    #[error("invalid container ID `{0}`: it starts with a dot or a dash")]
    Start(String),
    /// Neither a letter nor a digit, nor one of three others.
    #[error("invalid character `{0}` in the ID `{1}`: letters, digits, `_`, `.` and `-`")]
    Character(char, String),
    /// Too long.
    #[error("invalid container ID: it has more than {MOST} characters")]
    Long,
}

/// One that has been checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(String);

impl Id {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Id {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if text.is_empty() {
            return Err(BadId::Empty);
        }
        if text.len() > MOST {
            return Err(BadId::Long);
        }
        if text.starts_with(['.', '-']) {
            return Err(BadId::Start(text.to_owned()));
        }
        match text.chars().find(|c| !is_good(*c)) {
            Some(bad) => Err(BadId::Character(bad, text.to_owned())),
            None => Ok(Self(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_id_is_told() {
        assert_eq!("".parse::<Id>(), Err(BadId::Empty));
        assert_eq!("..".parse::<Id>(), Err(BadId::Start("..".into())));
        assert_eq!("-a".parse::<Id>(), Err(BadId::Start("-a".into())));
        assert_eq!(
            "a/b".parse::<Id>(),
            Err(BadId::Character('/', "a/b".into()))
        );
        assert_eq!("a".repeat(201).parse::<Id>(), Err(BadId::Long));
        assert_eq!("a_1.B-2".parse::<Id>().unwrap().as_str(), "a_1.B-2");
    }

    proptest! {
        #[test]
        fn an_id_is_one_file_name(text in any::<String>()) {
            if let Ok(id) = text.parse::<Id>() {
                prop_assert_eq!(id.as_str(), &text);
                let parts: Vec<_> = Path::new(&text).components().collect();
                prop_assert_eq!(parts, [Component::Normal(text.as_ref())]);
            }
        }

        #[test]
        fn ids_of_engines_are_ids(text in "[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,199}") {
            prop_assert!(text.parse::<Id>().is_ok());
        }
    }
}
