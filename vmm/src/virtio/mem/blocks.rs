//! Which blocks of the region are plugged, and which requests are allowed (virtio 1.2, 5.15.6): no I/O of its own.

use std::io;
use std::ops::Range;

/// Bytes of a block, the smallest piece that is plugged: a huge page, and what Linux takes at least anyway (a pageblock).
pub const BLOCK: u64 = 2 << 20;

/// Most pieces that the plugged blocks may lie in: the kernel has a mapping for each and for each gap, and no more than some 65000 of a
/// process (`vm.max_map_count`), which the VMM needs for other things as well. Linux plugs from the start on, and unplugs from the end.
pub const MAX_PIECES: usize = 4096;

/// The device's answer, by its number in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Response {
    /// Done.
    Ack = 0,
    /// More than the host has asked the driver to plug.
    Nack = 1,
    /// Not now: the host has refused it.
    Busy = 2,
    /// Not a request that can ever be carried out.
    Error = 3,
}

/// What blocks have in common, by its number in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum State {
    /// All are plugged.
    Plugged = 0,
    /// None is.
    Unplugged = 1,
    /// Some are.
    Mixed = 2,
}

/// Bytes of so many blocks of a region, all of which has fewer than 2^64.
fn bytes(blocks: u64) -> u64 {
    blocks.saturating_mul(BLOCK)
}

/// The blocks of one region.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    plugged: Vec<bool>,
    /// How many are plugged.
    count: u64,
    /// How many the host wants plugged.
    requested: u64,
    /// Runs of plugged blocks.
    pieces: usize,
}

impl Blocks {
    /// The blocks of `len` bytes at guest address `start`, all unplugged.
    pub fn new(start: u64, len: u64) -> Self {
        Self {
            start,
            plugged: vec![false; usize::try_from(len / BLOCK).unwrap_or(0)],
            count: 0,
            requested: 0,
            pieces: 0,
        }
    }

