//! Port-forwards: who dials localhost in the pod's network namespace on the host reaches the pod's processes in the guest.
//!
//! containerd (`kubectl port-forward`) and CRI-O enter the namespace and connect to `localhost:PORT`, where with another runtime the
//! pod would listen. Here a listener on each of the namespace's two loopback addresses is given every connection to them
//! ([`steer`](super::steer)). For each one the agent connects to the same port of the guest's localhost and opens a stream with
//! the token it is given; then bytes are copied both ways, and the end of one direction is passed on by itself. A connection
//! to a port at which nobody listens is accepted by then, so it is reset: containerd 2 tells the client so, 1.7 just ends.
//!
//! It takes root on the host to enter the namespace, and nobody else gets here. The guest does not: what it sends leaves the
//! tap through the pod's interface and never meets the host's stack, which also drops what comes from a wire for a loopback
//! address.
//!
//! A pod of Docker's, whose network comes after its start, has none of this: Docker has listeners of its own on 127.0.0.11 there.

use std::{
    fs::File,
    io,
    net::{self, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tracing::{Instrument as _, debug, info_span};

use super::{
    NetworkError,
    namespace::Namespace,
    steer::{Family, steer},
};
use crate::{agent::Agent, error::TaskError, phase::PhaseWatch, streams::Streams};

/// Connections at the same time, of a pod. Further ones are reset.
const MAX_CONNECTIONS: usize = 128;

/// Bytes on their way in one direction of a connection.
const CHUNK: usize = 32 * 1024;

/// How long a stream may take to arrive after the agent has opened it.
const ARRIVAL: Duration = Duration::from_secs(10);

/// Pause after an accept that failed, for want of fds most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The listeners of a pod's network namespace. Dropped, they are gone.
#[derive(Debug)]
pub struct Forwarder(Vec<Steered>);

/// A listener, and what holds the program that brings it its connections.
#[derive(Debug)]
struct Steered {
    listener: net::TcpListener,
    link: OwnedFd,
}

impl Steered {
    /// In the network namespace of the calling thread.
    fn open(family: Family) -> io::Result<Self> {
        let address: SocketAddr = match family {
            Family::V4 => (Ipv4Addr::LOCALHOST, 0).into(),
            Family::V6 => (Ipv6Addr::LOCALHOST, 0).into(),
        };
        let listener = net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let link = steer(listener.as_fd(), family, namespace.as_fd())?;
        Ok(Self { listener, link })
    }
}

impl Forwarder {
    /// Listens on the namespace's loopback addresses.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`]: its loopback interface is down, or the kernel has no such programs for us.
    pub(super) async fn open(namespace: &Namespace) -> Result<Self, NetworkError> {
        let open = || {
            let mut all = vec![Steered::open(Family::V4)?];
            match Steered::open(Family::V6) {
                Ok(steered) => all.push(steered),
                // Nobody misses it: IPv4 is what is dialled first.
                Err(error) => debug!(%error, "no port-forwards by IPv6"),
            }
            Ok(Self(all))
        };
        namespace.enter("listen for port-forwards in", open).await
    }

    /// Takes connections from now on, until the pod is gone. Must be called within a tokio runtime.
    pub fn serve(self, pod: &str, agent: Agent, streams: Streams, phase: PhaseWatch) {
        let guest = Guest {
            agent,
            streams,
            phase,
            free: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        };
        for steered in self.0 {
            let span = info_span!("port_forward", pod);
            tokio::spawn(accept(steered, guest.clone()).instrument(span));
        }
    }
}

/// What it takes to reach the guest.
#[derive(Clone)]
struct Guest {
    agent: Agent,
    streams: Streams,
    phase: PhaseWatch,
    free: Arc<Semaphore>,
}

async fn accept(steered: Steered, guest: Guest) {
    let Steered { listener, link } = steered;
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return debug!(%error, "the listener cannot be polled"),
    };
    let each = async {
        loop {
            match listener.accept().await {
                Ok((client, _)) => guest.take(client),
                Err(error) => {
                    debug!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    guest.phase.while_there(each).await;
    drop(link);
}

impl Guest {
    fn take(&self, client: TcpStream) {
        let Ok(permit) = Arc::clone(&self.free).try_acquire_owned() else {
            debug!("{MAX_CONNECTIONS} connections are open, this one is reset");
            return reset(client);
        };
        let guest = self.clone();
        let span = tracing::Span::current();
        let carried = async move {
            let carry = guest.carry(client, permit);
            guest.phase.while_there(carry).await;
        };
        tokio::spawn(carried.instrument(span));
    }

    /// A connection, from its start to its end.
    async fn carry(&self, mut client: TcpStream, _permit: OwnedSemaphorePermit) {
        let port = match client.local_addr() {
            Ok(dialled) => dialled.port(),
            Err(error) => return debug!(%error, "the connection has gone already"),
        };
        let mut stream = match self.dial(port).await {
            Ok(stream) => stream,
            Err(error) => {
                debug!(port, error = error.message(), "reset");
                return reset(client);
            }
        };
        debug!(port, "connected");
        let copied = copy_bidirectional_with_sizes(&mut client, &mut stream, CHUNK, CHUNK).await;
        debug!(port, ?copied, "ended");
    }

    /// Connects to a port of the guest's localhost.
    async fn dial(&self, port: u16) -> Result<UnixStream, TaskError> {
        let failed = |error: &dyn std::fmt::Display| {
            TaskError::failed(format!("no stream for port {port}: {error}"))
        };
        let (reserved, stream) = self.streams.expect_one().map_err(|e| failed(&e))?;
        self.agent.forward_port(port, reserved.for_agent()).await?;
        let arrived = timeout(ARRIVAL, stream).await.map_err(|e| failed(&e))?;
        arrived.map_err(|e| failed(&e))
    }
}

/// Closes a connection so that the other side hears it was not wanted.
fn reset(client: TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    if let Err(error) = setsockopt(&client, sockopt::Linger, &linger) {
        debug!(%error, "closed, not reset");
    }
}
