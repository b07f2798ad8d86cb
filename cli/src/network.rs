//! Networks: CNI's plugins, as Kubernetes has them, make a network namespace's interfaces, and the shim takes over what they have made.
//!
//! A network is a list of plugins (CNI specification 1.0, section 1). There is one without anybody's doing, `bridge`; others are files.

mod cni;
mod namespace;

use std::{
    fs, io,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    args::{self, NetworkCommand},
    container::{Container, State},
    names,
    place::Place,
    table,
};
use cni::Plugins;
use namespace::Namespace;

/// The network that there always is.
pub(crate) const DEFAULT: &str = "bridge";
/// No network but loopback.
pub(crate) const NONE: &str = "none";

/// Private addresses that neither Docker's nor Kubernetes' usual ones touch.
const SUBNETS: (u8, u8) = (10, 44);

/// A published port.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Port {
    host_port: u16,
    container_port: u16,
    protocol: String,
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    host_ip: String,
}

impl FromStr for Port {
    type Err = anyhow::Error;

    /// [[IP:]HOSTPORT:]PORT[/PROTOCOL]. Without a port of the host, one that is free.
    fn from_str(text: &str) -> Result<Self> {
        let bad = || format!("-p {text:?} is not [[ADDRESS:]HOSTPORT:]PORT[/tcp|/udp]");
        let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        if !matches!(protocol, "tcp" | "udp" | "sctp") {
            bail!(bad());
        }
        let (rest, container) = match rest.rsplit_once(':') {
            Some((rest, port)) => (Some(rest), port),
            None => (None, rest),
        };
        let number = |text: &str| {
            text.parse::<u16>()
                .ok()
                .filter(|n| *n > 0)
                .with_context(bad)
        };
        let container_port = number(container)?;
        let (address, host) = match rest.map(|rest| rest.rsplit_once(':').unwrap_or(("", rest))) {
            Some((address, host)) => (address, host),
            None => ("", ""),
        };
        let host_ip = match address.trim_start_matches('[').trim_end_matches(']') {
            "" => String::new(),
            address => address
                .parse::<IpAddr>()
                .ok()
                .with_context(bad)?
                .to_string(),
        };
        let host_port = match host {
            "" => free_port(protocol)?,
            host => number(host)?,
        };
        Ok(Self {
            host_port,
            container_port,
            protocol: protocol.to_owned(),
            host_ip,
        })
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = if self.host_ip.is_empty() {
            "0.0.0.0"
        } else {
            &self.host_ip
        };
        write!(
            f,
            "{address}:{}->{}/{}",
            self.host_port, self.container_port, self.protocol
        )
    }
}

/// One that nobody has at this moment.
fn free_port(protocol: &str) -> Result<u16> {
    let any = (Ipv4Addr::UNSPECIFIED, 0);
    let address = match protocol {
        "udp" => UdpSocket::bind(any).and_then(|socket| socket.local_addr()),
        _ => TcpListener::bind(any).and_then(|socket| socket.local_addr()),
    };
    Ok(address.context("looking for a free port")?.port())
}

/// What a container has of a network; kept, so that it can be given back whatever happens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attached {
    namespace: PathBuf,
    list: Value,
    ports: Vec<Port>,
    /// Its addresses, without the length of the prefix.
    pub(crate) addresses: Vec<String>,
}

/// Where networks are.
pub(crate) struct Networks {
    dir: PathBuf,
}

impl Networks {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            dir: root.join("networks"),
        }
    }

    /// A network's list of plugins.
    pub(crate) fn find(&self, name: &str) -> Result<Value> {
        if name == DEFAULT {
            return Ok(list(DEFAULT, "husk0", "10.44.0.0/24"));
        }
        let path = self.dir.join(format!("{}.conflist", names::checked(name)?));
        match fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!(
                    "there is no network {name:?}: `husk network ls` shows those that there are, `husk network create {name}` makes it"
                )
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn all(&self) -> Result<Vec<String>> {
        let mut names = vec![DEFAULT.to_owned(), NONE.to_owned()];
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
            Err(error) => {
                return Err(error).with_context(|| format!("listing {}", self.dir.display()));
            }
        };
        for entry in entries {
            let name = entry?.file_name();
            names.extend(
                name.to_str()
                    .and_then(|name| name.strip_suffix(".conflist"))
                    .map(str::to_owned),
            );
        }
        names[2..].sort();
        Ok(names)
    }
}

