//! Where containerd wants a stream: a path, `file://` or `binary://`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// One stream's address, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// None: `/dev/null` in the guest.
    Null,
    /// A FIFO; or a file or device that exists.
    Path(PathBuf),
    /// A log file to append to.
    File(PathBuf),
    /// A program that takes the output on fds 3 and 4 and says on fd 5 when it is ready.
    Binary(Binary),
}

/// A logging binary and its arguments, which are the address's query: `?key=value` becomes `key value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binary {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
}

impl Target {
    pub(super) fn parse(address: &str) -> Result<Self, String> {
        let Some((scheme, rest)) = address.split_once("://") else {
            return Ok(if address.is_empty() {
                Self::Null
            } else {
                Self::Path(address.into())
            });
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path, false));
        if !path.is_absolute() {
            return Err("the path is not absolute".to_owned());
        }
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Binary(Binary {
                program: path,
                arguments: arguments(query),
            })),
            other => Err(format!(
                "{other}:// is not supported: a FIFO's path, file:// or binary://"
            )),
        }
    }
}

fn arguments(query: &str) -> Vec<OsString> {
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true));
        arguments.push(decode(value, true));
    }
    arguments
}

/// Undoes percent-encoding, and `+` for a space where that is the custom. What is no escape stays as it is.
fn decode(text: &str, plus: bool) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let digit = |d: u8| {
            char::from(d)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
        };
        match (byte, after) {
            (b'%', [high, low, tail @ ..]) if digit(*high).is_some() && digit(*low).is_some() => {
                out.push(digit(*high).unwrap_or(0) << 4 | digit(*low).unwrap_or(0));
                rest = tail;
            }
            (b'+', _) if plus => out.push(b' '),
            _ => out.push(byte),
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_kind() {
        assert_eq!(Target::parse(""), Ok(Target::Null));
        assert_eq!(
            Target::parse("/run/x/1-stdout"),
            Ok(Target::Path("/run/x/1-stdout".into()))
        );
        assert_eq!(
            Target::parse("fifo:///run/x"),
            Ok(Target::Path("/run/x".into()))
        );
        assert_eq!(
            Target::parse("file:///var/log/a%20b.log"),
            Ok(Target::File("/var/log/a b.log".into()))
        );
        let binary = Binary {
            program: "/usr/bin/logger".into(),
            arguments: ["tag", "a b", "-v", ""].map(OsString::from).to_vec(),
        };
        assert_eq!(
            Target::parse("binary:///usr/bin/logger?tag=a+b&-v"),
            Ok(Target::Binary(binary))
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(Target::parse("npipe:///x").unwrap_err().contains("npipe"));
        assert!(Target::parse("file://x").unwrap_err().contains("absolute"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            let _ = Target::parse(&text);
            let _ = Target::parse(&format!("binary:///{text}"));
        }
    }
}
