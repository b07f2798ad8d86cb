//! `husk logs`.

use std::{
    fs::File,
    io::{self, BufReader, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{args, container::State, log, place::Place};

/// How often a log that is followed is looked at.
const AGAIN: Duration = Duration::from_millis(100);

/// Bytes that are looked through at once for the last lines.
const BLOCK: usize = 64 << 10;

pub(crate) fn logs(place: &Place, args: &args::Logs) -> Result<()> {
    let container = place.containers()?.find(&args.container)?;
    let [older, path] = log::files(&container.dir);
    // In this order: where the next file begins in between, this is the older one twice, not neither.
    let newer = open(&path)?;
    let earlier = open(&older)?.filter(|file| !is_same(file, newer.as_ref()));
    let (mut starts, mut left) = ([0; 2], args.tail.unwrap_or(usize::MAX));
    for (file, start) in [&newer, &earlier].into_iter().zip(&mut starts) {
        let Some(file) = file.as_ref().filter(|_| args.tail.is_some()) else {
            continue;
        };
        let (at, lines) = last_lines(file, left).context("reading the log")?;
        (*start, left) = (at, left - lines);
    }
    let mut read_to = 0;
    for (file, start) in [(earlier, starts[1]), (newer, starts[0])] {
        read_to = start;
        if let Some(mut file) = file {
            file.seek(SeekFrom::Start(start))?;
            read_to += show_lines(BufReader::new(file), args.timestamps)?;
        }
    }
    if !args.follow {
        return Ok(());
    }
    loop {
        // Looked at before the log: what the container wrote last is in it then.
        let runs = container
            .status()
            .is_ok_and(|status| status.state == State::Running);
        // It may not have written yet, or have gone.
        if let Some(mut file) = open(&path)? {
            if file.metadata()?.len() < read_to {
                // The next file has begun; the rest of the one before is in the older one.
                let mut rest = open(&older)?.context("the older part of the log has gone")?;
                rest.seek(SeekFrom::Start(read_to))?;
                show_lines(BufReader::new(rest), args.timestamps)?;
                read_to = 0;
            }
            file.seek(SeekFrom::Start(read_to))?;
            read_to += show_lines(BufReader::new(file), args.timestamps)?;
        }
        if !runs {
            return Ok(());
        }
        thread::sleep(AGAIN);
    }
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("opening {}", path.display())),
    }
}

fn is_same(file: &File, other: Option<&File>) -> bool {
    let inode = |file: &File| file.metadata().ok().map(|found| found.ino());
    other.is_some_and(|other| inode(file) == inode(other))
}

/// Where the last so many whole lines begin, and how many of them there are.
fn last_lines(file: &File, lines: usize) -> io::Result<(u64, usize)> {
    let mut at = file.metadata()?.len();
    let mut buffer = vec![0; BLOCK];
    let mut seen = 0;
    while at > 0 {
        let count = usize::try_from(at).map_or(BLOCK, |at| at.min(BLOCK));
        at -= count as u64;
        let block = buffer.get_mut(..count).unwrap_or_default();
        file.read_exact_at(block, at)?;
        for (index, _) in block.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            // The end of the line before the first that is wanted.
            if seen == lines {
                return Ok((at + index as u64 + 1, lines));
            }
            seen += 1;
        }
    }
    Ok((0, seen))
}

/// Shows whole lines: a line that is being written is the next look's. Says how many bytes they had.
fn show_lines(mut from: impl io::BufRead, timestamps: bool) -> Result<u64> {
    let mut shown = 0;
    let mut line = String::new();
    loop {
        line.clear();
        let count = from.read_line(&mut line)?;
        if !line.ends_with('\n') {
            return Ok(shown);
        }
        if let Ok(entry) = serde_json::from_str(&line) {
            show(&entry, timestamps)?;
        }
        shown += count as u64;
    }
}

fn show(entry: &log::Entry, timestamps: bool) -> Result<()> {
    let time = match timestamps {
        true => format!("{} ", entry.time),
        false => String::new(),
    };
    match &*entry.stream {
        "stderr" => write!(io::stderr().lock(), "{time}{}", entry.log)?,
        _ => {
            let mut out = io::stdout().lock();
            write!(out, "{time}{}", entry.log)?;
            out.flush()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(text: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text).unwrap();
        file
    }

    #[test]
    fn the_last_lines_are_whole_ones() {
        for (text, lines, wanted) in [
            ("", 3, (0, 0)),
            ("a\nb\nc\n", 2, (2, 2)),
            ("a\nb\nc\n", 3, (0, 3)),
            ("a\nb\nc\n", 9, (0, 3)),
            ("a\nb\nc\n", 0, (6, 0)),
            // What is being written is none yet.
            ("a\nb\nbeg", 1, (2, 1)),
            ("beg", 1, (0, 0)),
        ] {
            let found = last_lines(&file(text.as_bytes()), lines).unwrap();
            assert_eq!(found, wanted, "{text:?} {lines}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn lines_are_found_across_blocks(lengths in proptest::collection::vec(0..40_000_usize, 0..12), lines in 0..14_usize) {
            let text: Vec<u8> = lengths.iter().flat_map(|length| [vec![b'x'; *length], vec![b'\n']].concat()).collect();
            let (at, count) = last_lines(&file(&text), lines).unwrap();
            let skipped = lengths.len().saturating_sub(lines);
            let begin: usize = lengths.iter().take(skipped).map(|length| length + 1).sum();
            prop_assert_eq!((at, count), (begin as u64, lengths.len().min(lines)));
        }
    }
}
