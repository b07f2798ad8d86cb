//! Manifests and indexes.

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};

use super::{Endpoint, Failure, PullError, attempts::Attempts, request::read};
use crate::{
    layer::Sha256Digest,
    manifest::{Document, INDEXES, MANIFESTS, MAX_DOCUMENT, ManifestError, Named},
};

const DOING: &str = "reading a manifest";

/// A document, and what it is in a store.
pub(crate) struct Fetched {
    pub(crate) document: Document,
    pub(crate) named: Named,
    pub(crate) media_type: String,
    pub(crate) text: Vec<u8>,
}

/// What came for a manifest, and what the registry calls it.
struct Text {
    bytes: Vec<u8>,
    media_type: Option<String>,
}

impl Endpoint {
    /// The manifest or index that the image's name leads to, or that has this digest.
    pub(crate) async fn document(
        &self,
        digest: Option<&Sha256Digest>,
    ) -> Result<Fetched, PullError> {
        let own = self.reference.digest().or(self.reference.tag());
        let which = digest.map(ToString::to_string);
        let which = which.as_deref().or(own).unwrap_or_default();
        let text = self.text(which, "image's manifest").await?;
        self.checked(text, digest)
    }

    /// A manifest of another kind, which lies beside the image: what it is, is the caller's to say.
    pub(crate) async fn tagged(&self, tag: &str, what: &'static str) -> Result<Vec<u8>, PullError> {
        Ok(self.text(tag, what).await?.bytes)
    }

    async fn text(&self, which: &str, what: &'static str) -> Result<Text, PullError> {
        let mut attempts = Attempts::new(self.patience);
        loop {
            let ask = self.try_text(which, what);
            let failure = match tokio::time::timeout(self.patience.answer, ask).await {
                Ok(Ok(text)) => return Ok(text),
                Ok(Err(failure)) => failure,
                Err(_) => self.silent(DOING),
            };
            let (pause, error) = attempts.after(failure, false)?;
            tracing::info!(%error, seconds = pause.as_secs_f32(), "asking again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_text(&self, which: &str, what: &'static str) -> Result<Text, Failure> {
        let url = self.url("manifests", which);
        // In one line: not everybody reads a second.
        let kinds = [&INDEXES[..], &MANIFESTS].concat().join(", ");
        let mut headers = HeaderMap::new();
        headers.extend(
            HeaderValue::from_str(&kinds)
                .ok()
                .map(|kinds| (ACCEPT, kinds)),
        );
        let mut response = self.get(DOING, &url, headers).await?;
        let media_type = response.headers().get(CONTENT_TYPE);
        let media_type = media_type.and_then(|value| Some(value.to_str().ok()?.to_owned()));
        let (bytes, ended) = read(&mut response, MAX_DOCUMENT as usize).await;
        ended.map_err(|error| self.failed_request(DOING, &error))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            let size = bytes.len() as u64;
            let error = ManifestError::TooLarge { what, size };
            return Err(Failure::lasting(error.into()));
        }
        Ok(Text { bytes, media_type })
    }

    fn checked(&self, text: Text, digest: Option<&Sha256Digest>) -> Result<Fetched, PullError> {
        let (told_type, text) = (text.media_type, text.bytes);
        let found = Sha256Digest::of(&text);
        let wanted = digest
            .copied()
            .or_else(|| self.reference.digest()?.parse().ok());
        if let Some(expected) = wanted.filter(|wanted| *wanted != found) {
            let found = format!("its digest is {found}");
            return Err(self.other(expected, found));
        }
        // Its parameters, as "; charset=utf-8", say nothing here.
        let told_type = told_type.map(|told| {
            let bare = told.split(';').next().unwrap_or_default();
            bare.trim().to_ascii_lowercase()
        });
        let document = Document::parse(&text, told_type.as_deref())?;
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
