//! Docker's resolver in a pod's namespace: it is asked, and hears nameservers outside.

use std::net::UdpSocket;

use husk_protocol::names::{HEADER_LEN, Header, Transport};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{LIMIT, netns::Netns, network_at};
use crate::network::{names, namespace::Namespace};

/// A resolver that answers each query with itself, twice.
async fn resolver(pod: &Netns) {
    let socket = pod.inside(|| UdpSocket::bind("127.0.0.11:53")).await;
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let twice = [&query[..length], &query[..length]].concat();
            let _ = socket.send_to(&twice, from);
        }
    });
}

#[tokio::test]
async fn queries_are_answered_and_those_without_an_answer_are_told() {
    let pod = Netns::new();
    let (ours, mut guest) = tokio::net::UnixStream::pair().unwrap();
    let namespace = Namespace::find(pod.path()).unwrap();
    tokio::spawn(names::serve(names::Resolver { namespace }, ours));
    let mut ask = async |number, transport, message: &[u8]| {
        let frame = Header::frame(number, transport, message).unwrap();
        guest.write_all(&frame).await.unwrap();
        let mut header = [0; HEADER_LEN];
        guest.read_exact(&mut header).await.unwrap();
        let header = Header::decode(header).unwrap();
        let mut answer = vec![0; header.length.into()];
        guest.read_exact(&mut answer).await.unwrap();
        assert_eq!((header.query, header.transport), (number, transport));
        answer
    };
    // Nobody listens: as much is said at once.
    assert_eq!(ask(1, Transport::Udp, b"who").await, b"");
    assert_eq!(ask(2, Transport::Tcp, b"who").await, b"");
    resolver(&pod).await;
    assert_eq!(ask(3, Transport::Udp, b"who").await, b"whowho");
}

#[tokio::test]
async fn what_is_no_query_ends_it() {
    let pod = Netns::new();
    let (ours, mut guest) = tokio::net::UnixStream::pair().unwrap();
    let namespace = Namespace::find(pod.path()).unwrap();
    let served = tokio::spawn(names::serve(names::Resolver { namespace }, ours));
    guest.write_all(&[9; HEADER_LEN]).await.unwrap();
    let Err(error) = served.await.unwrap();
    assert!(error.to_string().contains("no transport"), "{error}");
}

#[tokio::test]
async fn a_socket_of_the_host_in_the_namespace_hears_a_nameserver_outside_and_nobody_else() {
    let (pod, outside) = Netns::pair();
    let network = network_at(&pod).with_resolver(true);
    let found = network.scan(LIMIT).await.unwrap();
    let _taps = network.plug(&found, 1).await.unwrap();
    for (port, is_heard) in [("53", true), ("54", false)] {
        let server = outside
            .inside(move || UdpSocket::bind(format!("10.0.0.1:{port}")))
            .await;
        std::thread::spawn(move || {
            let mut query = [0; 16];
            while let Ok((length, from)) = server.recv_from(&mut query) {
                let _ = server.send_to(&query[..length], from);
            }
        });
        let asker = pod.inside(|| UdpSocket::bind("10.0.0.2:0")).await;
        let patience = std::time::Duration::from_secs(if is_heard { 20 } else { 1 });
        asker.set_read_timeout(Some(patience)).unwrap();
        asker.send_to(b"who", format!("10.0.0.1:{port}")).unwrap();
        let heard = asker.recv(&mut [0; 16]).is_ok();
        assert_eq!(heard, is_heard, "port {port}");
    }
}
