//! The shim's client. There is one way to a pod, its shim's Task API; husk's own commands go it as containerd does.

pub mod pipes;
pub mod shim;
pub mod signal;
