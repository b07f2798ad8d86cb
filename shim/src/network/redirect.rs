//! Joins an interface and a tap: what comes in at one goes out at the other (`tc … ingress … mirred egress redirect`).
//!
//! A redirected frame is taken before the host's stack sees it, so nothing in the namespace answers for the pod. No bridge, no second
//! MAC address: this is the least that works for a veth, a macvlan and an ipvlan alike.

use rtnetlink::{
    Handle,
    packet_route::tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
        TcActionType, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType,
        TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
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

/// Has the host's stack in the namespace hear of what [`join`] keeps from it: who has which address (ARP), and what comes from port 53 to the
/// ports that are `like` these in the bits of a mask. The guest gets ARP as well.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub async fn spare_nameservers(
    handle: &Handle,
    interface: &Interface,
    tap: &Tap,
    like: PortMask,
) -> Result<(), NetworkError> {
    let failed = || {
        netlink(format!(
            "let answers of nameservers in at {}",
            interface.name
        ))
    };
    let filter = |priority: u16, protocol: i32| {
        let new = handle.traffic_filter(signed(interface.index)).add();
        let protocol = u16::try_from(protocol).unwrap_or_default().to_be();
        new.parent(TcHandle::from(INGRESS).into())
            .priority(priority)
            .protocol(protocol)
    };
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Ok;
    mirror.eaction = TcMirrorActionType::EgressMirror;
    mirror.ifindex = tap.index;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let everything = selector(vec![TcU32Key::default()]);
    let arp = filter(1, libc::ETH_P_ARP).u32(&[
        TcFilterU32Option::Selector(everything),
        TcFilterU32Option::Action(vec![action]),
    ]);
    arp.map_err(failed())?.execute().await.map_err(failed())?;
    for (priority, protocol) in [(2, libc::IPPROTO_UDP), (3, libc::IPPROTO_TCP)] {
        // Words of an IPv4 header without options (RFC 791), and of what follows.
        let carries = key(8, 0x00ff_0000, protocol.cast_unsigned() << 16);
        let ports = key(
            20,
            0xffff_0000 | u32::from(like.mask),
            53 << 16 | u32::from(like.value),
        );
        let taken = selector(vec![carries, ports]);
        // Without an action it goes on to the stack.
        let passed = filter(priority, libc::ETH_P_IP).u32(&[
            TcFilterU32Option::ClassId(TcHandle { major: 0, minor: 1 }),
            TcFilterU32Option::Selector(taken),
        ]);
        passed
            .map_err(failed())?
            .execute()
            .await
            .map_err(failed())?;
    }
    Ok(())
}

/// Ports that are `value` where `mask` has ones.
#[derive(Debug, Clone, Copy)]
pub struct PortMask {
    /// Bits that are the same.
    pub mask: u16,
    /// What they are.
    pub value: u16,
}

fn key(offset: i32, mask: u32, value: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.mask = mask;
    key.val = value;
    key
}

fn selector(keys: Vec<TcU32Key>) -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or_default();
    selector.keys = keys;
    selector
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
