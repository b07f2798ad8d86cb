//! What `/proc` tells of the processes that a container sees, numbered as it sees them: an engine on the host reads it there (`podman top`).
//!
//! It is read from the agent's own `/proc`, on which no container mounts anything, and its pids are translated: `status` has those of a
//! process in every pid namespace from the agent's down to its own (proc_pid_status(5)).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use husk_protocol::agent::{DescribeProcessesResponse, ProcessTexts};
use husk_protocol::processes::{MAX_BYTES, MAX_CMDLINE, MAX_LINE, MAX_PROCESSES};

/// Most bytes that are read of one file: a `status` with the most groups that a process may have (NGROUPS_MAX, 65536) fits.
const MAX_READ: u64 = 1 << 20;

/// Who has no number in a user namespace (`/proc/sys/kernel/overflowuid`, as it comes).
const OVERFLOW_ID: u32 = 65534;

/// The fields of `stat` after the name, as proc_pid_stat(5) counts them.
const STATE: usize = 3;

/// Describes the processes of the pid namespace of `init` and those of `own` below it, a bounded number of them.
///
/// # Errors
/// There is no such process any more.
pub fn describe(proc: &Path, init: i32, own: &[i32]) -> io::Result<DescribeProcessesResponse> {
    let init = proc.join(init.to_string());
    let namespace = fs::read_link(init.join("ns/pid"))?;
    let columns = Numbers::of(&status(&init)?).pid.len();
    let level = columns.checked_sub(1).ok_or(io::ErrorKind::InvalidData)?;

    let own: HashSet<i32> = own.iter().copied().collect();
    let mut seen = Vec::new();
    for pid in pids(proc)? {
        let dir = proc.join(pid.to_string());
        // What has ended meanwhile is not there any more.
        let is_in = fs::read_link(dir.join("ns/pid")).is_ok_and(|other| other == namespace);
        if !is_in && !own.contains(&pid) {
            continue;
        }
        let Ok(status) = status(&dir) else { continue };
        let numbers = Numbers::of(&status);
        if let Some(inner) = numbers.pid.get(level) {
            seen.push((dir, *inner, status, numbers));
        }
        if seen.len() == MAX_PROCESSES {
            break;
        }
    }
    let ids = |map: &str| read(&init.join(map), MAX_READ).map(|map| Ids::of(&map));
    let ids = [ids("uid_map")?, ids("gid_map")?];
    let view = View::new(level, seen.iter().map(|(.., numbers)| numbers), ids);
    let mut bytes = 0;
    let mut processes = Vec::new();
    for (dir, pid, status, numbers) in seen {
        let Ok(stat) = read(&dir.join("stat"), MAX_READ) else {
            continue;
        };
        let Some(stat) = view.stat(&stat, &numbers) else {
            continue;
        };
        let texts = ProcessTexts {
            pid,
            stat,
            status: view.status(&status),
            // The process' memory, which need not be readable.
            cmdline: read(&dir.join("cmdline"), MAX_CMDLINE).unwrap_or_default(),
            ..Default::default()
        };
        bytes += texts.stat.len() + texts.status.len() + texts.cmdline.len();
        if bytes > MAX_BYTES {
            break;
        }
        processes.push(texts);
    }
    Ok(DescribeProcessesResponse {
        boot_time: boot_time(&read(&proc.join("stat"), MAX_READ)?),
        processes,
        ..Default::default()
    })
}

fn pids(proc: &Path) -> io::Result<BTreeSet<i32>> {
    let names = fs::read_dir(proc)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// A file, or as much of it as is wanted.
fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut text)?;
    Ok(text)
}

/// A process' `status`, no line longer than [`MAX_LINE`]: some have 65536 groups.
fn status(dir: &Path) -> io::Result<Vec<u8>> {
    let text = read(&dir.join("status"), MAX_READ)?;
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    Ok(lines.flat_map(cut).collect())
}

/// The whole words of a line that fit.
fn cut(line: &[u8]) -> Vec<u8> {
    let Some(fits) = line.get(..MAX_LINE).filter(|fits| fits.len() < line.len()) else {
        return line.to_vec();
    };
    let end = fits.iter().rposition(u8::is_ascii_whitespace);
    let mut words = fits[..end.unwrap_or(MAX_LINE - 1)].to_vec();
    words.push(b'\n');
    words
}

/// `btime` of `/proc/stat`, in seconds since the Unix epoch.
fn boot_time(stat: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(stat);
    let told = text.lines().find_map(|line| line.strip_prefix("btime "));
    told.and_then(|told| told.trim().parse().ok()).unwrap_or(0)
}

/// The numbers of a process in each pid namespace, the agent's first.
#[derive(Debug, Default)]
struct Numbers {
    pid: Vec<u32>,
    group: Vec<u32>,
    session: Vec<u32>,
}

