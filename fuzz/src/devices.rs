//! A device behind its registers, and a driver that brings it up, offers it buffers and breaks the rules. What a device may change is in
//! [`crate::guest`]; what only one of them takes and promises is in a module of its own here.

pub mod balloon;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;

use std::fmt::Debug;

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::virtio::VirtioDevice;

use crate::{
    guest::{Guest, QUEUE_SIZE, Used},
    model::descriptor,
};

/// Most steps of a session.
const STEPS: usize = 64;

/// The host's side of a device, and what the device has promised.
pub trait World: Sized {
    /// What a driver of this device sends.
    type Message: for<'a> Arbitrary<'a> + Debug;
    /// What the host does.
    type Host: for<'a> Arbitrary<'a> + Debug;

    /// The bytes of a message.
    fn bytes(&self, message: &Self::Message) -> Vec<u8>;

    /// How a driver sends it.
    fn manner(&self, guest: &Guest, message: &Self::Message) -> Manner;

    /// A chain was made available.
    fn sent(&mut self, _guest: &mut Guest, _sent: &Sent<'_, Self::Message>) {}

    /// The host does something.
    fn host(&mut self, guest: &mut Guest, host: &Self::Host);

    /// A driver has brought the device up anew.
    fn brought_up(&mut self) {}

    /// Takes what the device has for the host; true where the device may have more to do then.
    fn take(&mut self, _guest: &mut Guest) -> bool {
        false
    }

    /// Looks at what the device has given back.
    fn look(&mut self, guest: &Guest, queue: usize, used: &Used);

    /// Looks at what holds whenever the device has nothing to do.
    fn check(&mut self, _guest: &mut Guest) {}
}

/// How a driver sends a message.
pub struct Manner {
    /// On which queue.
    pub queue: usize,
    /// Where its first buffer ends, in bytes.
    pub split: usize,
    /// Room for an answer, in bytes.
    pub room: Vec<usize>,
    /// How often.
    pub times: u8,
}

impl Manner {
    /// Once, in one buffer, on this queue.
    pub fn on(queue: usize) -> Self {
        Self {
            queue,
            split: 0,
            room: Vec::new(),
            times: 1,
        }
    }
}

/// A chain that was made available.
pub struct Sent<'a, M> {
    /// On which queue.
    pub queue: usize,
    /// Its head.
    pub head: u16,
    /// What there is to read.
    pub bytes: &'a [u8],
    /// What it is; none where it is any bytes.
    pub message: Option<&'a M>,
}

/// What happens to a device.
#[derive(Arbitrary, Debug)]
pub struct Session<M, H> {
    /// Above [`BARE`]: no driver has brought it up yet.
    bare: u8,
    steps: Vec<Step<M, H>>,
}

const BARE: u8 = 240;

#[derive(Debug)]
enum Step<M, H> {
    Send(M, bool),
    SendOdd(Odd<M>),
    Host(H),
    Offer {
        queue: u8,
        count: u8,
        len: Len,
        is_indirect: bool,
    },
    BringUp {
        refused: u32,
        size: Size,
    },
    Kick(u8),
    Read {
        offset: u16,
        len: u8,
    },
    Register {
        register: Register,
        value: Value,
    },
    Config {
        offset: u8,
        bytes: Vec<u8>,
    },
    Noise(Noise),
    Index {
        queue: u8,
        by: i8,
    },
}

impl<'a, M: Arbitrary<'a>, H: Arbitrary<'a>> Arbitrary<'a> for Step<M, H> {
    /// Mostly what a driver does, so that what it breaks is seldom the queue.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? {
            0..=111 => Self::Send(u.arbitrary()?, u.arbitrary()?),
            112..=127 => Self::SendOdd(u.arbitrary()?),
            128..=167 => Self::Host(u.arbitrary()?),
            168..=199 => Self::Offer {
                queue: u.arbitrary()?,
                count: u.arbitrary()?,
                len: u.arbitrary()?,
                is_indirect: u.arbitrary()?,
            },
            200..=211 => Self::BringUp {
                refused: u.arbitrary()?,
                size: u.arbitrary()?,
            },
            212..=217 => Self::Kick(u.arbitrary()?),
            218..=223 => Self::Read {
                offset: u.arbitrary()?,
                len: u.arbitrary()?,
            },
            224..=231 => Self::Register {
                register: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            232..=239 => Self::Config {
                offset: u.arbitrary()?,
                bytes: u.arbitrary()?,
            },
            240..=250 => Self::Noise(u.arbitrary()?),
            _ => Self::Index {
                queue: u.arbitrary()?,
                by: u.arbitrary()?,
            },
        })
    }
}

/// Sent as no driver does.
#[derive(Arbitrary, Debug)]
struct Odd<M> {
    payload: Payload<M>,
    queue: Option<u8>,
    split: u8,
    room: Vec<u8>,
    is_indirect: bool,
}

#[derive(Arbitrary, Debug)]
enum Payload<M> {
    Message(M),
    Bytes(Vec<u8>),
}

/// A descriptor as it comes.
#[derive(Arbitrary, Debug)]
struct Noise {
    queue: u8,
    index: u8,
    address: Address,
    len: u16,
    flags: u16,
    next: u16,
    head: u8,
}

