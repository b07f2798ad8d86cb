//! The connections that the guest has opened and said nothing on.
//!
//! Every container can dial the host, and must not take the places of the agent's streams, which open with a token at once. So
//! those that say nothing have a share of the places, and one more costs the oldest its own.

use std::collections::{HashSet, VecDeque};

use husk_protocol::ports;

/// Most of them. Twice what the guest's queue holds: however fast a container dials, it pushes nobody out who says something at once.
const MAX_SILENT: usize = 512;

/// See the module's head. Connections go by their number.
#[derive(Debug, Default)]
pub struct Silent {
    oldest_first: VecDeque<u64>,
    /// The ports on which one connection may be silent for as long as it likes, and which have had it.
    taken: HashSet<u32>,
}

impl Silent {
    /// The guest has opened a connection; the one that has to go for it, if any.
    pub fn opened(&mut self, port: u32, id: u64) -> Option<u64> {
        if matches!(port, ports::AGENT | ports::LOG) && self.taken.insert(port) {
            return None;
        }
        self.oldest_first.push_back(id);
        if self.oldest_first.len() > MAX_SILENT {
            self.oldest()
        } else {
            None
        }
    }

    /// The oldest, which goes.
    pub fn oldest(&mut self) -> Option<u64> {
        self.oldest_first.pop_front()
    }

    /// The connection is over, or silent no more.
    pub fn forget(&mut self, id: u64) {
        self.oldest_first.retain(|silent| *silent != id);
    }
}
