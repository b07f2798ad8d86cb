//! Real FIFOs, files and programs; the guest is the other end of a socketpair.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::spawn_blocking;

use super::*;

struct Fifos {
    dir: tempfile::TempDir,
}

impl Fifos {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            mkfifo(&dir.path().join(name), Mode::S_IRWXU).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn paths(&self) -> StdioPaths {
        let text = |name| self.path(name).to_str().unwrap().to_owned();
        StdioPaths {
            stdin: text("stdin"),
            stdout: text("stdout"),
            stderr: text("stderr"),
            terminal: false,
        }
    }
}

async fn open(paths: &StdioPaths) -> Stdio {
    Stdio::open(paths, "c1", "ns").await.unwrap()
}

/// The guest's end of a stream.
fn join(stdio: &Stdio, kind: StreamKind) -> UnixStream {
    let (guest, host) = UnixStream::pair().unwrap();
    stdio.connect(kind, host);
    guest
}

/// 64 MiB that repeat at no power of two.
fn pattern() -> Vec<u8> {
    (0_u32..64 << 20).map(|i| (i % 251) as u8).collect()
}

fn reader(path: &Path) -> fs::File {
    OpenOptions::new().read(true).open(path).unwrap()
}

#[tokio::test]
async fn a_stream_that_nobody_wants_is_not_waited_for() {
    let stdio = open(&StdioPaths::default()).await;
    let drained = stdio.drained(u64::MAX, u64::MAX);
    tokio::time::timeout(Duration::from_secs(1), drained)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_mib_out_and_eof() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    let path = fifos.path("stdout");
    let client = spawn_blocking(move || {
        let mut all = Vec::new();
        reader(&path).read_to_end(&mut all).unwrap();
        all
    });
    let mut guest = join(&stdio, StreamKind::Stdout);
    let data = pattern();
    guest.write_all(&data).await.unwrap();
    stdio.drained(data.len() as u64, 0).await;
    assert_eq!(stdio.stdout_progress.borrow().forwarded, data.len() as u64);
    drop(guest);
    assert!(
        client.await.unwrap() == data,
        "what the client read differs"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_mib_in_and_close_io() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    let mut guest = join(&stdio, StreamKind::Stdin);
    let path = fifos.path("stdin");
    let client = spawn_blocking(move || {
        let data = pattern();
        let mut fifo = OpenOptions::new().write(true).open(path).unwrap();
        fifo.write_all(&data).unwrap();
        // It stays open: CloseIO alone must end the guest's stdin.
        (fifo, data)
    });
    let read = tokio::spawn(async move {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).await.unwrap();
        all
    });
    let (_fifo, data) = client.await.unwrap();
    stdio.close_stdin();
    assert!(read.await.unwrap() == data, "what the guest read differs");
}

#[tokio::test]
async fn close_io_before_the_stream_is_there() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    OpenOptions::new()
        .write(true)
        .open(fifos.path("stdin"))
        .unwrap()
        .write_all(b"last words")
        .unwrap();
    stdio.close_stdin();
    let mut guest = join(&stdio, StreamKind::Stdin);
    let mut all = Vec::new();
    guest.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"last words");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_detaches_and_another_attaches() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    let mut stdin = join(&stdio, StreamKind::Stdin);
    let mut stdout = join(&stdio, StreamKind::Stdout);
    for word in [b"first".as_slice(), b"again"] {
        let mut to = OpenOptions::new()
            .write(true)
            .open(fifos.path("stdin"))
            .unwrap();
        let mut from = reader(&fifos.path("stdout"));
        to.write_all(word).unwrap();
        let mut got = vec![0; word.len()];
        stdin.read_exact(&mut got).await.unwrap();
        assert_eq!(got, word);
        stdout.write_all(word).await.unwrap();
        from.read_exact(&mut got).unwrap();
        assert_eq!(got, word);
        // Both ends are dropped here; neither the input ends nor the output fails.
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_reader_the_container_goes_on_and_a_late_one_gets_the_first_of_it() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    drop(reader_then_gone(&fifos.path("stdout")));
    let mut guest = join(&stdio, StreamKind::Stdout);
    let data = vec![b'x'; 4 << 20];
    // Blocks for the grace and no longer.
    guest.write_all(&data).await.unwrap();
    stdio.drained(data.len() as u64, 0).await;
    assert_eq!(stdio.stdout_progress.borrow().forwarded, data.len() as u64);
    // A client that comes back finds what the pipe holds, then what is written from now on. The pipe's pages need not be full.
    let mut fifo = reader_then_gone(&fifos.path("stdout"));
    let mut held = Vec::new();
    let end = fifo.read_to_end(&mut held).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
    assert!(!held.is_empty() && held.iter().all(|&b| b == b'x'));
    guest.write_all(b"new").await.unwrap();
    stdio.drained(data.len() as u64 + 3, 0).await;
    let mut got = [0; 3];
    fifo.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"new");
}

