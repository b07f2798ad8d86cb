//! Gives the guest's network devices what the pod's interfaces have on the host: names, addresses, routes, neighbours.
//!
//! A request is checked first (`request`), then fitted to the interfaces that there are (`links`), and only then is anything
//! changed, through one rtnetlink socket (`netlink`). What is there already stays, so a request can be repeated, or
//! follow one of which it is a part.
//!
//! An interface has what the request says and nothing else: it takes no router advertisements and makes up no addresses
//! (the host's network namespace did all that), and no route to the network of an address that the request does not have.
//! The one exception is the link-local address, without which IPv6 does not work on a
//! link: where a request has IPv6 addresses and none of the link among them, the kernel makes it. No address is tested for
//! duplicates: the one there is is its original, on the host's interface, whose stack never answers.

mod links;
mod messages;
mod netlink;
mod request;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

use crate::error::AgentError;
use links::{Link, Plan, Planned};
use netlink::{Netlink, Refused};
pub use request::Config;
use request::{Address, Interface};

/// What a device is called for the moment that its name is another's; the kernel fills in a number.
const ASIDE: &str = "husk%d";

/// One request at a time: each looks at what the last one left.
static TURN: Mutex<()> = Mutex::new(());

/// Configures the network namespace of the calling thread. Waits for a call that is under way: not for the runtime's own thread.
///
/// # Errors
/// [`AgentError::Invalid`] where the request does not fit the guest, of which nothing is changed then;
/// [`AgentError::Guest`] naming the step that failed, with those before it done.
pub fn configure(config: &Config) -> Result<(), AgentError> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut netlink =
        Netlink::open().map_err(|e| AgentError::guest("opening an rtnetlink socket", e))?;
    let links = Link::all(&mut netlink)
        .map_err(|e| AgentError::guest("listing the network interfaces", e))?;
    let mut plan = Plan::new(config, links)?;
    for planned in plan.links.iter_mut().filter(|planned| planned.in_the_way) {
        step_aside(&mut netlink, &mut planned.link)?;
    }
    for Planned { link, becomes, .. } in &mut plan.links {
        if let Some(interface) = becomes {
            set_up(&mut netlink, link, interface, config)?;
        }
    }
    for route in &config.routes {
        let hops = route.hops().iter();
        let indices: Vec<u32> = hops
            .map(|hop| plan.index(&hop.interface))
            .collect::<Result<_, _>>()?;
        there_already(netlink.call(messages::route(route, &indices)))
            .map_err(|e| AgentError::guest(format!("adding the route {route}"), e))?;
    }
    for neighbour in &config.neighbours {
        let index = plan.index(&neighbour.interface)?;
        netlink
            .call(messages::neighbour(neighbour, index))
            .map_err(|e| AgentError::guest(format!("adding the neighbour {neighbour}"), e))?;
    }
    Ok(())
}

/// Moves the VM's devices, which nobody has configured yet, into the network namespace of a process.
///
/// # Errors
/// [`AgentError::Guest`] naming the device that stays.
pub fn move_devices(pid: i32) -> Result<(), AgentError> {
    let mut netlink =
        Netlink::open().map_err(|e| AgentError::guest("opening an rtnetlink socket", e))?;
    let links = Link::all(&mut netlink)
        .map_err(|e| AgentError::guest("listing the network interfaces", e))?;
    for link in links.iter().filter(|link| link.is_idle_nic()) {
        netlink
            .call(messages::namespace(link.index, pid))
            .map_err(|e| {
                let doing = format!("moving {} to the pod's network namespace", link.name);
                AgentError::guest(doing, e)
            })?;
    }
    Ok(())
}

/// Takes the name off a device that another is to have.
fn step_aside(netlink: &mut Netlink, link: &mut Link) -> Result<(), AgentError> {
    set_down(netlink, link)?;
    netlink
        .call(messages::name(link.index, ASIDE))
        .map_err(|e| {
            AgentError::guest(
                format!("renaming {} to make room for another", link.name),
                e,
            )
        })?;
    // Whatever it is now, it is not what it is to be.
    link.name.clear();
    Ok(())
}

fn set_down(netlink: &mut Netlink, link: &mut Link) -> Result<(), AgentError> {
    if link.up {
        netlink
            .call(messages::up(link.index, false))
            .map_err(|e| AgentError::guest(format!("setting {} down", link.name), e))?;
        link.up = false;
    }
    Ok(())
}

/// Makes a device the interface that it is to be.
fn set_up(
    netlink: &mut Netlink,
    link: &mut Link,
    interface: &Interface,
    config: &Config,
) -> Result<(), AgentError> {
    let name = &interface.name;
    let renamed = link.name != name.as_str();
    let readdressed = link.address != interface.mac.0;
    if renamed || readdressed {
        // A device that is up keeps both. Its routes go with it; those of a request that changes it come again.
        set_down(netlink, link)?;
    }
    if renamed {
        netlink
            .call(messages::name(link.index, name.as_str()))
            .map_err(|e| {
                AgentError::guest(
                    format!("naming network device {} {name}", interface.device),
                    e,
                )
            })?;
    }
    if readdressed {
        netlink
            .call(messages::mac(link.index, interface.mac))
            .map_err(|e| {
                AgentError::guest(format!("giving {name} the address {}", interface.mac), e)
            })?;
    }
    if let Some(mtu) = interface.mtu.filter(|&mtu| mtu != link.mtu) {
        netlink
            .call(messages::mtu(link.index, mtu))
            .map_err(|e| AgentError::guest(format!("giving {name} an MTU of {mtu}"), e))?;
    }
    settle_ipv6(link, interface)?;
    if !link.up {
        netlink
            .call(messages::up(link.index, true))
            .map_err(|e| AgentError::guest(format!("setting {name} up"), e))?;
    }
    for address in &interface.addresses {
        let connected = config.connects(name, address);
        there_already(netlink.call(messages::address(address, link.index, connected)))
            .map_err(|e| AgentError::guest(format!("adding {} to {name}", address.prefix), e))?;
    }
    Ok(())
}

/// Sees to it, before it is up, that an interface does not configure itself.
fn settle_ipv6(link: &Link, interface: &Interface) -> Result<(), AgentError> {
    let directory = Path::new("/proc/sys/net/ipv6/conf").join(interface.name.as_str());
    let set = |parameter: &str, value: &str| {
        let file = directory.join(parameter);
        match fs::write(&file, value) {
            // A kernel without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(|e| {
                AgentError::guest(format!("writing {value} to {}", file.display()), e)
            }),
        }
    };
    set("accept_ra", "0")?;
    set("accept_dad", "0")?;
    let ipv6 = interface.addresses.iter().any(|a| a.prefix.ip.is_ipv6());
    let link_local = interface.addresses.iter().any(Address::is_ipv6_link_local);
    // IN6_ADDR_GEN_MODE_EUI64 and IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
    if ipv6 && !link_local {
        set("addr_gen_mode", "0")
    } else if !link.up {
        set("addr_gen_mode", "1")
    } else {
        // An earlier request's IPv6 goes on.
        Ok(())
    }
}

/// What was there before the request stays as it is.
fn there_already(done: Result<(), Refused>) -> Result<(), Refused> {
    match done {
        Err(refused) if refused.errno == Errno::EEXIST => Ok(()),
        done => done,
    }
}
