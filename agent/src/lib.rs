//! The guest's PID 1: sets containers up and runs them.
//!
//! One thread does everything but what can block, which has others for a moment. `boot` makes the guest a place to run
//! containers in, `dial` connects to the host, `service` answers its calls: `sandbox` and `net` for those about the guest,
//! `containers` for those about containers, each a `container` (its set-up) with its `process`es and their `stream`s; `volume` for
//! the directories of the host's that are copied; `forward` for port-forwards; `users` for a pod with users of its own; `share` for what was
//! the host's and has gone; `processes` for what is told of a container's. `reaper` learns how processes end, `events` what happens unasked.

pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod connection;
pub mod container;
pub mod containers;
pub mod cpus;
pub mod dial;
mod directory;
pub mod error;
pub mod events;
mod execs;
pub mod forward;
mod huge_pages;
pub mod launch;
pub mod log;
pub mod loopback;
pub mod names;
pub mod net;
pub mod polled;
pub mod power;
pub mod process;
pub mod processes;
pub mod reaper;
pub mod runtime;
pub mod sandbox;
pub mod service;
pub mod share;
pub mod stats;
pub mod stream;
pub mod terminal;
pub mod users;
pub mod volume;