/// A bridge that hides its containers behind the host's address, as docker's.
fn list(name: &str, bridge: &str, subnet: &str) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": format!("husk-{name}"),
        "plugins": [
            {
                "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
            // Where the host drops what it is not told to forward, as where Docker is.
            {"type": "firewall"},
        ],
    })
}

/// Connects a container. Half of that is taken back where it fails.
pub(crate) fn attach(root: &Path, container: &Container) -> Result<Option<Attached>> {
    let record = &container.record;
    if record.network == NONE {
        return Ok(None);
    }
    let list = Networks::new(root).find(&record.network)?;
    let namespace = Namespace::make(container.short_id())?;
    let mut attached = Attached {
        namespace: namespace.path().to_owned(),
        list,
        ports: record.ports.clone(),
        addresses: Vec::new(),
    };
    container.keep(FILE, &attached)?;
    match plugins(&record.id, &attached).add() {
        Ok(addresses) => {
            attached.addresses = addresses;
            container.keep(FILE, &attached)?;
            Ok(Some(attached))
        }
        Err(error) => {
            detach(container);
            Err(error).with_context(|| {
                format!("connecting the container to the network {}", record.network)
            })
        }
    }
}

/// The file of a container's directory that says what it has.
const FILE: &str = "network.json";

/// What a container has of its network.
pub(crate) fn attached(container: &Container) -> Option<Attached> {
    container.kept(FILE).ok().flatten()
}

/// Gives back what a container has of a network, if anything.
pub(crate) fn detach(container: &Container) {
    let Some(attached) = attached(container) else {
        return;
    };
    if let Err(error) = plugins(&container.record.id, &attached).del() {
        tracing::warn!(
            "disconnecting container {}: {error:#}",
            container.record.name
        );
    }
    Namespace::at(&attached.namespace).remove();
    container.forget(FILE);
}

/// The plugins of husk's own networks that are not there.
pub(crate) fn missing_plugins() -> Vec<&'static str> {
    let all = ["bridge", "host-local", "portmap", "firewall"];
    all.into_iter()
        .filter(|kind| cni::find(kind).is_err())
        .collect()
}

fn plugins<'a>(id: &'a str, attached: &'a Attached) -> Plugins<'a> {
    Plugins {
        id,
        namespace: &attached.namespace,
        list: &attached.list,
        ports: &attached.ports,
    }
}

impl Attached {
    /// The namespace that the shim takes the interfaces of.
    pub(crate) fn namespace(&self) -> &Path {
        &self.namespace
    }
}

/// The names that a container finds in its /etc/hosts: its own, and those of the others in its network.
pub(crate) fn hosts(all: &[Container], own: &Container) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let mut add = |container: &Container, addresses: &[String]| {
        let host = container.record.spec["hostname"]
            .as_str()
            .unwrap_or_default();
        for address in addresses {
            text += &format!("{address}\t{host} {}\n", container.record.name);
        }
    };
    match attached(own) {
        Some(attached) => add(own, &attached.addresses),
        None => add(own, &["127.0.1.1".to_owned()]),
    }
    if own.record.network == NONE {
        return text;
    }
    for other in all
        .iter()
        .filter(|other| other.record.network == own.record.network)
    {
        if other.record.id != own.record.id && is_up(other) {
            add(
                other,
                &attached(other)
                    .map(|attached| attached.addresses)
                    .unwrap_or_default(),
            );
        }
    }
    text
}

fn is_up(container: &Container) -> bool {
    container
        .status()
        .is_ok_and(|status| status.state == State::Running)
}

/// Tells those in a container's network that it has come or gone. In place: the file is mounted into the containers.
pub(crate) fn tell_others(place: &Place, own: &Container) {
    let all = match place.containers().and_then(|containers| containers.all()) {
        Ok(all) => all,
        Err(error) => return tracing::warn!("telling the others in the network: {error:#}"),
    };
    let others = all.iter().filter(|other| {
        other.record.id != own.record.id
            && other.record.network == own.record.network
            && is_up(other)
    });
    for other in others.filter(|other| other.record.network != NONE) {
        let path = other.dir.join("hosts");
        // One with a file of its user's own has none here.
        if path.exists()
            && let Err(error) = fs::write(&path, hosts(&all, other))
        {
            tracing::warn!("writing {}: {error}", path.display());
        }
    }
}

