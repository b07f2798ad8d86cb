//! Names that an engine resolves: the pod's queries to Docker's resolver, which listens in the pod's network namespace on the host.
//!
//! In a network that its users have made, Docker gives a container one nameserver, 127.0.0.11, and listens there itself, which no packet of
//! the guest reaches. So the agent listens on that address, the kernel brings it what is sent to port 53 ([`redirect`]), and each
//! query goes to the host by one stream. The queries of containers are read as far as their length and no further: whose answer
//! is whose is told by numbers of ours.

mod redirect;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_protocol::agent::ServeNamesRequest;
use husk_protocol::names::{HEADER_LEN, Header, MAX_QUERIES, RESOLVER, Transport};
use husk_protocol::stream::Token;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::dial::Host;
use crate::error::AgentError;
use crate::polled::Polled;
use crate::stream::{read_exact, write_all};

/// How long a client may leave its connection idle, and the host a query without an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause after an accept that failed, for want of fds most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Ports tried until one is free for UDP and TCP alike.
const TRIES: usize = 16;

/// A request that can be carried out.
#[derive(Debug)]
pub struct Plan(Token);

impl Plan {
    /// Reads the request.
    ///
    /// # Errors
    /// [`AgentError::Token`]; [`AgentError::Invalid`] where there is none.
    pub fn new(request: &ServeNamesRequest) -> Result<Self, AgentError> {
        let token = Token::from_field(&request.token)?;
        token
            .map(Self)
            .ok_or_else(|| AgentError::Invalid("serving names needs a stream".into()))
    }

    /// Serves from now on the processes in and below `cgroup`, of the calling thread's network namespace, for as long as the host does.
    ///
    /// # Errors
    /// [`AgentError::Guest`] naming the step that failed.
    pub async fn open(self, host: &dyn Host, cgroup: &Path) -> Result<(), AgentError> {
        let (datagrams, connections) = listen()
            .await
            .map_err(|e| AgentError::guest("listening for name queries", e))?;
        let stream = host
            .open_stream(self.0)
            .await
            .map_err(|e| AgentError::guest("connecting name queries to the host", e))?;
        datagrams
            .local_addr()
            .and_then(|ours| redirect::redirect(cgroup, datagrams.as_fd(), ours.port()))
            .map_err(|e| AgentError::guest("taking name queries from the kernel", e))?;
        tokio::spawn(serve(datagrams, connections, stream));
        Ok(())
    }
}

