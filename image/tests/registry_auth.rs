//! Who may pull: tokens, who gives them, and who must not learn of them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

mod common;
#[path = "common/ground.rs"]
mod ground;
#[path = "common/images.rs"]
mod images;
#[path = "common/registry.rs"]
mod registry;

use std::sync::{
    Arc, Barrier,
    atomic::{AtomicUsize, Ordering},
};

use common::noise;
use ground::{Ground, LONG, long, options, pull_at, pull_with, ranges};
use husk_image::registry::{PullError, Registry as Said};
use registry::{Fault, Proxy, Registry, certificate};

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let ground = Ground::new(&[]);
    let proxy = Proxy::new(&ground.registry.host, |request, _| {
        let host = request.header("host").unwrap().to_owned();
        if request.path.starts_with("/token?") {
            let text = match request.path.contains("scope=repository%3Aapp%3Apull") {
                true => &br#"{"token": "let-me-in", "expires_in": 300}"#[..],
                false => b"{}",
            };
            return Fault::Answer(200, String::new(), text.to_vec());
        }
        if request.header("authorization") == Some("Bearer let-me-in") {
            return Fault::None;
        }
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
        Fault::Answer(401, challenge, Vec::new())
    });
    let (pulled, _) = pull_at(&ground.store("store"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
}

/// What a registry demands that has its tokens from there.
fn demand(realm: &str) -> Fault {
    let header = format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"test\"\r\n");
    Fault::Answer(401, header, Vec::new())
}

/// A registry that asks for a token, and answers so when somebody wants one.
fn giving(ground: &Ground, token: Fault) -> Proxy {
    Proxy::new(&ground.registry.host, move |request, _| {
        if request.path.starts_with("/token") {
            return token.clone();
        }
        match request.header("authorization") {
            Some("Bearer right") => Fault::None,
            _ => demand(&format!("http://{}/token", request.header("host").unwrap())),
        }
    })
}

