//! The control channel of a VMM, from both ends. What the shim sends is answered, in order, once each, in a packet that the shim can read; and
//! what a VMM sends that its guest has taken over is read as what it says, or refused. The packets of the vsock bridge as well.
#![no_main]

use std::os::fd::AsRawFd as _;

use husk_protocol::{
    bridge::Connection,
    stream::{TOKEN_LEN, Token},
    vm::{
        CachePolicy, Call, FromVmm, MAX_NICS, MAX_PACKET, MAX_QUEUE_PAIRS, MAX_VCPUS,
        MIN_MEMORY_MIB, NicConfig, Reply, Request, ShareConfig, VERSION, VmConfig,
    },
};
use husk_vmm::{
    control::{Channel, ControlError, serve},
    parts::Inherited,
};
use libfuzzer_sys::fuzz_target;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    ToVmm(Vec<Packet>),
    ToShim(Vec<u8>),
    Bridge(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Packet {
    Request(u64, Asked),
    Launch(Box<Config>),
    Bytes(Vec<u8>),
    /// A request with its bytes changed.
    Damaged(u64, Asked, Vec<(u8, u8)>),
    Long(u16),
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Asked {
    Pause,
    Resume,
    Balloon(u64),
    Memory(u64),
    Nic(u8, bool),
    Info,
    Stop,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Config {
    id: u64,
    version: Option<u32>,
    name: String,
    vcpus: (u8, u8),
    memory: (u64, u64),
    fd: Fd,
    params: String,
    shares: Vec<(String, Fd)>,
    nics: Vec<u16>,
    console: Option<Fd>,
}

/// None that is open, but for those that are nobody's.
#[derive(arbitrary::Arbitrary, Debug, Clone, Copy)]
enum Fd {
    Closed,
    Standard,
    Negative,
    Most,
}

/// As many as the channel holds without a reader.
const MOST: usize = 8;

fuzz_target!(|input: Input| {
    match input {
        Input::ToVmm(packets) => to_vmm(&packets),
        Input::ToShim(packet) => to_shim(&packet),
        Input::Bridge(packet) => bridge(&packet),
    }
});

impl Asked {
    fn call(&self) -> Call {
        match *self {
            Self::Pause => Call::Pause,
            Self::Resume => Call::Resume,
            Self::Balloon(target_mib) => Call::SetBalloon { target_mib },
            Self::Memory(target_mib) => Call::SetMemory { target_mib },
            Self::Nic(nic, vhost) => Call::AttachNic {
                nic: nic.into(),
                vhost,
            },
            Self::Info => Call::Info,
            Self::Stop => Call::Stop,
        }
    }
}

impl Fd {
    fn number(self) -> i32 {
        match self {
            Self::Closed => 100_000,
            Self::Standard => 1,
            Self::Negative => -1,
            Self::Most => i32::MAX,
        }
    }
}

impl Config {
    fn config(&self) -> VmConfig {
        let fd = self.fd.number();
        VmConfig {
            version: self.version.unwrap_or(VERSION),
            id: self.name.clone(),
            vcpus: self.vcpus.0 % 40,
            max_vcpus: self.vcpus.1 % 40,
            memory_mib: self.memory.0,
            max_memory_mib: self.memory.1,
            kvm_fd: fd,
            user_namespace_fd: self.console.map(Fd::number),
            kernel_fd: fd,
            initramfs_fd: fd,
            kernel_params: self.params.clone(),
            vsock_fd: fd,
            shares: self
                .shares
                .iter()
                .map(|(tag, fd)| ShareConfig {
                    tag: tag.clone(),
                    root_fd: fd.number(),
                    cache: CachePolicy::Auto,
                })
                .collect(),
            nics: self
                .nics
                .iter()
                .map(|pairs| NicConfig {
                    queue_pairs: *pairs % 12,
                })
                .collect(),
            console_fd: self.console.map(Fd::number),
            debug_console: false,
        }
    }
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let written = |request: &Request| serde_json::to_vec(request).unwrap();
        match self {
            Self::Request(id, asked) => written(&Request {
                id: *id,
                call: asked.call(),
            }),
            Self::Launch(config) => written(&Request {
                id: config.id,
                call: Call::Launch(Box::new(config.config())),
            }),
            Self::Bytes(bytes) => bytes.clone(),
            Self::Damaged(id, asked, damage) => {
                let call = asked.call();
                let mut bytes = written(&Request { id: *id, call });
                for (at, byte) in damage {
                    if let Some(old) = bytes.get_mut(usize::from(*at)) {
                        *old = *byte;
                    }
                }
                bytes
            }
            Self::Long(by) => vec![b' '; MAX_PACKET - 0x8000 + usize::from(*by)],
        }
    }
}

/// A whole conversation, in which no VM comes to be.
fn to_vmm(packets: &[Packet]) {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    // What is to be answered, and in what way it ends.
    let mut asked = Vec::new();
    let mut ends = false;
    let mut is_too_long = false;
    let mut sent = 0;
    for packet in packets.iter().take(MOST) {
        let bytes = packet.bytes();
        let request = serde_json::from_slice::<Request>(&bytes).ok();
        if let Some(Request {
            call: Call::Launch(_),
            ..
        }) = request
            && !matches!(packet, Packet::Launch(_))
        {
            // Its descriptors would be taken over, whosever they are.
            continue;
        }
        sent += bytes.len();
        if sent > 100_000 {
            break;
        }
        send(ours.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        match request {
            _ if ends => {}
            Some(request) if !bytes.is_empty() && bytes.len() <= MAX_PACKET => {
                ends = matches!(request.call, Call::Launch(_));
                if let Call::Launch(config) = &request.call {
                    check(config);
                }
                asked.push(request.id);
            }
            _ => {
                ends = true;
                is_too_long = bytes.len() > MAX_PACKET;
            }
        }
    }
    shutdown(ours.as_raw_fd(), Shutdown::Write).unwrap();
    let outcome = serve(&Channel::new(theirs), Inherited::default(), 0);
    match &outcome {
        Ok(()) | Err(ControlError::Launch(_) | ControlError::Malformed(_)) => {
            assert!(!is_too_long, "{outcome:?}");
        }
        Err(ControlError::TooLong) => assert!(is_too_long),
        Err(error) => panic!("{error}"),
    }
    let mut buffer = vec![0; MAX_PACKET + 1];
    let mut answered = Vec::new();
    loop {
        let len = match recv(ours.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => break,
            Ok(len) => len,
            // It is said once that not all was read.
            Err(Errno::ECONNRESET) => continue,
            Err(error) => panic!("{error}"),
        };
        assert!(len <= MAX_PACKET);
        match serde_json::from_slice(&buffer[..len]).unwrap() {
            FromVmm::Reply(Reply { id, result: Err(_) }) => answered.push(id),
            other => panic!("{other:?}, where there is no VM"),
        }
    }
    // One that cannot be read may be refused under its number.
    let known = answered.len().min(asked.len());
    assert_eq!(answered[..known], asked);
    assert!(answered.len() <= asked.len() + usize::from(outcome.is_err()));
}

/// What is let through is within bounds.
fn check(config: &VmConfig) {
    if let Err(error) = config.check() {
        return drop(error.to_string());
    }
    assert_eq!(config.version, VERSION);
    assert!((1..=config.max_vcpus).contains(&config.vcpus) && config.max_vcpus <= MAX_VCPUS);
    assert!((MIN_MEMORY_MIB..=config.max_memory_mib).contains(&config.memory_mib));
    assert!(config.nics.len() <= MAX_NICS);
    let pairs = |nic: &NicConfig| (1..=MAX_QUEUE_PAIRS).contains(&nic.queue_pairs);
    assert!(config.nics.iter().all(pairs));
    let fits = |share: &ShareConfig| !share.tag.is_empty() && share.tag.len() <= 36;
    assert!(config.shares.iter().all(fits));
}

fn to_shim(packet: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<FromVmm>(packet) {
        let again = serde_json::to_vec(&message).unwrap();
        assert_eq!(serde_json::from_slice::<FromVmm>(&again).unwrap(), message);
    }
}

fn bridge(packet: &[u8]) {
    if let Ok(connection) = Connection::decode(packet) {
        assert_eq!(connection.encode(), packet);
    }
    match Token::from_field(packet) {
        Ok(None) => assert!(packet.is_empty()),
        Ok(Some(token)) => assert_eq!(token.as_bytes()[..], *packet),
        Err(error) => {
            let _ = error.to_string();
            assert!(![0, TOKEN_LEN].contains(&packet.len()));
        }
    }
}
