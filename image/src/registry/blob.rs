//! Blobs, from the first byte or from where somebody was cut off.

use std::time::Duration;

use reqwest::{
    Response, StatusCode,
    header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE},
};

use super::{Endpoint, Failure, PullError, attempts::Attempts};
use crate::{layer::Sha256Digest, manifest::Named, store::StoreError};

/// What takes a blob's bytes in their order.
pub(crate) trait Sink {
    /// Bytes that it has.
    fn written(&self) -> u64;
    /// Takes the next ones.
    fn write(&mut self, data: &[u8]) -> Result<(), PullError>;
    /// Throws away what it has: the next bytes are the first ones.
    fn restart(&mut self) -> Result<(), PullError>;
    /// The next attempt is made after this pause, because of this error.
    fn again(&mut self, pause: Duration, error: &PullError);
}

impl Endpoint {
    /// Fetches what the sink has not got yet. Attempts that bring something do not count, but for a bound on all of them.
    ///
    /// # Errors
    /// When the registry does not have it, sends more, or goes on failing; or the sink does not take it.
    pub(crate) async fn blob(
        &self,
        named: &Named,
        sink: &mut (dyn Sink + Send),
    ) -> Result<(), PullError> {
        let mut attempts = Attempts::new(self.patience);
        while sink.written() < named.size {
            let before = sink.written();
            let failure = match self.try_blob(named, sink).await {
                Ok(()) if sink.written() < named.size => {
                    let (written, size) = (sink.written(), named.size);
                    let why = format!("the stream ended after {written} of {size} bytes");
                    Failure::passing(self.registry_error(&doing(named), &why))
                }
                Ok(()) => break,
                // All has come, without a proper end.
                Err(failure) if failure.passing && sink.written() >= named.size => break,
                Err(failure) => failure,
            };
            let (pause, error) = attempts.after(failure, sink.written() > before)?;
            sink.again(pause, &error);
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// A blob that is kept in memory: the caller has bounded it. Checked.
    pub(crate) async fn small_blob(&self, named: &Named) -> Result<Vec<u8>, PullError> {
        let mut sink = Memory {
            named: *named,
            bytes: Vec::new(),
        };
        self.blob(named, &mut sink).await?;
        let found = Sha256Digest::of(&sink.bytes);
        match found == named.digest {
            true => Ok(sink.bytes),
            false => Err(self.other(named.digest, format!("its digest is {found}"))),
        }
    }

    async fn try_blob(&self, named: &Named, sink: &mut (dyn Sink + Send)) -> Result<(), Failure> {
        let doing = doing(named);
        let url = self.url("blobs", &named.digest.to_string());
        let mut headers = HeaderMap::new();
        let range = HeaderValue::from_str(&format!("bytes={}-", sink.written()));
        headers.extend(range.ok().map(|range| (RANGE, range)));
        // The answer's head: then the stream has the idle time-out.
        let ask = self.get(&doing, &url, headers);
        let mut response = match tokio::time::timeout(self.patience.answer, ask).await {
            Ok(response) => response?,
            Err(_) => return Err(self.silent(&doing)),
        };
        // Who does not say where it begins does as asked; the digest tells.
        match begins_at(&response).unwrap_or(sink.written()) {
            begin if begin == sink.written() => {}
            // It does not do ranges.
            0 => sink.restart().map_err(Failure::lasting)?,
            other => {
                let why = format!("{other} is where it begins, not {}", sink.written());
                sink.restart().map_err(Failure::lasting)?;
                return Err(Failure::passing(self.registry_error(&doing, &why)));
            }
        }
        loop {
            let data = match response.chunk().await {
                Ok(Some(data)) => data,
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.failed_request(&doing, &error)),
            };
            match tokio::task::block_in_place(|| sink.write(&data)) {
                Ok(()) => {}
                Err(PullError::Store(StoreError::WrongBlob { expected, found })) => {
                    return Err(Failure::lasting(self.other(expected, found)));
                }
                Err(error) => return Err(Failure::lasting(error)),
            }
        }
    }
}

struct Memory {
    named: Named,
    bytes: Vec<u8>,
}

impl Sink for Memory {
    fn written(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn write(&mut self, data: &[u8]) -> Result<(), PullError> {
        if self.written() + data.len() as u64 > self.named.size {
            self.bytes.clear();
            return Err(PullError::Store(StoreError::WrongBlob {
                expected: self.named.digest,
                found: format!("more than {} bytes", self.named.size),
            }));
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), PullError> {
        self.bytes.clear();
        Ok(())
    }

    fn again(&mut self, pause: Duration, error: &PullError) {
        tracing::info!(%error, seconds = pause.as_secs_f32(), "asking again");
    }
}

/// The place of an answer's first byte in the blob (RFC 9110, section 14.4).
fn begins_at(response: &Response) -> Option<u64> {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let told = response.headers().get(CONTENT_RANGE)?;
            begin(told.to_str().ok()?)
        }
        _ => Some(0),
    }
}

fn begin(range: &str) -> Option<u64> {
    let range = range.trim().strip_prefix("bytes")?;
    let (begin, _) = range.trim_start().split_once('-')?;
    begin.trim_end().parse().ok()
}

fn doing(named: &Named) -> String {
    format!("fetching {}", named.digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_says_where_it_begins() {
        assert_eq!(begin("bytes 7-9/10"), Some(7));
        assert_eq!(begin("bytes 0-9/*"), Some(0));
        for none in ["", "bytes", "bytes */10", "items 7-9/10", "bytes -9/10"] {
            assert_eq!(begin(none), None, "{none}");
        }
    }
}
