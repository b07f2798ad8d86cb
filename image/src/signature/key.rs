//! Public keys of those who sign.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use rustls::pki_types::{
    SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer,
    pem::{self, PemObject as _},
};
use webpki::{RawPublicKeyEntity, ring};

/// The most bytes of a key's file.
const MAX_FILE: u64 = 64 << 10;

/// What cosign makes, and takes of other tools: the digest is SHA-256 whatever the key, but for P-384 in some versions.
static ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 5] = [
    ring::ECDSA_P256_SHA256,
    ring::ECDSA_P384_SHA256,
    ring::ECDSA_P384_SHA384,
    ring::ED25519,
    ring::RSA_PKCS1_2048_8192_SHA256,
];

/// A file of keys that can check signatures: mostly one, and two while one takes the other's place.
#[derive(Debug, Clone)]
pub struct KeyFile {
    path: PathBuf,
    keys: Vec<SubjectPublicKeyInfoDer<'static>>,
}

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Where it is depends on who asks.
    #[error("the key {} must be named by its whole path, from / on", .0.display())]
    Relative(PathBuf),
    /// The file.
    #[error("cannot read the key {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("{} has no public key in PEM, as `cosign public-key` and `openssl pkey -pubout` write it", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: pem::Error,
    },
    /// Its kind.
    #[error("{} has a key of a kind that husk does not know; it knows ECDSA's P-256 and P-384, Ed25519, and RSA", .0.display())]
    Kind(PathBuf),
}

impl KeyFile {
    /// Reads it, in PEM.
    ///
    /// # Errors
    /// When there is none, or one that cannot be used.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        if !path.is_absolute() {
            return Err(KeyError::Relative(path.to_owned()));
        }
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        let path = path.to_owned();
        if let Err(source) = read {
            return Err(KeyError::Read { path, source });
        }
        let keys: Result<Vec<_>, _> = SubjectPublicKeyInfoDer::pem_slice_iter(&text).collect();
        match keys {
            Ok(keys) if keys.is_empty() => Err(KeyError::Pem {
                path,
                source: pem::Error::NoItemsFound,
            }),
            Ok(keys) if keys.iter().all(is_known) => Ok(Self { path, keys }),
            Ok(_) => Err(KeyError::Kind(path)),
            Err(source) => Err(KeyError::Pem { path, source }),
        }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is this a signature of that, made with the other half of one of them?
    pub(crate) fn has_made(&self, signature: &[u8], of: &[u8]) -> bool {
        let by = |key| {
            let mut all = ALGORITHMS.iter();
            all.any(|algorithm| verify(key, *algorithm, of, signature) == Ok(()))
        };
        self.keys.iter().any(by)
    }
}

/// One of the algorithms takes the key for its own, and misses the signature.
fn is_known(key: &SubjectPublicKeyInfoDer<'_>) -> bool {
    let mut all = ALGORITHMS.iter();
    all.any(|algorithm| {
        let refused = Err(webpki::Error::InvalidSignatureForPublicKey);
        verify(key, *algorithm, b"", b"") == refused
    })
}

fn verify(
    key: &SubjectPublicKeyInfoDer<'_>,
    algorithm: &dyn SignatureVerificationAlgorithm,
    of: &[u8],
    signature: &[u8],
) -> Result<(), webpki::Error> {
    RawPublicKeyEntity::try_from(key)?.verify_signature(algorithm, of, signature)
}
