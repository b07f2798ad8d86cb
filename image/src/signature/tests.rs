use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn layer(kind: &str, size: u64, signature: Option<&str>) -> Value {
    let mut layer =
        json!({"mediaType": kind, "size": size, "digest": Sha256Digest::of(b"").to_string()});
    if let Some(signature) = signature {
        layer["annotations"] = json!({ANNOTATION: signature});
    }
    layer
}

fn manifest(layers: Vec<Value>) -> Vec<u8> {
    let config = layer("application/vnd.oci.image.config.v1+json", 2, None);
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
    manifest.to_string().into_bytes()
}

#[test]
fn a_manifest_has_signatures() {
    let found = signatures(&manifest(vec![
        layer("text/plain", 1, Some("AA==")),
        layer(KIND, 250, Some("AAEC")),
        layer(KIND, 250, Some("not base64")),
        layer(KIND, 250, None),
        layer(KIND, MAX_PAYLOAD + 1, Some("AA==")),
    ]))
    .unwrap();
    assert_eq!(found[0].as_ref().unwrap().bytes, [0, 1, 2]);
    assert!(matches!(
        found[1..],
        [
            Err(BadSignature::Form),
            Err(BadSignature::Form),
            Err(BadSignature::TooLarge(_)),
        ]
    ));
    let many = vec![layer(KIND, 1, Some("AA==")); MAX_SIGNATURES + 1];
    for text in [&manifest(many)[..], b"", b"{}", b"<html>"] {
        assert!(signatures(text).is_err());
    }
}

#[test]
fn a_signature_is_for_a_place() {
    let hex = "ab".repeat(32);
    let by_digest = format!("quay.io/team/app@sha256:{hex}");
    let digest: Sha256Digest = format!("sha256:{hex}").parse().unwrap();
    let other = format!("quay.io/team/app@sha256:{}", "cd".repeat(32));
    for (place, name, is_right) in [
        ("index.docker.io/library/app", "app", true),
        ("docker.io/library/app", "app:1", true),
        ("app", "docker.io/library/app:1", true),
        ("quay.io/team/app", "quay.io/team/app:1", true),
        ("quay.io/team/app:1", "quay.io/team/app:1", true),
        ("quay.io/team/app:1", &by_digest, true),
        (&by_digest, "quay.io/team/app:1", true),
        (&other, "quay.io/team/app:1", false),
        ("quay.io/team/app:1", "quay.io/team/app:2", false),
        ("quay.io/team/app:latest", "quay.io/team/app:2", false),
        ("quay.io/team/ap", "quay.io/team/app:1", false),
        ("quay.io/team", "quay.io/team/app:1", false),
        ("quay.io:443/team/app", "quay.io/team/app:1", false),
        ("team/app", "quay.io/team/app:1", false),
        ("localhost:5000/app", "localhost:5000/app:1", true),
        ("", "quay.io/team/app:1", false),
        ("*", "quay.io/team/app:1", false),
    ] {
        let is_it = is_of(place, &name.parse().unwrap(), &digest);
        assert_eq!(is_it, is_right, "{place}");
    }
}

#[test]
fn many_reasons_are_told_in_short() {
    let why = |count| (0..count).map(|_| BadSignature::Form).collect::<Vec<_>>();
    assert_eq!(said(&why(0)), "there is none");
    assert_eq!(said(&why(3)).matches("base64").count(), 3);
    assert!(said(&why(9)).ends_with("and 6 more"));
}

proptest! {
    #[test]
    fn whatever_is_there_is_read(
        layers in prop::collection::vec(("[a-z/+.]{0,9}", any::<u64>(), ".{0,9}"), 0..9),
        end in 0_usize..2000,
    ) {
        let layers = layers
            .iter()
            .map(|(kind, size, text)| layer(if kind.len() > 4 { KIND } else { kind }, *size, Some(text)));
        let text = manifest(layers.collect());
        if let Ok(found) = signatures(text.get(..end).unwrap_or(&text)) {
            prop_assert!(found.len() <= 9);
        }
    }
}
