//! As whom `husk` pulls: what `docker login` and `podman login` have left.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail the test"
)]

#[path = "../../image/tests/common/mod.rs"]
mod common;
#[path = "common/ground.rs"]
mod ground;
#[path = "../../image/tests/common/images.rs"]
mod images;
#[path = "../../image/tests/common/registry.rs"]
mod registry;

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use common::run;
use ground::{Ground, error};
use registry::{Fault, Proxy, Registry};

/// A registry for the user `user` with the password `secret`, and its images.
fn locked() -> Ground {
    let dir = tempfile::tempdir().unwrap();
    let users = dir.path().join("htpasswd");
    // htpasswd -nbB user secret
    let line = "user:$2b$04$lBQU9E.wP0wiByNAxrga8uQQvpR8ffTzXByRQPiTEswPly3uDt8y2\n";
    fs::write(&users, line).unwrap();
    let settings = format!(
        "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        users.display()
    );
    let mut ground = Ground::on(Registry::with(&settings), &["--dest-creds=user:secret"]);
    ground.kept.push(dir);
    ground
}

#[test]
fn a_login_is_found_where_docker_and_podman_leave_it() {
    let ground = locked();
    let (one, host) = (ground.one(), &ground.registry.host);
    let said = error(&mut ground.husk(&["pull", &one]), 1);
    assert!(
        said.contains("a stranger") && said.contains(&format!("docker login {host}")),
        "{said}"
    );
    let config = |name: &str, text: &str| {
        let path = ground.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    };
    // "user:secret" and "user:wrong"
    let auth = |auth: &str| format!(r#"{{"auths": {{"{host}": {{"auth": "{auth}"}}}}}}"#);
    let (right, wrong) = (auth("dXNlcjpzZWNyZXQ="), auth("dXNlcjp3cm9uZw=="));
    let docker = config("docker/config.json", &wrong);
    let with_docker = |root: &str| {
        let mut husk = ground.husk_in(root, &["pull", "-q", &one]);
        husk.env("DOCKER_CONFIG", docker.parent().unwrap());
        husk
    };
    let said = error(&mut with_docker("a"), 1);
    assert!(said.contains("the user \"user\""), "{said}");
    fs::write(&docker, &right).unwrap();
    run(&mut with_docker("a"));
    // Podman's.
    let podman = config("podman.json", &right);
    run(ground
        .husk_in("b", &["pull", "-q", &one])
        .env("REGISTRY_AUTH_FILE", podman));
    // The default place.
    config("home/.docker/config.json", &right);
    run(&mut ground.husk_in("c", &["pull", "-q", &one]));
    // A helper, which is asked by its name in PATH.
    let helper = config(
        "bin/docker-credential-test",
        &format!(
            "#!/bin/sh\nread -r server\n[ \"$server\" = {host} ] || {{ echo 'credentials not found in native keychain'; exit 1; }}\n\
             echo '{{\"ServerURL\": \"x\", \"Username\": \"user\", \"Secret\": \"secret\"}}'\n"
        ),
    );
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&docker, r#"{"credsStore": "test"}"#).unwrap();
    let path = format!(
        "{}:{}",
        helper.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    run(with_docker("d").env("PATH", &path));
    // One that has nothing for the registry: a stranger; one that is not there: its fault.
    let said = error(&mut with_docker("e"), 1);
    assert!(
        said.contains("credentials") && said.contains("helper"),
        "{said}"
    );
    fs::write(
        &helper,
        "#!/bin/sh\nread -r server\necho 'credentials not found in native keychain'\nexit 1\n",
    )
    .unwrap();
    let said = error(with_docker("e").env("PATH", &path), 1);
    assert!(said.contains("a stranger"), "{said}");
}

/// `husk pull` with an identity token for this host, as a login in a browser leaves it.
fn with_token(ground: &Ground, root: &str, host: &str) -> Command {
    let docker = ground.dir.path().join(format!("docker-{root}"));
    fs::create_dir_all(&docker).unwrap();
    let text =
        format!(r#"{{"auths": {{"{host}": {{"auth": "dTo=", "identitytoken": "se+cret"}}}}}}"#);
    fs::write(docker.join("config.json"), text).unwrap();
    let mut husk = ground.husk_in(root, &["pull", "-q", &format!("{host}/one:1")]);
    husk.env("DOCKER_CONFIG", docker);
    husk
}

/// A registry with tokens, and what its server of tokens says.
fn giving(upstream: &str, says: impl Fn(&str) -> Fault + Send + Sync + 'static) -> Proxy {
    Proxy::new(upstream, move |request, _| {
        if request.path == "/token" && request.head.starts_with("POST ") {
            return says(&request.body);
        }
        if request.header("authorization") == Some("Bearer right") {
            return Fault::None;
        }
        let host = request.header("host").unwrap();
        let header =
            format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"a b\"\r\n");
        Fault::Answer(401, header, Vec::new())
    })
}

#[test]
fn an_identity_token_is_given_for_a_token() {
    let ground = Ground::new();
    let upstream = &ground.registry.host;
    let proxy = giving(upstream, |body| {
        let mut fields: Vec<_> = body.split('&').collect();
        fields.sort_unstable();
        let wanted = [
            "client_id=husk",
            "grant_type=refresh_token",
            "refresh_token=se%2Bcret",
            "scope=repository%3Aone%3Apull",
            "service=a+b",
        ];
        match fields == wanted {
            true => Fault::Answer(
                200,
                String::new(),
                br#"{"access_token": "right", "expires_in": 60}"#.into(),
            ),
            false => Fault::Answer(500, String::new(), body.into()),
        }
    });
    run(&mut with_token(&ground, "a", &proxy.host));
    // One that has come to its end.
    let proxy = giving(upstream, |_| {
        Fault::Answer(400, String::new(), br#"{"error": "invalid_grant"}"#.into())
    });
    let said = error(&mut with_token(&ground, "b", &proxy.host), 1);
    assert!(
        said.contains("whoever has this identity token") && said.contains("invalid_grant"),
        "{said}"
    );
    // It is in the form, which would go along.
    let elsewhere = Proxy::new(upstream, |_, _| Fault::None);
    let header = format!("Location: http://{}/token\r\n", elsewhere.host);
    let proxy = giving(upstream, move |_| {
        Fault::Answer(307, header.clone(), Vec::new())
    });
    let said = error(&mut with_token(&ground, "c", &proxy.host), 1);
    assert!(said.contains("another host"), "{said}");
    assert!(elsewhere.seen().is_empty());
    // A registry without tokens has no use for it.
    let locked = locked();
    let said = error(&mut with_token(&locked, "d", &locked.registry.host), 1);
    assert!(said.contains("a user name and a password"), "{said}");
}

#[test]
fn a_login_is_shown_to_a_registry_that_hides_what_strangers_may_not_have() {
    let ground = locked();
    let proxy = Proxy::new(&ground.registry.host, |request, _| {
        match request.header("authorization") {
            None if request.path != "/v2/" => Fault::Answer(404, String::new(), Vec::new()),
            _ => Fault::None,
        }
    });
    let docker = ground.dir.path().join("docker");
    fs::create_dir(&docker).unwrap();
    let host = &proxy.host;
    // "user:secret"
    let text = format!(r#"{{"auths": {{"{host}": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#);
    fs::write(docker.join("config.json"), text).unwrap();
    let mut husk = ground.husk(&["pull", "-q", &format!("{host}/one:1")]);
    run(husk.env("DOCKER_CONFIG", &docker));
    let said = error(
        &mut ground.husk_in("b", &["pull", &format!("{host}/one:1")]),
        1,
    );
    assert!(said.contains("has no image"), "{said}");
}
