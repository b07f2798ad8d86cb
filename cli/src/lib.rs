//! `husk`: images and containers without any daemon.
//!
//! Names, flags, output and exit codes are those that users of docker and nerdctl know. [`args`] is the command line, [`command`] does what
//! it says; the rest serves that.

mod archives;
pub mod args;
pub mod command;
mod human;
mod images;
mod place;
mod progress;
mod pull;
mod table;
mod version;
