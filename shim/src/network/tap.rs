//! Taps: the host's ends of the guest's network devices.
//!
//! Tap number N of a pod is `tapN_husk`, in the pod's own network namespace, with the pod's id as its alias. It is not persistent: it
//! lives as long as somebody holds one of its fds, which the VMM does.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage},
};
use tracing::info;

use super::{NetworkError, errno_of, model::Interface, namespace::Namespace, netlink, vhost};

const PREFIX: &str = "tap";
const SUFFIX: &str = "_husk";

/// What the kernel calls the kind of a tap.
const KIND: &str = "tun";

/// A tap that was made for the VM.
#[derive(Debug)]
pub struct Tap {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its queues.
    pub queues: Queues,
}

/// What a network device of the VM is connected by.
#[derive(Debug)]
pub struct Queues {
    /// The tap's queues.
    pub taps: Vec<OwnedFd>,
    /// As many of `/dev/vhost-net`, or none where the host has none.
    pub vhosts: Vec<OwnedFd>,
}

fn name_of(number: usize) -> String {
    format!("{PREFIX}{number}{SUFFIX}")
}

/// Whether an interface is one of husk's taps, of whatever pod.
pub fn is_ours(interface: &Interface) -> bool {
    let number = interface
        .name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_suffix(SUFFIX));
    interface.kind == KIND && number.is_some_and(|n| n.parse::<u8>().is_ok())
}

/// Makes a pod's tap of this number, up. One that an earlier shim of this pod has left is replaced.
///
/// # Errors
/// [`NetworkError::InUse`] where it is another pod's; what the kernel refuses.
pub async fn make(
    namespace: &Namespace,
    handle: &Handle,
    number: usize,
    mtu: u32,
    queues: u16,
    vhost: bool,
    pod: &str,
) -> Result<Tap, NetworkError> {
    let name = name_of(number);
    if let Some(old) = find(handle, &name).await? {
        let owner = old.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfAlias(owner) if owner != pod => Some(owner.clone()),
            _ => None,
        });
        if let Some(pod) = owner {
            return Err(NetworkError::InUse { pod });
        }
        info!(tap = name, "left over from an earlier shim, replaced");
        handle
            .link()
            .del(old.header.index)
            .execute()
            .await
            .map_err(netlink(format!("remove the left-over tap {name}")))?;
    }
    let wanted = name.clone();
    let queues = namespace
        .enter("make a tap (/dev/net/tun) in", move || {
            let taps = open(&wanted, queues)?;
            let vhosts = if vhost {
                vhost::open(queues)
            } else {
                Vec::new()
            };
            Ok(Queues { taps, vhosts })
        })
        .await?;
    let made = find(handle, &name).await?;
    let index = made
        .map(|link| link.header.index)
        .ok_or_else(|| NetworkError::Netlink {
            doing: format!("set the tap {name} up"),
            source: io::Error::other("it has vanished"),
        })?;
    // Frames are all that it carries: no address of its own, so that the host's stack sends nothing into the guest.
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let settings = LinkUnspec::new_with_index(index)
        .mtu(mtu)
        .alias(pod)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![silent]));
    // Two requests: in one, the kernel would set it up first.
    for settings in [settings, LinkUnspec::new_with_index(index).up()] {
        handle
            .link()
            .set(settings.build())
            .execute()
            .await
            .map_err(netlink(format!("set the tap {name} up")))?;
    }
    Ok(Tap {
        index,
        name,
        queues,
    })
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, NetworkError> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link),
        Err(error) => match errno_of(error) {
            error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            source => Err(NetworkError::Netlink {
                doing: format!("look for the tap {name}"),
                source,
            }),
        },
    }
}

/// Opens a new tap in the network namespace of the calling thread, an fd for each queue.
fn open(name: &str, queues: u16) -> io::Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut fds = Vec::with_capacity(queues.into());
    for queue in 0..queues {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        // A further queue joins the tap that the first has made.
        let exclusive = if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
        attach(&tun, name, flags | exclusive)?;
        fds.push(tun.into());
    }
    Ok(fds)
}

#[allow(unsafe_code, reason = "no crate in use wraps TUNSETIFF")]
fn attach(tun: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays 0.
    for (to, from) in ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    let request = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            // Its 16 bits, IFF_MULTI_QUEUE the highest but one, all fit.
            ifru_flags: flags as libc::c_short,
        },
    };
    // SAFETY: `tun` is open and `request` is an initialised ifreq, which TUNSETIFF reads and writes during the call only.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
