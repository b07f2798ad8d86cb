//! Who may pull: what a registry's 401 asks for, and the answer to it (RFC 9110, section 11; distribution, "Token Authentication
//! Specification" and "Oauth2 Token Authentication").
//!
//! A registry either wants the puller's name and password with every request (Basic), or a token that it has from a server of the registry's
//! choice (Bearer). What shows who the puller is goes to these two and to nobody else, and over TLS unless the administrator has said that it
//! need not.

use http_auth::ChallengeParser;
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::{
    Endpoint, Failure, PullError, Settings,
    credentials::Login,
    request::{read, refusal},
};

/// The most bytes of an answer with a token.
const MAX_ANSWER: usize = 1 << 20;
/// As which husk asks for a token with an identity token.
const CLIENT: &str = "husk";
const DOING: &str = "asking for a token";

/// Who the puller is for one registry, and what the registry takes for that at present.
pub(super) struct Authority {
    pub(super) login: Login,
    /// Whom the administrator lets be spoken to without TLS.
    pub(super) settings: Settings,
    held: Mutex<Option<HeaderValue>>,
    /// Has the registry been told of the login, if it wants to know?
    pub(super) introduced: OnceCell<()>,
}

/// What a registry asks for.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

impl Authority {
    pub(super) fn new(login: Login, settings: Settings) -> Self {
        Self {
            login,
            settings,
            held: Mutex::default(),
            introduced: OnceCell::new(),
        }
    }

    /// What the registry took last.
    pub(super) async fn held(&self) -> Option<HeaderValue> {
        self.held.lock().await.clone()
    }
}

impl Endpoint {
    /// What to answer to a 401 with these headers, which the registry gave to a request with `used`. One at a time: what another has got
    /// meanwhile will do.
    pub(super) async fn authorize(
        &self,
        asked: &HeaderMap,
        used: Option<HeaderValue>,
    ) -> Result<HeaderValue, Failure> {
        let mut held = self.authority.held.lock().await;
        if let Some(other) = held.as_ref().filter(|other| Some(*other) != used.as_ref()) {
            return Ok(other.clone());
        }
        let denied = |why| Failure::lasting(self.denied(why));
        let value = match (challenge(asked), &self.authority.login) {
            (Some(Challenge::Bearer { realm, service }), _) => {
                let token = self.token(&realm, service.as_deref()).await?;
                format!("Bearer {token}")
            }
            (Some(Challenge::Basic), Login::User { name, password }) => {
                http_auth::basic::encode_credentials(name, password)
            }
            (Some(Challenge::Basic), Login::Identity(_)) => {
                return Err(denied(
                    "it wants a user name and a password; the login is an identity token",
                ));
            }
            (Some(Challenge::Basic), Login::Nobody) => return Err(denied("it wants a login")),
            (None, _) => return Err(denied("it does not say what it wants to be shown")),
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| {
            let why = "the token, or the password, has characters that there cannot be";
            Failure::lasting(self.registry_error(DOING, why))
        })?;
        value.set_sensitive(true);
        if used.as_ref() == Some(&value) {
            return Err(denied("it does not take what it has asked for"));
        }
        Ok(held.insert(value).clone())
    }

    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, Failure> {
        let mut url = self.realm(realm).map_err(Failure::lasting)?;
        let scope = format!("repository:{}:pull", self.reference.repository());
        let mut wanted = vec![("scope", &*scope)];
        wanted.extend(service.map(|service| ("service", service)));
        let request = if let Login::Identity(token) = &self.authority.login {
            wanted.extend([
                ("grant_type", "refresh_token"),
                ("client_id", CLIENT),
                ("refresh_token", token),
            ]);
            self.tokens.post(url).form(&wanted)
        } else {
            url.query_pairs_mut().extend_pairs(wanted);
            let request = self.tokens.get(url);
            match &self.authority.login {
                Login::User { name, password } => {
                    let value = http_auth::basic::encode_credentials(name, password);
                    request.header(AUTHORIZATION, value)
                }
                _ => request,
            }
        };
        let failed = |error: reqwest::Error| self.failed_request(DOING, &error.without_url());
        let mut response = request.send().await.map_err(failed)?;
        if !response.status().is_success() {
            let (status, after, words) = refusal(response).await;
            let mut failure = match (status.as_u16(), &self.authority.login) {
                // OAuth's for a refresh token that is none, or no longer (RFC 6749, section 5.2).
                (400, Login::Identity(_)) => Failure::lasting(self.denied(&words)),
                // Not the image, but the server of tokens.
                (404, _) => {
                    let why = format!("{realm} is not found: {words}");
                    Failure::lasting(self.registry_error(DOING, &why))
                }
                (code, _) => self.refused(DOING, code, &words),
            };
            failure.after = after;
            return Err(failure);
        }
        let (text, ended) = read(&mut response, MAX_ANSWER).await;
        ended.map_err(failed)?;
        let lasting = |why: &str| Failure::lasting(self.registry_error(DOING, why));
        if text.len() > MAX_ANSWER {
            return Err(lasting(&format!(
                "the answer has more than {MAX_ANSWER} bytes"
            )));
        }
        found(&text).ok_or_else(|| lasting("there is none in the answer"))
    }

