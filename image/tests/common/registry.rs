//! A real registry, Debian's docker-registry, on a port of its own; and a proxy in front of it that misbehaves as it is told.

#![allow(
    dead_code,
    reason = "each of the tests that share it uses a part of it"
)]

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::common::run;

/// Its program: `make test` has fetched it; by hand it takes a moment the first time.
fn program() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scripts/docker-registry");
    let path = String::from_utf8(run(&mut Command::new(script))).unwrap();
    PathBuf::from(path.trim())
}

/// A registry. Dropped, it ends.
pub struct Registry {
    /// `127.0.0.1:PORT`.
    pub host: String,
    server: Child,
    _dir: tempfile::TempDir,
}

impl Registry {
    /// One that anybody may use.
    pub fn new() -> Self {
        Self::with("")
    }

    /// One with these settings too.
    pub fn with(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Somebody may take the port before the registry does.
        for _ in 0..10 {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let host = free.local_addr().unwrap().to_string();
            drop(free);
            let config = dir.path().join("config.yml");
            let root = dir.path().join("data");
            fs::write(
                &config,
                format!(
                    "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n{more}",
                    root.display()
                ),
            )
            .unwrap();
            let log = fs::File::create(dir.path().join("log")).unwrap();
            let mut server = Command::new(program())
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(60) {
                if TcpStream::connect(&host).is_ok() {
                    return Self {
                        host,
                        server,
                        _dir: dir,
                    };
                }
                if server.try_wait().unwrap().is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
            let _ = server.kill();
            let _ = server.wait();
        }
        panic!(
            "docker-registry does not come up: {}",
            fs::read_to_string(dir.path().join("log")).unwrap()
        );
    }

    /// Pushes an image of a layout there, by skopeo.
    pub fn push(&self, layout: &Path, name: &str, to: &str, flags: &[&str]) {
        let mut skopeo = Command::new("skopeo");
        skopeo
            .args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
            ])
            .args(flags)
            .arg(format!("oci:{}:{name}", layout.display()))
            .arg(format!("docker://{}/{to}", self.host));
        run(&mut skopeo);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A key and a certificate for 127.0.0.1, in two files of this directory.
pub fn certificate(dir: &Path) -> (PathBuf, PathBuf) {
    let (key, certificate) = (dir.join("key.pem"), dir.join("cert.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]);
    openssl.args(["-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    openssl.args([
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]);
    openssl.args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"]);
    run(openssl.arg(&key).arg("-out").arg(&certificate));
    (key, certificate)
}

/// What the proxy does with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing wrong.
    None,
    /// This answer instead: status, more header lines, body.
    Answer(u16, String, Vec<u8>),
    /// The same without an end to the body.
    EndlessAnswer(u16, String),
    /// After so many bytes of the body the connection ends.
    CutOff(usize),
    /// After so many bytes of the body nothing comes any more.
    Stall(usize),
    /// The byte at this place of the body is another.
    Corrupt(usize),
    /// The body has these bytes more, and no length.
    Longer(Vec<u8>),
    /// The answer is that to the request without its range.
    NoRange,
    /// The body never ends.
    Endless,
}

/// A request, as far as a test looks at it.
#[derive(Debug, Clone)]
pub struct Request {
    /// With the query.
    pub path: String,
    /// All of the head.
    pub head: String,
    /// What came with it.
    pub body: String,
}

impl Request {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

/// Decides, given the request and the number of those like it before.
type Rule = dyn Fn(&Request, usize) -> Fault + Send + Sync;

/// The proxy. Its threads end with the test's process.
pub struct Proxy {
    /// `127.0.0.1:PORT`.
    pub host: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Proxy {
    /// One in front of this host.
    pub fn new(
        upstream: &str,
        rule: impl Fn(&Request, usize) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
        let (upstream, rule, log) = (upstream.to_owned(), Arc::new(rule), Arc::clone(&seen));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (upstream, rule, log) = (upstream.clone(), Arc::clone(&rule), Arc::clone(&log));
                thread::spawn(move || {
                    // A client that goes away is what many of the tests are about.
                    let _ = serve(client, &upstream, &*rule, &log);
                });
            }
        });
        Self { host, seen }
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn without(head: &str, names: &[&str]) -> String {
    let keeps = |line: &&str| {
        let key = line.split(':').next().unwrap_or_default();
        !names.iter().any(|name| key.eq_ignore_ascii_case(name))
    };
    let lines: Vec<_> = head.trim_end().lines().filter(keeps).collect();
    lines.join("\r\n")
}

/// Until the client has had enough.
fn endless(client: &mut TcpStream) -> std::io::Result<()> {
    loop {
        client.write_all(&[b' '; 64 << 10])?;
    }
}

/// One request a connection.
fn serve(
    mut client: TcpStream,
    upstream: &str,
    rule: &Rule,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let asked = head(&mut client)?;
    let path = asked.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request {
        path,
        head: asked,
        body: String::new(),
    };
    let length = request
        .header("content-length")
        .and_then(|n| n.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    client.read_exact(&mut body)?;
    request.body = String::from_utf8_lossy(&body).into_owned();
    let before = {
        let mut log = log.lock().unwrap();
        let before = log.iter().filter(|old| old.path == request.path).count();
        log.push(request.clone());
        before
    };
    let fault = rule(&request, before);
    if let Fault::Answer(status, headers, body) = &fault {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status} said\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        client.write_all(head.as_bytes())?;
        return client.write_all(body);
    }
    if let Fault::EndlessAnswer(status, headers) = &fault {
        let head = format!("HTTP/1.1 {status} said\r\n{headers}Connection: close\r\n\r\n");
        client.write_all(head.as_bytes())?;
        return endless(&mut client);
    }
    let mut drop = vec!["connection"];
    if matches!(fault, Fault::NoRange) {
        drop.push("range");
    }
    let mut server = TcpStream::connect(upstream)?;
    let head_out = without(&request.head, &drop);
    server.write_all(format!("{head_out}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let answer = head(&mut server)?;
    let mut drop = vec!["connection"];
    if matches!(fault, Fault::Longer(_) | Fault::Endless) {
        drop.push("content-length");
    }
    let answer = without(&answer, &drop);
    client.write_all(format!("{answer}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut body = Vec::new();
    server.read_to_end(&mut body)?;
    match fault {
        Fault::CutOff(at) => client.write_all(&body[..at.min(body.len())])?,
        Fault::Stall(at) => {
            client.write_all(&body[..at.min(body.len())])?;
            // Until the client has had enough.
            let _ = client.read(&mut [0]);
        }
        Fault::Corrupt(at) => {
            if let Some(byte) = body.get_mut(at) {
                *byte ^= 1;
            }
            client.write_all(&body)?;
        }
        Fault::Longer(more) => {
            client.write_all(&body)?;
            client.write_all(&more)?;
        }
        Fault::Endless => {
            client.write_all(&body)?;
            endless(&mut client)?;
        }
        Fault::None | Fault::NoRange | Fault::Answer(..) | Fault::EndlessAnswer(..) => {
            client.write_all(&body)?
        }
    }
    client.shutdown(Shutdown::Write)
}
