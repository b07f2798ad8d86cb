//! The registers through which a guest turns itself off or resets itself.
//!
//! ACPI's hardware-reduced model has a sleep control and a sleep status register of one byte each (ACPI 6.5, 4.8.3.7);
//! the FADT names a reset register as well. A husk guest resets for one reason only: its kernel panicked.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::ending::{Cause, Ending};
use crate::layout::{RESET_VALUE, SLEEP_TYPE_S5};

/// `SLP_EN`: go to the state in `SLP_TYPx` now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Position of `SLP_TYPx`.
const SLEEP_TYPE_SHIFT: u8 = 2;
/// Width of `SLP_TYPx`.
const SLEEP_TYPE_MASK: u8 = 0b111;

/// Sleep control at offset 0, sleep status at offset 1.
pub struct SleepRegisters(Arc<Ending>);

impl SleepRegisters {
    /// Registers that end the VM through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for SleepRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status: nothing woke the machine.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, [value]) = (offset, data) {
            let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
                self.0.report(Cause::PowerOff);
            }
        }
    }
}

/// The reset register, which is also the keyboard controller's command port.
pub struct ResetRegister(Arc<Ending>);

impl ResetRegister {
    /// A register that ends the VM through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for ResetRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Keyboard controller status: input buffer empty, so that the guest's reset does not wait for it.
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [RESET_VALUE] {
            self.0.report(Cause::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_powers_off() {
        let ending = Arc::new(Ending::new().unwrap());
        let mut registers = SleepRegisters::new(Arc::clone(&ending));
        registers.write(0, &[5 << 2]);
        registers.write(0, &[3 << 2 | 1 << 5]);
        registers.write(1, &[5 << 2 | 1 << 5]);
        registers.write(0, &[5 << 2 | 1 << 5, 0]);
        assert_eq!(ending.cause(), None);
        registers.write(0, &[5 << 2 | 1 << 5]);
        assert_eq!(ending.cause(), Some(Cause::PowerOff));
    }

    #[test]
    fn only_the_reset_value_resets() {
        let ending = Arc::new(Ending::new().unwrap());
        let mut register = ResetRegister::new(Arc::clone(&ending));
        register.write(0, &[0xd1]);
        assert_eq!(ending.cause(), None);
        register.write(0, &[0xfe]);
        assert_eq!(ending.cause(), Some(Cause::Reset));
    }
}
