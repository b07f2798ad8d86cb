//! What reaches the agent: specs, paths in a container's root file system, volumes, networks. No path leads out of its root, a volume becomes
//! what was asked for or an error, and a spec that is taken has what the rest of the agent counts on.
#![no_main]

#[path = "agent/files.rs"]
mod files;
#[path = "agent/spec.rs"]
mod spec;

use std::{path::Path, sync::OnceLock};

use files::{Files, work};
use husk_agent::{container::fuzzing, net};
use husk_fuzz::sandbox::Sandbox;
use husk_protocol::agent::{ContainerStatsResponse, Event, Network, WaitProcessResponse};
use libfuzzer_sys::fuzz_target;
use protobuf::Message;
use spec::{Field, Json, spec};

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    Spec {
        changes: Vec<(Field, Json)>,
        exec: Json,
    },
    Text(Vec<u8>),
    Files(Files),
    Network(Vec<u8>),
    Answer(Vec<u8>),
}

fuzz_target!(|input: Input| {
    match input {
        Input::Spec { changes, exec } => spec(&changes, &exec),
        Input::Text(text) => text_of_any_kind(&text),
        Input::Files(files) => {
            static SANDBOX: OnceLock<Sandbox<Files>> = OnceLock::new();
            SANDBOX.get_or_init(|| Sandbox::new(work)).give(files);
        }
        Input::Network(bytes) => {
            if let Ok(network) = Network::parse_from_bytes(&bytes) {
                let _ = net::Config::new(network).map_err(|error| error.to_string());
            }
        }
        Input::Answer(bytes) => {
            comes_back::<WaitProcessResponse>(&bytes);
            comes_back::<ContainerStatsResponse>(&bytes);
            comes_back::<Event>(&bytes);
        }
    }
});

/// A message is read as what it says, or not at all.
fn comes_back<T: Message>(bytes: &[u8]) {
    if let Ok(message) = T::parse_from_bytes(bytes) {
        let again = message.write_to_bytes().unwrap();
        assert!(T::parse_from_bytes(&again).unwrap() == message);
    }
}

fn text_of_any_kind(text: &[u8]) {
    let _ = fuzzing::resources(text).map_err(|error| error.to_string());
    let _ = fuzzing::spec(text, text).map_err(|error| error.to_string());
    if let Ok(id) = str::from_utf8(text)
        && fuzzing::id(id).is_ok()
    {
        // It becomes a directory of its own.
        let path = Path::new("/base").join(id);
        assert_eq!(path.parent(), Some(Path::new("/base")));
        assert_eq!(path.file_name(), Some(id.as_ref()));
    }
}
