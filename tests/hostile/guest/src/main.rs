//! A guest that attacks: no kernel, no driver but its own, and the VMM's devices to talk to.
//!
//! husk-vmm boots it as a kernel. The command line says what to try (`hostile=NAME`), each attempt is a line on the console,
//! `held: …` where the VMM did as it should and `MOVED: …` where not, and `done` is the last before it turns itself off. Whoever
//! started it looks at the host as well (tests/src/e2e/hostile.rs). A mistake in here is a panic: `MOVED: panicked at …`.
#![no_std]
#![no_main]

mod door;
mod entry;
mod exits;
mod files;
mod fuse;
mod machine;
mod memory;
mod net;
mod queues;
mod races;
mod second;
mod sockets;
mod start;
mod virtio;

use start::Start;

/// Tells how an attempt ended.
fn report(held: bool, what: core::fmt::Arguments<'_>) {
    let outcome = if held { "held" } else { "MOVED" };
    say!("{outcome}: {what}");
}

/// Tells how an attempt ended, which should have been so.
#[macro_export]
macro_rules! check {
    ($held:expr, $($what:tt)*) => { $crate::report($held, format_args!($($what)*)) };
}

/// Attempts of one sort: each that fails has a line, and all together have one. A line takes longer than most attempts.
#[derive(Default)]
struct Tally {
    tried: u32,
    moved: u32,
}

impl Tally {
    /// Notes how an attempt ended.
    fn note(&mut self, held: bool, what: core::fmt::Arguments<'_>) {
        self.tried += 1;
        if !held {
            self.moved += 1;
            report(false, what);
        }
    }

    /// Tells of all of them.
    fn told(self, what: core::fmt::Arguments<'_>) {
        report(self.moved == 0, format_args!("{} {what}", self.tried));
    }
}

fn main(start_info: u64) -> ! {
    let start = Start::read(start_info);
    match start.word("hostile") {
        "hello" => say!("held: hello from {} MiB", start.ram >> 20),
        "queues" => queues::attack(&start),
        "files" => files::attack(&start),
        "held_open" => files::hold_open(&start),
        "net" => net::attack(&start),
        "memory" => memory::attack(&start),
        "races" => races::attack(&start),
        "exits" => exits::attack(&start),
        "sockets" => sockets::attack(),
        "door" => door::attack(&start),
        other => say!("MOVED: nothing is called {other:?}"),
    }
    say!("done");
    machine::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("MOVED: {info}");
    machine::power_off()
}
