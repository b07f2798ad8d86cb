//! Manifests and indexes.

use std::time::{Duration, SystemTime};

use oci_client::errors::OciEnvelope;
use oci_client::secrets::RegistryAuth;
use reqwest::{
    StatusCode,
    header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER},
};

use super::{Endpoint, Failure, Patience, PullError};
use crate::{
    layer::Sha256Digest,
    manifest::{Document, INDEXES, MANIFESTS, MAX_DOCUMENT, ManifestError, Named},
};

/// A document, and what it is in a store.
pub(crate) struct Fetched {
    pub(crate) document: Document,
    pub(crate) named: Named,
    pub(crate) media_type: String,
    pub(crate) text: Vec<u8>,
}

impl Endpoint {
    /// The manifest or index that the image's name leads to, or that has this digest.
    pub(crate) async fn document(
        &self,
        digest: Option<&Sha256Digest>,
    ) -> Result<Fetched, PullError> {
        let mut attempt = 1;
        let mut pause = self.patience.pause;
        loop {
            let failure = match self.try_document(digest).await {
                Ok(fetched) => return Ok(fetched),
                Err(failure) => failure,
            };
            if !failure.passing || attempt >= self.patience.attempts {
                return Err(failure.error);
            }
            let wait = pause_before(failure.after, pause);
            tracing::info!(error = %failure.error, seconds = wait.as_secs_f32(), "asking again");
            tokio::time::sleep(wait).await;
            attempt += 1;
            pause *= 2;
        }
    }

    async fn try_document(&self, digest: Option<&Sha256Digest>) -> Result<Fetched, Failure> {
        let token = self.token().await?;
        let request = self.get_document(digest, token.as_deref());
        match tokio::time::timeout(self.patience.answer, request).await {
            Ok(fetched) => fetched,
            Err(_) => Err(self.silent("reading a manifest")),
        }
    }

    async fn get_document(
        &self,
        digest: Option<&Sha256Digest>,
        token: Option<&str>,
    ) -> Result<Fetched, Failure> {
        let doing = "reading a manifest";
        let own = self.reference.digest().or(self.reference.tag());
        let which = digest.map(ToString::to_string);
        let which = which.as_deref().or(own).unwrap_or_default();
        // The parts are of an image's name, which has been parsed: none of them needs escaping.
        let url = format!(
            "{}://{}/v2/{}/manifests/{which}{}",
            if self.is_plain { "http" } else { "https" },
            self.reference.resolve_registry(),
            self.reference.repository(),
            self.reference
                .namespace()
                .map(|name| format!("?ns={name}"))
                .unwrap_or_default(),
        );
        let mut request = self
            .http
            .get(url)
            .header(ACCEPT, [&INDEXES[..], &MANIFESTS].concat().join(", "));
        match (token, &self.auth) {
            (Some(token), _) => request = request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => {
                request = request.basic_auth(user, Some(password));
            }
            (None, _) => {}
        }
        let failed = |error: &reqwest::Error| {
            let failure = self.failed_request(doing, error);
            Failure {
                // Nobody is there: another attempt in a moment is not what its user waits for.
                passing: failure.passing && !error.is_connect(),
                ..failure
            }
        };
        let mut response = request.send().await.map_err(|e| failed(&e))?;
        let status = response.status();
        let header = |name| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let (told_type, after) = (header(CONTENT_TYPE), header(RETRY_AFTER));
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| failed(&e))? {
            text.extend_from_slice(&chunk);
            if text.len() as u64 > MAX_DOCUMENT {
                let (what, size) = ("image's manifest", text.len() as u64);
                let error = ManifestError::TooLarge { what, size };
                return Err(Failure::lasting(error.into()));
            }
        }
        if status != StatusCode::OK {
            let mut failure = self.refused(doing, status.as_u16(), &in_words(&text));
            failure.after = after.and_then(|value| seconds(&value));
            return Err(failure);
        }
        let found = Sha256Digest::of(&text);
        let wanted = digest
            .copied()
            .or_else(|| self.reference.digest()?.parse().ok());
        if let Some(expected) = wanted.filter(|wanted| *wanted != found) {
            let found = format!("its digest is {found}");
            return Err(Failure::lasting(self.other(expected, found)));
        }
        // Its parameters, as "; charset=utf-8", say nothing here.
        let told_type = told_type.map(|told| {
            let bare = told.split(';').next().unwrap_or_default();
            bare.trim().to_ascii_lowercase()
        });
        let document = Document::parse(&text, told_type.as_deref())
            .map_err(|error| Failure::lasting(error.into()))?;
        let kinds = match document {
            Document::Index(_) => INDEXES,
            Document::Manifest(_) => MANIFESTS,
        };
        let media_type = told_type
            .filter(|told| kinds.contains(&told.as_str()))
            .unwrap_or_else(|| kinds[0].to_owned());
        Ok(Fetched {
            named: Named {
                digest: found,
                size: text.len() as u64,
            },
            document,
            media_type,
            text,
        })
    }
}

/// A registry's error, as its users write it (distribution-spec, "Error Codes"); or what came instead.
fn in_words(text: &[u8]) -> String {
    match serde_json::from_slice::<OciEnvelope>(text) {
        Ok(envelope) if !envelope.errors.is_empty() => {
            let words = envelope.errors.iter().map(|error| match &*error.message {
                "" => format!("{:?}", error.code),
                message => message.to_owned(),
            });
            words.collect::<Vec<_>>().join("; ")
        }
        _ => String::from_utf8_lossy(text).into_owned(),
    }
}

/// What Retry-After says (RFC 9110, section 10.2.3): seconds. The date that it may be instead is what no registry sends.
fn seconds(value: &str) -> Option<Duration> {
    value.trim().parse().ok().map(Duration::from_secs)
}

/// How long to wait before the next attempt: as long as the registry wants, within reason, or else a time that is not everybody's.
pub(super) fn pause_before(after: Option<Duration>, pause: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let part = now.map_or(0, |now| now.subsec_nanos() % 500);
    let pause = pause.min(Patience::MOST);
    let spread = pause.mul_f64(0.75 + f64::from(part) / 1000.0);
    match after {
        Some(after) => after.min(2 * Patience::MOST).max(spread),
        None => spread,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_words_are_told() {
        let text = br#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}, {"code": "DENIED"}]}"#;
        assert_eq!(in_words(text), "slow down; Denied");
        assert_eq!(in_words(b"<html>"), "<html>");
    }

    #[test]
    fn pauses_are_bounded() {
        let second = Duration::from_secs(1);
        for after in [
            None,
            Some(second),
            Some(100 * second),
            seconds("99999999999"),
        ] {
            let wait = pause_before(after, second);
            assert!(
                wait >= second.mul_f64(0.75) && wait <= 2 * Patience::MOST,
                "{wait:?}"
            );
        }
        assert!(pause_before(None, 1000 * second) <= 2 * Patience::MOST);
        assert_eq!(seconds(" 7 "), Some(7 * second));
        assert_eq!(seconds("Wed, 21 Oct 2026 07:28:00 GMT"), None);
    }
}