    /// Guest address of the first.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        bytes(self.plugged.len() as u64)
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        bytes(self.count)
    }

    /// Bytes that the host wants plugged.
    pub fn requested(&self) -> u64 {
        bytes(self.requested)
    }

    /// Asks for `bytes` to be plugged, rounded up to whole blocks; at most the region.
    pub fn request(&mut self, bytes: u64) {
        self.requested = bytes.min(self.bytes()).div_ceil(BLOCK);
    }

    /// Plugs `count` blocks at guest address `addr`; `open` makes that range of the region, in bytes, accessible.
    pub fn plug(
        &mut self,
        addr: u64,
        count: u16,
        open: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> Response {
        let Some(range) = self.range(addr, count) else {
            return Response::Error;
        };
        let is_granted = self.count.saturating_add(count.into()) <= self.requested;
        #[cfg(feature = "weakened")]
        let is_granted = is_granted || crate::weakened::Safeguard::Plug.is_left_out();
        if !is_granted {
            return Response::Nack;
        }
        self.change(range, State::Unplugged, open)
    }

    /// Unplugs `count` blocks at guest address `addr`; `close` takes that range of the region, in bytes, back.
    pub fn unplug(
        &mut self,
        addr: u64,
        count: u16,
        close: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> Response {
        match self.range(addr, count) {
            Some(range) => self.change(range, State::Plugged, close),
            None => Response::Error,
        }
    }

    /// Unplugs everything; `close` takes the region, in bytes, back.
    pub fn unplug_all(&mut self, close: impl FnOnce(Range<u64>) -> io::Result<()>) -> Response {
        if self.count > 0 && close(0..self.bytes()).is_err() {
            return Response::Busy;
        }
        self.plugged.fill(false);
        self.count = 0;
        self.pieces = 0;
        Response::Ack
    }

    /// The state of `count` blocks at guest address `addr`; `None` where these are no blocks of the region.
    pub fn state(&self, addr: u64, count: u16) -> Option<State> {
        Some(self.state_of(&self.range(addr, count)?))
    }

    fn state_of(&self, range: &Range<usize>) -> State {
        let blocks = self.plugged.get(range.clone()).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => State::Unplugged,
            n if n == blocks.len() => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Turns blocks that are all in the state `from` into the other one, once `act` has done its part.
    fn change(
        &mut self,
        range: Range<usize>,
        from: State,
        act: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> Response {
        if self.state_of(&range) != from {
            return Response::Error;
        }
        let plugs = from == State::Unplugged;
        let pieces = self.pieces_with(&range, plugs);
        let bytes = bytes(range.start as u64)..bytes(range.end as u64);
        if pieces > self.pieces.max(MAX_PIECES) || act(bytes).is_err() {
            return Response::Busy;
        }
        self.pieces = pieces;
        let count = range.len() as u64;
        self.count = if plugs {
            self.count.saturating_add(count)
        } else {
            // They were plugged, and so counted.
            self.count.saturating_sub(count)
        };
        if let Some(blocks) = self.plugged.get_mut(range) {
            blocks.fill(plugs);
        }
        Response::Ack
    }

    /// How many pieces there are once all the blocks of `range`, which none or all are plugged, are the other way round.
    fn pieces_with(&self, range: &Range<usize>, plugs: bool) -> usize {
        let is_plugged = |block: Option<usize>| {
            let block = block.and_then(|block| self.plugged.get(block));
            block.copied().unwrap_or(false)
        };
        let neighbours = [range.start.checked_sub(1), Some(range.end)].map(is_plugged);
        let both = neighbours.into_iter().filter(|plugged| *plugged).count();
        // A piece of its own joins those beside it; one that is taken out leaves them.
        if plugs {
            self.pieces.saturating_add(1).saturating_sub(both)
        } else {
            self.pieces.saturating_add(both).saturating_sub(1)
        }
    }

    /// The blocks that a request names: aligned, at least one, and all within the region.
    fn range(&self, addr: u64, count: u16) -> Option<Range<usize>> {
        let offset = addr.checked_sub(self.start)?;
        if count == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (end <= self.plugged.len()).then_some(first..end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 1 << 32;
    const BLOCKS: u64 = 24;

    #[derive(Debug, Clone)]
    enum Step {
        Request(u64),
        Plug(u64, u16, bool),
        Unplug(u64, u16, bool),
        UnplugAll(bool),
    }

    /// Addresses in, around and besides the region, a few of them misaligned.
    fn addr() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => (0..BLOCKS + 2).prop_map(|block| START + block * BLOCK),
            1 => START - 2 * BLOCK..START + (BLOCKS + 2) * BLOCK,
            1 => any::<u64>(),
        ]
    }

    fn count() -> impl Strategy<Value = u16> {
        prop_oneof![8 => 0u16..6, 1 => any::<u16>()]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..(BLOCKS + 4) * BLOCK).prop_map(Step::Request),
            (addr(), count(), any::<bool>()).prop_map(|(a, n, ok)| Step::Plug(a, n, ok)),
            (addr(), count(), any::<bool>()).prop_map(|(a, n, ok)| Step::Plug(a, n, ok)),
            (addr(), count(), any::<bool>()).prop_map(|(a, n, ok)| Step::Unplug(a, n, ok)),
            any::<bool>().prop_map(Step::UnplugAll),
        ]
    }

    /// A guest that plugs every other block gets so far, and may still join pieces and give all back.
    #[test]
    fn plugged_blocks_lie_in_so_many_pieces_at_most() {
        let most = MAX_PIECES as u64;
        let mut blocks = Blocks::new(START, (2 * most + 10) * BLOCK);
        blocks.request(u64::MAX);
        let at = |block: u64| START + block * BLOCK;
        for piece in 0..most {
            assert_eq!(blocks.plug(at(2 * piece), 1, |_| Ok(())), Response::Ack);
        }
        let never = |_: Range<u64>| -> io::Result<()> { panic!("asked of the host") };
        assert_eq!(blocks.plug(at(2 * most), 1, never), Response::Busy);
        assert_eq!(blocks.plug(at(2 * most - 1), 1, |_| Ok(())), Response::Ack);
        assert_eq!(blocks.plug(at(1), 1, |_| Ok(())), Response::Ack);
        assert_eq!(blocks.plug(at(2 * most + 1), 2, |_| Ok(())), Response::Ack);
        assert_eq!(blocks.unplug(at(1), 1, never), Response::Busy);
        assert_eq!(blocks.unplug(at(0), 1, |_| Ok(())), Response::Ack);
        assert_eq!(blocks.unplug_all(|_| Ok(())), Response::Ack);
        assert_eq!(blocks.plug(at(7), 1, |_| Ok(())), Response::Ack);
    }

    proptest! {
        /// What the host has made accessible is what counts as plugged, and never more than was asked for at that time.
        #[test]
        fn accessible_is_what_was_plugged(steps in prop::collection::vec(step(), 1..80)) {
            let mut blocks = Blocks::new(START, BLOCKS * BLOCK);
            let mut open = vec![false; BLOCKS as usize];
            for step in steps {
                let before = blocks.plugged();
                let mut act = |range: Range<u64>, to: bool, ok: bool| {
                    if ok {
                        open[(range.start / BLOCK) as usize..(range.end / BLOCK) as usize].fill(to);
                        Ok(())
                    } else {
                        Err(io::Error::other("not now"))
                    }
                };
                match step {
                    Step::Request(bytes) => blocks.request(bytes),
                    Step::Plug(addr, n, ok) => {
                        let response = blocks.plug(addr, n, |range| act(range, true, ok));
                        prop_assert_eq!(response == Response::Ack, blocks.plugged() > before);
                        prop_assert!(response != Response::Ack || blocks.plugged() <= blocks.requested());
                    }
                    Step::Unplug(addr, n, ok) => {
                        let response = blocks.unplug(addr, n, |range| act(range, false, ok));
                        prop_assert_eq!(response == Response::Ack, blocks.plugged() < before);
                    }
                    Step::UnplugAll(ok) => {
                        let response = blocks.unplug_all(|range| act(range, false, ok));
                        prop_assert_eq!(response == Response::Ack, blocks.plugged() == 0);
                    }
                }
                prop_assert!(blocks.requested() <= blocks.bytes());
                prop_assert_eq!(&blocks.plugged, &open);
                let pieces = open.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
                prop_assert_eq!(blocks.pieces, pieces);
                let count = open.iter().filter(|open| **open).count() as u64;
                prop_assert_eq!(blocks.plugged(), count * BLOCK);
                for (index, open) in open.iter().enumerate() {
                    let state = blocks.state(START + index as u64 * BLOCK, 1);
                    prop_assert_eq!(state == Some(State::Plugged), *open);
                }
            }
        }
    }
}
