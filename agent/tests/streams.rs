//! Streams over real pipes, ptys and sockets: what a copier does when either side is slow, ends or goes away.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use husk_agent::polled::{Polled, polled};
use husk_agent::stream::{InputKind, Output, Outputs, start_input};
use nix::fcntl::OFlag;
use nix::pty::openpty;
use nix::unistd::pipe2;

const MIB: usize = 1 << 20;

/// A container's side of a pipe and the agent's: `(reader, writer)` as files.
fn pipe() -> (File, File) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer.into())
}

/// The host's end of a connection and the agent's.
fn connection() -> (UnixStream, Polled) {
    let (host, agent) = UnixStream::pair().unwrap();
    (host, polled(OwnedFd::from(agent)).unwrap())
}

fn start_output(source: impl Into<OwnedFd>) -> (UnixStream, Outputs) {
    let (host, agent) = connection();
    let outputs = Outputs {
        stdout: Some(Output::start(polled(source.into()).unwrap(), Some(agent))),
        stderr: None,
    };
    (host, outputs)
}

/// Bytes in which a lost or doubled piece shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn read_to_end(mut from: impl Read + Send + 'static) -> tokio::task::JoinHandle<Vec<u8>> {
    tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
}

#[tokio::test]
async fn sixty_four_mib_of_output_arrive_whole_and_end() {
    let (reader, mut writer) = pipe();
    let (host, outputs) = start_output(reader);
    let sent = pattern(64 * MIB);
    let expected = sent.clone();
    let process = thread::spawn(move || writer.write_all(&sent).unwrap());
    assert!(
        read_to_end(host).await.unwrap() == expected,
        "the end came, with other bytes"
    );
    process.join().unwrap();
    assert_eq!(outputs.settle().await, (64 * MIB as u64, 0));
}

#[tokio::test]
async fn sixty_four_mib_of_input_arrive_whole_and_end() {
    let (reader, writer) = pipe();
    let (mut host, agent) = connection();
    start_input(agent, polled(writer.into()).unwrap(), InputKind::Pipe);
    let sent = pattern(64 * MIB);
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        host.write_all(&sent).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        host
    });
    assert!(read_to_end(reader).await.unwrap() == expected);
    sender.join().unwrap();
}

#[tokio::test]
async fn output_is_discarded_once_the_host_has_gone() {
    let (reader, mut writer) = pipe();
    let (host, outputs) = start_output(reader);
    drop(host);
    let process = tokio::task::spawn_blocking(move || writer.write_all(&pattern(4 * MIB)));
    process.await.unwrap().expect("the process notices nothing");
    assert_eq!(outputs.settle().await, (0, 0));
}

/// The clock stands still unless everything waits for it: a copier that forgot to answer shows in the time gone by.
#[tokio::test(start_paused = true)]
async fn a_child_that_keeps_the_pipe_does_not_hold_up_the_exit() {
    let start = tokio::time::Instant::now();
    let (reader, mut writer) = pipe();
    let mut background = writer.try_clone().unwrap();
    let (mut host, outputs) = start_output(reader);
    writer.write_all(b"last words").unwrap();
    drop(writer);
    assert_eq!(outputs.settle().await, (10, 0));
    assert_eq!(start.elapsed().as_nanos(), 0);
    background.write_all(b", and more").unwrap();
    drop(background);
    let mut said = String::new();
    let said = tokio::task::spawn_blocking(move || host.read_to_string(&mut said).map(|_| said));
    assert_eq!(said.await.unwrap().unwrap(), "last words, and more");
}

#[tokio::test]
async fn a_child_that_never_stops_writing_does_not_hold_up_the_exit() {
    let (reader, writer) = pipe();
    let mut background = writer.try_clone().unwrap();
    let (host, outputs) = start_output(reader);
    drop(writer);
    let host_reads =
        thread::spawn(move || std::io::copy(&mut (&host).take(u64::MAX), &mut std::io::sink()));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let writes = thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            background.write_all(&[b'y'; 4096]).unwrap();
        }
    });
    outputs.settle().await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    // The copier ends with the last writer, and with it what the host reads.
    tokio::task::spawn_blocking(move || {
        writes.join().unwrap();
        host_reads.join().unwrap().unwrap();
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_pipe_that_nobody_reads_closes_its_connection() {
    let (reader, writer) = pipe();
    let (mut host, agent) = connection();
    start_input(agent, polled(writer.into()).unwrap(), InputKind::Pipe);
    drop(reader);
    let end = tokio::task::spawn_blocking(move || host.read(&mut [0]));
    assert_eq!(
        end.await.unwrap().unwrap(),
        0,
        "without a byte having been sent"
    );
}

/// As systemd treats its console: nobody has it open but while there is something to say.
#[tokio::test]
async fn a_terminal_that_nobody_has_open_is_not_at_its_end_while_the_process_lives() {
    let pty = openpty(None, None).unwrap();
    let name = nix::unistd::ttyname(&pty.slave).unwrap();
    let (mut host, outputs) = start_output(pty.master);
    let is_held = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        fds.map(|fd| std::fs::read_link(fd.path()))
            .any(|link| link.is_ok_and(|link| link == name))
    };
    drop(pty.slave);
    let reopened = async {
        while !is_held() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), reopened)
        .await
        .unwrap();
    let mut slave = File::options().write(true).open(&name).unwrap();
    slave.write_all(b"once more\n").unwrap();
    let line = tokio::task::spawn_blocking(move || {
        let mut line = [0; 11];
        host.read_exact(&mut line).unwrap();
        (host, line)
    });
    let (host, line) = line.await.unwrap();
    assert_eq!(&line, b"once more\r\n");
    drop(slave);
    outputs.settle().await;
    assert_eq!(read_to_end(host).await.unwrap(), b"");
    assert!(!is_held(), "the other end is let go of");
}

#[tokio::test]
async fn a_terminal_carries_both_ways_and_ends_with_its_last_slave() {
    let pty = openpty(None, None).unwrap();
    let master = polled(pty.master).unwrap();
    let (mut host_in, agent_in) = connection();
    let (host_out, agent_out) = connection();
    start_input(agent_in, Polled::clone(&master), InputKind::Terminal);
    let outputs = Outputs {
        stdout: Some(Output::start(master, Some(agent_out))),
        stderr: None,
    };
    host_in.write_all(b"typed\n").unwrap();
    host_in.shutdown(std::net::Shutdown::Write).unwrap();
    let mut slave = File::from(pty.slave);
    let slave = tokio::task::spawn_blocking(move || {
        let mut line = [0; 64];
        let n = slave.read(&mut line).unwrap();
        assert_eq!(&line[..n], b"typed\n");
        assert_eq!(
            slave.read(&mut line).unwrap(),
            0,
            "the host's end of input is the terminal's"
        );
        slave.write_all(b"said\n").unwrap();
        slave
    })
    .await
    .unwrap();
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    let (screen, _) = outputs.settle().await;
    assert_eq!(
        start.elapsed().as_nanos(),
        0,
        "settled without waiting for the slave"
    );
    tokio::time::resume();
    drop(slave);
    let seen = read_to_end(host_out).await.unwrap();
    assert_eq!(
        screen,
        seen.len() as u64,
        "all was out when the process had ended"
    );
    let seen = String::from_utf8(seen).unwrap();
    assert!(
        seen.starts_with("typed\r\n") && seen.ends_with("said\r\n"),
        "{seen:?}"
    );
}