/// One port of the resolver's address, by UDP and TCP.
async fn listen() -> io::Result<(UdpSocket, TcpListener)> {
    let mut taken = None;
    for _ in 0..TRIES {
        let datagrams = UdpSocket::bind((*RESOLVER.ip(), 0)).await?;
        match TcpListener::bind(datagrams.local_addr()?).await {
            Ok(connections) => return Ok((datagrams, connections)),
            Err(error) => taken = Some(error),
        }
    }
    Err(taken.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

async fn serve(datagrams: UdpSocket, connections: TcpListener, stream: Polled) {
    let (sender, queries) = mpsc::channel(MAX_QUERIES);
    let relay = Arc::new(Relay {
        to_host: sender,
        asked: Mutex::default(),
    });
    tokio::select! {
        () = relay.take_datagrams(&datagrams) => {}
        () = relay.take_connections(&connections) => {}
        () = send(queries, &stream) => {}
        error = relay.answer(&datagrams, &stream) => {
            tracing::warn!(%error, "the host answers no more name queries");
        }
    }
}

async fn send(mut queries: mpsc::Receiver<Vec<u8>>, stream: &Polled) {
    while let Some(frame) = queries.recv().await {
        if write_all(stream, &frame, |_| ()).await.is_err() {
            return;
        }
    }
}

/// Who waits for an answer.
#[derive(Debug)]
enum Asker {
    Datagram(SocketAddr),
    Connection(oneshot::Sender<Vec<u8>>),
}

struct Relay {
    to_host: mpsc::Sender<Vec<u8>>,
    asked: Mutex<Asked>,
}

/// The queries under way. When there are too many the oldest is forgotten, as a resolver's client expects of datagrams.
#[derive(Debug, Default)]
struct Asked {
    last: u32,
    askers: BTreeMap<u32, Asker>,
}

impl Asked {
    fn add(&mut self, asker: Asker) -> u32 {
        if self.askers.len() >= MAX_QUERIES {
            self.askers.pop_first();
        }
        self.last = self.last.wrapping_add(1);
        self.askers.insert(self.last, asker);
        self.last
    }
}

impl Relay {
    fn ask(&self, transport: Transport, message: &[u8], asker: Asker) {
        let number = self.asked().add(asker);
        let sent = Header::frame(number, transport, message)
            .is_some_and(|frame| self.to_host.try_send(frame).is_ok());
        if !sent {
            self.asked().askers.remove(&number);
        }
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take_datagrams(&self, socket: &UdpSocket) {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            // An error is of a datagram sent before, to somebody who has gone.
            if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let message = buffer.get(..length).unwrap_or_default();
                self.ask(Transport::Udp, message, Asker::Datagram(from));
            }
            tokio::task::consume_budget().await;
        }
    }

    async fn take_connections(self: &Arc<Self>, listener: &TcpListener) {
        let free = Arc::new(Semaphore::new(MAX_QUERIES));
        loop {
            let Ok(permit) = Arc::clone(&free).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((client, _)) => {
                    let relay = Arc::clone(self);
                    tokio::spawn(async move {
                        // A client that breaks off has no more questions.
                        let _ = relay.converse(client).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection to the resolver");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A client's queries, one after another (RFC 1035, section 4.2.2).
    async fn converse(&self, mut client: TcpStream) -> io::Result<()> {
        loop {
            let mut message = Vec::new();
            timeout(PATIENCE, async {
                let length = client.read_u16().await?;
                message.resize(usize::from(length), 0);
                client.read_exact(&mut message).await
            })
            .await??;
            let (sender, answer) = oneshot::channel();
            self.ask(Transport::Tcp, &message, Asker::Connection(sender));
            let answer = timeout(PATIENCE, answer).await?.map_err(io::Error::other)?;
            let Some(length) = u16::try_from(answer.len()).ok().filter(|&n| n > 0) else {
                return Ok(());
            };
            timeout(PATIENCE, async {
                client.write_u16(length).await?;
                client.write_all(&answer).await
            })
            .await??;
        }
    }

    /// Hands answers out until the stream ends; that is the error.
    async fn answer(&self, datagrams: &UdpSocket, stream: &Polled) -> io::Error {
        loop {
            let (header, message) = match next(stream).await {
                Ok(answer) => answer,
                Err(error) => return error,
            };
            match self.asked().askers.remove(&header.query) {
                Some(Asker::Datagram(_)) if message.is_empty() => {}
                // Nobody waits for room: an answer that is lost is asked for again.
                Some(Asker::Datagram(to)) => drop(datagrams.try_send_to(&message, to)),
                Some(Asker::Connection(sender)) => drop(sender.send(message)),
                None => {}
            }
        }
    }
}

async fn next(stream: &Polled) -> io::Result<(Header, Vec<u8>)> {
    let mut header = [0; HEADER_LEN];
    read_exact(stream, &mut header).await?;
    let header = Header::decode(header).map_err(io::Error::other)?;
    let mut message = vec![0; usize::from(header.length)];
    read_exact(stream, &mut message).await?;
    Ok((header, message))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::Ipv4Addr;

    use super::*;
    use crate::polled::polled;

    #[test]
    fn of_too_many_queries_the_oldest_is_forgotten() {
        let mut asked = Asked {
            last: 10,
            ..Asked::default()
        };
        let from = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let first = asked.add(Asker::Datagram(from));
        for _ in 1..MAX_QUERIES {
            asked.add(Asker::Datagram(from));
        }
        assert!(asked.askers.contains_key(&first));
        let last = asked.add(Asker::Datagram(from));
        assert_eq!(asked.askers.len(), MAX_QUERIES);
        assert!(!asked.askers.contains_key(&first) && asked.askers.contains_key(&last));
    }

    /// The host's end of the stream: the next query.
    fn query(host: &mut std::os::unix::net::UnixStream) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        host.read_exact(&mut header).unwrap();
        let header = Header::decode(header).unwrap();
        let mut message = vec![0; usize::from(header.length)];
        host.read_exact(&mut message).unwrap();
        (header, message)
    }

    #[tokio::test]
    async fn each_asker_gets_its_own_answer() {
        let (ours, mut host) = std::os::unix::net::UnixStream::pair().unwrap();
        let (datagrams, connections) = listen().await.unwrap();
        let resolver = datagrams.local_addr().unwrap();
        let served = tokio::spawn(serve(datagrams, connections, polled(ours.into()).unwrap()));
        let asked = tokio::task::spawn_blocking(move || {
            let [one, two] = [(); 2].map(|()| {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.connect(resolver).unwrap();
                socket
            });
            one.send(b"one").unwrap();
            let (first, said) = query(&mut host);
            assert_eq!((first.transport, &*said), (Transport::Udp, &b"one"[..]));
            two.send(b"two").unwrap();
            let (second, _) = query(&mut host);
            let mut client = std::net::TcpStream::connect(resolver).unwrap();
            client.write_all(b"\0\x05three").unwrap();
            let (third, said) = query(&mut host);
            assert_eq!((third.transport, &*said), (Transport::Tcp, &b"three"[..]));
            // The last first, and one that nobody has asked for.
            for (number, answer) in [
                (third.query, &b"3"[..]),
                (second.query, b"2"),
                (77, b"?"),
                (first.query, b"1"),
            ] {
                let frame = Header::frame(number, Transport::Udp, answer).unwrap();
                host.write_all(&frame).unwrap();
            }
            let mut buffer = [0; 16];
            for (socket, answer) in [(one, b"1"), (two, b"2")] {
                let length = socket.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], answer);
            }
            let mut answer = [0; 3];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"\0\x013");
            // A query that has no answer ends its connection.
            client.write_all(b"\0\x01x").unwrap();
            let (last, _) = query(&mut host);
            let frame = Header::frame(last.query, Transport::Tcp, b"").unwrap();
            host.write_all(&frame).unwrap();
            assert_eq!(client.read(&mut answer).unwrap(), 0);
            // The host says what is no answer.
            host.write_all(&[9; HEADER_LEN]).unwrap();
        });
        asked.await.unwrap();
        served.await.unwrap();
    }
}
