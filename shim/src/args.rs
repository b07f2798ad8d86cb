//! The command line, as containerd writes it: Go-style flags (`-name value`, `-name=value`, one dash or two), then
//! one action.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// What somebody who runs the shim by hand reads.
pub const HELP: &str = "\
containerd-shim-husk-v2 runs containers in their own microVM. containerd starts it; try
    ctr run --runtime io.containerd.husk.v2 --rm -t IMAGE NAME
Settings: /etc/husk/config.toml. By hand:
    containerd-shim-husk-v2 -v       print the version
    containerd-shim-husk-v2 -info    print what the runtime supports (protobuf, for containerd)
    containerd-shim-husk-v2 -namespace NS -id ID -bundle DIR delete
                                     clear away what is left of a container
";

/// What the shim is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Find or start the pod's shim and print its address.
    Start,
    /// Clear a container away after its shim has gone.
    Delete,
    /// Serve on the socket that `start` handed over.
    Serve,
    /// `-v`.
    Version,
    /// `-info`.
    Info,
    /// `-h`.
    Help,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd namespace.
    pub namespace: String,
    /// containerd's gRPC address.
    pub address: String,
    /// The container's id.
    pub id: String,
    /// The container's bundle; containerd gives it to `delete` only, elsewhere it is the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// Path of the socket; from `start` to the serving shim.
    pub socket: PathBuf,
    /// Id of the pod; from `start` to the serving shim.
    pub group: String,
}

/// A command line that is none of containerd's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadArgs {
    /// No such flag.
    #[error("unknown flag {0} (-h shows what there is)")]
    UnknownFlag(String),
    /// The flag's value is missing.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// Not a truth value.
    #[error("flag -{0} is true or false, not {1:?}")]
    NotBool(String, String),
    /// No such action.
    #[error("unknown action {0:?}: start, delete or none")]
    UnknownAction(String),
    /// Text behind the action.
    #[error("unexpected argument {0:?} after the action")]
    Extra(String),
    /// A flag the action cannot do without.
    #[error("{0} needs -{1}")]
    Missing(&'static str, &'static str),
    /// Not UTF-8 where text is needed.
    #[error("flag -{0} is not valid UTF-8")]
    NotText(String),
}

impl Args {
    /// Reads the arguments, without the program's name.
    ///
    /// # Errors
    /// [`BadArgs`], a sentence.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, BadArgs> {
        let mut args = Self {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            id: String::new(),
            bundle: None,
            debug: false,
            socket: PathBuf::new(),
            group: String::new(),
        };
        let mut asked = None;
        let mut action = None;
        let mut rest = arguments.into_iter();
        while let Some(argument) = rest.next() {
            let Some((name, inline)) = flag(&argument) else {
                if action.is_some() {
                    return Err(BadArgs::Extra(argument.to_string_lossy().into_owned()));
                }
                action = Some(match argument.to_str() {
                    Some("start") => Action::Start,
                    Some("delete") => Action::Delete,
                    _ => {
                        return Err(BadArgs::UnknownAction(
                            argument.to_string_lossy().into_owned(),
                        ));
                    }
                });
                continue;
            };
            let mut value = |inline: Option<OsString>| {
                inline
                    .or_else(|| rest.next())
                    .ok_or_else(|| BadArgs::NoValue(name.clone()))
            };
            match name.as_str() {
                "namespace" => args.namespace = text(&name, value(inline)?)?,
                "address" => args.address = text(&name, value(inline)?)?,
                "id" => args.id = text(&name, value(inline)?)?,
                "group" => args.group = text(&name, value(inline)?)?,
                "bundle" => {
                    args.bundle =
                        Some(value(inline)?.into()).filter(|b: &PathBuf| !b.as_os_str().is_empty())
                }
                "socket" => args.socket = value(inline)?.into(),
                // Events go over ttrpc, not through containerd's binary.
                "publish-binary" => drop(value(inline)?),
                "debug" => args.debug = truth(&name, inline)?,
                "v" | "version" if truth(&name, inline.clone())? => asked = Some(Action::Version),
                "info" if truth(&name, inline.clone())? => asked = Some(Action::Info),
                "h" | "help" => asked = Some(Action::Help),
                "v" | "version" | "info" => {}
                _ => {
                    return Err(BadArgs::UnknownFlag(
                        argument.to_string_lossy().into_owned(),
                    ));
                }
            }
        }
        args.action = asked.or(action).unwrap_or(Action::Serve);
        let needs = match args.action {
            Action::Start => "start",
            Action::Delete => "delete",
            _ => return Ok(args),
        };
        for (value, name) in [(&args.namespace, "namespace"), (&args.id, "id")] {
            if value.is_empty() {
                return Err(BadArgs::Missing(needs, name));
            }
        }
        Ok(args)
    }
}

/// Splits `-name`, `--name` and `-name=value`; `None` for what is no flag.
fn flag(argument: &OsStr) -> Option<(String, Option<OsString>)> {
    let bytes = argument.as_bytes().strip_prefix(b"-")?;
    let bytes = bytes.strip_prefix(b"-").unwrap_or(bytes);
    let mut halves = bytes.splitn(2, |&b| b == b'=');
    let name = String::from_utf8_lossy(halves.next()?).into_owned();
    Some((name, halves.next().map(|v| OsStr::from_bytes(v).to_owned())))
}

fn text(name: &str, value: OsString) -> Result<String, BadArgs> {
    value
        .into_string()
        .map_err(|_| BadArgs::NotText(name.to_owned()))
}

/// A Go boolean flag: present means true.
fn truth(name: &str, inline: Option<OsString>) -> Result<bool, BadArgs> {
    let Some(value) = inline else { return Ok(true) };
    match value.to_str() {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        _ => Err(BadArgs::NotBool(
            name.to_owned(),
            value.to_string_lossy().into_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, BadArgs> {
        Args::parse(
            line.split(' ')
                .filter(|a| !a.is_empty())
                .map(|a| if a == "''" { OsString::new() } else { a.into() }),
        )
    }

    #[test]
    fn containerds_own_lines() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(start.action, Action::Start);
        assert_eq!(
            (start.namespace.as_str(), start.id.as_str()),
            ("k8s.io", "c1")
        );
        assert_eq!(start.address, "/run/containerd/containerd.sock");
        assert!(start.debug && start.bundle.is_none());
        let delete =
            parse("-namespace n -address '' -publish-binary '' -id c1 -bundle /run/b delete")
                .unwrap();
        assert_eq!(
            (delete.action, delete.bundle),
            (Action::Delete, Some("/run/b".into()))
        );
        assert_eq!(delete.address, "");
    }

    #[test]
    fn gos_ways_to_write_a_flag() {
        let args = parse("--namespace=n --id=a=b -debug=false start").unwrap();
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str(), args.debug),
            ("n", "a=b", false)
        );
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-v=false").unwrap().action, Action::Serve);
        assert_eq!(parse("").unwrap().action, Action::Serve);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(
            parse("-what start"),
            Err(BadArgs::UnknownFlag("-what".into()))
        );
        assert_eq!(parse("-id"), Err(BadArgs::NoValue("id".into())));
        assert_eq!(
            parse("-debug=maybe"),
            Err(BadArgs::NotBool("debug".into(), "maybe".into()))
        );
        assert_eq!(parse("stop"), Err(BadArgs::UnknownAction("stop".into())));
        assert_eq!(
            parse("-namespace n start"),
            Err(BadArgs::Missing("start", "id"))
        );
        assert_eq!(
            parse("-namespace n -id i start now"),
            Err(BadArgs::Extra("now".into()))
        );
    }
}
