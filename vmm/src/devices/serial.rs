//! COM1: output only, into the [`Console`].
//!
//! The registers are vm-superio's. A husk guest prints here when it panics, or everything when its boot is debugged.

use std::io;

use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use crate::bus::BusDevice;

/// Raises the port's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port on the bus.
pub struct SerialPort(Serial<Line, vm_superio::serial::NoEvents, Console>);

impl SerialPort {
    /// A port that prints to `console` and interrupts through `irq`.
    #[must_use]
    pub fn new(console: Console, irq: EventFd) -> Self {
        Self(Serial::new(Line(irq), console))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Byte registers; a wider access keeps the ones that the bus filled in.
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            *value = self.0.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            // Fails only when the interrupt cannot be raised; the guest's driver also polls.
            if self.0.write(register, *value).is_err() {
                tracing::debug!("serial interrupt lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_to_the_port_are_console_output() {
        let console = Console::new(None).unwrap();
        let mut port = SerialPort::new(console.clone(), EventFd::new(0).unwrap());
        for byte in b"Kernel panic\n" {
            let mut status = [0];
            port.read(5, &mut status);
            assert_eq!(status[0] & 0x60, 0x60, "always ready to send");
            port.write(0, &[*byte]);
        }
        port.write(0, &[1, 2]);
        assert_eq!(console.tail(), ["Kernel panic"]);
    }
}
