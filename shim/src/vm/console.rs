//! Lines that come out of the VM: the guest's console and husk-vmm's own stderr, into the shim's log, the last ones kept.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use husk_protocol::vm::CONSOLE_TAIL_LINES;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest line that is kept whole, in bytes; a guest that never ends a line must not grow the shim.
const MAX_LINE: usize = 1024;

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

/// Reads lines until the end, keeps the last ones and hands each to `log`. Control characters are made harmless: the guest
/// must not drive the terminal of whoever reads the log.
pub async fn follow(mut source: impl AsyncRead + Unpin, tail: Tail, log: impl Fn(&str)) {
    let mut line: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    let finish = |line: &mut Vec<u8>| {
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
            log(&text);
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
}

#[cfg(test)]
mod tests {
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
}
