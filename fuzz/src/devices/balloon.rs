//! virtio-balloon: pages that the driver names are given back, and no others.

use husk_vmm::virtio::{
    GuestMemory, VirtioDevice,
    balloon::{Balloon, BalloonHandle},
};

use super::{Manner, Sent, World};
use crate::guest::{Guest, Used, memory};

/// See the module's head.
pub struct Inflated(BalloonHandle);

impl Inflated {
    /// With its device.
    pub fn new() -> (Box<dyn VirtioDevice>, Self) {
        let (balloon, handle) = Balloon::new(&GuestMemory::new(memory()));
        (Box::new(balloon), Self(handle))
    }
}

impl World for Inflated {
    /// Page numbers.
    type Message = Vec<u8>;
    /// So many pages are to be given up.
    type Host = u16;

    fn bytes(&self, pages: &Vec<u8>) -> Vec<u8> {
        let number = |page: &u8| match page {
            0..16 => u32::MAX - u32::from(*page),
            // The first pages are the rings', and those behind them where buffers are first.
            16..192 => u32::from(*page % 64).max(32),
            _ => Guest::last_page() + u32::from(*page) - 200,
        };
        pages
            .iter()
            .flat_map(|page| number(page).to_le_bytes())
            .collect()
    }

    fn manner(&self, _: &Guest, _: &Vec<u8>) -> Manner {
        Manner::on(0)
    }

    fn sent(&mut self, guest: &mut Guest, sent: &Sent<'_, Vec<u8>>) {
        if sent.queue != 0 {
            // What is reported is a buffer that the device may write to.
            return;
        }
        for number in sent.bytes.chunks_exact(4) {
            let page = u32::from_le_bytes(number.try_into().unwrap());
            let at = u64::from(page) << 12;
            guest.allow(at, 4096);
            // What is left of the numbers reads as others then.
            guest.is_wild |= guest.has_given(at, 4096);
        }
        // The rings may be among them.
        guest.is_wild |= sent.message.is_none();
    }

    fn host(&mut self, _: &mut Guest, pages: &u16) {
        self.0.set_target_pages((*pages).into());
    }

    fn look(&mut self, _: &Guest, _: usize, used: &Used) {
        assert!(used.data.is_empty(), "{used:?}");
    }

    fn check(&mut self, guest: &mut Guest) {
        let [target, held] = [0, 4].map(|at| u32::from_le_bytes(guest.field(at)));
        assert!(target <= Guest::PAGES, "it asks for more than there is");
        assert_eq!(self.0.held_pages(), held.min(Guest::PAGES));
    }
}
