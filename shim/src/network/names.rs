//! The resolver that Docker has in a pod's network namespace, for the pod's processes in the guest.
//!
//! In a network that its users have made, Docker gives a container one nameserver, 127.0.0.11, on which it listens itself, in the namespace, and
//! answers with the names of its containers. The guest's packets never meet the host's stack there. So the agent takes the
//! pod's queries and sends them here by one stream; for each a socket in the namespace asks the resolver, and the answer goes
//! back. What is asked and answered is read as far as its length: the rest is between a container and Docker, as with
//! any runtime, and so is a query to which no answer comes.
//!
//! What Docker does not know it asks the host's nameservers, and that from a socket in this namespace: so the answers to those, known by their ports,
//! are the host's stack's and not the guest's, which has other ports to send from ([`Network::spare_resolver`]).
//!
//! All of it is bounded: [`MAX_QUERIES`] at the same time, each for [`PATIENCE`], and no further one is read while there are so many.

use std::{
    convert::Infallible, fs, io, net::Ipv4Addr, ops::RangeInclusive, sync::Arc, time::Duration,
};

use husk_protocol::names::{HEADER_LEN, Header, MAX_QUERIES, RESOLVER, Transport};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream, UdpSocket, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, Semaphore},
    time::timeout,
};
use tracing::{Instrument as _, debug, info_span, warn};

use super::{
    Network, NetworkError,
    model::Interface,
    namespace::Namespace,
    redirect::{self, PortMask},
    tap::Tap,
};
use crate::{
    agent::Agent,
    error::{TaskError, chain},
    phase::PhaseWatch,
    streams::Streams,
};
use rtnetlink::Handle;

/// How long a query waits for its answer: Docker asks up to three servers of the host's, 4 s each (moby, libnetwork/resolver.go).
const PATIENCE: Duration = Duration::from_secs(20);

/// How long the stream may take to arrive after the agent has opened it.
const ARRIVAL: Duration = Duration::from_secs(10);

impl Network {
    /// Has the guest's queries answered from now on, until the pod is gone. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The guest cannot send any.
    pub async fn serve_names(
        &self,
        agent: &Agent,
        streams: &Streams,
        phase: PhaseWatch,
    ) -> Result<(), TaskError> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        let failed = |error: &dyn std::fmt::Display| {
            TaskError::failed(format!("no stream for name queries: {error}"))
        };
        let (reserved, stream) = streams.expect_one().map_err(|e| failed(&e))?;
        agent.serve_names(reserved.for_agent()).await?;
        let arrived = timeout(ARRIVAL, stream).await.map_err(|e| failed(&e))?;
        let stream = arrived.map_err(|e| failed(&e))?;
        let resolver = Resolver {
            namespace: namespace.clone(),
        };
        let span = info_span!("names", pod = self.pod);
        let served = async move {
            let Err(error) = serve(resolver, stream).await;
            match error.kind() {
                // The guest has ended.
                io::ErrorKind::UnexpectedEof => debug!("no more name queries"),
                _ => warn!(%error, "the guest's name queries are not answered any more"),
            }
        };
        let served = async move { phase.while_there(served).await };
        tokio::spawn(served.instrument(span));
        Ok(())
    }
}

/// Where the host's stack in the namespace sends from, in place of 32768 to 60999, which the guest's has.
const HOST_PORTS: RangeInclusive<u16> = 63488..=65535;
const HOST_MASK: PortMask = PortMask {
    mask: 0xf800,
    value: 0xf800,
};

impl Network {
    /// Lets Docker's resolver hear the answers of nameservers outside that come in at this interface. It works without, for the names of
    /// containers, so what goes wrong is told in the log alone.
    pub(super) async fn spare_resolver(
        &self,
        namespace: &Namespace,
        handle: &Handle,
        interface: &Interface,
        tap: &Tap,
    ) {
        let arp = format!("/proc/sys/net/ipv4/conf/{}/arp_ignore", interface.name);
        let settings = move || {
            let (first, last) = (HOST_PORTS.start(), HOST_PORTS.end());
            fs::write(
                "/proc/sys/net/ipv4/ip_local_port_range",
                format!("{first} {last}"),
            )?;
            // The guest says what the interface's addresses are (ip-sysctl.rst: "do not reply for all local addresses").
            fs::write(arp, "8")
        };
        let set = namespace.enter("set the ports of the host in", settings);
        let spared = async {
            set.await?;
            redirect::spare_nameservers(handle, interface, tap, HOST_MASK).await
        };
        if let Err(error) = spared.await {
            warn!(
                error = chain(&error),
                "names outside of Docker's networks may be unknown to the pod"
            );
        }
    }
}

