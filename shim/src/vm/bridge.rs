//! The shim's end of the vsock bridge: what the guest dials arrives here (see [`husk_protocol::bridge`]).

use husk_protocol::bridge::{Connection, PACKET_LEN};
use tokio::{net::UnixStream, sync::mpsc};
use tracing::{debug, warn};

use super::{GuestConnection, seqpacket::Seqpacket};
use crate::few::Few;

/// Takes connections off the bridge until the VMM closes it or nobody wants them any more. While the receiver is
/// busy they wait in the socket, and with them the guest that dials too much.
pub async fn accept(bridge: Seqpacket, connections: mpsc::Sender<GuestConnection>) {
    let mut packet = [0; PACKET_LEN + 1];
    let lines = Few::default();
    loop {
        let (length, fd) = match bridge.receive(&mut packet).await {
            Ok((0, _)) => return,
            Ok(received) => received,
            Err(error) => {
                debug!(%error, "the vsock bridge is gone");
                return;
            }
        };
        let connection = packet
            .get(..length)
            .ok_or(husk_protocol::bridge::BadPacket)
            .and_then(Connection::decode);
        let (port, fd) = match (connection, fd) {
            (Ok(Connection::FromGuest { port }), Some(fd)) => (port, fd),
            (connection, fd) => {
                if lines.more() {
                    warn!(
                        ?connection,
                        has_fd = fd.is_some(),
                        "unusable packet on the vsock bridge, dropped"
                    );
                }
                continue;
            }
        };
        let stream = std::os::unix::net::UnixStream::from(fd);
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream));
        match stream {
            Ok(stream) => {
                if connections
                    .send(GuestConnection { port, stream })
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) if lines.more() => {
                warn!(%error, port, "a vsock connection cannot be used, closed")
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read as _};

    use std::os::fd::{AsFd as _, OwnedFd};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn post(vmm: &OwnedFd, packet: &[u8], fd: Option<&OwnedFd>) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fd.into_iter().map(|fd| fd.as_fd()).collect();
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(
            vmm,
            &[IoSlice::new(packet)],
            &mut ancillary,
            SendFlags::empty(),
        )
        .unwrap();
    }

    #[tokio::test]
    async fn connections_arrive_and_rubbish_is_passed_over() {
        let (ours, vmm) = Seqpacket::pair().unwrap();
        let (sender, mut receiver) = mpsc::channel(4);
        let task = tokio::spawn(accept(ours, sender));
        let (mut guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
        let host = OwnedFd::from(host);
        post(&vmm, b"rubbish", None);
        post(&vmm, &[0; 40], Some(&host));
        post(&vmm, &Connection::FromGuest { port: 7 }.encode(), None);
        post(&vmm, &Connection::ToGuest { port: 7 }.encode(), Some(&host));
        post(
            &vmm,
            &Connection::FromGuest { port: 9 }.encode(),
            Some(&host),
        );
        drop(host);
        let mut connection = receiver.recv().await.unwrap();
        assert_eq!(connection.port, 9);
        connection.stream.write_all(b"hello").await.unwrap();
        drop(connection);
        // EOF proves that the copies sent with the refused packets are closed too.
        let text = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            guest.read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(text.await.unwrap().unwrap(), "hello");
        drop(vmm);
        task.await.unwrap();
    }
}
