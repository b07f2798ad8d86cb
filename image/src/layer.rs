//! A layer on its way: digested, decompressed, digested again, each byte once, and no more of them than agreed.

use std::{
    fmt,
    io::{self, BufReader, Read},
    str::FromStr,
};

use flate2::bufread::MultiGzDecoder;
use oci_spec::image::MediaType;
use sha2::{Digest as _, Sha256};

/// log2 of the most memory that a zstd stream may ask for: 32 MiB. RFC 8878 (3.1.1.1.2) has every decoder take 8 MiB; only `--ultra` asks for more.
const ZSTD_WINDOW_LOG: u32 = 25;

/// Below this many bytes a layer may expand as it likes.
const ALWAYS_ALLOWED: u64 = 16 << 20;

/// How much a layer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the tar stream.
    pub bytes: u64,
    /// Bytes of the tar stream for each of the blob. gzip has at most 1032.
    pub ratio: u64,
}

impl Default for Limits {
    /// 64 GiB, and 500 bytes for one.
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            ratio: 500,
        }
    }
}

/// A SHA-256 digest, shown as OCI has it: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// Of these bytes.
    pub fn of(data: &[u8]) -> Self {
        Sha256::new_with_prefix(data).into()
    }

    /// Its 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl From<Sha256> for Sha256Digest {
    fn from(sha256: Sha256) -> Self {
        Self(sha256.finalize().into())
    }
}

/// No digest that husk can use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no digest: \"sha256:\" and 64 hexadecimal digits in lower case are one")]
pub struct BadDigest(String);

impl FromStr for Sha256Digest {
    type Err = BadDigest;

    /// Reads it as it is shown (image-spec, descriptor.md, "Digests").
    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let parse = || {
            let hex = text.strip_prefix("sha256:")?.as_bytes();
            let digit = |byte: u8| match byte {
                b'0'..=b'9' => Some(byte - b'0'),
                b'a'..=b'f' => Some(byte - b'a' + 10),
                _ => None,
            };
            let (pairs, rest) = hex.as_chunks::<2>();
            let bytes: Option<Vec<u8>> = pairs
                .iter()
                .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
                .collect();
            rest.is_empty().then(|| bytes?.try_into().ok())?
        };
        parse().map(Self).ok_or_else(|| BadDigest(text.to_owned()))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// More than agreed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TooMuch {
    /// In all.
    #[error("the layer unpacks to more than the {0} bytes that one may have")]
    Bytes(u64),
    /// For what there is of the blob.
    #[error("the layer unpacks to more than {0} times its size, which no honest one does")]
    Ratio(u64),
}

/// Reads the tar stream out of a blob; the compression is told by its first bytes.
pub struct Layer<R: Read> {
    decoder: Decoder<R>,
    told: Told,
    limits: Limits,
}

/// What a whole layer was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Of the blob.
    pub digest: Sha256Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Of the tar stream: OCI's diffID.
    pub diff_id: Sha256Digest,
    /// Bytes of the tar stream.
    pub unpacked: u64,
    /// How the blob is compressed.
    pub compression: Compression,
}

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Summary {
    /// OCI's name of such a layer (image-spec, layer.md).
    pub fn media_type(&self) -> MediaType {
        match self.compression {
            Compression::None => MediaType::ImageLayer,
            Compression::Gzip => MediaType::ImageLayerGzip,
            Compression::Zstd => MediaType::ImageLayerZstd,
        }
    }
}

enum Decoder<R: Read> {
    Plain(Buffered<R>),
    Gzip(Box<MultiGzDecoder<Buffered<R>>>),
    Zstd(zstd::Decoder<'static, Buffered<R>>),
}

/// The blob, whose first bytes have been looked at.
type Buffered<R> = BufReader<Counted<io::Chain<io::Cursor<Vec<u8>>, R>>>;

/// Digest and count of what has passed.
#[derive(Default)]
struct Told {
    sha256: Sha256,
    bytes: u64,
}

impl Told {
    fn add(&mut self, data: &[u8]) {
        self.sha256.update(data);
        self.bytes += data.len() as u64;
    }

    fn digest(self) -> Sha256Digest {
        self.sha256.into()
    }
}

struct Counted<R> {
    inner: R,
    told: Told,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.told.add(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl<R: Read> Layer<R> {
    /// A layer whose blob this is.
    ///
    /// # Errors
    /// When the first bytes cannot be read.
    pub fn new(blob: R, limits: Limits) -> io::Result<Self> {
        const GZIP: &[u8] = &[0x1f, 0x8b];
        const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
        // RFC 8878, 3.1.2: 0x184D2A50 to 0x184D2A5F, little-endian; some writers begin with one.
        const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];
        let (mut first, mut blob) = (Vec::new(), blob);
        (&mut blob).take(4).read_to_end(&mut first)?;
        let is_zstd = first.starts_with(ZSTD)
            || first.first().is_some_and(|byte| byte & 0xf0 == 0x50)
                && first.get(1..) == Some(ZSTD_SKIPPABLE);
        let is_gzip = first.starts_with(GZIP);
        let whole = BufReader::with_capacity(
            128 << 10,
            Counted {
                inner: io::Cursor::new(first).chain(blob),
                told: Told::default(),
            },
        );
        let decoder = if is_gzip {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(whole)))
        } else if is_zstd {
            let mut decoder = zstd::Decoder::with_buffer(whole)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Decoder::Zstd(decoder)
        } else {
            Decoder::Plain(whole)
        };
        Ok(Self {
            decoder,
            told: Told::default(),
            limits,
        })
    }

