//! Fields of a header.

use super::BLOCK;

/// A number of a header: octal digits between spaces and NULs, or, as GNU tar writes what they are too few for, big-endian bytes after one
/// with the highest bit set. An empty one is zero. `None`: neither, or not within 64 bits.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    const BINARY: u8 = 0x80;
    if let Some((first, rest)) = field.split_first()
        && first & BINARY != 0
    {
        let bytes = [first & !BINARY].into_iter().chain(rest.iter().copied());
        return bytes
            .map(u64::from)
            .try_fold(0, |sum: u64, byte| Some(sum.checked_mul(256)? | byte));
    }
    let digits = field.trim_ascii_start();
    let end = digits.iter().position(|byte| matches!(byte, 0 | b' '));
    let (digits, rest) = digits.split_at(end.unwrap_or(digits.len()));
    if rest.iter().any(|byte| !matches!(byte, 0 | b' ')) {
        return None;
    }
    digits.iter().try_fold(0, |sum: u64, byte| match byte {
        b'0'..=b'7' => Some(sum.checked_mul(8)? | u64::from(byte - b'0')),
        _ => None,
    })
}

/// A time before 1970 is a binary number below zero.
pub(super) fn signed_number(field: &[u8]) -> Option<i64> {
    if field.first() != Some(&0xff) {
        return number(field)?.try_into().ok();
    }
    let (sign, value) = field.split_last_chunk::<8>()?;
    let value = i64::from_be_bytes(*value);
    (value < 0 && sign.iter().all(|byte| *byte == 0xff)).then_some(value)
}

/// The sum of a header's bytes, those of the checksum itself taken for spaces.
pub(super) fn checksum(block: &[u8; BLOCK]) -> u64 {
    const FIELD: std::ops::Range<usize> = 148..156;
    let sum = |(at, byte): (usize, &u8)| u64::from(if FIELD.contains(&at) { b' ' } else { *byte });
    block.iter().enumerate().map(sum).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary_or_nothing() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"77777777", Some(0o77_777_777)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"", Some(0)),
            (b"\x80\0\0\0\0\x01\x02\x03", Some(0x10203)),
            (
                b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
                Some(u64::MAX),
            ),
            // Below zero, and beyond 64 bits.
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"7777777777777777777777777", None),
            (b"0000648\0", None),
            (b"64 4\0", None),
            (b"-1\0", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    #[test]
    fn times_may_be_below_zero() {
        for (field, value) in [
            (&b"00000000017\0"[..], Some(15)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe",
                Some(-2),
            ),
            (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\xff\xff\0\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"x", None),
        ] {
            assert_eq!(signed_number(field), value, "{field:?}");
        }
    }
}