fn reader_then_gone(path: &Path) -> fs::File {
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_loses_nothing() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    let mut fifo = reader_then_gone(&fifos.path("stdout"));
    let mut guest = join(&stdio, StreamKind::Stdout);
    let data = vec![b'y'; 1 << 20];
    let writer = tokio::spawn(async move {
        guest.write_all(&data).await.unwrap();
        data.len()
    });
    // Longer than the grace: there is a reader, so nothing may be dropped.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let read = spawn_blocking(move || {
        let mut all = 0;
        let mut chunk = vec![0; 1 << 16];
        loop {
            match fifo.read(&mut chunk) {
                Ok(0) => return all,
                Ok(n) => all += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        }
    });
    assert_eq!(read.await.unwrap(), writer.await.unwrap());
}

#[tokio::test]
async fn a_log_file_is_appended_to_by_both_streams() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("new/dir/log");
    let url = format!("file://{}", log.display());
    let paths = StdioPaths {
        stdout: url.clone(),
        stderr: url,
        ..Default::default()
    };
    let stdio = open(&paths).await;
    assert!(
        !stdio.wants(StreamKind::Stdin)
            && stdio.wants(StreamKind::Stdout)
            && stdio.wants(StreamKind::Stderr)
    );
    let (mut out, mut err) = (
        join(&stdio, StreamKind::Stdout),
        join(&stdio, StreamKind::Stderr),
    );
    out.write_all(b"one\n").await.unwrap();
    stdio.drained(4, 0).await;
    err.write_all(b"two\n").await.unwrap();
    stdio.drained(4, 4).await;
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\n");
    stdio.close();
    let stdio = open(&paths).await;
    join(&stdio, StreamKind::Stdout)
        .write_all(b"three\n")
        .await
        .unwrap();
    stdio.drained(6, 0).await;
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\nthree\n");
}

