//! Who carries a pod's packets: the host's kernel by vhost-net, and where there is none, the VMM.

use std::{fs, path::PathBuf};

use husk_tests::containerd::Containerd;

use super::*;
use crate::settings::Settings;

/// By which a host has vhost-net.
pub const DEVICE: &str = "/dev/vhost-net";

fn vmm_of(pod: &Pod<'_>) -> Result<u32> {
    let shim = host::shim_of(&pod.id).context("no shim")?;
    Ok(host::vmm_of(&shim).context("no VMM")?.pid)
}

/// How many descriptors of vhost-net a VMM has open.
fn opened(vmm: u32) -> Result<usize> {
    let fds = fs::read_dir(format!("/proc/{vmm}/fd"))?;
    let targets = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    Ok(targets.filter(|to| to.ends_with("vhost-net")).count())
}

/// The kernel's threads that carry a VMM's packets: the VMM's own since Linux 6.4, the kernel's before.
fn carriers(vmm: u32) -> Result<Vec<PathBuf>> {
    let name = format!("vhost-{vmm}\n");
    let mut found = Vec::new();
    for dir in [format!("/proc/{vmm}/task"), "/proc".into()] {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm == name) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// How often they have been woken.
fn wakes(carriers: &[PathBuf]) -> Result<u64> {
    let wakes = carriers.iter().map(|carrier| {
        let status = fs::read_to_string(carrier.join("status"))?;
        host::field_of(&status, "voluntary_ctxt_switches").context("no count of switches")
    });
    wakes.sum()
}

/// Whether the log says that this is who carries the packets of the pods that have come since it had this length.
fn is_logged(containerd: &Containerd, length: usize, carrier: &str) -> Result<()> {
    wait::until("the log to say who carries the packets", || {
        let log = containerd.log_since(length);
        let line = log
            .lines()
            .find(|line| line.contains("a network device is connected"))?;
        let said = line.split_once("carrier=")?.1;
        // In quotes, of one log or of two.
        let said = said.trim_start_matches(['\\', '"']);
        said.starts_with(carrier).then_some(())
    })
}

fn traffic(main: &PodContainer<'_>, ip: &str) -> Result<()> {
    main.exec(&["ping", "-c", "3", "-W", "30", GATEWAY])?.ok()?;
    host::run(&["ping", "-c", "3", "-W", "30", ip])?;
    let listener = TcpListener::bind((GATEWAY, 0))?;
    let fetch = format!(
        "nc -w 30 {GATEWAY} {} | sha256sum",
        listener.local_addr()?.port()
    );
    let body = vec![b'x'; 1 << 20];
    thread::scope(|scope| {
        let server = scope.spawn(|| listener.accept()?.0.write_all(&body));
        let seen = main.sh(&fetch)?.ok()?;
        let sent = server.join();
        sent.map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(seen.starts_with(&sha256(&body)), "{seen}");
        Ok(())
    })
}

/// Has the guest's driver let go of the device and take it up again, with the address it had.
const ANEW: &str = "
set -e
mac=$(cat /sys/class/net/eth0/address)
addr=$(ip -o -4 addr show dev eth0 | awk '{ print $4 }')
device=$(basename $(readlink /sys/class/net/eth0/device))
cd /sys/bus/virtio/drivers/virtio_net
echo $device >unbind
test ! -e /sys/class/net/eth0
echo $device >bind
ip link set eth0 address $mac
ip addr add $addr dev eth0
ip link set eth0 up
";

/// With two pairs of queues, in a pod with two vCPUs.
pub fn carried(suite: &Context) -> Result<()> {
    let _settings = Settings::set("max_vcpus = 2\n")?;
    let (containerd, cri) = suite.cri_and_containerd()?;
    let length = containerd.log().len();
    let mut config = cri.pod_config();
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    linux.resources = Some(v1::LinuxContainerResources {
        cpu_quota: 200_000,
        cpu_period: 100_000,
        ..Default::default()
    });
    let pod = cri.run_pod(config)?;
    let mut config = container(&SLEEP);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let main = pod.start(config)?;
    let (ip, vmm) = (address(&pod)?, vmm_of(&pod)?);
    is_logged(containerd, length, "vhost-net")?;
    for turn in ["from the start", "after the driver has started anew"] {
        let threads = carriers(vmm)?;
        ensure!(
            opened(vmm)? == 2 && threads.len() == 2,
            "{turn}: {} open, {threads:?}",
            opened(vmm)?
        );
        let before = wakes(&threads)?;
        traffic(&main, &ip).context(turn)?;
        let after = wakes(&threads)?;
        ensure!(
            after >= before + 6,
            "{turn}: woken {before} and {after} times"
        );
        main.sh(ANEW)?.ok()?;
    }
    Ok(())
}

/// A path that is not there for as long as this lives.
struct Hidden(&'static str);

impl Hidden {
    fn new(path: &'static str) -> Result<Self> {
        fs::rename(path, format!("{path}.hidden"))?;
        Ok(Self(path))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // The next pod says that it is missing.
        let _ = fs::rename(format!("{}.hidden", self.0), self.0);
    }
}

/// The host has none, or the node's settings forbid it.
pub fn missing(suite: &Context) -> Result<()> {
    {
        let _hidden = Hidden::new(DEVICE)?;
        vmm_carries(suite).context("without the device")?;
    }
    let _settings = Settings::set("vhost_net = false\n")?;
    vmm_carries(suite).context("switched off")
}

fn vmm_carries(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    let length = containerd.log().len();
    let pod = cri.pod()?;
    is_logged(containerd, length, "husk-vmm")?;
    let main = pod.start(container(&SLEEP))?;
    let vmm = vmm_of(&pod)?;
    ensure!(opened(vmm)? == 0 && carriers(vmm)?.is_empty());
    traffic(&main, &address(&pod)?)
}
