//! Joins an interface and a tap: what comes in at one goes out at the other (`tc … ingress … mirred egress redirect`).
//!
//! A redirected frame is taken before the host's stack sees it, so nothing in the namespace answers for the pod. No bridge, no second
//! MAC address: this is the least that works for a veth, a macvlan and an ipvlan alike.

use rtnetlink::{
    Handle,
    packet_route::tc::{TcHandle, TcMessage},
};
use tracing::{debug, info};

use super::{NetworkError, model::Interface, netlink, tap::Tap};

/// Handle of an ingress qdisc, `ffff:`.
const INGRESS: u32 = 0xffff_0000;

/// Every protocol (`ETH_P_ALL` of linux/if_ether.h), in network byte order as the filter wants it.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Joins the two. A redirection that an earlier shim has left at the interface is replaced.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub async fn join(handle: &Handle, interface: &Interface, tap: &Tap) -> Result<(), NetworkError> {
    let ends = [
        (tap.index, tap.name.as_str()),
        (interface.index, interface.name.as_str()),
    ];
    let [inside, outside] = ends;
    for ((from, name), (to, other)) in [(inside, outside), (outside, inside)] {
        add_qdisc(handle, from, name).await?;
        let filter = handle
            .traffic_filter(signed(from))
            .add()
            .parent(TcHandle::from(INGRESS).into())
            .protocol(ALL_PROTOCOLS)
            .redirect(to);
        let added = match filter {
            Ok(filter) => filter.execute().await,
            Err(error) => Err(error),
        };
        added.map_err(netlink(format!("redirect the frames of {name} to {other}")))?;
    }
    Ok(())
}

/// Takes the redirection away from an interface. That it has gone already is fine.
pub async fn undo(handle: &Handle, interface: u32) {
    if let Err(error) = remove_qdisc(handle, interface).await {
        debug!(%error, interface, "the redirection is not taken away");
    }
}

async fn add_qdisc(handle: &Handle, interface: u32, name: &str) -> Result<(), NetworkError> {
    let add = || handle.qdisc().add(signed(interface)).ingress().execute();
    let mut added = add().await;
    if let Err(rtnetlink::Error::NetlinkError(refusal)) = &added
        && refusal.to_io().raw_os_error() == Some(libc::EEXIST)
    {
        info!(interface = name, "has an ingress qdisc already, replaced");
        remove_qdisc(handle, interface)
            .await
            .map_err(netlink(format!(
                "remove the ingress qdisc that {name} already has"
            )))?;
        added = add().await;
    }
    added.map_err(netlink(format!("add an ingress qdisc to {name}")))
}

async fn remove_qdisc(handle: &Handle, interface: u32) -> Result<(), rtnetlink::Error> {
    let mut request = handle.qdisc().del(signed(interface));
    let message: &mut TcMessage = request.message_mut();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS.into();
    request.execute().await
}

/// The kernel's indices are positive; traffic control has them signed.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}
