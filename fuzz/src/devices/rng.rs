//! virtio-rng: so many random bytes at most.

use husk_vmm::virtio::{VirtioDevice, rng::Rng};

use super::{Manner, World};
use crate::guest::{Guest, Used};

/// See the module's head.
pub struct Entropy;

impl Entropy {
    /// With its device.
    pub fn new() -> (Box<dyn VirtioDevice>, Self) {
        (Box::new(Rng::default()), Self)
    }
}

impl World for Entropy {
    /// Room for bytes.
    type Message = Vec<u16>;
    type Host = ();

    fn bytes(&self, _: &Vec<u16>) -> Vec<u8> {
        Vec::new()
    }

    fn manner(&self, _: &Guest, message: &Vec<u16>) -> Manner {
        let room = message.iter().take(8).map(|len| usize::from(*len).max(1));
        Manner {
            room: room.collect(),
            ..Manner::on(0)
        }
    }

    fn host(&mut self, _: &mut Guest, (): &()) {}

    fn look(&mut self, _: &Guest, _: usize, used: &Used) {
        assert!(used.data.len() <= 4096, "{used:?}");
    }
}
