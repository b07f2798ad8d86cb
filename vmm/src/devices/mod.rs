//! The few devices of a PC that a husk guest sees besides virtio: a serial port and the power registers.

pub mod console;
pub mod power;
pub mod serial;
