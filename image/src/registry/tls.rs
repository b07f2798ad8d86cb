//! Clients of one registry, and whom they trust.

use oci_client::{
    Client as OciClient,
    client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
};

use super::{Patience, told_by};

/// As which husk introduces itself.
const AGENT: &str = concat!("husk/", env!("CARGO_PKG_VERSION"));

/// `oci-client`'s, and the one that it is built on. They trust these certificates and the system's.
///
/// Where the system has none, `oci-client` (0.18) panics, as it makes a client with reqwest's defaults first; `husk` sees to it that there are
/// some.
pub(super) fn clients(
    own: &[Vec<u8>],
    is_plain: bool,
    patience: Patience,
) -> Result<(OciClient, reqwest::Client), String> {
    // Whoever was first has chosen the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let roots: Vec<reqwest::Certificate> = own
        .iter()
        .map(|pem| reqwest::Certificate::from_pem(pem))
        .collect::<Result<_, _>>()
        .map_err(|e| told_by(&e))?;
    let http = reqwest::Client::builder()
        .user_agent(AGENT)
        .connect_timeout(patience.connect)
        .read_timeout(patience.idle)
        .tls_certs_merge(roots)
        .build()
        .map_err(|e| told_by(&e))?;
    let pem = |data: &Vec<u8>| Certificate {
        encoding: CertificateEncoding::Pem,
        data: data.clone(),
    };
    let config = ClientConfig {
        protocol: if is_plain {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        extra_root_certificates: own.iter().map(pem).collect(),
        read_timeout: Some(patience.idle),
        connect_timeout: Some(patience.connect),
        user_agent: AGENT,
        ..ClientConfig::default()
    };
    let oci = OciClient::try_from(config).map_err(|e| told_by(&e))?;
    Ok((oci, http))
}

/// The certificates of a file in PEM, each by itself, as reqwest takes them.
pub(super) fn split(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    const END: &str = "-----END CERTIFICATE-----";
    let text = std::str::from_utf8(pem).map_err(|e| e.to_string())?;
    let all: Vec<Vec<u8>> = text
        .split_inclusive(END)
        .filter(|part| part.ends_with(END))
        .map(|part| part.as_bytes().to_vec())
        .collect();
    if all.is_empty() {
        return Err("it has no certificate in PEM".to_owned());
    }
    Ok(all)
}
