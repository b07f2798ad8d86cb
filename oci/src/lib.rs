//! `husk-oci`: containers in their own microVM for engines that call an OCI runtime's command line, podman above all.
//!
//! The commands, flags, messages and exit codes are crun's. A container here is a directory below `--root` ([`store`]), which is the bundle
//! that the pod's shim is given, and a [`proxy`]: the process that engines take for the container's, as the real one is the guest's. All else is
//! the shim's.

pub mod args;
pub mod command;
mod conmon;
mod create;
mod delete;
mod descriptors;
mod exec;
mod hooks;
mod id;
mod limits;
mod list;
mod log;
mod pod;
mod process;
mod proxy;
mod spec;
mod store;
mod task;
