//! Images of a test's own making.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{fs, path::Path, process::Command};

use husk_image::{
    layer::Sha256Digest,
    manifest::Platform,
    store::{Ingest, Store},
};
use oci_spec::image::Descriptor;
use serde_json::json;

use crate::common::run;

/// Adds a blob: its digest and its size.
pub fn add(store: &Store, data: &[u8]) -> (String, usize) {
    let digest = Sha256Digest::of(data);
    if let Ingest::Partial(mut partial) = store.ingest(&digest, data.len() as u64).unwrap() {
        partial.write(data).unwrap();
        partial.commit().unwrap();
    }
    (digest.to_string(), data.len())
}

/// A layer of what a directory has: the blob, and the digest of what is in it. Compressed, as skopeo compresses one that is not.
pub fn layer(dir: &Path) -> (Vec<u8>, Sha256Digest) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--format=posix",
        "--xattrs",
        "--xattrs-include=*",
        "--file",
    ]);
    run(tar.arg(file.path()).arg("--directory").arg(dir).arg("."));
    compressed(file.path())
}

/// The same of an archive that is there.
pub fn compressed(tar: &Path) -> (Vec<u8>, Sha256Digest) {
    let blob = run(Command::new("gzip").args(["-1", "-c"]).arg(tar));
    (blob, Sha256Digest::of(&fs::read(tar).unwrap()))
}

/// Makes an image of these layers, and gives it a name.
pub fn publish(store: &Store, name: &str, layers: &[(Vec<u8>, Sha256Digest)]) {
    publish_as(store, name, "tar+gzip", layers);
}

/// The same with layers of this media type.
pub fn publish_as(store: &Store, name: &str, kind: &str, layers: &[(Vec<u8>, Sha256Digest)]) {
    let diff_ids: Vec<_> = layers
        .iter()
        .map(|(_, diff_id)| diff_id.to_string())
        .collect();
    let layers: Vec<_> = layers
        .iter()
        .map(|(blob, _)| {
            let (digest, size) = add(store, blob);
            let kind = format!("application/vnd.oci.image.layer.v1.{kind}");
            json!({"mediaType": kind, "digest": digest, "size": size})
        })
        .collect();
    let config = json!({
        "architecture": Platform::here().architecture, "os": "linux", "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (digest, size) = add(store, config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": size},
    });
    let (digest, size) = add(store, manifest.to_string().as_bytes());
    let descriptor = json!({"mediaType": manifest["mediaType"], "digest": digest, "size": size});
    let descriptor: Descriptor = serde_json::from_value(descriptor).unwrap();
    store.tag(name, &descriptor).unwrap();
}
