//! One question to a registry, and its answer, or why there is none.

use oci_client::errors::OciEnvelope;
use reqwest::{
    Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER},
};
use serde::Deserialize;

use super::{Endpoint, Failure, attempts::seconds, credentials::Login};

/// Bytes of an error that are read: it is for people.
const MAX_ERROR: usize = 16 << 10;

impl Endpoint {
    fn root(&self) -> String {
        let scheme = if self.is_plain { "http" } else { "https" };
        format!("{scheme}://{}/v2/", self.reference.resolve_registry())
    }

    /// Where the image's repository has something: a manifest or a blob, by its tag or digest.
    pub(super) fn url(&self, kind: &str, which: &str) -> String {
        // The parts are of an image's name, which has been parsed: none of them needs escaping.
        format!(
            "{}{}/{kind}/{which}{}",
            self.root(),
            self.reference.repository(),
            self.reference
                .namespace()
                .map(|name| format!("?ns={name}"))
                .unwrap_or_default(),
        )
    }

    /// Is this answer the registry's own? Whoever it has sent us on to is not told who we are.
    fn is_from(&self, response: &Response) -> bool {
        Url::parse(&self.root()).is_ok_and(|root| root.origin() == response.url().origin())
    }

    /// Who has a login shows it before anything is asked: a registry that anybody may use may have more for some, and says of that to others
    /// that it is not there.
    async fn introduce(&self) -> Result<(), Failure> {
        let doing = "asking for the registry's version";
        let request = self.http.get(self.root());
        let failed = |error: reqwest::Error| self.failed_request(doing, &error);
        let response = request.send().await.map_err(failed)?;
        self.heard();
        if response.status() == StatusCode::UNAUTHORIZED && self.is_from(&response) {
            self.authorize(response.headers(), None).await?;
        }
        Ok(())
    }

    /// Asks, as who the puller is, and once more where the registry wants to know that, or no longer takes the token it had. What comes back is
    /// a success; its body has not been read. The caller bounds the time.
    pub(super) async fn get(
        &self,
        doing: &str,
        url: &str,
        headers: HeaderMap,
    ) -> Result<Response, Failure> {
        let send = |authorization: Option<HeaderValue>| {
            let mut request = self.http.get(url).headers(headers.clone());
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            request.send()
        };
        let failed = |error: reqwest::Error| self.failed_request(doing, &error);
        if !matches!(self.authority.login, Login::Nobody) {
            let introduced = &self.authority.introduced;
            introduced.get_or_try_init(|| self.introduce()).await?;
        }
        let used = self.authority.held().await;
        let mut response = send(used.clone()).await.map_err(failed)?;
        self.heard();
        if response.status() == StatusCode::UNAUTHORIZED && self.is_from(&response) {
            let fresh = self.authorize(response.headers(), used).await?;
            response = send(Some(fresh)).await.map_err(failed)?;
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let (status, after, words) = refusal(response).await;
        let mut failure = self.refused(doing, status.as_u16(), &words);
        failure.after = after;
        Err(failure)
    }
}

/// What an answer that is no success says: its status, when to ask again, and its words.
pub(super) async fn refusal(
    mut response: Response,
) -> (StatusCode, Option<std::time::Duration>, String) {
    let after = response.headers().get(RETRY_AFTER);
    let after = after.and_then(|value| seconds(value.to_str().ok()?));
    // A part of them is better than nothing.
    let (text, _) = read(&mut response, MAX_ERROR).await;
    (response.status(), after, in_words(&text))
}

/// Reads a body until it has more than so many bytes. What comes after that, and after an error, is left.
pub(super) async fn read(
    response: &mut Response,
    most: usize,
) -> (Vec<u8>, Result<(), reqwest::Error>) {
    let mut text = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => text.extend_from_slice(&chunk),
            Ok(None) => return (text, Ok(())),
            Err(error) => return (text, Err(error)),
        }
        if text.len() > most {
            return (text, Ok(()));
        }
    }
}

/// A registry's error, as its users write it (distribution-spec, "Error Codes"), or a token server's (RFC 6749, section 5.2; Docker Hub has
/// `details`); or what came instead.
fn in_words(text: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Said {
        #[serde(alias = "details", alias = "message")]
        error_description: Option<String>,
        error: Option<String>,
    }
    if let Ok(envelope) = serde_json::from_slice::<OciEnvelope>(text)
        && !envelope.errors.is_empty()
    {
        let words = envelope.errors.iter().map(|error| match &*error.message {
            "" => format!("{:?}", error.code),
            message => message.to_owned(),
        });
        return words.collect::<Vec<_>>().join("; ");
    }
    let said = serde_json::from_slice::<Said>(text).ok();
    said.and_then(|said| said.error_description.or(said.error))
        .unwrap_or_else(|| String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_words_are_told() {
        for (text, words) in [
            (
                r#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}, {"code": "DENIED"}]}"#,
                "slow down; Denied",
            ),
            (r#"{"details": "incorrect username"}"#, "incorrect username"),
            (r#"{"error": "invalid_grant"}"#, "invalid_grant"),
            (r#"{"errors": []}"#, r#"{"errors": []}"#),
            ("<html>", "<html>"),
        ] {
            assert_eq!(in_words(text.as_bytes()), words);
        }
    }
}
