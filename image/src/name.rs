//! Names of images, as people write them: `busybox`, `docker.io/library/busybox:1.36`, `localhost:5000/app@sha256:…`.

use std::{fmt, str::FromStr};

use oci_spec::distribution::{ParseError, Reference};

use crate::layer::{BadDigest, Sha256Digest};

/// Docker Hub, as the host of an image's name.
#[cfg(feature = "registry")]
pub(crate) const HUB: &str = "docker.io";

/// A name made whole, with Docker's rules: without a registry it is Docker Hub's, without a repository's owner it is `library`'s, and
/// without tag and digest the tag is `latest`. With a digest, a tag says nothing and is left out.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName {
    reference: Reference,
    digest: Option<Sha256Digest>,
}

/// Why a text names no image.
#[derive(Debug, thiserror::Error)]
pub enum BadName {
    /// It has another form.
    #[error(
        "{name:?} names no image: {}; a name is [REGISTRY[:PORT]/]REPOSITORY[:TAG][@sha256:DIGEST]",
        why(.name, .reason)
    )]
    Form {
        /// The text.
        name: String,
        /// What is wrong; the message has it.
        reason: ParseError,
    },
    /// Its digest is of a kind that husk does not check.
    #[error("{name:?} names an image by a digest that husk cannot use")]
    Digest {
        /// The text.
        name: String,
        /// What is wrong.
        source: BadDigest,
    },
}

/// The parser's reason, or the commonest one that it does not tell.
fn why(name: &str, reason: &ParseError) -> String {
    let is_case = name.to_lowercase().parse::<Reference>().is_ok();
    if is_case && *reason == ParseError::ReferenceInvalidFormat {
        return ParseError::NameContainsUppercase.to_string();
    }
    reason.to_string()
}

impl ImageName {
    /// The host that has it, as it is written: `docker.io`.
    pub fn registry(&self) -> &str {
        self.reference.registry()
    }

    /// Its place there: `library/busybox`.
    pub fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// Which of the place's images, if the name has no digest.
    pub fn tag(&self) -> Option<&str> {
        self.reference.tag().filter(|_| self.digest.is_none())
    }

    /// What it must be, if the name says so.
    pub fn digest(&self) -> Option<Sha256Digest> {
        self.digest
    }

    /// For who asks a registry.
    #[cfg(feature = "registry")]
    pub(crate) fn reference(&self) -> &Reference {
        &self.reference
    }
}

impl FromStr for ImageName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let name = || text.to_owned();
        let form = |reason| BadName::Form {
            name: name(),
            reason,
        };
        // The parser's \w is Unicode's, the specification's ASCII's (distribution-spec, "Pulling manifests"); what is none would end in a URL.
        if !text.is_ascii() {
            return Err(form(ParseError::ReferenceInvalidFormat));
        }
        let mut reference: Reference = text.parse().map_err(form)?;
        // "A/a" is read with a host "A", which then becomes an owner of Docker Hub that there cannot be.
        reference.whole().parse::<Reference>().map_err(form)?;
        let mut digest = None;
        if let Some(written) = reference.digest() {
            // Hex digits in either case are the same digest; one spelling is enough.
            let parsed: Sha256Digest = written.to_lowercase().parse().map_err(|source| {
                let name = name();
                BadName::Digest { name, source }
            })?;
            reference = reference.clone_with_digest(parsed.to_string());
            digest = Some(parsed);
        }
        Ok(Self { reference, digest })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reference.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_names_are_docker_hubs() {
        let hex = "ab".repeat(32);
        for (written, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("someone/app", "docker.io/someone/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b/c:t", "localhost:5000/a/b/c:t"),
            ("quay.io/app", "quay.io/app:latest"),
        ] {
            assert_eq!(written.parse::<ImageName>().unwrap().to_string(), whole);
        }
        let name: ImageName = format!("app:1@sha256:{}", hex.to_uppercase())
            .parse()
            .unwrap();
        assert_eq!(
            name.to_string(),
            format!("docker.io/library/app@sha256:{hex}")
        );
        assert_eq!(name.digest().unwrap().hex(), hex);
    }

    #[test]
    fn what_names_no_image_is_said() {
        let say = |text: &str| text.parse::<ImageName>().unwrap_err().to_string();
        assert!(say("").contains("at least one component"));
        assert!(say("BusyBox").contains("must be lowercase"));
        for text in [
            "a b",
            "../x",
            "x:",
            "-x",
            "x@sha256:12",
            "http://x/y",
            "a:b:c",
            "x\n",
            "A/a",
            "x:φ",
            "ö.example/x",
        ] {
            assert!(say(text).contains("names no image"), "{text}");
        }
        assert!(say(&"a".repeat(300)).contains("255"));
        let sha512 = format!("x@sha512:{}", "0".repeat(128));
        assert!(say(&sha512).contains("cannot use"));
    }

    proptest! {
        #[test]
        fn a_whole_name_is_itself(text in "[a-zA-Z0-9:/@._-]{0,60}") {
            if let Ok(name) = text.parse::<ImageName>() {
                prop_assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name);
            }
        }
    }
}