    /// Reads what is left and says what it was, all in all.
    ///
    /// # Errors
    /// When the rest cannot be read.
    pub fn finish(mut self) -> io::Result<Summary> {
        io::copy(&mut self, &mut io::sink())?;
        let (mut blob, compression) = match self.decoder {
            Decoder::Plain(blob) => (blob, Compression::None),
            Decoder::Gzip(decoder) => (decoder.into_inner(), Compression::Gzip),
            Decoder::Zstd(decoder) => (decoder.finish(), Compression::Zstd),
        };
        io::copy(&mut blob, &mut io::sink())?;
        let blob = blob.into_inner().told;
        Ok(Summary {
            size: blob.bytes,
            digest: blob.digest(),
            unpacked: self.told.bytes,
            diff_id: self.told.digest(),
            compression,
        })
    }

    fn check(&self) -> Result<(), TooMuch> {
        let blob = match &self.decoder {
            Decoder::Plain(_) => return self.check_bytes(),
            Decoder::Gzip(decoder) => decoder.get_ref(),
            Decoder::Zstd(decoder) => decoder.get_ref(),
        };
        let allowed = blob.get_ref().told.bytes.saturating_mul(self.limits.ratio);
        if self.told.bytes > allowed.max(ALWAYS_ALLOWED) {
            return Err(TooMuch::Ratio(self.limits.ratio));
        }
        self.check_bytes()
    }

    fn check_bytes(&self) -> Result<(), TooMuch> {
        if self.told.bytes > self.limits.bytes {
            return Err(TooMuch::Bytes(self.limits.bytes));
        }
        Ok(())
    }
}

impl<R: Read> Read for Layer<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.decoder {
            Decoder::Plain(blob) => blob.read(buffer),
            Decoder::Gzip(decoder) => decoder.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
        }?;
        self.told.add(buffer.get(..count).unwrap_or_default());
        self.check().map_err(io::Error::other)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 3).unwrap()
    }

    fn read(blob: &[u8], limits: Limits) -> io::Result<(Vec<u8>, Summary)> {
        let mut layer = Layer::new(blob, limits)?;
        let mut text = Vec::new();
        layer.read_to_end(&mut text)?;
        Ok((text, layer.finish()?))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn what_was_packed_comes_out(data in proptest::collection::vec(any::<u8>(), 0..5000)) {
            use Compression::{Gzip, Zstd};
            let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7], &zstd(&data)[..]].concat();
            let (start, end) = data.split_at(data.len() / 2);
            let pieces = [gzip(start), gzip(end)].concat();
            let blobs = [(gzip(&data), Gzip), (pieces, Gzip), (zstd(&data), Zstd), (skippable, Zstd)];
            for (blob, compression) in blobs {
                let (text, summary) = read(&blob, Limits::default()).unwrap();
                prop_assert_eq!(&text, &data);
                prop_assert_eq!(summary, Summary {
                    digest: Sha256Digest::of(&blob),
                    size: blob.len() as u64,
                    diff_id: Sha256Digest::of(&data),
                    unpacked: data.len() as u64,
                    compression,
                });
            }
        }

        #[test]
        fn any_blob_is_survived(blob in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..3) {
            let start: &[u8] = match kind {
                0 => &[0x1f, 0x8b, 8, 0],
                1 => &[0x28, 0xb5, 0x2f, 0xfd],
                _ => &[],
            };
            let _ = read(&[start, &blob].concat(), Limits::default());
        }
    }

    #[test]
    fn a_plain_tar_stream_is_its_own_blob() {
        let (text, summary) = read(b"plain", Limits::default()).unwrap();
        assert_eq!(text, b"plain");
        assert_eq!(summary.digest, summary.diff_id);
        assert_eq!(summary.compression, Compression::None);
        assert_eq!(
            Sha256Digest::of(b"abc").to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn only_digests_are_digests() {
        let digest = Sha256Digest::of(b"abc");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        let hex = digest.hex();
        for text in [
            hex.clone(),
            format!("sha512:{hex}"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{hex}0"),
            format!("sha256:{hex}00"),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:../../{}", &hex[6..]),
            String::new(),
        ] {
            let error = text.parse::<Sha256Digest>().unwrap_err();
            assert!(error.to_string().contains("no digest"), "{text}");
        }
    }

    #[test]
    fn a_blob_that_breaks_off_is_an_error() {
        let data: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
        for blob in [gzip(&data), zstd(&data)] {
            assert!(read(&blob[..blob.len() - 5], Limits::default()).is_err());
        }
    }

    fn refusal(error: &io::Error) -> &TooMuch {
        error.get_ref().unwrap().downcast_ref().unwrap()
    }

    #[test]
    fn bombs_are_refused() {
        let zeros = vec![0; 20 << 20];
        for blob in [gzip(&zeros), zstd(&zeros)] {
            let error = read(&blob, Limits::default()).unwrap_err();
            assert_eq!(refusal(&error), &TooMuch::Ratio(500));
            let limits = Limits {
                bytes: 1 << 20,
                ratio: u64::MAX,
            };
            let error = read(&blob, limits).unwrap_err();
            assert_eq!(refusal(&error), &TooMuch::Bytes(1 << 20));
        }
        let limits = Limits {
            bytes: u64::MAX,
            ratio: u64::MAX,
        };
        assert_eq!(read(&zstd(&zeros), limits).unwrap().1.unpacked, 20 << 20);
    }

    #[test]
    fn a_zstd_stream_gets_no_more_memory_than_agreed() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&vec![1; 1 << 20]).unwrap();
        let blob = encoder.finish().unwrap();
        let error = read(&blob, Limits::default()).unwrap_err();
        assert!(
            error.to_string().to_lowercase().contains("memory"),
            "{error}"
        );
    }
}
