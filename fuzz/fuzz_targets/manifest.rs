//! What a registry says of an image, as a pull reads it: an index or a manifest, and after a NUL the configuration.
#![no_main]

use husk_image::manifest::{Document, MAX_LAYERS, Manifest, Platform, choose, config};
use libfuzzer_sys::fuzz_target;
use oci_spec::image::Descriptor;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (text, configuration) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let kinds = [
        None,
        Some("application/vnd.oci.image.index.v1+json"),
        Some("application/vnd.docker.distribution.manifest.v2+json"),
    ];
    for kind in kinds {
        match Document::parse(text, kind) {
            Ok(Document::Index(index)) => {
                // The store keeps what it has read of an index in one of its own.
                let again = serde_json::to_vec(&index).unwrap();
                match Document::parse(&again, kinds[1]) {
                    Ok(Document::Index(again)) => assert_eq!(again, index),
                    other => panic!("{other:?}"),
                }
                for platform in ["linux/amd64", "linux/arm64/v8", "linux/arm/v7"] {
                    let platform: Platform = platform.parse().unwrap();
                    match choose(&index, &platform) {
                        Ok(chosen) => {
                            let is_it = |d: &Descriptor| {
                                d.digest().to_string() == chosen.digest.to_string()
                                    && d.size() == chosen.size
                            };
                            assert!(index.manifests().iter().any(is_it));
                        }
                        Err(error) => drop(error.to_string()),
                    }
                }
            }
            Ok(Document::Manifest(manifest)) => layers(&manifest, configuration),
            Err(error) => drop(error.to_string()),
        }
    }
});

fn layers(manifest: &Manifest, configuration: &[u8]) {
    assert!(manifest.layers.len() <= MAX_LAYERS);
    let config = match config(configuration) {
        Ok(config) => config,
        Err(error) => return drop(error.to_string()),
    };
    match manifest.layers(&config, &Platform::here()) {
        Ok(layers) => {
            let named = layers.iter().map(|layer| (layer.digest, layer.size));
            assert!(
                named.eq(manifest
                    .layers
                    .iter()
                    .map(|layer| (layer.digest, layer.size)))
            );
        }
        Err(error) => drop(error.to_string()),
    }
}
