//! Port-forwards: a TCP port of the guest's localhost, joined to a stream that the host waits for.
//!
//! Whoever listens there does so in the guest's network namespace, which is the pod's and the agent's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use husk_protocol::agent::ForwardPortRequest;
use husk_protocol::stream::Token;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::dial::Host;
use crate::error::AgentError;
use crate::polled::{Polled, polled};
use crate::stream::carry;

/// How long an address may take to answer: a listener whose backlog is full does not.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request that can be carried out.
#[derive(Debug)]
pub struct Plan {
    port: u16,
    token: Token,
}

impl Plan {
    /// Reads the request.
    ///
    /// # Errors
    /// [`AgentError::Token`] and [`AgentError::Invalid`] for what makes no sense.
    pub fn new(request: &ForwardPortRequest) -> Result<Self, AgentError> {
        let port = u16::try_from(request.port).ok().filter(|&port| port != 0);
        let token = Token::from_field(&request.token)?;
        match (port, token) {
            (Some(port), Some(token)) => Ok(Self { port, token }),
            _ => Err(AgentError::Invalid(format!(
                "a port-forward needs a TCP port and a stream; the port is {}",
                request.port
            ))),
        }
    }

    /// Connects both ends and starts to copy between them.
    ///
    /// # Errors
    /// [`AgentError::Guest`]: nobody listens on the port, or the host does not answer.
    pub async fn open(self, host: &dyn Host) -> Result<(), AgentError> {
        let Self { port, token } = self;
        // First: the host hears of a stream that has nothing to tell only by this call's error.
        let server = connect(port)
            .await
            .map_err(|e| AgentError::guest(format!("connecting to port {port}"), e))?;
        let stream = host
            .open_stream(token)
            .await
            .map_err(|e| AgentError::guest("connecting a port-forward to the host", e))?;
        tokio::spawn(async move {
            // One that breaks off takes the other along.
            let _ = tokio::try_join!(carry(&stream, &server), carry(&server, &stream));
        });
        Ok(())
    }
}

/// Connects to a port of localhost as containerd does: by IPv4, and where that fails by IPv6. The error is the first one's.
async fn connect(port: u16) -> io::Result<Polled> {
    let dial = async |ip: IpAddr| timeout(PATIENCE, TcpStream::connect((ip, port))).await?;
    let connection = match dial(Ipv4Addr::LOCALHOST.into()).await {
        Ok(connection) => connection,
        Err(error) => dial(Ipv6Addr::LOCALHOST.into()).await.map_err(|_| error)?,
    };
    polled(OwnedFd::from(connection.into_std()?))
}
