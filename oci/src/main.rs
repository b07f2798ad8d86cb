//! `husk-oci`: reads the command line and hands over to the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    husk_oci::command::main()
}
