//! What the administrator says of registries: `/etc/husk/registries.toml`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    name::HUB,
    signature::policy::{self, Policy, PolicyError},
};

/// Where the settings are, unless somebody says otherwise.
pub const FILE: &str = "/etc/husk/registries.toml";

/// All of them. An empty file, or none, is right for most.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// By the host as it stands in an image's name, with its port: `docker.io`, `localhost:5000`.
    pub registry: BTreeMap<String, Registry>,
    /// Who must have signed what.
    pub signatures: Policy,
    /// How long to wait, and how often to ask again.
    pub patience: Patience,
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    registry: BTreeMap<String, Registry>,
    #[serde(default)]
    signatures: BTreeMap<String, policy::Written>,
}

/// One registry, or a mirror of one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Hosts that are asked before it, in this order.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// HTTP without TLS. Where nothing is said: for this machine's own addresses alone.
    pub plain_http: Option<bool>,
    /// A file of certificates in PEM, trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// How long to wait, and how often to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the next bytes of an answer.
    pub idle: Duration,
    /// For an answer that is short: a token, a manifest, an error.
    pub answer: Duration,
    /// The most attempts in a row that bring nothing.
    pub attempts: u32,
    /// Before the second attempt; doubled before each further one, up to [`Patience::MOST`] unless the registry wants it longer.
    pub pause: Duration,
}

impl Patience {
    /// The longest pause.
    pub const MOST: Duration = Duration::from_secs(30);
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(30),
            answer: Duration::from_secs(60),
            attempts: 5,
            pause: Duration::from_millis(500),
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What it says. TOML's own message has the line and the keys that there are.
    #[error("{} is not understood", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A host that is none.
    #[error("{} names a registry or a mirror {host:?}; it is HOST or HOST:PORT, without a scheme or a path", path.display())]
    Host {
        /// Which.
        path: PathBuf,
        /// The word.
        host: String,
    },
    /// A rule about signatures, or its key.
    #[error("{} cannot be followed", path.display())]
    Signatures {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PolicyError,
    },
}

impl Settings {
    /// Reads a file; one that is not there says nothing.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let (text, path) = (fs::read_to_string(path), path.to_owned());
        let text = match text {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(SettingsError::Read { path, source }),
        };
        let written: Written = match toml::from_str(&text) {
            Ok(written) => written,
            Err(source) => {
                let source = Box::new(source);
                return Err(SettingsError::Parse { path, source });
            }
        };
        let mirrors = written.registry.values().flat_map(|r| &r.mirrors);
        for host in written.registry.keys().chain(mirrors) {
            if !is_host(host) {
                let host = host.clone();
                return Err(SettingsError::Host { path, host });
            }
        }
        match Policy::new(&path, written.signatures) {
            Ok(signatures) => Ok(Self {
                registry: written.registry,
                signatures,
                patience: Patience::default(),
            }),
            Err(source) => Err(SettingsError::Signatures { path, source }),
        }
    }

    /// What is said of a host.
    pub(super) fn of(&self, host: &str) -> Registry {
        self.registry.get(host).cloned().unwrap_or_default()
    }
}

impl Registry {
    /// Is this host spoken to without TLS?
    pub(super) fn is_plain(&self, host: &str) -> bool {
        self.plain_http.unwrap_or_else(|| is_loopback(host))
    }
}

/// The host of an image's name.
fn is_host(text: &str) -> bool {
    let host = format!("{text}/x").parse::<crate::name::ImageName>();
    host.is_ok_and(|name| name.registry() == text && name.repository() == "x") || text == HUB
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.toml");
        fs::write(&path, text).unwrap();
        Settings::read(&path)
    }

    #[test]
    fn settings_are_read() {
        let settings = read(
            "[registry.\"docker.io\"]\nmirrors = [\"mirror.example:5000\", \"10.0.0.1\"]\n\
             [registry.\"10.0.0.1\"]\nplain_http = true\nca_file = \"/etc/ca.pem\"\n",
        )
        .unwrap();
        assert_eq!(settings.of("docker.io").mirrors.len(), 2);
        assert!(settings.of("10.0.0.1").is_plain("10.0.0.1"));
        assert!(settings.of("other").mirrors.is_empty());
        assert!(
            Settings::read(Path::new("/nonexistent"))
                .unwrap()
                .registry
                .is_empty()
        );
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_tls_unasked() {
        let silent = Registry::default();
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.8.9.10",
        ] {
            assert!(silent.is_plain(host), "{host}");
        }
        for host in [
            "docker.io",
            "localhost.example",
            "127.0.0.1.example",
            "10.0.0.1:5000",
        ] {
            assert!(!silent.is_plain(host), "{host}");
        }
        let tls = Registry {
            plain_http: Some(false),
            ..Registry::default()
        };
        assert!(!tls.is_plain("localhost:5000"));
    }

    #[test]
    fn a_mistake_is_told_with_its_place() {
        let error = read("[registry.\"a.b\"]\nmirror = []\n").unwrap_err();
        let text = std::error::Error::source(&error).unwrap().to_string();
        assert!(text.contains("mirror") && text.contains("line 2"), "{text}");
        for host in ["https://a.b", "a.b/c", "a b", "", "word"] {
            let text = format!("[registry.\"docker.io\"]\nmirrors = [{host:?}]\n");
            let error = read(&text).unwrap_err();
            assert!(
                matches!(error, SettingsError::Host { .. }),
                "{host}: {error}"
            );
        }
    }
}
