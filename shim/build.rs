//! Generates the messages of `proto/cri.proto`, in pure Rust: no protoc is needed.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/cri.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // `include!` of a whole file cannot carry inner attributes or inner docs: drop them.
    let path = out.join("cri.rs");
    let text = fs::read_to_string(&path)?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(&path, kept.join("\n"))?;
    println!("cargo:rerun-if-changed=proto/cri.proto");
    Ok(())
}