impl Numbers {
    fn of(status: &[u8]) -> Self {
        let mut numbers = Self::default();
        for line in status.split(|byte| *byte == b'\n') {
            match split(line) {
                (b"NSpid:", rest) => numbers.pid = columns(rest),
                (b"NSpgid:", rest) => numbers.group = columns(rest),
                (b"NSsid:", rest) => numbers.session = columns(rest),
                _ => {}
            }
        }
        numbers
    }
}

/// A line's name with its colon, and the rest.
fn split(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line.iter().position(|byte| *byte == b':');
    line.split_at(end.map_or(0, |colon| colon + 1))
}

fn columns(rest: &[u8]) -> Vec<u32> {
    let text = String::from_utf8_lossy(rest);
    let numbers = text.split_ascii_whitespace().map(str::parse);
    numbers.map_while(Result::ok).collect()
}

/// How a user namespace numbers the agent's users or groups: ranges that begin in it and at the agent's, and their lengths.
#[derive(Debug, Default)]
struct Ids(Vec<[u32; 3]>);

impl Ids {
    /// Of a `uid_map` or `gid_map` (user_namespaces(7)).
    fn of(map: &[u8]) -> Self {
        let text = String::from_utf8_lossy(map);
        let ranges = text.lines().map(|line| columns(line.as_bytes()));
        Self(ranges.filter_map(|range| range.try_into().ok()).collect())
    }

    fn number(&self, outer: u32) -> u32 {
        let mut inside = self.0.iter().filter_map(|[inner, first, count]| {
            let offset = outer.checked_sub(*first).filter(|offset| offset < count)?;
            inner.checked_add(offset)
        });
        inside.next().unwrap_or(OVERFLOW_ID)
    }

    /// The numbers of a line, with what is between them.
    fn line(&self, line: &str) -> String {
        let words = line.split_inclusive(|c: char| c.is_ascii_whitespace());
        let word = |word: &str| match word.trim_end().parse() {
            Ok(id) => format!("{}{}", self.number(id), &word[word.trim_end().len()..]),
            Err(_) => word.to_owned(),
        };
        words.map(word).collect()
    }
}

/// How a container numbers what it sees.
struct View {
    /// How far below the agent's its pid namespace is.
    level: usize,
    /// The agent's pids, and its.
    numbers: HashMap<u32, u32>,
    users: Ids,
    groups: Ids,
}

