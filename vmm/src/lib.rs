//! husk's virtual machine monitor: one process a pod.
//!
//! `kvm` and `vcpu` run the guest, `memory` and `boot` prepare it (PVH entry, ACPI tables), `virtio` holds the
//! transport and one module a device, `control` is the shim's channel. A guest is hostile: whatever it supplies
//! is bounded before it is used, and the types say whether a value has been checked.

pub mod virtio;
