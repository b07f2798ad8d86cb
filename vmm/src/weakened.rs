#![allow(
    unsafe_code,
    reason = "makes whatever system call its guest asks for, which is what this is here for"
)]
//! husk-vmm with a hole in it, for the tests alone: the feature `weakened`, which no release has.
//!
//! A test of a safeguard that cannot fail shows nothing. So the attacks of `tests/hostile` are made on this program as well, with one
//! safeguard or more left out, and must succeed then. `weakened=names,jail,…` in the guest's parameters says which: the shim hands on
//! nothing else. The other half is a back door, for "assume one bug in the VMM": a port by which the guest has a thread of a kind of its
//! choice make a system call. Both say so in the log.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap};

use crate::bus::{Bus, BusDevice, BusError};
use crate::jail::seccomp::Kind;
use crate::starter::Starter;

/// What can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safeguard {
    /// The check of names in the file server's requests.
    Names,
    /// The copy in which they are checked as what is served; the guest gets time to change its own in between.
    Copies,
    /// How much memory the host lets be plugged.
    Plug,
    /// Root, namespaces, capabilities and Landlock.
    Jail,
    /// The filters of system calls.
    Seccomp,
}

impl Safeguard {
    const ALL: [(&'static str, Self); 5] = [
        ("names", Self::Names),
        ("copies", Self::Copies),
        ("plug", Self::Plug),
        ("jail", Self::Jail),
        ("seccomp", Self::Seccomp),
    ];

    fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Is it to be left out?
    #[must_use]
    pub fn is_left_out(self) -> bool {
        LEFT_OUT.load(Ordering::SeqCst) & self.bit() != 0
    }
}

/// How long a request that has been checked lies in the guest's memory where [`Safeguard::Copies`] is left out: a second vCPU comes to run in
/// it, also where all share one CPU.
pub const TIME_TO_CHANGE: std::time::Duration = std::time::Duration::from_millis(20);

static LEFT_OUT: AtomicU8 = AtomicU8::new(0);

/// Reads from the guest's parameters what is to be left out.
pub fn choose(kernel_params: &str) {
    let words = kernel_params
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("weakened="))
        .flat_map(|words| words.split(','));
    for word in words {
        for (name, safeguard) in Safeguard::ALL {
            if word == name {
                LEFT_OUT.fetch_or(safeguard.bit(), Ordering::SeqCst);
                tracing::error!("this husk-vmm is for tests alone, and runs without {name}");
            }
        }
    }
}

/// The door, and how many ports it has.
const PORT: u64 = 0x700;
const PORTS: u64 = 4;
/// Where in the guest's block the result goes: behind thread, number, six arguments and which of them are addresses of the guest.
const RESULT: u64 = 9 * 8;

struct Door {
    memory: GuestMemoryMmap,
    starter: Arc<Starter>,
}

/// Adds the back door to the ports.
///
/// # Errors
/// Another device is there.
pub fn with_door(
    mut ports: Bus,
    memory: &GuestMemoryMmap,
    starter: &Arc<Starter>,
) -> Result<Bus, BusError> {
    tracing::error!("this husk-vmm is for tests alone, and has a back door");
    let door = Door {
        memory: memory.clone(),
        starter: Arc::clone(starter),
    };
    ports.insert(PORT, PORTS, Arc::new(Mutex::new(door)))?;
    Ok(ports)
}

impl Door {
    /// Makes the call that the block at `at` describes, and puts its result there.
    fn call(&self, at: u32) -> Option<()> {
        let at = GuestAddress(at.into());
        let [kind, number, arguments @ .., addresses]: [u64; 9] = self.memory.read_obj(at).ok()?;
        let kind = *Kind::ALL.get(usize::try_from(kind).ok()?)?;
        let mut raw = [0i64; 6];
        for (index, (raw, argument)) in raw.iter_mut().zip(arguments).enumerate() {
            *raw = if addresses >> index & 1 == 1 {
                let host = self.memory.get_host_address(GuestAddress(argument));
                host.ok()?.addr() as i64
            } else {
                argument.cast_signed()
            };
        }
        let number = number.cast_signed();
        let call = move || {
            kind.confine().ok()?;
            let [a, b, c, d, e, f] = raw;
            // SAFETY: none. The guest decides what this does to the process: that is the bug that the tests assume.
            let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
            let errno = || std::io::Error::last_os_error().raw_os_error();
            Some(if result == -1 {
                -i64::from(errno().unwrap_or(libc::EIO))
            } else {
                result
            })
        };
        let thread = move || {
            std::thread::Builder::new()
                .spawn(call)?
                .join()
                .map_or(Ok(None), Ok)
        };
        let made: std::io::Result<Option<i64>> = self.starter.run(thread).ok()?;
        let result = made.ok()??;
        let place = GuestAddress(at.0.checked_add(RESULT)?);
        self.memory.write_obj(result, place).ok()
    }
}

impl BusDevice for Door {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Ok(at) = data.try_into().map(u32::from_le_bytes)
            && self.call(at).is_none()
        {
            tracing::error!("the back door did not do as it was told");
        }
    }
}
