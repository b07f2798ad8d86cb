//! Credit: how much each side of a connection may still send (virtio 1.2, 5.10.6.3).
//!
//! Each side has a receive buffer and tells, with every packet, its size (`buf_alloc`) and how many bytes it has taken out of it
//! so far (`fwd_cnt`). The other knows what it has sent and so what must still fit. All counters wrap at 2^32.

/// Receive buffer of a connection here, in bytes: what the guest may send before the host's reader has taken it. Large
/// enough to keep several of Linux's 64 KiB packets under way.
pub const BUFFER: u32 = 256 * 1024;

/// The counters of one connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes received from the guest.
    received: u32,
    /// Of these, bytes that the host's socket has taken.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// The guest's buffer size.
    peer_alloc: u32,
    /// What the guest says it has taken out of it.
    peer_forwarded: u32,
}

/// The guest sent more than it had credit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overrun;

impl Credit {
    /// Takes note of what a packet from the guest says about its buffer.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        self.peer_forwarded = fwd_cnt;
    }

    /// Counts `len` bytes from the guest.
    ///
    /// # Errors
    /// [`Overrun`] when there was no room announced for them; nothing is counted then.
    pub fn receive(&mut self, len: u32) -> Result<(), Overrun> {
        let outstanding = self.received.wrapping_sub(self.announced);
        match outstanding.checked_add(len) {
            Some(total) if total <= BUFFER => {
                self.received = self.received.wrapping_add(len);
                Ok(())
            }
            _ => Err(Overrun),
        }
    }

    /// Counts `len` bytes that have left the buffer here.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// True when the guest should hear how much has been taken: half of the buffer has become free since it last did, so
    /// that it never waits on a buffer that is empty.
    pub fn is_stale(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= BUFFER / 2
    }

    /// The `buf_alloc` and `fwd_cnt` of a packet that is about to go to the guest.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUFFER, self.forwarded)
    }

    /// Bytes the guest has room for: at most its buffer, whatever it claims to have taken out of it.
    pub fn available(&self) -> u32 {
        let outstanding = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(outstanding)
    }

    /// Counts `len` bytes sent to the guest, at most [`Self::available`].
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two honest ends with their packets in flight: none ever overruns the other, and neither waits for ever.
    #[derive(Debug, Clone)]
    enum Turn {
        Send(u32),
        Forward(u32),
        Announce,
    }

    fn turn() -> impl Strategy<Value = Turn> {
        prop_oneof![
            (1..100_000u32).prop_map(Turn::Send),
            (1..100_000u32).prop_map(Turn::Forward),
            Just(Turn::Announce),
        ]
    }

    proptest! {
        #[test]
        fn an_honest_sender_never_overruns(start: u32, turns in proptest::collection::vec(turn(), 0..200)) {
            // `here` receives; `there` is a sender with the same arithmetic.
            let mut here = Credit { received: start, forwarded: start, announced: start, ..Credit::default() };
            let mut there = Credit { sent: start, ..Credit::default() };
            let (alloc, fwd) = here.announce();
            there.hear(alloc, fwd);
            let mut buffered = 0u32;
            for turn in turns {
                match turn {
                    Turn::Send(len) => {
                        let len = len.min(there.available());
                        there.send(len);
                        prop_assert_eq!(here.receive(len), Ok(()));
                        buffered += len;
                        prop_assert!(buffered <= BUFFER);
                    }
                    Turn::Forward(len) => {
                        let len = len.min(buffered);
                        here.forward(len);
                        buffered -= len;
                        if here.is_stale() {
                            let (alloc, fwd) = here.announce();
                            there.hear(alloc, fwd);
                        }
                    }
                    Turn::Announce => {
                        let (alloc, fwd) = here.announce();
                        there.hear(alloc, fwd);
                    }
                }
                // Empty buffer, and the sender may go on: no deadlock.
                prop_assert!(buffered > 0 || there.available() > 0);
            }
        }

        #[test]
        fn a_lie_gains_nothing(sent: u32, alloc: u32, fwd: u32) {
            let mut honest = Credit { sent, ..Credit::default() };
            honest.hear(alloc, sent);
            prop_assert_eq!(honest.available(), alloc);
            let mut liar = Credit { sent, ..Credit::default() };
            liar.hear(alloc, fwd);
            let room = liar.available();
            prop_assert!(room <= alloc);
            // What it was given counts, so that there is an end to it.
            liar.send(room);
            prop_assert_eq!(liar.available(), 0);
        }

        #[test]
        fn an_overrun_is_noticed(len in BUFFER + 1..) {
            prop_assert_eq!(Credit::default().receive(len), Err(Overrun));
        }
    }
}
