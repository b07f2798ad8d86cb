//! Which images must be signed, and by whom: `[signatures]` of the settings.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    SignatureError, Wanted,
    key::{KeyError, KeyFile},
};
use crate::name::{HUB, ImageName};

/// What stands for every image.
const ALL: &str = "*";

/// A rule as it is written.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "it is \"accept\", \"reject\", or a list of the files of public keys"
)]
pub(crate) enum Written {
    Word(Word),
    Keys(Vec<PathBuf>),
}

/// What needs no key.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Word {
    Accept,
    Reject,
}

/// What is to be done with an image.
#[derive(Debug, Clone)]
enum Rule {
    Accept,
    Reject,
    /// One of them must have signed it.
    Signed(Vec<KeyFile>),
}

/// All the rules. By default every image is accepted.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    file: PathBuf,
    rules: BTreeMap<String, Rule>,
}

/// Why the rules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The images that it is about.
    #[error(
        "signatures of {0:?}: that names no images; it is \"*\", HOST, HOST/PATH or HOST/PATH/REPOSITORY, in lower case and without a tag"
    )]
    Scope(String),
    /// Nobody could have signed.
    #[error("signatures of {0:?}: the list has no key; \"reject\" is how nothing is accepted")]
    NoKey(String),
    /// A key.
    #[error("signatures of {scope:?}")]
    Key {
        /// Of which images.
        scope: String,
        /// What is wrong.
        #[source]
        source: KeyError,
    },
}

/// The keys that one image must be signed with.
pub(crate) struct Demand<'a> {
    pub(crate) keys: &'a [KeyFile],
    pub(crate) wanted: Wanted,
}

impl Policy {
    /// Reads the keys of the rules that this file has.
    ///
    /// # Errors
    /// When a rule is about nothing, or has a key that cannot be used.
    pub(crate) fn new(
        file: &Path,
        written: BTreeMap<String, Written>,
    ) -> Result<Self, PolicyError> {
        let mut rules = BTreeMap::new();
        for (scope, written) in written {
            if !is_scope(&scope) {
                return Err(PolicyError::Scope(scope));
            }
            let rule = match written {
                Written::Word(Word::Accept) => Rule::Accept,
                Written::Word(Word::Reject) => Rule::Reject,
                Written::Keys(paths) if paths.is_empty() => return Err(PolicyError::NoKey(scope)),
                Written::Keys(paths) => {
                    let keys = paths.iter().map(|path| KeyFile::read(path));
                    match keys.collect() {
                        Ok(keys) => Rule::Signed(keys),
                        Err(source) => return Err(PolicyError::Key { scope, source }),
                    }
                }
            };
            rules.insert(scope, rule);
        }
        let file = file.to_owned();
        Ok(Self { file, rules })
    }

    /// What the image needs: `None`, nothing. The rule with the longest name that the image is below counts.
    ///
    /// # Errors
    /// When nothing helps.
    pub(crate) fn of(&self, name: &ImageName) -> Result<Option<Demand<'_>>, SignatureError> {
        // A host's name is the same however it is written.
        let place = format!("{}/{}", name.registry(), name.repository()).to_ascii_lowercase();
        let below = |scope: &str| {
            let rest = place.strip_prefix(scope);
            scope == ALL || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        // "*" is shorter than every host.
        let found = self.rules.iter().filter(|(scope, _)| below(scope));
        match found.max_by_key(|(scope, _)| scope.len()) {
            None | Some((_, Rule::Accept)) => Ok(None),
            Some((scope, Rule::Reject)) => Err(SignatureError::Rejected {
                name: name.to_string(),
                scope: scope.clone(),
                file: self.file.clone(),
            }),
            Some((_, Rule::Signed(keys))) => {
                let paths = keys.iter().map(|key| key.path().to_owned());
                let wanted = Wanted {
                    file: self.file.clone(),
                    keys: paths.collect(),
                };
                Ok(Some(Demand { keys, wanted }))
            }
        }
    }
}

/// The beginning of an image's whole name, up to a slash.
fn is_scope(text: &str) -> bool {
    let below = format!("{text}/x");
    let is_whole = |name: ImageName| {
        let whole = format!("{}/{}", name.registry(), name.repository());
        whole == below && whole == whole.to_ascii_lowercase()
    };
    text == ALL || text == HUB || below.parse().is_ok_and(is_whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[(&str, &str)]) -> Result<Policy, PolicyError> {
        let text: String = rules
            .iter()
            .map(|(scope, rule)| format!("{scope:?} = {rule}\n"))
            .collect();
        Policy::new(Path::new("/etc/x.toml"), toml::from_str(&text).unwrap())
    }

    #[test]
    fn the_longest_name_counts() {
        let policy = policy(&[
            ("*", "\"reject\""),
            ("docker.io", "\"accept\""),
            ("docker.io/someone", "\"reject\""),
            ("docker.io/someone/app", "\"accept\""),
            ("localhost:5000/team", "\"accept\""),
        ])
        .unwrap();
        for (image, is_accepted) in [
            ("busybox", true),
            ("someone/app:1", true),
            ("someone/app/part", true),
            ("someone/apple", false),
            ("someone/other", false),
            ("someoneelse/app", true),
            ("docker.io.example/app", false),
            ("localhost:5000/team/app", true),
            ("LOCALHOST:5000/team/app", true),
            ("Docker.io/someone/apple", false),
            ("localhost:5000/app", false),
            ("quay.io/app", false),
        ] {
            let found = policy.of(&image.parse().unwrap());
            assert_eq!(found.is_ok(), is_accepted, "{image}");
            if let Err(error) = found {
                assert!(error.to_string().contains("/etc/x.toml"), "{error}");
            }
        }
        assert!(Policy::default().of(&"x".parse().unwrap()).is_ok());
    }

    #[test]
    fn a_rule_about_nothing_is_refused() {
        for scope in [
            "",
            "team/app",
            "quay.io/",
            "quay.io/app:1",
            "https://quay.io",
            "quay.io/*",
            "Quay.io",
            "quay.io/App",
        ] {
            let error = policy(&[(scope, "\"accept\"")]).unwrap_err();
            assert!(matches!(error, PolicyError::Scope(_)), "{scope}: {error}");
        }
        let error = policy(&[("quay.io", "[]")]).unwrap_err();
        assert!(matches!(error, PolicyError::NoKey(_)), "{error}");
        for path in ["relative.pub", "/nonexistent.pub"] {
            let error = policy(&[("quay.io", &format!("[{path:?}]"))]).unwrap_err();
            let PolicyError::Key { source, .. } = error else {
                panic!("{path}: {error}");
            };
            assert!(source.to_string().contains(path), "{source}");
        }
    }
}
