//! A process of the host, told apart from a later one that has the same pid.

use std::{fs, io};

use serde::{Deserialize, Serialize};

/// A pid and when it was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// In this process' pid namespace.
    pub pid: u32,
    /// Clock ticks from boot to its start (field 22 of `/proc/PID/stat`).
    started: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, started) = state_and_start(&stat).ok_or_else(|| io::Error::other("its stat"))?;
        Ok(Self { pid, started })
    }

    /// Whether it goes on. A zombie does not.
    pub fn is_alive(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let found = stat.ok();
        let found = found.as_deref().and_then(state_and_start);
        found.is_some_and(|(state, started)| started == self.started && !"ZX".contains(state))
    }
}

/// Fields 3 and 22 of proc_pid_stat(5): the name before them may hold anything.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_lives_until_it_has_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.is_alive());
        let other = ProcessId {
            started: process.started + 1,
            ..process
        };
        assert!(!other.is_alive());
        child.kill().unwrap();
        // Not reaped yet.
        while process.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!process.is_alive() && ProcessId::of(child.id()).is_err());
    }

    #[test]
    fn a_name_may_hold_anything() {
        let numbers = (4..=22)
            .map(|n| n.to_string())
            .collect::<Vec<_>>()
            .join(" ");
        let stat = format!("7 (a) R 1 (b) S {numbers} 23");
        assert_eq!(state_and_start(&stat), Some(('S', 22)));
        assert_eq!(state_and_start("7 (a) S 1"), None);
    }
}
