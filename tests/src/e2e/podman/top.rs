//! `podman top`: podman enters the mount namespace of what stands for the container, and reads the `/proc` there.

use anyhow::{Context as _, Result, ensure};
use husk_tests::{podman::Podman, wait};

/// What has one word in each row, and the command.
const COLUMNS: [&str; 14] = [
    "pid", "ppid", "uid", "group", "state", "tty", "nice", "rss", "vsz", "hpid", "seccomp",
    "capeff", "etime", "args",
];

/// A process' words, in [`COLUMNS`]' order.
#[derive(Debug)]
struct Row(Vec<String>);

impl Row {
    fn get(&self, column: &str) -> &str {
        let at = COLUMNS.iter().position(|name| *name == column);
        at.and_then(|at| self.0.get(at)).map_or("", |word| word)
    }

    fn is(&self, wanted: &[(&str, &str)]) -> Result<()> {
        for (column, wanted) in wanted {
            ensure!(self.get(column) == *wanted, "{column}: {self:?}");
        }
        Ok(())
    }

    fn has(&self, column: &str) -> Result<u64> {
        let number = self.get(column).parse();
        number.with_context(|| format!("{column}: {self:?}"))
    }
}

fn rows(podman: &Podman, name: &str) -> Result<Vec<Row>> {
    let told = podman.run(&[&["top", name][..], &COLUMNS].concat())?.ok()?;
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (words, args) = words.split_at(words.len().min(COLUMNS.len() - 1));
        let words = words.iter().map(|word| (*word).to_owned());
        Row(words.chain([args.join(" ")]).collect())
    };
    Ok(told.text().lines().skip(1).map(row).collect())
}

/// Shows the processes of a container that has `sh` as its first.
pub fn shows(podman: &Podman, name: &str) -> Result<()> {
    let exec = ["exec", "-d", "-u", "1234:4321", name, "sleep", "777"];
    podman.run(&exec)?.ok()?;
    let rows = wait::until("the exec's process", || {
        let rows = rows(podman, name).ok()?;
        let runs = rows.iter().any(|row| row.get("args") == "sleep 777");
        runs.then_some(rows)
    })?;
    let find = |column: &str, wanted: &str| {
        let found = rows.iter().find(|row| row.get(column) == wanted);
        found.with_context(|| format!("no {wanted}: {rows:?}"))
    };
    let first = find("pid", "1")?;
    let stand_in = podman.inspect(name, "{{.State.Pid}}")?;
    first.is(&[
        ("ppid", "0"),
        ("uid", "0"),
        ("group", "root"),
        ("tty", "?"),
        ("nice", "0"),
        ("hpid", &stand_in),
        ("seccomp", "filter"),
    ])?;
    ensure!(first.get("args").starts_with("sh -c "), "{first:?}");
    ensure!(first.get("capeff").contains("SETUID,"), "{first:?}");
    let other = find("args", "sleep 777")?;
    other.is(&[
        ("ppid", "0"),
        ("uid", "1234"),
        ("group", "4321"),
        ("state", "S"),
        ("capeff", "none"),
    ])?;
    for row in [first, other] {
        ensure!(row.has("vsz")? > 0 && row.has("rss")? > 0, "{row:?}");
        ensure!(row.get("etime").ends_with('s'), "{row:?}");
        // Of this boot of the guest, by the host's clock.
        ensure!(!row.get("etime").starts_with('-'), "{row:?}");
    }
    let usual = podman.run(&["top", name])?.ok()?.text();
    let head: Vec<&str> = usual
        .lines()
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    ensure!(
        head == [
            "USER", "PID", "PPID", "%CPU", "ELAPSED", "TTY", "TIME", "COMMAND"
        ],
        "{usual}"
    );
    ensure!(usual.contains("sleep 777"), "{usual}");
    Ok(())
}

/// The terminal of its first process.
pub fn terminal(podman: &Podman, name: &str) -> Result<String> {
    let rows = rows(podman, name)?;
    let first = rows.first().context("no process")?;
    Ok(first.get("tty").to_owned())
}

/// Shows each process of a pod once, though its containers see each other's.
pub fn shows_pod(podman: &Podman, name: &str, commands: &[&str]) -> Result<()> {
    let told = podman.run(&["pod", "top", name, "args"])?.ok()?.text();
    for command in commands {
        let rows = told.lines().filter(|line| line.trim() == *command);
        ensure!(rows.count() == 1, "{command}: {told}");
    }
    Ok(())
}
