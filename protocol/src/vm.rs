//! The VMM's configuration and control channel.
//!
//! The shim starts `husk-vmm --control-fd N`; N is one end of a `SOCK_SEQPACKET` socketpair on which each packet is one
//! JSON object of at most [`MAX_PACKET`] bytes. The shim's first message is [`Call::Launch`] with
//! the whole [`VmConfig`], whose fds the VMM has inherited under the numbers it names. Every request gets
//! one [`Reply`] with its id, in order; between them the VMM sends [`Event`]s on its own account. The VM ends with its control
//! channel: when the shim goes, so does the VMM. Descriptors that come after the start travel beside their request (`SCM_RIGHTS`).

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

/// Version of the messages below. Shim and VMM are installed together; a mismatch is refused at launch.
pub const VERSION: u32 = 4;

/// Longest packet on the control channel, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Smallest guest memory, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;

/// Most vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;

/// Most network devices of one VM.
pub const MAX_NICS: usize = 8;

/// Most pairs of queues of one network device.
pub const MAX_QUEUE_PAIRS: u16 = 8;

/// The Ethernet address that a VM's network device starts with: a locally administered one, by which the agent finds the device
/// that it then gives the address of the host's interface.
#[must_use]
pub const fn nic_mac(nic: u8) -> [u8; 6] {
    [0x02, b'h', b'u', b's', b'k', nic]
}

/// Lines of guest console that a [`VmExit::GuestPanic`] carries at most.
pub const CONSOLE_TAIL_LINES: usize = 40;

/// One VM, as the shim wants it. Fds are numbers that the VMM process has inherited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// Name for logs: the pod's id.
    pub id: String,
    /// vCPUs that the guest boots with, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// vCPUs that it may bring online later, those included; the same as [`Self::vcpus`]: the VM keeps its size.
    pub max_vcpus: u8,
    /// Guest RAM in MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// How far [`Call::SetMemory`] may raise it; the same as [`Self::memory_mib`]: the VM keeps its size.
    pub max_memory_mib: u64,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm_fd: RawFd,
    /// Uncompressed ELF `vmlinux` with a PVH note, open for reading.
    pub kernel_fd: RawFd,
    /// Initramfs, open for reading.
    pub initramfs_fd: RawFd,
    /// Appended to the kernel command line that the VMM makes.
    pub kernel_params: String,
    /// The vsock bridge (see [`crate::bridge`]).
    pub vsock_fd: RawFd,
    /// Shared directories.
    pub shares: Vec<ShareConfig>,
    /// Network devices, at most [`MAX_NICS`]. They start without a link; [`Call::AttachNic`] gives them one.
    pub nics: Vec<NicConfig>,
    /// Where the guest's console goes as it comes; `None`: only the last lines are kept, for a panic.
    pub console_fd: Option<RawFd>,
    /// The user namespace that the VMM goes into, of which it is user 0; `None`: it stays in the shim's.
    pub user_namespace_fd: Option<RawFd>,
    /// The guest logs its boot on the serial console (slow: for debugging a guest that does not come up).
    pub debug_console: bool,
}

/// One virtio-fs device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// virtio-fs tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory to serve, open (`O_PATH` will do).
    pub root_fd: RawFd,
    /// How long the guest may trust what it has read.
    pub cache: CachePolicy,
}

/// One virtio-net device; its number is its place in the list, its address [`nic_mac`] of that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
}

/// virtio-fs cache policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// Nothing is kept: every look goes to the host.
    Never,
    /// Kept for a second; a changed mtime drops cached data. For whatever the host may change.
    Auto,
    /// Kept for good. Only for a tree that no one else writes.
    Always,
}

/// What the shim asks; the VMM answers each with a [`Reply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u64,
    /// The question.
    pub call: Call,
}

