//! ForwardPort, to listeners of this machine's own.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use husk_protocol::agent::ForwardPortRequest;
use tokio::task::spawn_blocking;
use ttrpc::{Code, context};

use super::{Guest, code};

const TOKEN: [u8; 32] = [9; 32];

/// More than all the buffers on the way hold.
const MUCH: usize = 8 << 20;

async fn forward(guest: &Guest, port: u32) -> ttrpc::Result<UnixStream> {
    let request = ForwardPortRequest {
        port,
        token: TOKEN.to_vec(),
        ..Default::default()
    };
    let context = context::Context::default();
    guest.client.forward_port(context, &request).await?;
    Ok(guest.host.stream(&TOKEN))
}

fn port_of(listener: &TcpListener) -> u32 {
    listener.local_addr().unwrap().port().into()
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let guest = Guest::new().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut stream = forward(&guest, port_of(&listener)).await.unwrap();
    let server = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut asked = Vec::new();
        client.read_to_end(&mut asked).unwrap();
        // Its own direction is still open.
        client.write_all(&asked).unwrap();
        asked.len()
    });
    let answer = spawn_blocking(move || {
        let mut reader = stream.try_clone().unwrap();
        let answer = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        stream.write_all(&vec![7; MUCH]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        answer.join().unwrap()
    });
    assert!(answer.await.unwrap() == vec![7; MUCH]);
    assert_eq!(server.join().unwrap(), MUCH);
}

#[tokio::test]
async fn a_server_that_goes_takes_the_stream_along() {
    let guest = Guest::new().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut stream = forward(&guest, port_of(&listener)).await.unwrap();
    drop(listener.accept().unwrap());
    let written = spawn_blocking(move || {
        loop {
            if let Err(error) = stream.write_all(&[0; 4096]) {
                return error.kind();
            }
        }
    });
    let kind = written.await.unwrap();
    // Which of the two hangs on whether bytes were still on their way.
    let is_gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&kind);
    assert!(is_gone, "{kind}");
}

#[tokio::test]
async fn one_that_listens_by_ipv6_only_is_found() {
    let guest = Guest::new().await;
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else {
        // A machine without IPv6.
        return;
    };
    let mut stream = forward(&guest, port_of(&listener)).await.unwrap();
    let (mut client, _): (TcpStream, _) = listener.accept().unwrap();
    client.write_all(b"six").unwrap();
    drop(client);
    let answer = spawn_blocking(move || {
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        all
    });
    assert_eq!(answer.await.unwrap(), "six");
}

#[tokio::test]
async fn a_port_without_a_listener_or_no_port_at_all_is_refused() {
    let guest = Guest::new().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = port_of(&listener);
    drop(listener);
    let (kind, message) = code(forward(&guest, port).await);
    assert_eq!(kind, Code::INTERNAL);
    assert!(
        message.starts_with(&format!("connecting to port {port}: Connection refused")),
        "{message}"
    );
    for port in [0, 65536] {
        let (kind, message) = code(forward(&guest, port).await);
        assert_eq!(kind, Code::INVALID_ARGUMENT, "{message}");
    }
    let request = ForwardPortRequest {
        port: 80,
        ..Default::default()
    };
    let tokenless = guest
        .client
        .forward_port(context::Context::default(), &request)
        .await;
    assert_eq!(code(tokenless).0, Code::INVALID_ARGUMENT);
}
