//! Generates the agent API and the shim's own from `proto/`, in pure Rust: no protoc is needed.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/shim.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // `include!` of a whole file cannot carry inner attributes or inner docs: drop them.
    for name in ["agent.rs", "agent_ttrpc.rs", "shim_ttrpc.rs"] {
        let path = out.join(name);
        let text = fs::read_to_string(&path)?;
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n"))?;
    }
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
