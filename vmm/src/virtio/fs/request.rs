//! What of a FUSE request must be true before virtiofsd sees it.
//!
//! The crate trusts names: it hands them to `unlinkat`, `mkdirat`, `renameat` as they come, so that one with a slash in it would
//! leave the share. (Standalone, virtiofsd sits in a `chroot`.) It also unwraps file offsets, and the split of a reply's header
//! from its body. A guest's kernel never sends such, a hostile one may. The layouts are those of <linux/fuse.h>, protocol 7.

/// Size of the header in front of every request: `struct fuse_in_header`.
pub const HEADER_LEN: usize = 40;

/// Size of a reply without a body: `struct fuse_out_header`.
pub const REPLY_LEN: usize = REPLY_BYTES as usize;
/// The same, as replies and used rings have it.
pub const REPLY_BYTES: u32 = 16;

/// How much of a request without names is copied out of the guest's reach: the header and the longest fixed part
/// that is checked here (`fuse_write_in`). What a write carries stays where it is.
pub const FIXED_LEN: usize = 80;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const READ: u32 = 15;
const WRITE: u32 = 16;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const RENAME2: u32 = 45;

/// Where the names of a request are: after a fixed part of so many bytes, so many of them, each ended by a zero byte.
#[derive(Clone, Copy)]
struct Names {
    fixed: usize,
    count: usize,
}

fn names(op: u32) -> Option<Names> {
    let (fixed, count) = match op {
        // The target of a link, which follows its name, is the guest's affair.
        LOOKUP | SYMLINK | UNLINK | RMDIR => (0, 1),
        MKDIR | LINK => (8, 1),
        MKNOD | CREATE => (16, 1),
        RENAME => (8, 2),
        RENAME2 => (16, 2),
        _ => return None,
    };
    Some(Names { fixed, count })
}

/// True if the request that begins with `header` must be copied whole before [`check`].
pub fn has_names(header: &[u8]) -> bool {
    word(header, 4).and_then(names).is_some()
}

/// True if `request` is answered, with a header at least.
pub fn has_reply(request: &[u8]) -> bool {
    !matches!(
        word(request, 4),
        Some(FORGET | INTERRUPT | DESTROY | BATCH_FORGET)
    )
}

/// Checks the copied part of a request.
///
/// # Errors
/// The errno to answer with.
pub fn check(request: &[u8]) -> Result<(), i32> {
    let op = word(request, 4).ok_or(libc::EINVAL)?;
    if let Some(Names { fixed, count }) = names(op) {
        let mut rest = request
            .get(HEADER_LEN..)
            .and_then(|body| body.get(fixed..))
            .ok_or(libc::EINVAL)?;
        for _ in 0..count {
            let end = rest.iter().position(|b| *b == 0).ok_or(libc::EINVAL)?;
            let (name, after) = rest.split_at(end);
            #[cfg(feature = "weakened")]
            if crate::weakened::Safeguard::Names.is_left_out() {
                break;
            }
            if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
                return Err(libc::EINVAL);
            }
            rest = after.get(1..).unwrap_or_default();
        }
    }
    if matches!(op, READ | WRITE) {
        // A file handle, then the offset.
        let offset = double_word(request, HEADER_LEN + 8).ok_or(libc::EINVAL)?;
        if i64::try_from(offset).is_err() {
            return Err(libc::EINVAL);
        }
    }
    Ok(())
}

/// The reply to `request` that says only `errno`.
pub fn refusal(request: &[u8], errno: i32) -> [u8; REPLY_LEN] {
    let mut reply = [0; REPLY_LEN];
    let unique = double_word(request, 8).unwrap_or(0);
    let fields: [&[u8]; 3] = [
        &REPLY_BYTES.to_le_bytes(),
        &errno.saturating_neg().to_le_bytes(),
        &unique.to_le_bytes(),
    ];
    for (to, from) in reply.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    reply
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn double_word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(op: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..8].copy_from_slice(&op.to_le_bytes());
        bytes[8] = 7;
        bytes.extend(body);
        bytes
    }

    #[test]
    fn names_stay_in_their_directory() {
        for bad in ["..\0", ".\0", "\0", "/etc\0", "a/b\0", "../x\0", "x"] {
            for (op, fixed) in [
                (LOOKUP, 0),
                (UNLINK, 0),
                (MKDIR, 8),
                (CREATE, 16),
                (LINK, 8),
            ] {
                let body = [&vec![1; fixed][..], bad.as_bytes()].concat();
                assert_eq!(check(&request(op, &body)), Err(libc::EINVAL), "{op} {bad}");
            }
            let second = [&[1; 16][..], b"good\0", bad.as_bytes()].concat();
            assert!(check(&request(RENAME2, &second)).is_err(), "{bad}");
        }
        for good in ["...\0", "..a\0", "a.\0", "\u{e4}\0"] {
            assert_eq!(check(&request(LOOKUP, good.as_bytes())), Ok(()));
        }
        assert_eq!(check(&request(SYMLINK, b"name\0../../anywhere\0")), Ok(()));
        assert_eq!(check(&request(RENAME, b"12345678old\0new\0")), Ok(()));
    }

    #[test]
    fn offsets_fit_a_file() {
        let at = |offset: u64| [&[0; 8][..], &offset.to_le_bytes(), &[0; 24]].concat();
        for op in [READ, WRITE] {
            assert_eq!(check(&request(op, &at(i64::MAX as u64))), Ok(()));
            assert!(check(&request(op, &at(1 << 63))).is_err());
            assert!(check(&request(op, &[0; 15])).is_err());
        }
    }

    #[test]
    fn a_refusal_answers_its_request() {
        let reply = refusal(&request(LOOKUP, b""), libc::EINVAL);
        assert_eq!(
            reply,
            [16, 0, 0, 0, 234, 255, 255, 255, 7, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    proptest! {
        #[test]
        fn anything_is_checked(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (has_names(&bytes), has_reply(&bytes), check(&bytes), refusal(&bytes, 1));
        }
    }
}
