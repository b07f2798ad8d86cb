//! A container's processes, as its guest tells of them, which may tell anything.

use std::collections::BTreeMap;

use husk_protocol::{
    agent::{DescribeProcessesResponse, ProcessTexts},
    processes::MAX_PROCESSES,
};

/// Linux numbers processes up to here (`PID_MAX_LIMIT`).
const MAX_PID: u32 = 4 << 20;

/// Most bytes of one text.
const MAX_TEXT: usize = 64 << 10;

/// The fields of `stat` behind the name that Linux has had for long (proc_pid_stat(5), up to `exit_code`).
const STAT_FIELDS: usize = 50;

/// The processes of one moment, by their pids in the container.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// When the guest was booted, in seconds since the Unix epoch.
    pub(super) boot_time: u64,
    pub(super) all: BTreeMap<u32, Texts>,
}

/// What a process' files in `/proc` say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Texts {
    pub(super) stat: Vec<u8>,
    pub(super) status: Vec<u8>,
    pub(super) cmdline: Vec<u8>,
}

impl From<DescribeProcessesResponse> for Processes {
    /// Without those that no kernel would tell of so: readers rely on the fields that there always are.
    fn from(told: DescribeProcessesResponse) -> Self {
        let believed = told.processes.into_iter().filter(is_believed);
        let texts = |process: ProcessTexts| Texts {
            stat: process.stat,
            status: process.status,
            cmdline: process.cmdline,
        };
        Self {
            boot_time: told.boot_time,
            all: believed
                .take(MAX_PROCESSES)
                .map(|process| (process.pid, texts(process)))
                .collect(),
        }
    }
}

fn is_believed(process: &ProcessTexts) -> bool {
    let texts = [&process.stat, &process.status, &process.cmdline];
    (1..=MAX_PID).contains(&process.pid)
        && texts.iter().all(|text| text.len() <= MAX_TEXT)
        && is_stat(process.pid, &process.stat)
        && is_status(&process.status)
}

/// `PID (NAME) STATE` and numbers.
fn is_stat(pid: u32, text: &[u8]) -> bool {
    let name = text.strip_prefix(format!("{pid} (").as_bytes());
    let Some(end) = name.and_then(|name| name.iter().rposition(|byte| *byte == b')')) else {
        return false;
    };
    let rest = name.and_then(|name| name.get(end + 1..));
    let rest = rest.and_then(|rest| std::str::from_utf8(rest).ok());
    let fields: Vec<_> = rest.unwrap_or_default().split_ascii_whitespace().collect();
    let is_number = |field: &&str| {
        let digits = field.strip_prefix('-').unwrap_or(field);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    fields.len() >= STAT_FIELDS && fields.iter().skip(1).all(is_number)
}

/// The ids of user and group, four of each.
fn is_status(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else {
        return false;
    };
    ["Uid:", "Gid:"].iter().all(|key| {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(key));
        let ids = lines.next().map(|ids| ids.split_ascii_whitespace());
        let is_id = |id: &str| id.parse::<u32>().is_ok();
        lines.next().is_none()
            && ids.is_some_and(|ids| ids.clone().count() == 4 && ids.clone().all(is_id))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As a guest tells of one.
    pub(in super::super) fn process(pid: u32, name: &str) -> ProcessTexts {
        ProcessTexts {
            pid,
            stat: format!("{pid} ({name}) S 0 {pid}{}\n", " 0".repeat(STAT_FIELDS - 3)).into(),
            status: format!("Name:\t{name}\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n").into(),
            cmdline: format!("{name}\0-x\0").into(),
            ..ProcessTexts::default()
        }
    }

    /// Which of these are believed.
    fn believed(processes: Vec<ProcessTexts>) -> Vec<u32> {
        let told = DescribeProcessesResponse {
            processes,
            ..DescribeProcessesResponse::default()
        };
        Processes::from(told).all.into_keys().collect()
    }

    #[test]
    fn what_no_kernel_tells_is_left_out() {
        assert_eq!(
            believed(vec![process(7, "sh"), process(1, "a) (b")]),
            [1, 7]
        );
        let with = |change: fn(&mut ProcessTexts)| {
            let mut process = process(7, "sh");
            change(&mut process);
            believed(vec![process])
        };
        assert_eq!(with(|_| {}), [7]);
        let changes: [fn(&mut ProcessTexts); 8] = [
            |process| process.pid = 8,
            |process| process.stat = b"7 (sh) S 0 7\n".into(),
            |process| process.stat = b"7 (sh".into(),
            |process| process.stat.extend(b" x\n"),
            |process| process.status = b"Name:\tsh\nGid:\t0\t0\t0\t0\n".into(),
            |process| process.status.extend(b"Uid:\t0\n"),
            |process| process.status.push(0xff),
            |process| process.cmdline = vec![b'x'; MAX_TEXT + 1],
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert_eq!(with(change), [0; 0], "{number}");
        }
        assert_eq!(
            believed(vec![process(0, "sh"), process(MAX_PID + 1, "sh")]),
            [0; 0]
        );
        let many = (1..=MAX_PROCESSES as u32 + 1).map(|pid| process(pid, "sh"));
        assert_eq!(believed(many.collect()).len(), MAX_PROCESSES);
    }

    proptest! {
        #[test]
        fn any_name_is_believed(name in "[^\0]{0,16}") {
            prop_assert!(is_stat(7, &process(7, &name).stat));
        }

        #[test]
        fn anything_is_read(text in prop::collection::vec(any::<u8>(), 0..200)) {
            is_stat(7, &text);
            is_status(&text);
        }
    }
}