/// The calls of the control channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// Build the VM and run it. First and once; answered when the vCPUs run.
    Launch(Box<VmConfig>),
    /// Stop every vCPU; answered when none runs.
    Pause,
    /// Let them run on.
    Resume,
    /// Take this much of the guest's memory (MiB) into the balloon.
    SetBalloon {
        /// Target size; bounded by the guest's memory.
        target_mib: u64,
    },
    /// Let the guest plug or unplug memory (virtio-mem) until it has this much in all. Answered at once; [`Event::MemorySet`]
    /// follows when it has.
    SetMemory {
        /// Target size in MiB, [`VmConfig::memory_mib`] to [`VmConfig::max_memory_mib`].
        target_mib: u64,
    },
    /// Connect a network device, which has no link yet, to a tap. The tap's descriptors, one for each of its queues (at least one, at
    /// most as many as the device has pairs), come beside the request; made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
    /// `IFF_MULTI_QUEUE` where there are several. The guest sees its link come up.
    AttachNic {
        /// Number of the device.
        nic: u8,
        /// Behind the tap's descriptors come as many of `/dev/vhost-net`, open for reading and writing, by which the host's kernel is to
        /// carry the packets. A VMM that cannot use them carries the packets itself, as it does without.
        vhost: bool,
    },
    /// Memory figures.
    Info,
    /// End the VM now; [`Event::Exited`] with [`VmExit::Stopped`] follows the reply.
    Stop,
}

/// From the VMM to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromVmm {
    /// Answers a request.
    Reply(Reply),
    /// Happened on its own.
    Event(Event),
}

/// The answer to the request with the same id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// The outcome; the error is a sentence for the user.
    pub result: Result<Answer, String>,
}

/// What a successful call gives back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// For [`Call::Launch`]: `CLOCK_MONOTONIC` nanoseconds at the steps of the start.
    Launched(LaunchTimes),
    /// For [`Call::Info`].
    Info(VmInfo),
}

/// When the VMM reached each step of a start, in `CLOCK_MONOTONIC` nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchTimes {
    /// `main` began.
    pub process_started: u64,
    /// Memory mapped, kernel and initramfs loaded, devices made.
    pub vm_built: u64,
    /// The first vCPU entered the guest.
    pub vcpus_running: u64,
}

/// Memory of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Guest RAM, bytes; what it has plugged included.
    pub memory_bytes: u64,
    /// How much of it the host has backed with pages.
    pub resident_bytes: u64,
    /// What the balloon holds, bytes.
    pub balloon_bytes: u64,
}

/// Unasked news from the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The VM is over; the VMM exits after this packet.
    Exited(VmExit),
    /// The guest has as much memory as the last [`Call::SetMemory`] asked for. Comes once for each; not at all where the guest
    /// does not get that far, or another call overtakes it.
    MemorySet {
        /// What it has, in MiB: the target, rounded up to virtio-mem's block.
        memory_mib: u64,
    },
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmExit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest kernel panicked (a husk guest resets for no other reason).
    GuestPanic {
        /// Its last console lines, oldest first.
        console: Vec<String>,
    },
    /// KVM could not go on.
    KvmError {
        /// vCPU, exit reason and registers, in a sentence.
        detail: String,
        /// The last console lines, oldest first.
        console: Vec<String>,
    },
    /// [`Call::Stop`], or the control channel closed.
    Stopped,
    /// A part of the VMM failed.
    Failed {
        /// What failed.
        detail: String,
    },
}

impl VmConfig {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`BadConfig`] naming the first field that is out of range.
    pub fn check(&self) -> Result<(), BadConfig> {
        if self.version != VERSION {
            return Err(BadConfig::Version(self.version));
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(BadConfig::Vcpus(self.vcpus));
        }
        if !(self.vcpus..=MAX_VCPUS).contains(&self.max_vcpus) {
            return Err(BadConfig::MaxVcpus(self.max_vcpus));
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return Err(BadConfig::Memory(self.memory_mib));
        }
        if self.max_memory_mib < self.memory_mib {
            return Err(BadConfig::MaxMemory(self.max_memory_mib));
        }
        if self.nics.len() > MAX_NICS {
            return Err(BadConfig::Nics(self.nics.len()));
        }
        if let Some(nic) = self
            .nics
            .iter()
            .find(|nic| !(1..=MAX_QUEUE_PAIRS).contains(&nic.queue_pairs))
        {
            return Err(BadConfig::QueuePairs(nic.queue_pairs));
        }
        // The tag fills a 36-byte field of the device's configuration space (virtio 1.2, 5.11.4).
        match self
            .shares
            .iter()
            .find(|s| !(1..=36).contains(&s.tag.len()))
        {
            Some(share) => Err(BadConfig::Tag(share.tag.clone())),
            None => Ok(()),
        }
    }
}

