//! Where things are, and names for them.

use std::{
    env,
    ffi::OsString,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{self, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use husk_image::{
    manifest::Platform,
    name::ImageName,
    registry::Settings,
    store::{Listed, Store},
};
use rustix::process::geteuid;

use crate::container::Containers;

/// Where all of it is, unless somebody says otherwise.
const ROOT: &str = "/var/lib/husk";

/// Its owner's alone.
const PRIVATE: u32 = 0o700;

/// What the global flags say.
pub(crate) struct Place {
    root: PathBuf,
    registries: PathBuf,
}

impl Place {
    pub(crate) fn new(root: Option<PathBuf>, registries: PathBuf) -> Self {
        let root = root.unwrap_or_else(|| {
            let own = (!geteuid().is_root()).then(|| data_home(|name| env::var_os(name)));
            own.flatten()
                .map_or_else(|| PathBuf::from(ROOT), |home| home.join("husk"))
        });
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
            Ok((fs::metadata(&path)?, fs::metadata(&self.root)?))
        };
        let made = make().map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::PermissionDenied if !geteuid().is_root() => anyhow::Error::from(error)
                .context("this user may not, --root names a place of its own"),
            _ => error.into(),
        });
        let making = || format!("making {}", path.display());
        let (made, root) = made.with_context(making)?;
        let own = geteuid().as_raw();
        // One's layers are no use to the other, and root would believe what a user has written.
        let owners = [made.uid(), if own == 0 { root.uid() } else { own }];
        if let Some(owner) = owners.into_iter().find(|owner| *owner != own) {
            bail!(
                "{} is user {owner}'s, and this is user {own}: run husk as that user, or --root names another place",
                path.display()
            );
        }
        fs::set_permissions(&path, Permissions::from_mode(PRIVATE)).with_context(making)?;
        Ok(path)
    }

    /// Says what is missing where this process cannot have containers.
    pub(crate) fn for_containers(&self) -> Result<()> {
        let own = geteuid();
        if own.is_root() {
            return Ok(());
        }
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.map_or_else(
            |error| format!(", nor can it open /dev/kvm ({error})"),
            |_| String::new(),
        );
        bail!(
            "a container takes root, for its mounts, its network and its cgroup: this is user {}{kvm}; images can be had without",
            own.as_raw()
        )
    }

    pub(crate) fn settings(&self) -> Result<Settings> {
        Ok(Settings::read(&self.registries)?)
    }
}

/// Where a user's own data are (XDG Base Directory Specification); a path that is not absolute counts for nothing.
fn data_home(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| {
        variable(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))
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
    fn a_users_data_are_where_others_keep_them() {
        for (variables, home) in [
            (
                &[("XDG_DATA_HOME", "/data"), ("HOME", "/home/u")][..],
                Some("/data"),
            ),
            (&[("HOME", "/home/u")], Some("/home/u/.local/share")),
            (
                &[("XDG_DATA_HOME", "data"), ("HOME", "/home/u")],
                Some("/home/u/.local/share"),
            ),
            (&[("XDG_DATA_HOME", ""), ("HOME", "")], None),
            (&[], None),
        ] {
            let variable = |name: &str| {
                let found = variables.iter().find(|(other, _)| *other == name);
                found.map(|(_, value)| OsString::from(value))
            };
            assert_eq!(
                data_home(variable),
                home.map(PathBuf::from),
                "{variables:?}"
            );
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
