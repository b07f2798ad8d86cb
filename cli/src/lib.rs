//! `husk`: images and containers without any daemon.
//!
//! Names, flags, output and exit codes are those that users of docker and nerdctl know. [`args`] is the command line, [`command`] does what
//! it says; the rest serves that.

mod archives;
pub mod args;
mod attach;
pub mod command;
mod container;
mod cp;
mod doctor;
mod exec;
mod files;
mod frame;
mod human;
mod images;
mod jail;
mod lifecycle;
mod log;
mod logs;
mod look;
mod monitor;
mod names;
mod network;
mod place;
mod proc;
mod progress;
mod pull;
mod root;
mod run;
mod spec;
mod stats;
mod table;
mod terminal;
mod version;

use husk_client::{pipes, shim, signal};

/// The namespace of `husk`'s own containers.
const NAMESPACE: &str = "husk";