fn script(dir: &Path, body: &str) -> String {
    let path = dir.join("logger");
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!(
        "binary://{}?to={}",
        path.display(),
        dir.join("log").display()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logging_binary_gets_both_streams_its_environment_and_eof() {
    let dir = tempfile::tempdir().unwrap();
    let url = script(
        dir.path(),
        r#"exec 5>&-
{ echo "$1 $CONTAINER_ID $CONTAINER_NAMESPACE"; /bin/cat <&3; /bin/cat <&4; echo end; } >"$2.new"
/bin/mv "$2.new" "$2""#,
    );
    let paths = StdioPaths {
        stdout: url.clone(),
        stderr: url,
        ..Default::default()
    };
    let stdio = open(&paths).await;
    let (mut out, mut err) = (
        join(&stdio, StreamKind::Stdout),
        join(&stdio, StreamKind::Stderr),
    );
    out.write_all(b"out\n").await.unwrap();
    err.write_all(b"err\n").await.unwrap();
    stdio.drained(4, 4).await;
    drop((out, err));
    let log = dir.path().join("log");
    while !log.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        fs::read_to_string(log).unwrap(),
        "to c1 ns\nout\nerr\nend\n"
    );
}

#[tokio::test]
async fn a_logging_binary_that_fails_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let url = script(dir.path(), "exit 3");
    let error = Stdio::open(
        &StdioPaths {
            stdout: url,
            ..Default::default()
        },
        "c",
        "n",
    )
    .await
    .unwrap_err()
    .to_string();
    // The script may be caught between closing fd 5 and ending; then its end is seen by the copy instead.
    assert!(
        error.contains("logger") && error.contains("Stdout"),
        "{error}"
    );
    let gone = StdioPaths {
        stdout: "binary:///no/such/logger".into(),
        ..Default::default()
    };
    let error = Stdio::open(&gone, "c", "n").await.unwrap_err().to_string();
    assert!(error.contains("/no/such/logger"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_opened_is_named() {
    let paths = StdioPaths {
        stdin: "/no/such/fifo".into(),
        ..Default::default()
    };
    let error = Stdio::open(&paths, "c", "n").await.unwrap_err().to_string();
    assert!(
        error.contains("Stdin") && error.contains("/no/such/fifo"),
        "{error}"
    );
}

#[tokio::test]
async fn a_terminal_has_no_stderr_and_close_ends_everything() {
    let fifos = Fifos::new();
    let stdio = open(&StdioPaths {
        terminal: true,
        ..fifos.paths()
    })
    .await;
    assert!(!stdio.wants(StreamKind::Stderr) && stdio.wants(StreamKind::Stdin));
    let mut from = reader_then_gone(&fifos.path("stdout"));
    let mut guest = join(&stdio, StreamKind::Stdout);
    guest.write_all(b"tty").await.unwrap();
    stdio.drained(3, 0).await;
    stdio.close();
    stdio.close();
    // Aborted tasks let go at their next turn.
    let mut end = [0];
    assert!(matches!(guest.read(&mut end).await, Ok(0) | Err(_)));
    let mut all = Vec::new();
    from.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"tty");
    // A process of a closed Stdio has nothing to wait for.
    stdio.drained(1 << 30, 1 << 30).await;
}

/// What a guest says of its output is not believed beyond what can be underway.
#[tokio::test(start_paused = true)]
async fn a_guest_that_talks_on_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stdout: format!("file://{}", dir.path().join("log").display()),
        ..Default::default()
    };
    let stdio = open(&paths).await;
    let mut guest = join(&stdio, StreamKind::Stdout);
    let block = vec![b'x'; 1 << 16];
    let flood = async { while guest.write_all(&block).await.is_ok() {} };
    tokio::select! {
        () = flood => panic!("the stream ended"),
        () = stdio.drained(u64::MAX, 0) => {}
    }
    // Nor does one that lets it come byte by byte.
    let begin = tokio::time::Instant::now();
    let drip = async {
        loop {
            guest.write_all(b"x").await.unwrap();
            tokio::time::sleep(DRAIN_PATIENCE / 2).await;
        }
    };
    tokio::select! {
        () = drip => {}
        () = stdio.drained(u64::MAX, 0) => {}
    }
    assert_eq!(begin.elapsed(), DRAIN_LIMIT);
}

/// Memory of the shim's is no place for what a client does not take.
#[tokio::test(start_paused = true)]
async fn what_a_client_does_not_read_stays_in_the_guest() {
    let fifos = Fifos::new();
    let stdio = open(&fifos.paths()).await;
    let _client = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(fifos.path("stdout"))
        .unwrap();
    let mut guest = join(&stdio, StreamKind::Stdout);
    let block = vec![b'x'; 1 << 12];
    let mut taken = 0;
    let flood = async {
        loop {
            guest.write_all(&block).await.unwrap();
            taken += block.len();
        }
    };
    // It ends when nothing moves any more.
    let stuck: Result<(), _> = tokio::time::timeout(Duration::from_secs(3600), flood).await;
    assert!(stuck.is_err());
    assert!(taken < 1 << 20, "{taken}");
}
