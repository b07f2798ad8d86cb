//! Whom a registry's certificate is checked against: the host's, or Mozilla's where the host has none, as a small image or a rescue system.

use std::{env, fs, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

/// A file of certificates in PEM that counts instead of the host's (OpenSSL's name for it, which rustls-native-certs knows).
const FILE: &str = "SSL_CERT_FILE";
/// The same for a directory.
const DIR: &str = "SSL_CERT_DIR";
/// Set where this program has run itself anew, so that it does so once.
const DONE: &str = "HUSK_OWN_CERTIFICATES";

/// Sees to it that there are certificates: without any, nothing can be asked of a registry, not even without TLS. Where there are none this
/// program runs itself anew, with Mozilla's.
pub(crate) fn ensure(root: &Path) -> Result<()> {
    if env::var_os(DONE).is_some() || !rustls_native_certs::load_native_certs().certs.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    let path = root.join("certificates.pem");
    let new = root.join(format!("certificates.pem.{}.new", std::process::id()));
    let write = || {
        fs::write(&new, mozillas())?;
        fs::rename(&new, &path)
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    let own = env::current_exe().context("finding husk's own program")?;
    let error = Command::new(own)
        .args(env::args_os().skip(1))
        .env(FILE, &path)
        .env_remove(DIR)
        .env(DONE, "1")
        .exec();
    Err(error).context("running husk anew")
}

/// In PEM (RFC 7468).
fn mozillas() -> String {
    let mut text = String::new();
    for root in TLS_SERVER_ROOT_CERTS {
        text += "-----BEGIN CERTIFICATE-----\n";
        let encoded = STANDARD.encode(root);
        let mut rest = &*encoded;
        while !rest.is_empty() {
            let (line, more) = rest.split_at(rest.len().min(64));
            text += line;
            text += "\n";
            rest = more;
        }
        text += "-----END CERTIFICATE-----\n";
    }
    text
}
