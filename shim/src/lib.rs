//! containerd-shim-husk-v2: one process a pod, between containerd and the pod's VM.
//!
//! The frontend is what containerd sees of a process: command line ([`args`]), `start` ([`bootstrap`]), `delete`
//! ([`delete`]), `-info` ([`info`]), its log ([`log`]) and what it leaves on disk ([`state`]). Behind it the
//! long-running part ([`daemon`]) serves the task API and owns the pod.

pub mod agent;
pub mod annotations;
pub mod args;
pub mod bootstrap;
pub mod cgroup;
pub mod cleanup;
pub mod clock;
pub mod config;
pub mod container;
pub mod context;
pub mod cri;
pub mod daemon;
pub mod delete;
pub mod demand;
pub mod engine_mounts;
pub mod error;
pub mod etc;
pub mod events;
pub mod few;
pub mod group;
pub mod growth;
pub mod hooks;
pub mod huge_pages;
pub mod idmap;
pub mod info;
pub mod input;
pub mod lifecycle;
pub mod log;
pub mod mount;
pub mod network;
pub mod overlay;
pub mod phase;
pub mod plan;
pub mod pod;
pub mod sandbox;
pub mod service;
pub mod share;
pub mod sizing;
pub mod socket;
pub mod spec;
pub mod state;
pub mod stdio;
pub mod streams;
pub mod timing;
pub mod vm;
pub mod vmm_users;
pub mod volume;
