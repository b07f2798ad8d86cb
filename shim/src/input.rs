//! What containerd says on the shim's standard input.
//!
//! 1.6 to 2.2 send the task's runtime options as one protobuf `Any`, or nothing; 2.3 and later send
//! `BootstrapParams`, which any `Any` parses as too, so they count only where their ids are those of the command line.
//! CRI-O sends nothing. Whatever cannot be understood is reported to the log, not refused: a newer engine may say more.

use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message as _};
use containerd_shim_protos::shim::oci;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// More than any options take.
const MAX_INPUT: usize = 1 << 20;
/// How long an open but silent standard input is waited for.
const PATIENCE_MS: u16 = 2000;

/// The options that husk honours, from whatever form they came in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A cgroup for the shim.
    pub shim_cgroup: Option<String>,
    /// Another configuration file.
    pub config_path: Option<PathBuf>,
    /// The configuration itself, TOML (CRI's inline `options` table).
    pub config_body: Option<String>,
    /// containerd's ttrpc address, where it did not come in the environment.
    pub ttrpc_address: Option<String>,
    /// Where to put the socket.
    pub socket_dir: Option<PathBuf>,
    /// What could not be understood; for the log.
    pub remarks: Vec<String>,
}

/// Reads standard input to its end: nothing from a terminal, and never for long.
pub fn read_stdin() -> Vec<u8> {
    let mut stdin = io::stdin();
    let mut input = Vec::new();
    if stdin.is_terminal() {
        return input;
    }
    let mut chunk = [0; 4096];
    while input.len() < MAX_INPUT {
        let ready = {
            let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(PATIENCE_MS))
        };
        if !matches!(ready, Ok(1..)) {
            break;
        }
        match stdin.read(&mut chunk) {
            Ok(n @ 1..) => input.extend(chunk.iter().take(n)),
            _ => break,
        }
    }
    input
}

impl Options {
    /// Understands the input of a `start` for this container.
    pub fn parse(input: &[u8], namespace: &str, id: &str) -> Self {
        let mut options = Self::default();
        if input.is_empty() {
            return options;
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == id
            && params.namespace == namespace
        {
            options.ttrpc_address = some(params.containerd_ttrpc_address);
            options.socket_dir = params.socket_dir.and_then(some).map(PathBuf::from);
            for any in params
                .extensions
                .into_iter()
                .filter_map(|e| e.value.into_option())
            {
                options.take(&any);
            }
            return options;
        }
        match Any::parse_from_bytes(input) {
            Ok(any) => options.take(&any),
            Err(e) => options.remarks.push(format!(
                "standard input is neither runtime options nor BootstrapParams: {e}"
            )),
        }
        options
    }

    /// Understands the options of a Create.
    pub fn of(any: &Any) -> Self {
        let mut options = Self::default();
        options.take(any);
        options
    }

    fn take(&mut self, any: &Any) {
        // Go's typeurl writes the bare name, others a host before it.
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        match name {
            "" => {}
            "containerd.runc.v1.Options" => match oci::Options::parse_from_bytes(&any.value) {
                Ok(runc) => self.shim_cgroup = some(runc.shim_cgroup),
                Err(e) => self
                    .remarks
                    .push(format!("unreadable runtime options {name}: {e}")),
            },
            "runtimeoptions.v1.Options" => match generic(&any.value) {
                Ok((path, body)) => {
                    self.config_path = some(path).map(PathBuf::from);
                    self.config_body = some(body);
                }
                Err(e) => self
                    .remarks
                    .push(format!("unreadable runtime options {name}: {e}")),
            },
            other => self.remarks.push(format!(
                "runtime options of type {other} mean nothing to husk"
            )),
        }
    }
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|t| !t.is_empty())
}

/// `runtimeoptions.v1.Options`: `type_url` = 1, `config_path` = 2, `config_body` = 3.
fn generic(value: &[u8]) -> Result<(String, String), String> {
    let mut input = CodedInputStream::from_bytes(value);
    let mut path = String::new();
    let mut body = String::new();
    let mut read = || -> containerd_shim_protos::protobuf::Result<()> {
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            // Field number and wire type 2 (length-delimited).
            match tag {
                0x12 => path = input.read_string()?,
                0x1a => body = input.read_string()?,
                _ => skip(&mut input, tag)?,
            }
        }
        Ok(())
    };
    read().map_err(|e| e.to_string())?;
    Ok((path, body))
}

fn skip(
    input: &mut CodedInputStream<'_>,
    tag: u32,
) -> containerd_shim_protos::protobuf::Result<()> {
    match tag & 7 {
        0 => input.read_raw_varint64().map(drop),
        1 => input.skip_raw_bytes(8),
        5 => input.skip_raw_bytes(4),
        _ => {
            let length = input.read_raw_varint32()?;
            input.skip_raw_bytes(length)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;
    use proptest::prelude::*;

    fn boxed(name: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: name.to_owned(),
            value,
            ..Default::default()
        }
    }

    fn runc() -> Any {
        let options = oci::Options {
            shim_cgroup: "/shims/a".into(),
            ..Default::default()
        };
        boxed(
            "containerd.runc.v1.Options",
            options.write_to_bytes().unwrap(),
        )
    }

    #[test]
    fn nothing_means_defaults() {
        assert_eq!(Options::parse(b"", "n", "i"), Options::default());
    }

    #[test]
    fn runc_options() {
        let options = Options::parse(&runc().write_to_bytes().unwrap(), "n", "i");
        assert_eq!(options.shim_cgroup.as_deref(), Some("/shims/a"));
        assert!(options.remarks.is_empty());
    }

    #[test]
    fn generic_options() {
        let value = b"\x0a\x01t\x12\x05/a/b c\x1a\x05x = 1\x20\x07".to_vec();
        let broken = Options::parse(
            &boxed("runtimeoptions.v1.Options", value)
                .write_to_bytes()
                .unwrap(),
            "n",
            "i",
        );
        assert_eq!(broken.remarks.len(), 1);
        let value = b"\x0a\x01t\x12\x05/a/b.\x1a\x05x = 1\x20\x07".to_vec();
        let input = boxed("type.googleapis.com/runtimeoptions.v1.Options", value)
            .write_to_bytes()
            .unwrap();
        let options = Options::parse(&input, "n", "i");
        assert_eq!(options.config_path, Some("/a/b.".into()));
        assert_eq!(options.config_body.as_deref(), Some("x = 1"));
    }

    #[test]
    fn bootstrap_params_count_only_with_the_right_ids() {
        let mut params = BootstrapParams {
            instance_id: "i".into(),
            namespace: "n".into(),
            containerd_ttrpc_address: "/run/t".into(),
            socket_dir: Some("/tmp/s".into()),
            ..Default::default()
        };
        params.extensions.push(Extension {
            value: Some(runc()).into(),
            ..Default::default()
        });
        let bytes = params.write_to_bytes().unwrap();
        let options = Options::parse(&bytes, "n", "i");
        assert_eq!(options.ttrpc_address.as_deref(), Some("/run/t"));
        assert_eq!(options.socket_dir, Some("/tmp/s".into()));
        assert_eq!(options.shim_cgroup.as_deref(), Some("/shims/a"));
        assert_eq!(Options::parse(&bytes, "n", "other").ttrpc_address, None);
    }

    proptest! {
        #[test]
        fn any_input_is_survived(input in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Options::parse(&input, "n", "i");
            let _ = generic(&input);
        }
    }
}
