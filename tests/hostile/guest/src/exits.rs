//! Ways out of a guest that KVM cannot go on after: each ends the VM.

use crate::machine::{add_registers, run_registers, undefined};
use crate::start::Start;

/// A device's registers.
const REGISTERS: u64 = 0xd000_0000;

/// Does what `try` says.
pub fn attack(start: &Start) {
    match start.word("try") {
        "triple_fault" => undefined(),
        "run_registers" => run_registers(REGISTERS),
        "add_registers" => add_registers(REGISTERS),
        other => crate::say!("MOVED: nothing is called {other:?}"),
    }
}
