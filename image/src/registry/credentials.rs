//! Who the puller is, as `docker login` or `podman login` has left it: in a file, or with a helper.

use std::{env, fs::File, io::BufReader, path::PathBuf, time::Duration};

use docker_credential::{
    CredentialRetrievalError as Error, DockerCredential, get_credential_from_reader,
};

use super::PullError;

/// As whom to pull.
pub(super) enum Login {
    /// Nobody in particular.
    Nobody,
    /// A user, with a password or what the registry takes instead of one.
    User { name: String, password: String },
    /// Whoever this has been given to, as a login in a browser ends (OAuth's refresh token).
    Identity(String),
}

/// How long a helper may take; it may ask a key ring, or its user.
const HELPER: Duration = Duration::from_secs(60);

/// What Docker calls its own registry in its configuration.
const HUB: &str = "https://index.docker.io/v1/";

/// What every helper says of a registry that it has nothing for (docker-credential-helpers, credentials/error.go).
const NOT_FOUND: &str = "credentials not found";

/// The credentials for a registry: Docker's, or else podman's; anonymous where neither has any.
///
/// # Errors
/// When there are some that cannot be had or used: an anonymous attempt would fail with the wrong reason.
pub(super) async fn find(registry: &str) -> Result<Login, PullError> {
    let failed = |why: String| PullError::Credentials {
        registry: registry.to_owned(),
        why,
    };
    let server = match registry {
        "docker.io" => HUB.to_owned(),
        other => other.to_owned(),
    };
    let look = tokio::task::spawn_blocking(move || {
        files()
            .iter()
            .find_map(|path| look_in(path, &server).transpose())
            .transpose()
    });
    let found = match tokio::time::timeout(HELPER, look).await {
        Ok(Ok(found)) => found.map_err(failed)?,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => {
            let seconds = HELPER.as_secs();
            return Err(failed(format!(
                "the credential helper has not answered in {seconds} s"
            )));
        }
    };
    Ok(found.unwrap_or(Login::Nobody))
}

/// Where the two look (docs.docker.com, "DOCKER_CONFIG"; containers-auth.json(5)).
fn files() -> Vec<PathBuf> {
    let dir = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let home = dir("HOME").unwrap_or_else(|| PathBuf::from("/root"));
    let docker = dir("DOCKER_CONFIG").unwrap_or_else(|| home.join(".docker"));
    let podman = dir("REGISTRY_AUTH_FILE").unwrap_or_else(|| {
        let uid = rustix::process::getuid().as_raw();
        dir("XDG_RUNTIME_DIR")
            .unwrap_or_else(|| PathBuf::from(format!("/run/containers/{uid}")))
            .join("containers/auth.json")
    });
    vec![
        docker.join("config.json"),
        podman,
        home.join(".config/containers/auth.json"),
    ]
}

fn look_in(path: &PathBuf, server: &str) -> Result<Option<Login>, String> {
    // A file that cannot be opened is, nearly always, none.
    let Ok(file) = File::open(path) else {
        return Ok(None);
    };
    let of = |why: &str| format!("{why} (in {})", path.display());
    match get_credential_from_reader(BufReader::new(file), server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(Some(Login::User {
            name: user,
            password,
        })),
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Login::Identity(token))),
        Err(Error::NoCredentialConfigured) => Ok(None),
        Err(Error::HelperFailure { stdout, stderr, .. })
            if stdout.contains(NOT_FOUND) || stderr.contains(NOT_FOUND) =>
        {
            Ok(None)
        }
        Err(error) => Err(of(error.to_string().trim_end())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn look(text: &str, server: &str) -> Result<Option<Login>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, text).unwrap();
        look_in(&path, server)
    }

    #[test]
    fn what_login_has_left_is_found() {
        // "user:secret"
        let text = format!(
            r#"{{"auths": {{"{HUB}": {{"auth": "dXNlcjpzZWNyZXQ="}}, "localhost:5000": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#
        );
        for server in [HUB, "localhost:5000"] {
            let Login::User { name, password } = look(&text, server).unwrap().unwrap() else {
                panic!("no user for {server}");
            };
            assert_eq!((&*name, &*password), ("user", "secret"));
        }
        assert!(look(&text, "other").unwrap().is_none());
        assert!(look("{}", HUB).unwrap().is_none());
    }

    #[test]
    fn an_identity_token_is_no_password() {
        let token = r#"{"auths": {"x": {"auth": "dTo=", "identitytoken": "t"}}}"#;
        let found = look(token, "x").ok().flatten();
        assert!(matches!(found, Some(Login::Identity(token)) if token == "t"));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let said = |text| look(text, "x").err().unwrap();
        assert!(said("{").contains("config.json"));
        let helper = r#"{"credHelpers": {"x": "husk-test-of-a-helper-that-is-not-there"}}"#;
        assert!(said(helper).contains("helper"));
    }
}