    /// Where the token is to be had, if that may be told who the puller is.
    fn realm(&self, text: &str) -> Result<Url, PullError> {
        let url = Url::parse(text).map_err(|error| {
            self.registry_error(DOING, &format!("{text:?} is no address: {error}"))
        })?;
        let host = url.host_str().unwrap_or_default();
        let named = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let may_be_plain = self.is_plain && self.authority.settings.of(&named).is_plain(&named);
        match url.scheme() {
            "https" => Ok(url),
            "http" if may_be_plain => Ok(url),
            _ => Err(PullError::Realm {
                registry: self.host.clone(),
                realm: super::short(text),
            }),
        }
    }
}

/// The token of an answer: its older name, and OAuth's.
fn found(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(text).ok()?;
    let some = |token: Option<String>| token.filter(|token| !token.is_empty());
    some(answer.token).or(some(answer.access_token))
}

/// The challenge to answer: Bearer, which does not show the password to the registry, before Basic.
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut best = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let parsed = ChallengeParser::new(value.to_str().unwrap_or_default());
        for challenge in parsed.map_while(Result::ok) {
            let parameter = |key: &str| {
                let mut all = challenge.params.iter();
                let (_, value) = all.find(|(name, _)| name.eq_ignore_ascii_case(key))?;
                Some(value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameter("realm")
            {
                let service = parameter("service");
                return Some(Challenge::Bearer { realm, service });
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                best = Some(Challenge::Basic);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        challenge(&headers)
    }

    #[test]
    fn challenges_are_understood() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.to_owned(),
                service: service.map(str::to_owned),
            })
        };
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io""#;
        let found = bearer("https://auth.docker.io/token", Some("registry.docker.io"));
        assert_eq!(parsed(&[hub]), found);
        assert_eq!(parsed(&[r#"Basic realm="x""#, hub]), found);
        assert_eq!(
            parsed(&[r#"Basic realm="x", bearer Realm="y""#]),
            bearer("y", None)
        );
        assert_eq!(parsed(&[r#"basic realm="a, b""#]), Some(Challenge::Basic));
        for none in [
            &[][..],
            &[""],
            &["Negotiate"],
            &[r#"Bearer service="x""#],
            &["?"],
        ] {
            assert_eq!(parsed(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_token_has_two_names() {
        let token = |text: &str| found(text.as_bytes());
        assert_eq!(token(r#"{"token": "a", "expires_in": 60}"#).unwrap(), "a");
        assert_eq!(token(r#"{"token": "", "access_token": "b"}"#).unwrap(), "b");
        for none in ["", "{}", r#"{"token": 1}"#, r#"{"token": ""}"#] {
            assert_eq!(token(none), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_is_read(text in r#"((Bearer|Basic|,|=|"| |realm|\\|[ -~]){0,20})"#) {
            if let Some(Challenge::Bearer { realm, .. }) = parsed(&[&text]) {
                prop_assert!(realm.len() <= text.len());
            }
        }
    }
}
