#![allow(
    unsafe_code,
    reason = "owns the kick: a signal handler that writes to the vCPU's kvm_run page"
)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]
//! vCPU threads: one a vCPU, each in KVM_RUN until the guest touches a device or someone kicks it.
//!
//! The kick is a signal. Its handler sets `immediate_exit` in the thread's own `kvm_run` page, so it works whether it arrives in
//! the guest (KVM_RUN returns EINTR), before KVM_RUN (which then returns at once) or in device code (the next
//! KVM_RUN returns at once). The thread clears the flag before it looks at the [`Gate`], so no kick is lost.

mod exits;

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt as _;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::boot::pvh;
use crate::bus::Bus;
use crate::clock;
use crate::ending::{Cause, Ending};
use crate::gate::{Gate, Next};
use crate::jail::seccomp::Kind;
use crate::sentence;

/// Why vCPUs could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused registers.
    #[error("cannot set the boot vCPU's registers")]
    Registers(#[source] kvm_ioctls::Error),
    /// No thread.
    #[error("cannot start a vCPU thread")]
    Spawn(#[source] io::Error),
    /// No signal handler.
    #[error("cannot install the handler of the signal that stops vCPUs")]
    Signal(#[source] io::Error),
}

/// What every vCPU thread shares.
pub struct Shared {
    /// Port I/O devices.
    pub ports: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// Where the end of the VM is reported.
    pub ending: Arc<Ending>,
    gate: Gate,
    /// When the boot vCPU first entered the guest.
    entered: OnceLock<u64>,
}

impl Shared {
    /// For a VM of `vcpus` vCPUs.
    #[must_use]
    pub fn new(ports: Bus, mmio: Bus, ending: Arc<Ending>, vcpus: u8) -> Self {
        Self {
            ports,
            mmio,
            ending,
            gate: Gate::new(usize::from(vcpus)),
            entered: OnceLock::new(),
        }
    }
}

impl Shared {
    /// For a vCPU that cannot run at all.
    fn give_up(&self, sentence: String) {
        self.ending.report(Cause::Failed(sentence));
        // Nobody waits for it then.
        let _ = self.entered.set(clock::monotonic());
        self.gate.leave();
    }
}

/// The running vCPUs. Dropping it stops them.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each of `fds`; the first starts the guest at `entry`, the others wait for its wake-up call.
    ///
    /// # Errors
    /// KVM refuses the registers, or a thread cannot be had; those already started are stopped again.
    pub fn start(fds: Vec<VcpuFd>, entry: u64, shared: Shared) -> Result<Self, VcpuError> {
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| VcpuError::Signal(io::Error::from_raw_os_error(e.errno())))?;
        if let Some(boot) = fds.first() {
            set_boot_registers(boot, entry).map_err(VcpuError::Registers)?;
        }
        let mut vcpus = Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        let mut result = Ok(());
        for (index, fd) in fds.into_iter().enumerate() {
            let shared = Arc::clone(&vcpus.shared);
            let thread = std::thread::Builder::new()
                .name(format!("{}{index}", Kind::Vcpu.name()))
                .spawn(move || {
                    if let Err(error) = Kind::Vcpu.confine() {
                        shared.give_up(sentence(&error));
                    } else {
                        Vcpu { index, fd }.run(&shared);
                    }
                });
            match thread {
                Ok(thread) => vcpus.threads.push(thread),
                Err(error) => {
                    // Dropping `vcpus` waits for every vCPU: this one will not come.
                    vcpus.shared.gate.leave();
                    result = Err(VcpuError::Spawn(error));
                }
            }
        }
        result.map(|()| vcpus)
    }

    /// Waits until the boot vCPU is about to enter the guest; `CLOCK_MONOTONIC` nanoseconds.
    #[must_use]
    pub fn entered(&self) -> u64 {
        *self.shared.entered.wait()
    }

    /// Holds every vCPU; returns when none runs. Idempotent.
    pub fn pause(&self) {
        self.shared.gate.pause(|| self.kick());
    }

    /// Lets them run on. Idempotent.
    pub fn resume(&self) {
        self.shared.gate.resume();
    }

    /// Ends every vCPU thread; returns when none runs. Idempotent.
    pub fn stop(&self) {
        self.shared.gate.stop(|| self.kick());
    }

    fn kick(&self) {
        for thread in &self.threads {
            // SAFETY: the thread has not been joined (only dropping `self.threads` could), so its id is valid; the signal
            // has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn set_boot_registers(boot: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = boot.get_sregs()?;
    pvh::set_special_registers(&mut sregs);
    boot.set_sregs(&sregs)?;
    boot.set_regs(&pvh::registers(entry))
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

thread_local! {
    /// The `immediate_exit` flag of the vCPU that this thread runs; null in other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer leads into this thread's kvm_run page, which `Vcpu::run` keeps mapped while it is set.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// What KVM_RUN came back with, for those outcomes that are not a device access.
enum Outcome {
    /// A kick, or nothing of note.
    Again,
    /// The guest asked for something that a husk guest has no business with, or KVM gave up.
    End(String),
}

struct Vcpu {
    index: usize,
    fd: VcpuFd,
}

impl Vcpu {
    fn run(mut self, shared: &Shared) {
        let flag = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(flag);
        if let Some(detail) = self.run_guest(shared) {
            shared.ending.report(Cause::Kvm(detail));
        }
        // From here on a kick finds nothing to write to.
        IMMEDIATE_EXIT.set(ptr::null_mut());
        compiler_fence(Ordering::SeqCst);
        // A boot vCPU that never ran must not keep the launch waiting.
        let _ = shared.entered.set(clock::monotonic());
        shared.gate.leave();
    }

    /// Runs the guest until it is told to stop (`None`) or KVM cannot go on.
    fn run_guest(&mut self, shared: &Shared) -> Option<String> {
        loop {
            self.fd.set_kvm_immediate_exit(0);
            // The handler runs on this thread: it is enough that the compiler keeps the order.
            compiler_fence(Ordering::SeqCst);
            match shared.gate.pass() {
                Next::Run => {}
                // Tells the guest that time went by, so that its watchdogs do not see a lock-up. Guests without
                // kvmclock cannot be told (EINVAL), and need not.
                Next::RunAfterPause => drop(self.fd.kvmclock_ctrl()),
                Next::Stop => return None,
            }
            if self.index == 0 && shared.entered.get().is_none() {
                let _ = shared.entered.set(clock::monotonic());
            }
            match self.enter(shared) {
                Outcome::Again => {}
                Outcome::End(reason) => return Some(self.describe(&reason)),
            }
        }
    }

    fn enter(&mut self, shared: &Shared) -> Outcome {
        let reason = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.ports.write(u64::from(port), data);
                return Outcome::Again;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.ports.read(u64::from(port), data);
                return Outcome::Again;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.mmio.read(address, data);
                return Outcome::Again;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.mmio.write(address, data);
                return Outcome::Again;
            }
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return Outcome::Again,
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => exits::unhandled(&other),
            Err(error) => match exits::failed(error) {
                None => return Outcome::Again,
                Some(reason) => reason,
            },
        };
        Outcome::End(reason)
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR this member of the union is the valid one, and it is plain integers.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        exits::internal(internal.suberror)
    }

    /// One sentence: vCPU, reason, and the registers that tell where it was.
    fn describe(&self, reason: &str) -> String {
        let registers = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rcx={:#x} rdx={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x}",
                r.rip,
                r.rsp,
                r.rflags,
                r.rax,
                r.rcx,
                r.rdx,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.cs.selector
            ),
            _ => "registers not to be had".into(),
        };
        format!("vCPU {}: {reason}; {registers}", self.index)
    }
}