/// Until the stream ends, or says what is no query.
pub(super) async fn serve(resolver: Resolver, stream: UnixStream) -> io::Result<Infallible> {
    let (mut from, to) = stream.into_split();
    let resolver = Arc::new(resolver);
    let to = Arc::new(Mutex::new(to));
    let free = Arc::new(Semaphore::new(MAX_QUERIES));
    loop {
        let permit = Arc::clone(&free).acquire_owned().await;
        let permit = permit.map_err(io::Error::other)?;
        let (header, query) = next(&mut from).await?;
        let (resolver, to) = (Arc::clone(&resolver), Arc::clone(&to));
        let answered = async move {
            let answer = match timeout(PATIENCE, resolver.ask(header.transport, &query)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    debug!(error = chain(&error), "no answer to a name query");
                    Vec::new()
                }
                Err(_) => Vec::new(),
            };
            send(&to, header, &answer).await;
            drop(permit);
        };
        tokio::spawn(answered.in_current_span());
    }
}

async fn next(from: &mut OwnedReadHalf) -> io::Result<(Header, Vec<u8>)> {
    let mut header = [0; HEADER_LEN];
    from.read_exact(&mut header).await?;
    let header = Header::decode(header).map_err(io::Error::other)?;
    let mut query = vec![0; usize::from(header.length)];
    from.read_exact(&mut query).await?;
    Ok((header, query))
}

async fn send(to: &Mutex<OwnedWriteHalf>, header: Header, answer: &[u8]) {
    let Some(frame) = Header::frame(header.query, header.transport, answer) else {
        return;
    };
    if let Err(error) = to.lock().await.write_all(&frame).await {
        debug!(%error, "an answer to a name query has nobody to go to");
    }
}

/// Docker's.
pub(super) struct Resolver {
    pub(super) namespace: Namespace,
}

impl Resolver {
    async fn ask(&self, transport: Transport, query: &[u8]) -> Result<Vec<u8>, NetworkError> {
        match transport {
            Transport::Udp => self.by_datagram(query).await,
            Transport::Tcp => self.by_connection(query).await,
        }
    }

    async fn by_datagram(&self, query: &[u8]) -> Result<Vec<u8>, NetworkError> {
        let open = || {
            let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.set_nonblocking(true)?;
            // The namespace's own rules lead from here to the resolver.
            socket.connect(RESOLVER)?;
            Ok(socket)
        };
        let socket = self.namespace.enter(ASK, open).await?;
        let asked = async {
            let socket = UdpSocket::from_std(socket)?;
            socket.send(query).await?;
            let mut answer = vec![0; usize::from(u16::MAX)];
            let length = socket.recv(&mut answer).await?;
            answer.truncate(length);
            Ok(answer)
        };
        asked.await.map_err(|source| self.failed(source))
    }

    async fn by_connection(&self, query: &[u8]) -> Result<Vec<u8>, NetworkError> {
        let open = || {
            let socket = std::net::TcpStream::connect_timeout(&RESOLVER.into(), PATIENCE)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket = self.namespace.enter(ASK, open).await?;
        let asked = async {
            let mut socket = TcpStream::from_std(socket)?;
            let length = u16::try_from(query.len()).map_err(io::Error::other)?;
            socket.write_u16(length).await?;
            socket.write_all(query).await?;
            let mut answer = vec![0; usize::from(socket.read_u16().await?)];
            socket.read_exact(&mut answer).await?;
            Ok(answer)
        };
        asked.await.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> NetworkError {
        self.namespace.failed(ASK, source)
    }
}

const ASK: &str = "ask the resolver in";
