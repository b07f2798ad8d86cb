//! Lists of CPUs, as cpuset files and specs write them: `0-3,7`.

use std::collections::BTreeSet;

/// More CPUs than any guest has: a longer range is a mistake, not a wish.
const MAX_CPU: u32 = 4095;

/// Parses a list; `None` where it is malformed. The empty list is well-formed.
pub fn parse(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in list.trim().split(',').map(str::trim) {
        if part.is_empty() {
            continue;
        }
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (first.trim().parse().ok()?, last.trim().parse().ok()?),
            None => {
                let cpu: u32 = part.parse().ok()?;
                (cpu, cpu)
            }
        };
        if first > last || last > MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Writes a list, as short as can be.
pub fn format(cpus: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for cpu in cpus.iter().copied() {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let parts: Vec<String> = ranges
        .into_iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        })
        .collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists() {
        assert_eq!(format(&parse("3,0-1, 2 ,7\n").unwrap()), "0-3,7");
        assert_eq!(format(&parse("").unwrap()), "");
        for bad in ["a", "3-1", "1-", "-1", "0-4294967295"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(cpus in proptest::collection::btree_set(0u32..200, 0..40)) {
            prop_assert_eq!(parse(&format(&cpus)), Some(cpus));
        }

        #[test]
        fn any_text(text in ".{0,20}") {
            let _ = parse(&text);
        }
    }
}
