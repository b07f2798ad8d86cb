//! containerd-shim-husk-v2: one process a pod, between containerd and the pod's VM.
//!
//! The frontend is what containerd sees of a process: command line ([`args`]), `start` ([`bootstrap`]), `delete`
//! ([`delete`]), `-info` ([`info`]), its log ([`log`]) and what it leaves on disk ([`state`]). Behind it the
//! long-running part ([`daemon`]) serves the task API and owns the pod.

pub mod args;
pub mod bootstrap;
pub mod cleanup;
pub mod config;
pub mod context;
pub mod daemon;
pub mod delete;
pub mod events;
pub mod group;
pub mod info;
pub mod input;
pub mod log;
pub mod service;
pub mod socket;
pub mod state;
pub mod stdio;