#[derive(Arbitrary, Debug)]
enum Len {
    Page,
    PageToo,
    Small(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Size {
    Full,
    One,
    Two,
    Eight,
}

#[derive(Arbitrary, Debug)]
enum Register {
    Status,
    Queue(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Value {
    Small(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Address {
    Memory(u16),
    Canary(u8),
    Any(u64),
}

/// Runs a session with a device.
pub fn run<W: World>(
    device: Box<dyn VirtioDevice>,
    world: W,
    session: &Session<W::Message, W::Host>,
) {
    let mut run = Run {
        guest: Guest::new(device),
        world,
    };
    if session.bare <= BARE {
        run.guest.bring_up(0, QUEUE_SIZE);
    }
    for step in session.steps.iter().take(STEPS) {
        run.step(step);
    }
    run.settle();
    run.guest.end();
}

struct Run<W> {
    guest: Guest,
    world: W,
}

impl<W: World> Run<W> {
    fn step(&mut self, step: &Step<W::Message, W::Host>) {
        match step {
            Step::Send(message, is_indirect) => {
                let bytes = self.world.bytes(message);
                let manner = self.world.manner(&self.guest, message);
                for _ in 0..manner.times {
                    self.send(&bytes, &manner, *is_indirect, Some(message));
                }
            }
            Step::SendOdd(odd) => {
                let (bytes, message) = match &odd.payload {
                    Payload::Message(message) => (self.world.bytes(message), Some(message)),
                    Payload::Bytes(bytes) => (bytes.clone(), None),
                };
                let usual = message.map(|message| self.world.manner(&self.guest, message));
                let usual = usual.map_or(0, |manner| manner.queue);
                let manner = Manner {
                    queue: odd.queue.map_or(usual, usize::from),
                    split: odd.split.into(),
                    room: odd.room.iter().take(8).copied().map(usize::from).collect(),
                    times: 1,
                };
                if manner.room.contains(&0) {
                    // An empty buffer breaks the queue; the chain is known all the same.
                    self.guest.is_wild = true;
                }
                self.send(&bytes, &manner, odd.is_indirect, message);
            }
            Step::Host(host) => {
                self.world.host(&mut self.guest, host);
                self.settle();
            }
            Step::Offer {
                queue,
                count,
                len,
                is_indirect,
            } => {
                let queue = usize::from(*queue % 3);
                let len = match len {
                    Len::Page | Len::PageToo => 4096,
                    Len::Small(len) => usize::from(*len).max(1),
                    Len::Any(len) => usize::from(*len).max(1),
                };
                for _ in 0..=count % 32 {
                    self.guest.add(queue, &[], &[len], *is_indirect);
                }
                self.guest.kick(queue as u32);
                self.settle();
            }
            Step::BringUp { refused, size } => {
                self.settle();
                let size = match size {
                    Size::Full => QUEUE_SIZE,
                    Size::One => 1,
                    Size::Two => 2,
                    Size::Eight => 8,
                };
                self.guest.bring_up(u64::from(*refused), size);
                self.world.brought_up();
            }
            Step::Kick(queue) => {
                self.guest.kick(u32::from(*queue));
                self.settle();
            }
            Step::Read { offset, len } => {
                let mut data = vec![0xff; usize::from(*len % 17)];
                self.guest.read(u64::from(*offset), &mut data);
            }
            Step::Register { register, value } => {
                let offset = match register {
                    Register::Status => 0x70,
                    Register::Queue(at) => 0x30 + 4 * u64::from(*at % 32),
                    Register::Any(offset) => u64::from(*offset),
                };
                let value = match value {
                    Value::Small(value) => u32::from(*value),
                    Value::Any(value) => *value,
                };
                self.guest.write(offset, &value.to_le_bytes());
            }
            Step::Config { offset, bytes } => {
                let len = bytes.len().min(9);
                self.guest.write(0x100 + u64::from(*offset), &bytes[..len]);
            }
            Step::Noise(noise) => noise.write(&mut self.guest),
            Step::Index { queue, by } => self.guest.move_index(usize::from(*queue % 5), *by),
        }
    }

    fn send(
        &mut self,
        bytes: &[u8],
        manner: &Manner,
        is_indirect: bool,
        message: Option<&W::Message>,
    ) {
        let (first, second) = bytes.split_at(bytes.len().min(manner.split));
        let parts: Vec<_> = [first, second]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        let queue = manner.queue;
        if let Some(head) = self.guest.add(queue, &parts, &manner.room, is_indirect) {
            let sent = Sent {
                queue,
                head,
                bytes,
                message,
            };
            self.world.sent(&mut self.guest, &sent);
            self.guest.kick(queue as u32);
            self.settle();
        }
    }

    /// Lets the device do what there is to do, and looks at what it has done.
    fn settle(&mut self) {
        self.guest.settle();
        while self.world.take(&mut self.guest) {
            self.guest.settle();
        }
        for queue in 0..self.guest.queue_count() {
            for used in self.guest.used(queue) {
                self.world.look(&self.guest, queue, &used);
            }
        }
        self.world.check(&mut self.guest);
    }
}

impl Noise {
    fn write(&self, guest: &mut Guest) {
        let address = match self.address {
            Address::Memory(page) => u64::from(page) << 4,
            Address::Canary(by) => 0x10_0000 + u64::from(by) - 128,
            Address::Any(address) => address,
        };
        let bytes = descriptor(address, u32::from(self.len), self.flags, self.next);
        let (index, head) = (u16::from(self.index), u16::from(self.head));
        guest.add_noise(usize::from(self.queue % 5), index, bytes, head);
    }
}
