//! containerd-shim-husk-v2: one process a pod, between containerd and the pod's VM.
//!
//! The frontend is what containerd sees of a process: command line (`args`), `start` (`bootstrap`), `delete`
//! (`delete`), `-info` (`info`), its log (`log`) and what it leaves on disk ([`state`]). Behind it the
//! long-running part (`daemon`) serves the task API and owns the pod.

pub mod config;
pub mod context;
pub mod events;
pub mod state;
pub mod stdio;
