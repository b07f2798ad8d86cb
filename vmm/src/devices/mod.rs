//! The few devices of a PC that a husk guest sees besides virtio: a serial port and the power registers.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

pub mod console;
pub mod power;
pub mod serial;
