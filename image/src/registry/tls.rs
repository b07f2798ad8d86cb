//! Clients of one registry, whom they trust, and where they let themselves be sent.

use reqwest::{
    Certificate, Client,
    redirect::{Action, Attempt, Policy},
};

use super::{Patience, told_by};

/// As which husk introduces itself.
const AGENT: &str = concat!("husk/", env!("CARGO_PKG_VERSION"));

/// The most redirects, one after the other.
const REDIRECTS: usize = 10;

/// Two clients that trust these certificates and the system's, or Mozilla's where the system has none, as a small image or a rescue system:
/// one for the registry, and one for who the puller is.
pub(super) fn clients(
    mut roots: Vec<Certificate>,
    patience: Patience,
) -> Result<(Client, Client), String> {
    // Whoever was first has chosen the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let has_roots = !rustls_native_certs::load_native_certs().certs.is_empty();
    if !has_roots {
        for root in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
            roots.push(Certificate::from_der(root).map_err(|e| told_by(&e))?);
        }
    }
    let client = |policy: fn(Attempt<'_>) -> Action| {
        let builder = Client::builder()
            .user_agent(AGENT)
            .connect_timeout(patience.connect)
            .read_timeout(patience.idle)
            .referer(false)
            .redirect(Policy::custom(policy));
        let builder = match has_roots {
            true => builder.tls_certs_merge(roots.clone()),
            false => builder.tls_certs_only(roots.clone()),
        };
        builder.build().map_err(|e| told_by(&e))
    };
    Ok((client(secure)?, client(staying)?))
}

/// A registry may send on to whoever has its blobs, which learns no credentials: reqwest leaves them out for another host. Nobody is sent out of
/// TLS.
fn secure(attempt: Attempt<'_>) -> Action {
    let is_left = |url: &reqwest::Url| url.scheme() == "https";
    if attempt.url().scheme() != "https" && attempt.previous().iter().any(is_left) {
        return attempt.error("it leads from https to http");
    }
    if attempt.previous().len() > REDIRECTS {
        return attempt.error("it leads on and on");
    }
    attempt.follow()
}

/// A form goes with its redirect, and an identity token is in one: nobody else is to have it.
fn staying(attempt: Attempt<'_>) -> Action {
    let origin = attempt.url().origin();
    if attempt.previous().iter().any(|url| url.origin() != origin) {
        return attempt.error("whoever gives the tokens leads on to another host");
    }
    secure(attempt)
}

/// The certificates of a file in PEM: there must be one.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<Certificate>, String> {
    let all = Certificate::from_pem_bundle(pem).map_err(|e| told_by(&e))?;
    match all.is_empty() {
        true => Err("it has no certificate in PEM".to_owned()),
        false => Ok(all),
    }
}