impl View {
    fn new<'a>(level: usize, seen: impl Iterator<Item = &'a Numbers>, ids: [Ids; 2]) -> Self {
        let all = seen.flat_map(|process| [&process.pid, &process.group, &process.session]);
        let pair = |columns: &Vec<u32>| Some((*columns.first()?, *columns.get(level)?));
        let [users, groups] = ids;
        Self {
            level,
            numbers: all.filter_map(pair).collect(),
            users,
            groups,
        }
    }

    /// 0 for what is outside, as the kernel has it.
    fn number(&self, outer: &str) -> u32 {
        let known = outer.parse().ok().and_then(|pid| self.numbers.get(&pid));
        known.copied().unwrap_or(0)
    }

    /// A `stat`; `None` for what is none. The name may hold anything, parentheses and line breaks included.
    fn stat(&self, text: &[u8], process: &Numbers) -> Option<Vec<u8>> {
        let open = text.iter().position(|byte| *byte == b'(')?;
        let close = text.iter().rposition(|byte| *byte == b')')?;
        let name = text.get(open..=close).filter(|name| !name.is_empty())?;
        let rest = String::from_utf8_lossy(text.get(close + 1..)?);
        let at = |columns: &[u32]| columns.get(self.level).copied().unwrap_or(0).to_string();
        let fields = rest.split_ascii_whitespace().enumerate();
        let fields = fields.map(|(index, field)| match index + STATE {
            4 => self.number(field).to_string(),
            5 => at(&process.group),
            6 => at(&process.session),
            // The terminal's foreground group; -1: there is no terminal.
            8 if !field.starts_with('-') => self.number(field).to_string(),
            _ => field.to_owned(),
        });
        let fields: Vec<_> = fields.collect();
        let mut made = format!("{} ", at(&process.pid)).into_bytes();
        made.extend_from_slice(name);
        made.extend(format!(" {}\n", fields.join(" ")).into_bytes());
        Some(made)
    }

    /// A `status`. The kernel escapes line breaks in the name.
    fn status(&self, text: &[u8]) -> Vec<u8> {
        let mut made = Vec::with_capacity(text.len());
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let (name, rest) = split(line);
            let told = String::from_utf8_lossy(rest);
            let inner = match name {
                b"Tgid:" | b"Pid:" | b"PPid:" | b"TracerPid:" => {
                    self.number(told.trim()).to_string()
                }
                b"NStgid:" | b"NSpid:" | b"NSpgid:" | b"NSsid:" => {
                    let columns = columns(rest);
                    let own = columns.iter().skip(self.level).map(u32::to_string);
                    own.collect::<Vec<_>>().join("\t")
                }
                b"Uid:" | b"Gid:" | b"Groups:" => {
                    let ids = match name {
                        b"Uid:" => &self.users,
                        _ => &self.groups,
                    };
                    made.extend_from_slice(name);
                    made.extend(ids.line(&told).into_bytes());
                    continue;
                }
                _ => {
                    made.extend_from_slice(line);
                    continue;
                }
            };
            made.extend_from_slice(name);
            made.extend(format!("\t{inner}\n").into_bytes());
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// PID 1 of a container, and a child that leads a group in its session.
    const INIT: &str = "Name:\tsh\nTgid:\t70\nPid:\t70\nPPid:\t1\nTracerPid:\t0\n\
        Uid:\t100000\t100033\t4\t165535\nGroups:\t5 165536 \nNStgid:\t70\t1\nNSpid:\t70\t1\nNSpgid:\t70\t1\nNSsid:\t70\t1\nVmRSS:\t   12 kB\n";
    const CHILD: &str = "Name:\tsleep\nPid:\t75\nPPid:\t70\nTracerPid:\t70\nNSpid:\t75\t6\nNSpgid:\t75\t6\nNSsid:\t70\t1\n";

    fn view() -> (View, Numbers) {
        let [init, child] = [INIT, CHILD].map(|text| Numbers::of(text.as_bytes()));
        let ids =
            || Ids::of(b"         0     100000      65536\n     70000          5          1\n");
        (
            View::new(1, [&init, &child].into_iter(), [ids(), ids()]),
            child,
        )
    }

    #[test]
    fn numbers_are_the_containers() {
        let (view, child) = view();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert_eq!(
            text(view.status(INIT.as_bytes())),
            "Name:\tsh\nTgid:\t1\nPid:\t1\nPPid:\t0\nTracerPid:\t0\n\
             Uid:\t0\t33\t65534\t65535\nGroups:\t70000 65534 \nNStgid:\t1\nNSpid:\t1\nNSpgid:\t1\nNSsid:\t1\nVmRSS:\t   12 kB\n"
        );
        assert_eq!(
            text(view.status(CHILD.as_bytes())),
            "Name:\tsleep\nPid:\t6\nPPid:\t1\nTracerPid:\t1\nNSpid:\t6\nNSpgid:\t6\nNSsid:\t1\n"
        );
        let stat = |line: &str| view.stat(line.as_bytes(), &child).map(text);
        assert_eq!(
            stat("75 (sleep) S 70 75 70 34816 75 4194304 70 75\n").unwrap(),
            "6 (sleep) S 1 6 1 34816 6 4194304 70 75\n"
        );
        // Without a terminal, and with one whose foreground group is outside.
        assert_eq!(
            stat("75 (sleep) S 70 75 70 0 -1 7\n").unwrap(),
            "6 (sleep) S 1 6 1 0 -1 7\n"
        );
        assert_eq!(
            stat("75 (sleep) S 70 75 70 34816 9 7\n").unwrap(),
            "6 (sleep) S 1 6 1 34816 0 7\n"
        );
        assert_eq!(stat("75 sleep S 70"), None);
        assert_eq!(stat("75 )( S 70"), None);
    }

    #[test]
    fn lines_and_clocks() {
        let long = format!("Groups:\t{}\n", "4294967294 ".repeat(MAX_LINE));
        let made = cut(long.as_bytes());
        assert!(made.len() <= MAX_LINE && made.ends_with(b" 4294967294\n"));
        assert_eq!(cut(b"Groups:\t1 \n"), b"Groups:\t1 \n");
        assert_eq!(
            boot_time(b"cpu  1 2\nbtime 1764448000\nctxt 5\n"),
            1_764_448_000
        );
        assert_eq!(boot_time(b"cpu  1 2\n"), 0);
    }

    proptest! {
        #[test]
        fn a_name_is_never_taken_for_a_field(name in prop::collection::vec(any::<u8>(), 0..16)) {
            let (view, child) = view();
            let line = [b"75 (", name.as_slice(), b") S 70 75 70 0 -1 7\n"].concat();
            let wanted = [b"6 (", name.as_slice(), b") S 1 6 1 0 -1 7\n"].concat();
            prop_assert_eq!(view.stat(&line, &child), Some(wanted));
        }

        #[test]
        fn anything_is_read(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let (view, child) = view();
            view.status(&text);
            view.stat(&text, &child);
            cut(&text);
        }
    }
}
