//! What a hostile guest says to the shim: answers of its agent, connections to the stream port, and the lives of processes in any order.
//!
//! Modules of the shim by their files, as in `config`: as a crate it would double the time that all targets take to compile.
#![no_main]

#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/agent/mod.rs"]
mod agent;
#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/error.rs"]
mod error;
#[path = "../../shim/src/few.rs"]
mod few;
#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/lifecycle/mod.rs"]
mod lifecycle;
#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/phase.rs"]
mod phase;
#[allow(dead_code, reason = "not all of it is for a fuzzer")]
#[path = "../../shim/src/streams.rs"]
mod streams;

#[path = "shim/answers.rs"]
mod answers;
#[path = "shim/handshakes.rs"]
mod handshakes;
#[path = "shim/lives.rs"]
mod lives;

use libfuzzer_sys::fuzz_target;

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    Answers(answers::Talk),
    Handshakes(Vec<handshakes::Step>),
    Lives(Vec<lives::Step>),
}

fuzz_target!(|input: Input| {
    match input {
        Input::Answers(talk) => on_a_clock_of_its_own(answers::run(talk)),
        Input::Handshakes(steps) => on_a_clock_of_its_own(handshakes::run(&steps)),
        Input::Lives(steps) => lives::run(&steps),
    }
});

/// Time passes when there is nothing else to do.
fn on_a_clock_of_its_own(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(work);
}
