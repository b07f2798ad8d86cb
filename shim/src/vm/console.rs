//! Lines that come out of the VM: the guest's console, the agent's log and husk-vmm's own stderr, into the shim's log, the last ones
//! kept. Each of them may be in a hostile guest's hand, so what reaches the log is bounded by an [`Allowance`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use husk_protocol::vm::CONSOLE_TAIL_LINES;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::Instant,
};

/// Longest line that is kept whole, in bytes; a guest that never ends a line must not grow the shim.
const MAX_LINE: usize = 1024;

/// What a source may put into the log at once, in bytes. A whole boot is a tenth of it.
const BURST: usize = 1 << 20;

/// What it may put there in each [`PERIOD`] after that, in bytes: 0.4 GiB a day, whatever it says.
const REFILL: usize = 48 << 10;
const PERIOD: Duration = Duration::from_secs(10);

/// What a line takes in the log beside its text, in bytes: time, level, pod and the like. So empty talk is bounded as well.
const LINE_COST: usize = 160;

/// What a source may still put into the log.
#[derive(Debug)]
struct Allowance {
    left: usize,
    period: Instant,
    /// Lines left out since the last that was not.
    lost: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            period: now,
            lost: 0,
        }
    }

    /// Counts a line of so many bytes; whether it may go into the log. Periods are refilled whole, so that a flood's gaps are said once each.
    fn take(&mut self, bytes: usize, now: Instant) -> bool {
        let periods = now.duration_since(self.period).as_secs() / PERIOD.as_secs();
        if periods > 0 {
            let refill = usize::try_from(periods)
                .unwrap_or(usize::MAX)
                .saturating_mul(REFILL);
            self.left = self.left.saturating_add(refill).min(BURST);
            self.period = now;
        }
        match self.left.checked_sub(bytes + LINE_COST) {
            Some(left) => {
                self.left = left;
                true
            }
            None => {
                // Shorter lines wait as well: they would come out of order with the gap.
                self.left = 0;
                self.lost += 1;
                false
            }
        }
    }

    /// The sentence about what has been left out since it was last asked for, if anything was.
    fn gap(&mut self) -> Option<String> {
        let lost = std::mem::take(&mut self.lost);
        (lost > 0).then(|| {
            format!(
                "[{lost} lines left out here: more than {} KiB at once, or {} KiB in {} s]",
                BURST >> 10,
                REFILL >> 10,
                PERIOD.as_secs()
            )
        })
    }
}

/// The last lines of something.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= CONSOLE_TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The lines, oldest first.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }
}

/// Reads lines until the end, keeps the last ones and hands each to `log`, as far as the source's allowance goes; then how many were
/// left out. Control characters are made harmless: the guest must not drive the terminal of whoever reads the log.
pub async fn follow(mut source: impl AsyncRead + Unpin, tail: Tail, log: impl Fn(&str)) {
    let mut line: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    let mut allowance = Allowance::new(Instant::now());
    let mut finish = |line: &mut Vec<u8>| {
        let text: String = String::from_utf8_lossy(line)
            .trim_end()
            .chars()
            .map(|c| {
                if c.is_control() && c != '\t' {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .collect();
        line.clear();
        if !text.is_empty() {
            if allowance.take(text.len(), Instant::now()) {
                if let Some(gap) = allowance.gap() {
                    log(&gap);
                }
                log(&text);
            }
            tail.push(text);
        }
    };
    loop {
        let read = match source.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        for &byte in buffer.get(..read).unwrap_or_default() {
            if byte == b'\n' || line.len() >= MAX_LINE {
                finish(&mut line);
            }
            if byte != b'\n' {
                line.push(byte);
            }
        }
    }
    finish(&mut line);
    if let Some(gap) = allowance.gap() {
        log(&gap);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn lines_of(bytes: &[u8]) -> Vec<String> {
        let tail = Tail::default();
        follow(bytes, tail.clone(), |_| {}).await;
        tail.lines()
    }

    #[tokio::test]
    async fn lines_are_split_cleaned_and_bounded() {
        assert_eq!(
            lines_of(b"one\r\n\ntwo\x1b[2J\nrest").await,
            ["one", "two\u{fffd}[2J", "rest"]
        );
        let endless = vec![b'x'; 3 * MAX_LINE];
        assert!(lines_of(&endless).await.iter().all(|l| l.len() <= MAX_LINE));
        let many = "l\n".repeat(1000);
        assert_eq!(lines_of(many.as_bytes()).await.len(), CONSOLE_TAIL_LINES);
    }

    /// Logged lines and the tail of a source that says one line over and over, and once more two periods later.
    async fn flood(line: &str, times: usize) -> (Vec<String>, Vec<String>) {
        let logged = Mutex::new(Vec::new());
        let tail = Tail::default();
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let talk = async {
            for _ in 0..times {
                theirs.write_all(line.as_bytes()).await.unwrap();
            }
            // Two periods: time goes on when everything said so far has been read.
            tokio::time::sleep(2 * PERIOD).await;
            theirs.write_all(b"and again\n").await.unwrap();
            for _ in 0..times {
                theirs.write_all(line.as_bytes()).await.unwrap();
            }
            theirs.write_all(b"last words\n").await.unwrap();
            drop(theirs);
        };
        let log = |line: &str| logged.lock().unwrap().push(line.to_owned());
        tokio::join!(talk, follow(ours, tail.clone(), log));
        (logged.into_inner().unwrap(), tail.lines())
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_talks_without_end_is_cut_short_and_the_gap_is_said_once() {
        for line in ["x\n".to_owned(), format!("{}\n", "y".repeat(MAX_LINE))] {
            let cost = line.len() - 1 + LINE_COST;
            let times = 3 * BURST / cost;
            let (logged, tail) = flood(&line, times).await;
            let bytes: usize = logged.iter().map(|line| line.len() + LINE_COST).sum();
            assert!(bytes <= BURST + 2 * REFILL + 1024, "{bytes}");
            assert!(bytes >= BURST, "{bytes}");
            let gaps: Vec<_> = logged.iter().filter(|l| l.contains("left out")).collect();
            assert_eq!(gaps.len(), 2, "{gaps:?}");
            let lost = times - BURST / cost;
            assert!(gaps[0].starts_with(&format!("[{lost} lines left out here")));
            // The gap is where it was: before what came after it, and at the end.
            let after = logged.iter().position(|line| line == "and again").unwrap();
            assert_eq!(&logged[after - 1], gaps[0]);
            assert_eq!(logged.last().unwrap(), gaps[1]);
            // A report of the end has the last words all the same.
            assert_eq!(tail.last().unwrap(), "last words");
        }
    }
}
