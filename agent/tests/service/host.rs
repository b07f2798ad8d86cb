//! The host's side of a test: takes the connections that the agent dials and knows the streams by their tokens.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use async_trait::async_trait;
use husk_agent::dial::Host;
use husk_agent::polled::{Polled, polled};
use husk_protocol::ports;

#[derive(Default)]
pub struct TestHost {
    dialled: Mutex<Vec<UnixStream>>,
    streams: Mutex<HashMap<Vec<u8>, UnixStream>>,
}

#[async_trait]
impl Host for TestHost {
    async fn dial(&self, port: u32) -> io::Result<Polled> {
        if port != ports::STREAM {
            return Err(io::Error::other("a test dials streams only"));
        }
        let (host, agent) = UnixStream::pair()?;
        self.dialled.lock().unwrap().push(host);
        polled(OwnedFd::from(agent))
    }
}

impl TestHost {
    /// The stream that the agent opened with this token.
    pub fn stream(&self, token: &[u8]) -> UnixStream {
        let mut streams = self.streams.lock().unwrap();
        for mut stream in self.dialled.lock().unwrap().drain(..) {
            let mut sent = vec![0; husk_protocol::stream::TOKEN_LEN];
            stream.read_exact(&mut sent).unwrap();
            streams.insert(sent, stream);
        }
        streams.remove(token).expect("no stream with this token")
    }
}
