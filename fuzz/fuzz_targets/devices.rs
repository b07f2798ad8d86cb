//! Every device behind its registers, and a driver that brings it up, offers it buffers and breaks the rules: `husk_fuzz::devices`. The
//! console, which has no queues, is here.
#![no_main]

use std::io::Write as _;

use husk_fuzz::devices::{
    Session, World, balloon::Inflated, mem::Pluggable, net::Wire, rng::Entropy, run, vsock::Bridge,
};
use husk_vmm::devices::console::Console;
use libfuzzer_sys::fuzz_target;

type Of<W> = Session<<W as World>::Message, <W as World>::Host>;

#[derive(arbitrary::Arbitrary, Debug)]
enum Input {
    Rng(Of<Entropy>),
    Balloon(Of<Inflated>),
    Mem(Of<Pluggable>),
    Net { pairs: bool, session: Of<Wire> },
    Vsock(Of<Bridge>),
    Console(Vec<(Vec<u8>, u8)>),
}

fuzz_target!(|input: Input| {
    match input {
        Input::Rng(session) => with(Entropy::new(), &session),
        Input::Balloon(session) => with(Inflated::new(), &session),
        Input::Mem(session) => with(Pluggable::new(), &session),
        Input::Net { pairs, session } => with(Wire::new(1 + u16::from(pairs)), &session),
        Input::Vsock(session) => with(Bridge::new(), &session),
        Input::Console(writes) => console(&writes),
    }
});

fn with<W: World>((device, world): (Box<dyn husk_vmm::virtio::VirtioDevice>, W), session: &Of<W>) {
    run(device, world, session);
}

/// What a guest prints ends up in logs: so many lines of so many characters, and none of them controls a terminal.
fn console(writes: &[(Vec<u8>, u8)]) {
    let mut console = Console::new(None).unwrap();
    for (bytes, times) in writes.iter().take(64) {
        for _ in 0..=*times {
            console.write_all(bytes).unwrap();
        }
    }
    let tail = console.tail();
    assert!(tail.len() <= husk_protocol::vm::CONSOLE_TAIL_LINES);
    for line in tail {
        assert!(line.chars().count() <= 400, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}