/// A configuration that no VM can be built from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadConfig {
    /// Shim and VMM do not fit together.
    #[error(
        "the shim speaks version {0} of the VMM configuration, this husk-vmm speaks {VERSION}: install both from one release"
    )]
    Version(u32),
    /// vCPU count out of range.
    #[error("{0} vCPUs asked for: a VM has 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Fewer vCPUs to grow to than at boot, or more than there can be.
    #[error("{0} vCPUs to grow to: at least those that the VM boots with, at most {MAX_VCPUS}")]
    MaxVcpus(u8),
    /// Too little memory.
    #[error("{0} MiB of memory asked for: a VM has at least {MIN_MEMORY_MIB} MiB")]
    Memory(u64),
    /// Less memory to grow to than at boot.
    #[error("{0} MiB of memory to grow to, less than the VM boots with")]
    MaxMemory(u64),
    /// Tag does not fit.
    #[error("virtio-fs tag {0:?} does not fit: 1 to 36 bytes")]
    Tag(String),
    /// Too many network devices.
    #[error("{0} network devices asked for: a VM has at most {MAX_NICS}")]
    Nics(usize),
    /// Queue pairs of a network device out of range.
    #[error("{0} queue pairs asked for: a network device has 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs(u16),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            version: VERSION,
            id: "pod".into(),
            vcpus: 1,
            max_vcpus: 4,
            memory_mib: 256,
            max_memory_mib: 1024,
            kvm_fd: 4,
            kernel_fd: 5,
            initramfs_fd: 6,
            kernel_params: String::new(),
            vsock_fd: 7,
            shares: vec![ShareConfig {
                tag: "husk".into(),
                root_fd: 8,
                cache: CachePolicy::Auto,
            }],
            nics: vec![NicConfig { queue_pairs: 1 }],
            console_fd: None,
            user_namespace_fd: Some(9),
            debug_console: false,
        }
    }

    #[test]
    fn a_message_survives_the_wire() {
        let request = Request {
            id: 1,
            call: Call::Launch(Box::new(config())),
        };
        let wire = serde_json::to_vec(&request).unwrap();
        assert!(wire.len() < MAX_PACKET);
        assert_eq!(serde_json::from_slice::<Request>(&wire).unwrap(), request);
    }

    #[test]
    fn each_bound_is_checked() {
        assert_eq!(config().check(), Ok(()));
        let with = |change: fn(&mut VmConfig)| {
            let mut c = config();
            change(&mut c);
            c.check()
        };
        assert_eq!(with(|c| c.version = 9), Err(BadConfig::Version(9)));
        assert_eq!(with(|c| c.vcpus = 0), Err(BadConfig::Vcpus(0)));
        assert_eq!(with(|c| c.vcpus = 33), Err(BadConfig::Vcpus(33)));
        assert_eq!(with(|c| c.max_vcpus = 0), Err(BadConfig::MaxVcpus(0)));
        assert_eq!(with(|c| c.max_vcpus = 33), Err(BadConfig::MaxVcpus(33)));
        assert_eq!(with(|c| c.memory_mib = 63), Err(BadConfig::Memory(63)));
        assert_eq!(
            with(|c| c.max_memory_mib = 255),
            Err(BadConfig::MaxMemory(255))
        );
        assert_eq!(
            with(|c| c.shares[0].tag.clear()),
            Err(BadConfig::Tag(String::new()))
        );
        for queue_pairs in [0, 9] {
            let mut c = config();
            c.nics[0].queue_pairs = queue_pairs;
            assert_eq!(c.check(), Err(BadConfig::QueuePairs(queue_pairs)));
        }
        assert_eq!(
            with(|c| c.nics = vec![NicConfig { queue_pairs: 1 }; 9]),
            Err(BadConfig::Nics(9))
        );
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let mut value = serde_json::to_value(config()).unwrap();
        value["surprise"] = 1.into();
        assert!(serde_json::from_value::<VmConfig>(value).is_err());
    }
}
