//! husk's virtual machine monitor: one process a pod.
//!
//! `kvm` and `vcpu` run the guest, `memory` and `boot` prepare it (PVH entry, ACPI tables), `virtio` holds the
//! transport and one module a device, `control` is the shim's channel, `jail` what the process gives up before the guest runs. A guest is hostile: whatever it supplies
//! is bounded before it is used, and the types say whether a value has been checked. The modules that see it, or prepare what it sees,
//! deny what might panic or lose bits unnoticed: an index, bare arithmetic, a cast to fewer bits. Tests count as they like.

pub mod boot;
pub mod bus;
pub mod clock;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod ending;
pub mod gate;
pub mod jail;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod parts;
pub mod rights;
pub mod starter;
pub mod vcpu;
pub mod virtio;
pub mod vm;
#[cfg(feature = "weakened")]
pub mod weakened;

/// An error and its causes as one sentence for a person: `cannot do this: because of that`.
#[must_use]
pub fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
