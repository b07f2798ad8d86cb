//! `kubectl exec`, `attach` and `port-forward` of a few lines, by CRI's streaming server.

use anyhow::{Context as _, Result};
use k8s_cri::v1;
use serde_json::{Value, json};

use crate::{
    cri::{Ended, Pod, PodContainer},
    spdy::{Connection, Stream},
};

/// The subprotocol whose error stream tells the exit code.
const REMOTE_COMMAND: &str = "v4.channel.k8s.io";

const PORT_FORWARD: &str = "portforward.k8s.io";

/// Which of a process's streams a session has, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Standard input, output and error.
    Pipes,
    /// A terminal: input and output.
    Terminal,
}

/// A process's streams at the client's side. Dropped, the client has gone.
pub struct Session {
    /// What it reads.
    pub stdin: Stream,
    /// What it writes.
    pub stdout: Stream,
    stderr: Option<Stream>,
    error: Stream,
    size: Option<Stream>,
    _connection: Connection,
}

impl Session {
    fn open(url: &str, kind: Kind) -> Result<Self> {
        let connection = Connection::upgrade(url, REMOTE_COMMAND)?;
        let open = |name| connection.open(&[("streamtype", name)]);
        let is = |wanted| (kind == wanted).then_some(());
        Ok(Self {
            error: open("error")?,
            stdin: open("stdin")?,
            stdout: open("stdout")?,
            stderr: is(Kind::Pipes).map(|()| open("stderr")).transpose()?,
            size: is(Kind::Terminal).map(|()| open("resize")).transpose()?,
            _connection: connection,
        })
    }

    /// Changes the size of the terminal.
    ///
    /// # Errors
    /// There is none.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = self.size.as_ref().context("no terminal")?;
        size.send(
            json!({ "Width": columns, "Height": rows })
                .to_string()
                .as_bytes(),
        )
    }

    /// Waits for the process's end: the code, and what has not been read of its output.
    ///
    /// # Errors
    /// It does not end, or the server has failed.
    pub fn ended(self) -> Result<Ended> {
        let text = |stream: &Stream| -> Result<String> {
            Ok(String::from_utf8_lossy(&stream.rest()?)
                .trim_end()
                .to_owned())
        };
        Ok(Ended {
            out: text(&self.stdout)?,
            err: self
                .stderr
                .as_ref()
                .map(text)
                .transpose()?
                .unwrap_or_default(),
            code: exit_code(&text(&self.error)?)?,
        })
    }
}

/// The exit code in a `metav1.Status`.
fn exit_code(status: &str) -> Result<i32> {
    let failed = || format!("the server's status is {status:?}");
    let value: Value = serde_json::from_str(status).with_context(failed)?;
    if value["status"] == "Success" {
        return Ok(0);
    }
    let causes = value["details"]["causes"].as_array();
    let cause = causes
        .into_iter()
        .flatten()
        .find(|cause| cause["reason"] == "ExitCode");
    let code = cause.and_then(|cause| cause["message"].as_str());
    code.with_context(failed)?.parse().with_context(failed)
}

impl PodContainer<'_> {
    /// Exec.
    ///
    /// # Errors
    /// CRI's message.
    pub fn exec_session(&self, kind: Kind, command: &[&str]) -> Result<Session> {
        let request = v1::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty: kind == Kind::Terminal,
            stdin: true,
            stdout: true,
            stderr: kind == Kind::Pipes,
        };
        let answer = self.cri.call("Exec", async |mut c| c.exec(request).await)?;
        Session::open(&answer.url, kind)
    }

    /// Attach.
    ///
    /// # Errors
    /// CRI's message.
    pub fn attach(&self, kind: Kind) -> Result<Session> {
        let request = v1::AttachRequest {
            container_id: self.id.clone(),
            tty: kind == Kind::Terminal,
            stdin: true,
            stdout: true,
            stderr: kind == Kind::Pipes,
        };
        let answer = self
            .cri
            .call("Attach", async |mut c| c.attach(request).await)?;
        Session::open(&answer.url, kind)
    }
}

/// A client that forwards connections to a pod.
pub struct PortForward {
    connection: Connection,
    next: u32,
}

/// A connection to a port of the pod.
pub struct Forwarded {
    /// Its bytes.
    pub data: Stream,
    error: Stream,
}

impl PortForward {
    /// Opens a connection to a port.
    ///
    /// # Errors
    /// The server has gone.
    pub fn dial(&mut self, port: u16) -> Result<Forwarded> {
        let (port, request) = (port.to_string(), self.next.to_string());
        self.next += 1;
        let open = |kind| {
            self.connection.open(&[
                ("streamtype", kind),
                ("port", &port),
                ("requestid", &request),
            ])
        };
        Ok(Forwarded {
            error: open("error")?,
            data: open("data")?,
        })
    }
}

impl Forwarded {
    /// Waits for the connection's end: what has not been read of its data, and what the server has to say of it.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(self) -> Result<(Vec<u8>, String)> {
        let data = self.data.rest()?;
        Ok((
            data,
            String::from_utf8_lossy(&self.error.rest()?).into_owned(),
        ))
    }
}

impl Pod<'_> {
    /// PortForward.
    ///
    /// # Errors
    /// CRI's message.
    pub fn port_forward(&self) -> Result<PortForward> {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            // Each connection names its own.
            port: Vec::new(),
        };
        let answer = self
            .cri
            .call("PortForward", async |mut c| c.port_forward(request).await)?;
        Ok(PortForward {
            connection: Connection::upgrade(&answer.url, PORT_FORWARD)?,
            next: 0,
        })
    }
}