/// The name servers for a container: the host's, but for those that only the host itself can ask (systemd-resolved, say).
pub(crate) fn resolv_conf() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let reachable = |text: &str| -> Option<String> {
        let is_local = |line: &str| {
            let address = line.trim().strip_prefix("nameserver").map(str::trim);
            address.is_some_and(|a| a.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
        };
        let kept: Vec<&str> = text.lines().filter(|line| !is_local(line)).collect();
        let has_one = kept
            .iter()
            .any(|line| line.trim_start().starts_with("nameserver"));
        has_one.then(|| kept.join("\n") + "\n")
    };
    reachable(&read("/etc/resolv.conf"))
        .or_else(|| reachable(&read("/run/systemd/resolve/resolv.conf")))
        .unwrap_or_default()
}

pub(crate) fn command(place: &Place, command: &NetworkCommand) -> Result<()> {
    let networks = Networks::new(place.root());
    match command {
        NetworkCommand::Ls(args) => ls(&networks, args),
        NetworkCommand::Create(args) => create(&networks, args),
        NetworkCommand::Rm(args) => remove(place, &networks, args),
    }
}

/// A line of `husk network ls`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    name: String,
    subnet: String,
    bridge: String,
}

fn ls(networks: &Networks, args: &args::NetworkLs) -> Result<()> {
    let mut lines = Vec::new();
    for name in networks.all()? {
        let list = if name == NONE {
            Value::Null
        } else {
            networks.find(&name)?
        };
        let plugin = &list["plugins"][0];
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        lines.push(Line {
            subnet: text(&plugin["ipam"]["ranges"][0][0]["subnet"]),
            bridge: text(&plugin["bridge"]),
            name,
        });
    }
    table::print(args.format, &["NAME", "SUBNET", "BRIDGE"], &lines, |line| {
        vec![line.name.clone(), line.subnet.clone(), line.bridge.clone()]
    })
}

fn create(networks: &Networks, args: &args::NetworkCreate) -> Result<()> {
    let name = names::checked(&args.name)?;
    let all = networks.all()?;
    if all.contains(&name) {
        bail!("there is a network {name:?} already");
    }
    let mut taken = Vec::new();
    for other in all.iter().filter(|other| *other != NONE) {
        let list = networks.find(other)?;
        let plugin = &list["plugins"][0];
        taken.push((
            plugin["bridge"].clone(),
            plugin["ipam"]["ranges"][0][0]["subnet"].clone(),
        ));
    }
    let is_free =
        |bridge: &str, subnet: &str| !taken.iter().any(|(b, s)| b == bridge || s == subnet);
    let (a, b) = SUBNETS;
    let free = (1..=254_u8)
        .map(|number| (format!("husk{number}"), format!("{a}.{b}.{number}.0/24")))
        .find(|(bridge, subnet)| is_free(bridge, args.subnet.as_ref().unwrap_or(subnet)));
    let (bridge, subnet) =
        free.context("there is no room for another network, or its subnet is another's")?;
    let subnet = args.subnet.clone().unwrap_or(subnet);
    let parts = subnet.split_once('/').and_then(|(address, length)| {
        Some((
            address.parse::<Ipv4Addr>().ok()?,
            length.parse::<u8>().ok().filter(|l| *l <= 30)?,
        ))
    });
    if parts.is_none() {
        bail!("--subnet {subnet:?} is not ADDRESS/LENGTH, as 10.1.2.0/24");
    }
    fs::create_dir_all(&networks.dir)
        .with_context(|| format!("making {}", networks.dir.display()))?;
    let path = networks.dir.join(format!("{name}.conflist"));
    let text = serde_json::to_vec_pretty(&list(&name, &bridge, &subnet))?;
    // Of two at once, one has made it.
    let mut file =
        fs::File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
    file.write_all(&text)?;
    writeln!(io::stdout(), "{name}")?;
    Ok(())
}

fn remove(place: &Place, networks: &Networks, args: &args::NetworkRm) -> Result<()> {
    for name in &args.networks {
        if [DEFAULT, NONE].contains(&&**name) {
            bail!("the network {name} is always there");
        }
        let list = networks.find(name)?;
        let users = place.containers()?.all()?;
        if let Some(user) = users.iter().find(|c| c.record.network == *name) {
            bail!(
                "container {} is in the network {name}: remove that first",
                user.record.name
            );
        }
        fs::remove_file(networks.dir.join(format!("{name}.conflist")))
            .with_context(|| format!("removing the network {name}"))?;
        if let Some(bridge) = list["plugins"][0]["bridge"].as_str() {
            namespace::remove_bridge(bridge);
        }
        writeln!(io::stdout(), "{name}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
