//! Where things are, and names for them.

use std::{
    fs::{self, DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{self, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use husk_image::{
    manifest::Platform,
    name::ImageName,
    registry::Settings,
    store::{Listed, Store},
};

use crate::container::Containers;

/// Root's alone.
const PRIVATE: u32 = 0o700;

/// What the global flags say.
pub(crate) struct Place {
    root: PathBuf,
    registries: PathBuf,
}

impl Place {
    pub(crate) fn new(root: PathBuf, registries: PathBuf) -> Self {
        // A monitor has another working directory. Nothing is looked up here: it fails for an empty path only, which fails later too.
        let root = path::absolute(&root).unwrap_or(root);
        Self { root, registries }
    }

    /// Where all of it is.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The containers; their directory is made where there is none.
    pub(crate) fn containers(&self) -> Result<Containers> {
        Ok(Containers::new(&self.private("containers")?))
    }

    /// The images' store; made where there is none.
    pub(crate) fn store(&self) -> Result<Store> {
        let path = self.private("images")?;
        Store::open(&path).with_context(|| format!("opening the images in {}", path.display()))
    }

    /// A directory of the root's that nobody else enters: an image may have programs that run as root whoever starts them (as in
    /// CVE-2021-41103).
    pub(crate) fn private(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        let make = || {
            DirBuilder::new()
                .recursive(true)
                .mode(PRIVATE)
                .create(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(PRIVATE))
        };
        make().with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    pub(crate) fn settings(&self) -> Result<Settings> {
        Ok(Settings::read(&self.registries)?)
    }
}

/// What a user calls an image: a name as the store has it, a name with what may be left out, or the beginning of an id. Of an id, all names.
pub(crate) fn find<'a>(images: &'a [Listed], word: &str) -> Result<Vec<&'a Listed>> {
    let named = |name: &str| images.iter().find(|image| image.name == name);
    if let Some(image) = named(word) {
        return Ok(vec![image]);
    }
    let whole = word.parse::<ImageName>();
    if let Some(image) = whole
        .as_ref()
        .ok()
        .and_then(|name| named(&name.to_string()))
    {
        return Ok(vec![image]);
    }
    let hex = word.strip_prefix("sha256:").unwrap_or(word);
    let is_id = hex.len() >= 3
        && hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let mut found: Vec<&Listed> = Vec::new();
    if is_id {
        found.extend(images.iter().filter(|image| id(image).starts_with(hex)));
    }
    if let Some(first) = found.first() {
        if found.iter().any(|other| id(other) != id(first)) {
            bail!("{word:?} is the beginning of several images' ids: write more of it");
        }
        return Ok(found);
    }
    // A word that can be no name is told so.
    let name = whole?;
    bail!(
        "there is no image {name}: `husk pull {word}` pulls it, `husk images` shows those that there are"
    );
}

/// An image's id: the digest of what its name leads to, in hex.
pub(crate) fn id(image: &Listed) -> &str {
    let digest = image.descriptor.digest().as_ref();
    digest.split_once(':').map_or(digest, |(_, hex)| hex)
}

/// As on Docker's command line.
pub(crate) fn platform(text: Option<&str>) -> Result<Platform> {
    let Some(text) = text else {
        return Ok(Platform::here());
    };
    text.parse().with_context(|| format!("--platform {text:?}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listed(name: &str, hex: &str) -> Listed {
        let digest = format!("sha256:{hex:0<64}");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        Listed {
            name: name.to_owned(),
            descriptor: serde_json::from_value(
                json!({"mediaType": kind, "digest": digest, "size": 1}),
            )
            .unwrap(),
            size: 1,
            image: None,
        }
    }

    #[test]
    fn images_are_found_by_name_and_by_id() {
        let images = [
            listed("docker.io/library/a:latest", "abc1"),
            listed("docker.io/library/a:2", "abc1"),
            listed("x/plain", "abc2"),
            listed("docker.io/library/abc:latest", "def"),
        ];
        let names = |word: &str| -> Vec<String> {
            let found = find(&images, word).unwrap();
            found.iter().map(|image| image.name.clone()).collect()
        };
        assert_eq!(names("a"), ["docker.io/library/a:latest"]);
        assert_eq!(names("library/a:2"), ["docker.io/library/a:2"]);
        assert_eq!(names("x/plain"), ["x/plain"]);
        assert_eq!(
            names("abc1"),
            ["docker.io/library/a:latest", "docker.io/library/a:2"]
        );
        assert_eq!(names("sha256:def"), ["docker.io/library/abc:latest"]);
        // A name goes before an id.
        assert_eq!(names("abc"), ["docker.io/library/abc:latest"]);
        let error = |word: &str| find(&images, word).unwrap_err().to_string();
        assert!(error("abc0").contains("no image docker.io/library/abc0:latest"));
        assert!(error("sha256:abc").contains("several"));
        assert!(error("A b").contains("names no image"));
    }
}
