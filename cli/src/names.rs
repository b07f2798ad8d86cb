//! Names of containers.

use anyhow::{Result, bail};

const FIRST: [&str; 32] = [
    "amber", "bold", "brisk", "calm", "clever", "crisp", "dapper", "eager", "early", "fair",
    "fleet", "gentle", "glad", "green", "hardy", "jolly", "keen", "kind", "light", "lively",
    "lucid", "merry", "neat", "nimble", "plain", "quiet", "rapid", "sound", "steady", "swift",
    "tidy", "witty",
];
const SECOND: [&str; 32] = [
    "acorn", "almond", "apple", "barley", "bean", "beech", "birch", "cashew", "cedar", "chestnut",
    "clover", "coconut", "cotton", "elm", "fern", "flax", "hazel", "hemp", "larch", "linden",
    "maize", "maple", "millet", "oat", "olive", "peanut", "pecan", "poppy", "rye", "sesame",
    "walnut", "wheat",
];

/// A name that says nothing, of an id in hex.
pub(crate) fn made_up(id: &str) -> String {
    let byte = |at: usize| {
        let digits = id.get(2 * at..2 * at + 2).unwrap_or_default();
        usize::from_str_radix(digits, 16).unwrap_or_default()
    };
    let pick =
        |words: &[&'static str; 32], at: usize| words.get(byte(at) % 32).copied().unwrap_or("husk");
    let rest = id.get(4..8).unwrap_or_default();
    format!("{}-{}-{rest}", pick(&FIRST, 0), pick(&SECOND, 1))
}

/// One that a user has chosen.
pub(crate) fn checked(name: &str) -> Result<String> {
    let is_sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if name.len() < 2
        || name.len() > 128
        || !name.chars().all(is_sound)
        || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        bail!(
            "{name:?} is no name for a container: it has two to 128 letters, digits, \"_\", \".\" and \"-\", and begins with a letter or a digit"
        );
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_up_can_be_chosen() {
        for id in ["00000000", "ffffffff", "1f80abcd"] {
            let name = made_up(id);
            assert_eq!(checked(&name).unwrap(), name);
        }
        for name in ["", "x", "-x", "a b", "a/b", "../x", &"x".repeat(129)] {
            assert!(checked(name).is_err(), "{name}");
        }
    }
}
