//! Registries, by the OCI distribution protocol: who may pull, documents, and blobs.
//!
//! A registry, and everything on the way to it, is hostile: what it sends is bounded and checked before it is believed, waiting for it has an
//! end, and it learns no credentials but its own. All of it goes through one question, [`Endpoint::get`], and one count of attempts;
//! `oci-client` has the registries' errors. Its own client (0.18) reads tokens, manifests and errors whole, whatever their size.

mod attempts;
mod auth;
mod blob;
mod credentials;
mod document;
mod request;
mod settings;
mod tls;

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use oci_spec::distribution::Reference;

use auth::Authority;
pub(crate) use blob::Sink;
use credentials::Login;
pub use settings::{FILE, Patience, Registry, Settings, SettingsError};

use crate::{
    layer::Sha256Digest, manifest::ManifestError, name::ImageName, signature::SignatureError,
    store::StoreError,
};

/// Why an image is not there.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Nobody has it.
    #[error(
        "{registry} has no image {name}: look for a misspelt name or tag; a registry also says so of one that needs a login"
    )]
    NotFound {
        /// Who was asked.
        registry: String,
        /// For what.
        name: String,
    },
    /// The puller may not have it.
    #[error(
        "{registry} does not let {who} pull {name}: {why}; `docker login {registry}` or `podman login {registry}` leaves credentials that husk finds"
    )]
    Denied {
        /// Who was asked.
        registry: String,
        /// For what.
        name: String,
        /// As whom.
        who: String,
        /// The registry's words.
        why: String,
    },
    /// There are credentials, of no use.
    #[error("the credentials for {registry} cannot be used: {why}")]
    Credentials {
        /// For whom.
        registry: String,
        /// What is wrong.
        why: String,
    },
    /// The token, and what shows who the puller is, would go in clear text to somebody.
    #[error(
        "{registry} has its tokens from {realm}, which is not over TLS; `plain_http = true` for both hosts in registries.toml allows that"
    )]
    Realm {
        /// Who wants it.
        registry: String,
        /// Whom to ask.
        realm: String,
    },
    /// The file of certificates.
    #[error("the certificates for {registry} cannot be used: {why}")]
    Certificates {
        /// For whom.
        registry: String,
        /// What is wrong.
        why: String,
    },
    /// It does not answer, or not as a registry does.
    #[error("{doing} from {registry}: {why}")]
    Registry {
        /// What was being done, to what.
        doing: String,
        /// Who was asked.
        registry: String,
        /// What happened.
        why: String,
    },
    /// What came is another thing than what was asked for.
    #[error("{registry} has sent something else for {expected}: {found}")]
    Other {
        /// Who was asked.
        registry: String,
        /// For this.
        expected: Sha256Digest,
        /// And what was wrong.
        found: String,
    },
    /// The image.
    #[error(transparent)]
    Image(#[from] ManifestError),
    /// Nobody vouches for it who should.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// The store, or a layer that is not unpacked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why one attempt has failed.
#[derive(Debug)]
struct Failure {
    error: PullError,
    /// Another attempt may succeed.
    passing: bool,
    /// When the registry wants to be asked again.
    after: Option<Duration>,
}

impl Failure {
    fn lasting(error: PullError) -> Self {
        Self {
            error,
            passing: false,
            after: None,
        }
    }

    fn passing(error: PullError) -> Self {
        Self {
            passing: true,
            ..Self::lasting(error)
        }
    }
}

/// One host that an image can be had from: its registry, or a mirror of that.
pub(crate) struct Endpoint {
    /// Of an image's name, without the rest.
    host: String,
    reference: Reference,
    is_plain: bool,
    http: reqwest::Client,
    /// Asks for tokens.
    tokens: reqwest::Client,
    authority: Authority,
    patience: Patience,
    /// It has answered once: from then on, that nobody is there may pass.
    is_there: AtomicBool,
}

impl Endpoint {
    /// All that can be asked for an image, in the order in which to ask.
    pub(crate) fn all(name: &ImageName, settings: &Settings) -> Vec<String> {
        let mut hosts = settings.of(name.registry()).mirrors;
        hosts.push(name.registry().to_owned());
        hosts
    }

    /// Gets ready to ask one; nothing is sent yet.
    ///
    /// # Errors
    /// When its certificates or credentials cannot be used.
    pub(crate) async fn new(
        host: String,
        name: &ImageName,
        settings: &Settings,
    ) -> Result<Self, PullError> {
        let told = settings.of(&host);
        let is_plain = told.is_plain(&host);
        let mut reference = name.reference().clone();
        if host != name.registry() {
            reference.set_mirror_registry(host.clone());
        }
        let bad_certificates = |why: String| PullError::Certificates {
            registry: host.clone(),
            why,
        };
        let mut certificates = Vec::new();
        if let Some(path) = &told.ca_file {
            let data = fs::read(path)
                .map_err(|e| bad_certificates(format!("reading {}: {e}", path.display())))?;
            certificates = tls::certificates(&data)
                .map_err(|why| bad_certificates(format!("{}: {why}", path.display())))?;
        }
        let patience = settings.patience;
        let (http, tokens) = tls::clients(certificates, patience).map_err(bad_certificates)?;
        let login = credentials::find(&host).await?;
        Ok(Self {
            host,
            reference,
            is_plain,
            http,
            tokens,
            authority: Authority::new(login, settings.clone()),
            patience,
            is_there: AtomicBool::new(false),
        })
    }

    /// What is being asked for.
    fn wanted(&self) -> String {
        self.reference.to_string()
    }

    fn denied(&self, why: &str) -> PullError {
        let who = match &self.authority.login {
            Login::User { name, .. } => format!("the user {name:?}"),
            Login::Identity(_) => "whoever has this identity token".to_owned(),
            Login::Nobody => "a stranger".to_owned(),
        };
        PullError::Denied {
            registry: self.host.clone(),
            name: self.wanted(),
            who,
            why: short(why),
        }
    }

    /// It has sent something else.
    pub(crate) fn other(&self, expected: Sha256Digest, found: String) -> PullError {
        PullError::Other {
            registry: self.host.clone(),
            expected,
            found,
        }
    }

    fn registry_error(&self, doing: &str, why: &str) -> PullError {
        PullError::Registry {
            doing: doing.to_owned(),
            registry: self.host.clone(),
            why: short(why),
        }
    }

    fn silent(&self, doing: &str) -> Failure {
        let seconds = self.patience.answer.as_secs();
        Failure::passing(self.registry_error(doing, &format!("no answer in {seconds} s")))
    }

    /// It has answered.
    fn heard(&self) {
        self.is_there.store(true, Ordering::Relaxed);
    }

    /// The way to it, or the stream from it, broke.
    fn failed_request(&self, doing: &str, error: &reqwest::Error) -> Failure {
        // Nobody is there: another attempt in a moment is not what the puller waits for.
        let is_nobody = error.is_connect() && !self.is_there.load(Ordering::Relaxed);
        let lasting = error.is_builder() || error.is_redirect() || is_nobody;
        let error = self.registry_error(doing, &told_by(error));
        if lasting {
            Failure::lasting(error)
        } else {
            Failure::passing(error)
        }
    }

    /// A status that is no success.
    fn refused(&self, doing: &str, code: u16, text: &str) -> Failure {
        let error = match code {
            401 | 403 => self.denied(text),
            404 => PullError::NotFound {
                registry: self.host.clone(),
                name: self.wanted(),
            },
            _ => self.registry_error(doing, &format!("status {code}: {text}")),
        };
        // Time-out, too early, too many requests, and the server's own troubles (RFC 9110, section 15; RFC 6585; RFC 8470).
        if matches!(code, 408 | 425 | 429 | 500..=599) {
            Failure::passing(error)
        } else {
            Failure::lasting(error)
        }
    }
}

/// An error and its causes, as one sentence: reqwest's own says "error sending request" of everything.
fn told_by(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A registry's words, as far as they fit into an error, without what would confuse a terminal.
fn short(text: &str) -> String {
    const MOST: usize = 300;
    let text = text.trim();
    let mut shown: String = text
        .chars()
        .take(MOST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}
