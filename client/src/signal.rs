//! Signals, as people write them.

use anyhow::{Result, bail};

/// A signal of Linux on x86-64 (signal(7)), by name with or without SIG, or by number.
///
/// # Errors
/// There is none of that name or number.
pub fn signal_number(text: &str) -> Result<u32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    // The first of those that have no names but what the C library keeps back.
    const REALTIME: u32 = 34;
    if let Ok(number) = text.parse::<u32>() {
        if (1..=64).contains(&number) {
            return Ok(number);
        }
        bail!("there is no signal {text}: they have the numbers 1 to 64");
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let more = match rest {
            "" => Some(0),
            rest => rest.strip_prefix('+').and_then(|n| n.parse::<u32>().ok()),
        };
        if let Some(more) = more.filter(|more| *more <= 30) {
            return Ok(REALTIME + more);
        }
    }
    let found = NAMES.iter().zip(1_u32..).find(|(known, _)| **known == name);
    match found {
        Some((_, number)) => Ok(number),
        None => bail!("there is no signal {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("KILL", 9),
            ("sigterm", 15),
            ("SIGUSR1", 10),
            ("64", 64),
            ("SIGRTMIN+3", 37),
            ("SYS", 31),
        ] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for text in ["", "0", "65", "SIGNOTHING", "RTMIN+99", "-9"] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }
}
