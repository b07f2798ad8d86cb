//! Port-forwards into a pod: connections that a host process makes in the pod's network namespace.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
    task::spawn_blocking,
};

use super::world::{Fault, Guest, LIMIT, World};
use crate::network::tests::netns::Netns;

type Forwards = mpsc::UnboundedReceiver<(u32, Vec<u8>)>;

/// A pod that runs, in this namespace.
async fn pod(netns: &Netns) -> (World, Forwards) {
    let guest = Arc::new(Guest::default());
    let (sender, forwards) = mpsc::unbounded_channel();
    guest.forwards.set(sender).unwrap();
    (pod_of(guest, netns).await, forwards)
}

async fn pod_of(guest: Arc<Guest>, netns: &Netns) -> World {
    let w = World::in_network(guest, Fault::None, netns.path().to_str().unwrap()).await;
    w.create().await.unwrap();
    w
}

/// Connects as a process inside would.
async fn dial(netns: &Netns, address: impl Into<SocketAddr>) -> TcpStream {
    let address = address.into();
    let client = netns.inside(move || TcpStream::connect(address)).await;
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client
}

/// The guest takes the next connection: its port and its stream.
async fn taken(w: &World, forwards: &mut Forwards) -> (u32, UnixStream) {
    let next = tokio::time::timeout(LIMIT, forwards.recv());
    let (port, token) = next.await.unwrap().unwrap();
    (port, w.vmm.dial(&token).await)
}

/// What comes until the end.
async fn rest(mut client: TcpStream) -> io::Result<String> {
    let read = spawn_blocking(move || {
        let mut all = String::new();
        client.read_to_string(&mut all).map(|_| all)
    });
    read.await.unwrap()
}

async fn is_reset(client: TcpStream) {
    let error = rest(client).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}

#[tokio::test]
async fn whatever_port_is_dialled_is_the_guests() {
    let (netns, _outside) = Netns::pair();
    let (w, mut forwards) = pod(&netns).await;
    let ports: [(SocketAddr, u32); 4] = [
        ((Ipv4Addr::LOCALHOST, 80).into(), 80),
        ((Ipv4Addr::LOCALHOST, 65535).into(), 65535),
        ((Ipv4Addr::new(127, 9, 9, 9), 8080).into(), 8080),
        ((Ipv6Addr::LOCALHOST, 443).into(), 443),
    ];
    for (address, port) in ports {
        let mut client = dial(&netns, address).await;
        let (dialled, mut guest) = taken(&w, &mut forwards).await;
        assert_eq!(dialled, port);
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut asked = String::new();
        guest.read_to_string(&mut asked).await.unwrap();
        assert_eq!(asked, "question");
        // The other direction is still open.
        guest.write_all(b"answer").await.unwrap();
        drop(guest);
        assert_eq!(rest(client).await.unwrap(), "answer");
    }
}

#[tokio::test]
async fn only_loopback_of_that_namespace_is_taken() {
    let (netns, outside) = Netns::pair();
    let (_w, mut forwards) = pod(&netns).await;
    for (place, address) in [(&netns, [10, 0, 0, 2]), (&outside, [127, 0, 0, 1])] {
        let listener = place.inside(move || TcpListener::bind((Ipv4Addr::from(address), 0)));
        let listener = listener.await;
        let _client = dial(place, listener.local_addr().unwrap()).await;
        listener.accept().unwrap();
    }
    assert!(forwards.try_recv().is_err());
}

#[tokio::test]
async fn a_port_that_the_guest_refuses_is_reset() {
    let (netns, _outside) = Netns::pair();
    let w = pod_of(Arc::default(), &netns).await;
    is_reset(dial(&netns, (Ipv4Addr::LOCALHOST, 81)).await).await;
    assert!(w.guest.calls.lock().unwrap().contains(&"forward 81".into()));
}

#[tokio::test]
async fn one_connection_too_many_is_reset_and_room_comes_back() {
    let (netns, _outside) = Netns::pair();
    let (w, mut forwards) = pod(&netns).await;
    let mut open = Vec::new();
    for _ in 0..128 {
        let client = dial(&netns, (Ipv4Addr::LOCALHOST, 80)).await;
        open.push((client, taken(&w, &mut forwards).await));
    }
    is_reset(dial(&netns, (Ipv4Addr::LOCALHOST, 80)).await).await;
    drop(open);
    // Those that have been closed are not counted for long.
    let again = async {
        loop {
            let client = dial(&netns, (Ipv4Addr::LOCALHOST, 80)).await;
            tokio::select! {
                next = forwards.recv() => break drop((client, next.unwrap())),
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
        }
    };
    tokio::time::timeout(LIMIT, again).await.unwrap();
}

#[tokio::test]
async fn all_of_it_goes_with_the_pod() {
    let (netns, _outside) = Netns::pair();
    let (w, mut forwards) = pod(&netns).await;
    let client = dial(&netns, (Ipv4Addr::LOCALHOST, 80)).await;
    let _guest = taken(&w, &mut forwards).await;
    w.vmm.die("it panicked").await;
    // The connection ends although the guest's end of it is open.
    assert_eq!(rest(client).await.unwrap(), "");
    let refused = async {
        let dial = || netns.inside(|| Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, 80))));
        while dial().await.is_ok() {}
    };
    tokio::time::timeout(LIMIT, refused).await.unwrap();
}

#[tokio::test]
async fn a_namespace_whose_loopback_is_down_does_without() {
    let (netns, _outside) = Netns::pair();
    netns.ip("link set lo down");
    let (w, _forwards) = pod(&netns).await;
    w.start("").await.unwrap();
}
