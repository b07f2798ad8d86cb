//! Who signs: openssl, in cosign's form (cosign, specs/SIGNATURE_SPEC.md). The skopeo of Debian 12 has that taken out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use husk_image::{layer::Sha256Digest, manifest::Platform, store::Store};
use serde_json::{Value, json};

use crate::{common::run, ground::Ground, images::add};

/// A pair of keys.
pub struct Signer {
    private: PathBuf,
    /// The one for the settings.
    pub public: PathBuf,
    kind: String,
}

/// What is signed, and the signature.
#[derive(Clone)]
pub struct Signed {
    pub payload: String,
    /// In base64.
    pub signature: String,
}

impl Signer {
    pub fn new(dir: &Path, name: &str, kind: &str) -> Self {
        let private = dir.join(format!("{name}.key"));
        let public = dir.join(format!("{name}.pub"));
        let mut openssl = Command::new("openssl");
        openssl.args(["genpkey", "-quiet", "-out"]).arg(&private);
        match kind {
            "RSA" => openssl.args(["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
            "ed25519" => openssl.args(["-algorithm", "ed25519"]),
            curve => openssl
                .args(["-algorithm", "EC", "-pkeyopt"])
                .arg(format!("ec_paramgen_curve:{curve}")),
        };
        run(&mut openssl);
        let mut openssl = Command::new("openssl");
        openssl.args(["pkey", "-pubout", "-in"]).arg(&private);
        run(openssl.arg("-out").arg(&public));
        Self {
            private,
            public,
            kind: kind.to_owned(),
        }
    }

    pub fn sign(&self, payload: &str) -> Signed {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), payload).unwrap();
        let mut openssl = Command::new("openssl");
        match &*self.kind {
            // It signs the text itself, the others its SHA-256.
            "ed25519" => {
                openssl.args(["pkeyutl", "-sign", "-rawin", "-inkey"]);
                openssl.arg(&self.private).arg("-in")
            }
            _ => openssl
                .args(["dgst", "-sha256", "-sign"])
                .arg(&self.private),
        };
        let signature = run(openssl.arg(file.path()));
        Signed {
            payload: payload.to_owned(),
            signature: STANDARD.encode(signature),
        }
    }
}

/// What cosign signs.
pub fn payload(place: &str, digest: &Sha256Digest) -> Value {
    json!({
        "critical": {
            "identity": {"docker-reference": place},
            "image": {"docker-manifest-digest": digest.to_string()},
            "type": "cosign container image signature",
        },
        "optional": null,
    })
}

/// Lays signatures beside the image `app` with this digest, in place of those that were there.
pub fn attach(ground: &Ground, digest: &Sha256Digest, signatures: &[Signed]) {
    let layout = ground.dir.path().join("signatures");
    let store = Store::open(&layout).unwrap();
    let layers: Vec<_> = signatures
        .iter()
        .map(|signed| {
            let (digest, size) = add(&store, signed.payload.as_bytes());
            json!({
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": digest, "size": size,
                "annotations": {"dev.cosignproject.cosign/signature": signed.signature},
            })
        })
        .collect();
    let config = json!({
        "architecture": "", "os": "", "created": "0001-01-01T00:00:00Z", "config": {},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>()},
    });
    let (config, size) = add(&store, config.to_string().as_bytes());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "layers": layers,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": size},
    });
    let (manifest, size) = add(&store, manifest.to_string().as_bytes());
    let descriptor = json!({"mediaType": kind, "digest": manifest, "size": size});
    let descriptor = serde_json::from_value(descriptor).unwrap();
    store.tag("signatures", &descriptor).unwrap();
    let tag = format!("app:sha256-{}.sig", digest.hex());
    let flags = ["--preserve-digests"];
    ground.registry.push(&layout, "signatures", &tag, &flags);
}

/// Makes an index of `app:1` and gives it this tag.
pub fn index(ground: &Ground, tag: &str) -> Sha256Digest {
    let layout = ground.dir.path().join("layout");
    let store = Store::open(&layout).unwrap();
    let names = store.names().unwrap();
    let (_, app) = names.iter().find(|(name, _)| name == "app").unwrap();
    let here = Platform::here();
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [{
        "mediaType": app.media_type(), "digest": app.digest(), "size": app.size(),
        "platform": {"os": here.os, "architecture": here.architecture},
    }]});
    let (digest, size) = add(&store, index.to_string().as_bytes());
    let descriptor = json!({"mediaType": kind, "digest": digest, "size": size});
    let descriptor = serde_json::from_value(descriptor).unwrap();
    store.tag(tag, &descriptor).unwrap();
    let flags = ["--all"];
    ground
        .registry
        .push(&layout, tag, &format!("app:{tag}"), &flags);
    digest.parse().unwrap()
}
