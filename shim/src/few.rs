//! Log lines that a guest or its VMM can cause: few of each kind.

use std::sync::atomic::{AtomicU32, Ordering};

/// Lines of one kind, in all, that a guest or its VMM can cause as often as it likes.
const FEW: u32 = 20;

/// Counts such lines: the host's disk must not fill with them.
#[derive(Debug, Default)]
pub struct Few(AtomicU32);

impl Few {
    /// Whether one more may be written.
    pub fn more(&self) -> bool {
        let one_less = |written: u32| (written < FEW).then_some(written + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_kind_there_are_few() {
        let lines = Few::default();
        let written = (0..1000).filter(|_| lines.more()).count();
        assert_eq!(written, FEW as usize);
    }
}
