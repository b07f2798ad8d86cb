//! `husk version`.

use anyhow::Result;
use serde::Serialize;

use crate::{args, table};

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
}

pub(crate) fn print(args: &args::Version) -> Result<()> {
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        os: std::env::consts::OS,
        arch: std::env::consts::ARCH,
    };
    table::print(args.format, &["VERSION", "OS", "ARCH"], &[version], |v| {
        [v.version, v.os, v.arch].map(str::to_owned).to_vec()
    })
}
