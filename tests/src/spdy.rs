//! SPDY/3.1 as far as CRI's streaming server speaks it: many streams over one upgraded HTTP connection.
//!
//! The API server, kubectl and crictl use it towards CRI; the server's WebSockets cannot tell the end of an input (v4). Nobody
//! maintains a crate of it. What is left out here is not used there: flow control, settings, streams that the server opens.
//! Headers must come as one zlib stream a connection; ours has stored blocks only, so nothing is compressed.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::wait;

/// Type of the control frame that opens a stream, with the version's bytes before it.
const SYN_STREAM: [u8; 4] = [0x80, 3, 0, 1];

/// Set in the first byte of a control frame.
const CONTROL: u8 = 0x80;

/// Type of the control frame that breaks a stream off.
const RST_STREAM: u8 = 3;

/// Flag of a stream's last frame.
const FIN: u8 = 1;

/// Bytes in a data frame of ours: its length has 24 bits.
const CHUNK: usize = 32 * 1024;

/// A zlib header of the fastest level and without a dictionary (RFC 1950).
const ZLIB_HEADER: [u8; 2] = [0x78, 0x01];

/// A stored block of no bytes.
const EMPTY_BLOCK: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// Pieces of a stream, by the stream's number. One that has ended is not in it.
type Inboxes = Mutex<HashMap<u32, Sender<Vec<u8>>>>;

/// A connection. Dropped, it is closed with all its streams.
pub struct Connection {
    writer: Arc<Mutex<Writer>>,
    inboxes: Arc<Inboxes>,
}

struct Writer {
    socket: TcpStream,
    /// Number of the next stream; a client's are odd.
    next: u32,
    has_sent_headers: bool,
}

/// A stream, in both directions.
pub struct Stream {
    number: u32,
    writer: Arc<Mutex<Writer>>,
    inbox: Receiver<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Asks for the URL and turns the connection into one of SPDY, with this subprotocol.
    ///
    /// # Errors
    /// The server does not answer, or does not want to.
    pub fn upgrade(url: &str, subprotocol: &str) -> Result<Self> {
        let (host, path) = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split_once('/'))
            .with_context(|| format!("{url} is no HTTP URL"))?;
        let mut socket =
            TcpStream::connect(host).with_context(|| format!("connecting to {host}"))?;
        socket.set_nodelay(true)?;
        write!(
            socket,
            "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: {subprotocol}\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut reader = BufReader::new(socket.try_clone()?);
        let mut answer = String::new();
        while !answer.ends_with("\r\n\r\n") {
            ensure!(reader.read_line(&mut answer)? > 0, "{url}: {answer:?}");
        }
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{url}: {answer}");
        let inboxes = Arc::new(Inboxes::default());
        thread::spawn({
            let inboxes = Arc::clone(&inboxes);
            move || {
                // However the connection ends, its streams end with it.
                while read_frame(&mut reader, &inboxes).is_ok() {}
                lock(&inboxes).clear();
            }
        });
        let writer = Writer {
            socket,
            next: 1,
            has_sent_headers: false,
        };
        Ok(Self {
            writer: Arc::new(Mutex::new(writer)),
            inboxes,
        })
    }

