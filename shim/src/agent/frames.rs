//! What the agent may send: answers.
//!
//! ttrpc's client takes a data frame for a call's first answer and goes on expecting more: it keeps every such call for good, and queues whatever
//! else comes for one until somebody looks. None of the agent's calls is a stream, so a frame of another kind than an answer breaks the connection.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

/// A connection of which nothing but answers is read.
pub(super) struct Answers<S> {
    stream: S,
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// Bytes of the header that have been seen.
    seen: usize,
    /// Bytes of the payload that have not.
    payload: usize,
}

impl<S> Answers<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            header: [0; MESSAGE_HEADER_LENGTH],
            seen: 0,
            payload: 0,
        }
    }

    /// Looks at bytes that have come, in their order.
    fn look(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let passed = self.payload.min(bytes.len());
            self.payload -= passed;
            bytes = bytes.get(passed..).unwrap_or_default();
            for byte in self.header.iter_mut().skip(self.seen) {
                let Some((first, rest)) = bytes.split_first() else {
                    return Ok(());
                };
                *byte = *first;
                self.seen += 1;
                bytes = rest;
            }
            let header = MessageHeader::from(&self.header);
            if header.type_ != MESSAGE_TYPE_RESPONSE {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the agent sent a frame that is no answer",
                ));
            }
            self.seen = 0;
            self.payload = usize::try_from(header.length).unwrap_or(usize::MAX);
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Answers<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let new = buffer.filled().get(before..).unwrap_or_default();
        Poll::Ready(self.look(new))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Answers<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ttrpc::proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST};

    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let header = MessageHeader {
            length: length as u32,
            stream_id: 1,
            type_: kind,
            flags: 0,
        };
        // A payload that would be another kind of frame.
        [Vec::from(header), vec![MESSAGE_TYPE_DATA; length]].concat()
    }

    proptest! {
        #[test]
        fn answers_pass_however_they_come_and_the_first_other_frame_does_not(
            lengths in prop::collection::vec(0usize..60, 0..8),
            piece in 1usize..40,
            other in prop::option::of(prop_oneof![Just(MESSAGE_TYPE_DATA), Just(MESSAGE_TYPE_REQUEST), Just(0u8)]),
        ) {
            let mut bytes: Vec<u8> = lengths.iter().flat_map(|length| frame(MESSAGE_TYPE_RESPONSE, *length)).collect();
            bytes.extend(other.iter().flat_map(|kind| frame(*kind, 3)));
            let mut answers = Answers::new(());
            let outcome = bytes.chunks(piece).try_for_each(|bytes| answers.look(bytes));
            prop_assert_eq!(outcome.is_err(), other.is_some());
        }
    }
}