#[test]
fn a_token_that_ends_in_a_pull_is_renewed() {
    let ground = Ground::new(&[]);
    let [lower, upper] = [0, 1].map(|at| format!("blobs/{}", ground.layers[at]));
    // The first token is good until the upper layer has been cut off.
    let given = AtomicUsize::new(0);
    let good = AtomicUsize::new(1);
    // The layers come at once: neither is refused, and has the next token for both, before the other has asked with the first.
    let both = Barrier::new(2);
    let proxy = Proxy::new(&ground.registry.host, move |request, before| {
        if request.path.starts_with("/token") {
            let number = given.fetch_add(1, Ordering::SeqCst) + 1;
            let text = format!(r#"{{"access_token": "number-{number}", "expires_in": 60}}"#);
            return Fault::Answer(200, String::new(), text.into_bytes());
        }
        let is_upper = request.path.contains(&upper);
        if is_upper && before == 1 || request.path.contains(&lower) && before == 0 {
            both.wait();
        }
        let right = format!("Bearer number-{}", good.load(Ordering::SeqCst));
        if request.header("authorization") != Some(&*right) {
            return demand(&format!("http://{}/token", request.header("host").unwrap()));
        }
        if is_upper && before == 0 {
            good.store(2, Ordering::SeqCst);
            return Fault::CutOff(1_000_000);
        }
        Fault::None
    });
    let (pulled, _) = pull_at(&ground.store("store"), &proxy.host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    let asked = ["bytes=0-", "bytes=1000000-", "bytes=1000000-"];
    assert_eq!(ranges(&proxy, &ground.layers[1]), asked);
    assert_eq!(ranges(&proxy, &ground.layers[0]), ["bytes=0-"; 2]);
    let seen = proxy.seen();
    let tokens = seen.iter().filter(|r| r.path.starts_with("/token"));
    assert_eq!(tokens.count(), 2, "each token is asked for once");
}

#[test]
fn a_token_that_cannot_be_had_is_told() {
    let ground = Ground::new(&[]);
    let answer = |status, text: &str| Fault::Answer(status, String::new(), text.into());
    for (number, (fault, words)) in [
        (answer(200, "{}"), "there is none in the answer"),
        (answer(200, "<html>"), "there is none in the answer"),
        (answer(200, r#"{"token": "a\nb"}"#), "characters"),
        (answer(200, r#"{"token": "wrong"}"#), "a stranger"),
        (answer(404, ""), "asking for a token"),
        (answer(403, r#"{"details": "not you"}"#), "not you"),
        // These have no end.
        (
            Fault::EndlessAnswer(200, String::new()),
            "more than 1048576 bytes",
        ),
        (Fault::EndlessAnswer(403, String::new()), "a stranger"),
    ]
    .into_iter()
    .enumerate()
    {
        let proxy = giving(&ground, fault.clone());
        let error = pull_at(&ground.store("store"), &proxy.host).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words), "{number}: {fault:?}: {text}");
        assert!(!matches!(error, PullError::NotFound { .. }), "{text}");
        let seen = proxy.seen();
        let tokens = seen.iter().filter(|r| r.path.starts_with("/token"));
        assert!(tokens.count() <= 2, "{fault:?}: it does not pass");
    }
    // What does pass.
    let busy = Proxy::new(&ground.registry.host, |request, before| {
        if request.path.starts_with("/token") {
            return match before {
                0 => Fault::Answer(429, String::new(), Vec::new()),
                _ => Fault::Answer(200, String::new(), br#"{"token": "right"}"#.into()),
            };
        }
        match request.header("authorization") {
            Some("Bearer right") => Fault::None,
            _ => demand(&format!("http://{}/token", request.header("host").unwrap())),
        }
    });
    pull_at(&ground.store("busy"), &busy.host).unwrap();
}

#[test]
fn a_token_is_not_asked_for_in_clear_text() {
    // The registry has TLS, the server of its tokens has not.
    let dir = tempfile::tempdir().unwrap();
    let (key, certificate) = certificate(dir.path());
    let nobody = Proxy::new("127.0.0.1:1", |_, _| Fault::None);
    let registry = Registry::with(&format!(
        "  tls:\n    certificate: {certificate}\n    key: {key}\nauth:\n  token:\n    realm: http://{host}/token\n    service: test\n    \
         issuer: test\n    rootcertbundle: {certificate}\n",
        certificate = certificate.display(),
        key = key.display(),
        host = nobody.host,
    ));
    let mut options = options();
    let said = Said {
        plain_http: Some(false),
        ca_file: Some(certificate),
        ..Said::default()
    };
    options
        .settings
        .registry
        .insert(registry.host.clone(), said);
    let store = husk_image::store::Store::open(&dir.path().join("store")).unwrap();
    let name = format!("{}/app:1", registry.host);
    let error = pull_with(&store, &name, &options, &Arc::default()).unwrap_err();
    let is_told = matches!(&error, PullError::Realm { realm, .. } if realm.contains(&nobody.host));
    assert!(is_told, "{error}");
    assert!(nobody.seen().is_empty());
    // The registry has none either, but somebody else would be told.
    let plain = Proxy::new(&registry.host, |_, _| {
        demand("http://tokens.invalid:80/token")
    });
    let error = pull_at(&store, &plain.host).unwrap_err();
    assert!(matches!(&error, PullError::Realm { .. }), "{error}");
}

#[test]
fn a_redirect_takes_no_token_along() {
    let ground = Ground::new(&[]);
    let elsewhere = Proxy::new(&ground.registry.host, |_, _| Fault::None);
    let locked = Proxy::new(&ground.registry.host, |_, _| {
        demand("http://127.0.0.1:1/token")
    });
    let leading = |to: &Proxy| {
        let to = to.host.clone();
        Proxy::new(&ground.registry.host, move |request, _| {
            let host = request.header("host").unwrap();
            if request.path.starts_with("/token") {
                return Fault::Answer(200, String::new(), br#"{"token": "right"}"#.into());
            }
            if request.header("authorization") != Some("Bearer right") {
                return demand(&format!("http://{host}/token"));
            }
            match request.path.contains("/blobs/") {
                true => {
                    let header = format!("Location: http://{to}{}\r\n", request.path);
                    Fault::Answer(307, header, Vec::new())
                }
                false => Fault::None,
            }
        })
    };
    let (pulled, _) = pull_at(&ground.store("store"), &leading(&elsewhere).host).unwrap();
    assert_eq!(long(&pulled), noise(0, LONG));
    // Nor does whoever it leads to get one by asking.
    let error = pull_at(&ground.store("locked"), &leading(&locked).host).unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
    for proxy in [&elsewhere, &locked] {
        let seen = proxy.seen();
        assert!(!seen.is_empty());
        assert!(seen.iter().all(|r| r.header("authorization").is_none()));
    }
}

#[test]
fn nobody_is_led_out_of_tls() {
    let dir = tempfile::tempdir().unwrap();
    let (key, certificate) = certificate(dir.path());
    let nobody = Proxy::new("127.0.0.1:1", |_, _| Fault::None);
    let registry = Registry::with(&format!(
        "  tls:\n    certificate: {}\n    key: {}\nmiddleware:\n  storage:\n    - name: redirect\n      options:\n        baseurl: http://{}/\n",
        certificate.display(),
        key.display(),
        nobody.host,
    ));
    let ground = Ground::on(registry, &[]);
    let mut options = options();
    let said = Said {
        plain_http: Some(false),
        ca_file: Some(certificate),
        ..Said::default()
    };
    let host = &ground.registry.host;
    options.settings.registry.insert(host.clone(), said);
    let name = format!("{host}/app:1");
    let store = ground.store("store");
    let error = pull_with(&store, &name, &options, &Arc::default()).unwrap_err();
    assert!(error.to_string().contains("from https to http"), "{error}");
    assert!(nobody.seen().is_empty());
}