    /// Opens a stream with these headers, their names in lower case.
    ///
    /// # Errors
    /// The connection has broken.
    pub fn open(&self, headers: &[(&str, &str)]) -> Result<Stream> {
        let mut writer = lock(&self.writer);
        let number = writer.next;
        writer.next += 2;
        let (sender, inbox) = mpsc::channel();
        lock(&self.inboxes).insert(number, sender);
        writer.open(number, headers)?;
        Ok(Stream {
            number,
            writer: Arc::clone(&self.writer),
            inbox,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The server may have been quicker.
        let _ = lock(&self.writer).socket.shutdown(Shutdown::Both);
    }
}

impl Writer {
    fn open(&mut self, number: u32, headers: &[(&str, &str)]) -> Result<()> {
        let mut block = u32::try_from(headers.len())?.to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend(u32::try_from(text.len())?.to_be_bytes());
            block.extend(text.as_bytes());
        }
        // Neither an associated stream, nor a priority, nor a credential slot.
        let mut frame = [&number.to_be_bytes()[..], &[0; 6]].concat();
        if !self.has_sent_headers {
            frame.extend(ZLIB_HEADER);
            self.has_sent_headers = true;
        }
        // A stored block that is not the last (RFC 1951).
        let length = u16::try_from(block.len())?;
        frame.push(0);
        frame.extend(length.to_le_bytes());
        frame.extend((!length).to_le_bytes());
        frame.extend(block);
        // An empty one has Go's reader hand out what it has, before it looks for more.
        frame.extend(EMPTY_BLOCK);
        self.send(SYN_STREAM, 0, &frame)
    }

    fn send(&mut self, head: [u8; 4], flags: u8, payload: &[u8]) -> Result<()> {
        let [_, length @ ..] = u32::try_from(payload.len())?.to_be_bytes();
        let frame = [&head[..], &[flags], &length, payload].concat();
        Ok(self.socket.write_all(&frame)?)
    }
}

fn read_frame(reader: &mut BufReader<TcpStream>, inboxes: &Inboxes) -> Result<()> {
    let mut head = [0; 8];
    reader.read_exact(&mut head)?;
    let [a, b, c, kind, flags, length @ ..] = head;
    let [x, y, z] = length;
    let mut payload = vec![0; u32::from_be_bytes([0, x, y, z]).try_into()?];
    reader.read_exact(&mut payload)?;
    let mut inboxes = lock(inboxes);
    if a & CONTROL == 0 {
        let number = u32::from_be_bytes([a, b, c, kind]);
        if let Some(inbox) = inboxes.get(&number) {
            // Nobody may want it any more.
            let _ = inbox.send(payload);
        }
        if flags & FIN != 0 {
            inboxes.remove(&number);
        }
    } else if kind == RST_STREAM
        && let [a, b, c, d, ..] = payload[..]
    {
        inboxes.remove(&u32::from_be_bytes([a, b, c, d]));
    }
    Ok(())
}

impl Stream {
    /// Sends bytes.
    ///
    /// # Errors
    /// The connection has broken.
    pub fn send(&self, data: &[u8]) -> Result<()> {
        for piece in data.chunks(CHUNK) {
            lock(&self.writer).send(self.number.to_be_bytes(), 0, piece)?;
        }
        Ok(())
    }

    /// Says that no more is sent.
    ///
    /// # Errors
    /// The connection has broken.
    pub fn finish(&self) -> Result<()> {
        lock(&self.writer).send(self.number.to_be_bytes(), FIN, &[])
    }

    /// What comes next, however much that is; `None` at the end.
    ///
    /// # Errors
    /// Nothing comes.
    pub fn receive(&self) -> Result<Option<Vec<u8>>> {
        match self.inbox.recv_timeout(wait::HANG) {
            Ok(piece) => Ok(Some(piece)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("nothing comes on stream {}", self.number),
        }
    }

    /// At least this much of what comes.
    ///
    /// # Errors
    /// It ends before.
    pub fn receive_bytes(&self, count: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while all.len() < count {
            let piece = self.receive()?;
            all.extend(piece.with_context(|| format!("the end after {} bytes", all.len()))?);
        }
        Ok(all)
    }

    /// What comes, until this text is in it.
    ///
    /// # Errors
    /// It ends without.
    pub fn receive_until(&self, text: &str) -> Result<String> {
        let mut all = String::new();
        while !all.contains(text) {
            let piece = self.receive()?;
            let piece = piece.with_context(|| format!("no {text:?} in {all:?}"))?;
            all.push_str(&String::from_utf8_lossy(&piece));
        }
        Ok(all)
    }

    /// All that comes.
    ///
    /// # Errors
    /// There is no end.
    pub fn rest(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(piece) = self.receive()? {
            all.extend(piece);
        }
        Ok(all)
    }
}
