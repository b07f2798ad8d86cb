//! Blobs, from the first byte or from where somebody was cut off.

use std::time::Duration;

use futures::StreamExt as _;
use oci_client::client::BlobResponse;

use super::{Endpoint, Failure, PullError, document::pause_before, told_by};
use crate::{manifest::Named, store::StoreError};

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
        const ALL: u32 = 100;
        let (mut vain, mut all) = (0, 0);
        while sink.written() < named.size {
            let before = sink.written();
            let failure = match self.try_blob(named, sink).await {
                Ok(()) if sink.written() < named.size => {
                    let (written, size) = (sink.written(), named.size);
                    let why = format!("the stream ended after {written} of {size} bytes");
                    Failure::passing(self.registry_error(&doing(named), &why))
                }
                Ok(()) => break,
                Err(failure) => failure,
            };
            all += 1;
            vain = if sink.written() > before { 1 } else { vain + 1 };
            if !failure.passing || vain >= self.patience.attempts || all >= ALL {
                return Err(failure.error);
            }
            let pause = self.patience.pause * 2_u32.saturating_pow(vain.min(16) - 1);
            let pause = pause_before(failure.after, pause);
            sink.again(pause, &failure.error);
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    async fn try_blob(&self, named: &Named, sink: &mut (dyn Sink + Send)) -> Result<(), Failure> {
        let doing = doing(named);
        self.oci
            .store_auth_if_needed(self.reference.resolve_registry(), &self.auth)
            .await;
        let digest = named.digest.to_string();
        let ask =
            self.oci
                .pull_blob_stream_partial(&self.reference, &*digest, sink.written(), None);
        // The answer's head: then the stream has the idle time-out. An error's text is read in here.
        let answer = match tokio::time::timeout(self.patience.answer, ask).await {
            Ok(answer) => answer.map_err(|error| self.failed(&doing, error))?,
            Err(_) => return Err(self.silent(&doing)),
        };
        let mut stream = match answer {
            BlobResponse::Partial(stream) => stream.stream,
            BlobResponse::Full(stream) => {
                // It does not do ranges.
                if sink.written() > 0 {
                    sink.restart().map_err(Failure::lasting)?;
                }
                stream.stream
            }
        };
        while let Some(data) = stream.next().await {
            let data = data
                .map_err(|error| Failure::passing(self.registry_error(&doing, &told_by(&error))))?;
            match tokio::task::block_in_place(|| sink.write(&data)) {
                Ok(()) => {}
                Err(PullError::Store(StoreError::WrongBlob { expected, found })) => {
                    return Err(Failure::lasting(self.other(expected, found)));
                }
                Err(error) => return Err(Failure::lasting(error)),
            }
        }
        Ok(())
    }
}

fn doing(named: &Named) -> String {
    format!("fetching {}", named.digest)
}
