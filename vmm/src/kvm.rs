#![allow(
    unsafe_code,
    reason = "owns the KVM file descriptors and hands guest memory to KVM"
)]
//! KVM: from the inherited `/dev/kvm` to a virtual machine with memory, interrupt controllers and vCPUs.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, KvmIrqRouting, Msrs, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msr_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid::{self, Topology};
use crate::layout;

/// What this VMM cannot do without, and the name users find in KVM's documentation.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// `IA32_MISC_ENABLE`: fast string operations are on.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, memory is write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// What went wrong with KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not KVM, or a KVM from before 2.6.22.
    #[error("the KVM device speaks API version {0}, not {KVM_API_VERSION}: is it really /dev/kvm?")]
    ApiVersion(i32),
    /// This host's KVM is too old or too odd.
    #[error(
        "this host's KVM lacks {0}, which husk needs: use a newer kernel, or a host with hardware virtualisation"
    )]
    Capability(&'static str),
    /// More vCPUs than KVM supports.
    #[error("{asked} vCPUs asked for, but this host's KVM supports {most} in one VM")]
    TooManyVcpus {
        /// vCPUs asked for.
        asked: u8,
        /// KVM's limit.
        most: usize,
    },
    /// An ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took fewer model-specific registers than given.
    #[error("KVM refused model-specific register {0:#x}")]
    Msr(u32),
    /// CPUID table too long.
    #[error("this host's CPUID table is longer than KVM accepts ({0} entries)")]
    Cpuid(usize),
}

fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { what, source }
}

/// The host's KVM, checked.
pub struct Host {
    kvm: Kvm,
    supported: CpuId,
    tsc_deadline: bool,
}

impl Host {
    /// Takes over `/dev/kvm` and checks that it can do what is needed.
    ///
    /// # Errors
    /// Not KVM, or a required capability is missing.
    pub fn open(kvm: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the fd is open and ours; that it really is /dev/kvm is checked by the next ioctl.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion(version));
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Capability(name));
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("reading the CPUID that KVM supports"))?;
        Ok(Self {
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            supported,
            kvm,
        })
    }

    /// Makes a VM with `memory` and in-kernel interrupt controllers.
    ///
    /// # Errors
    /// Too many vCPUs for this host, or KVM refuses a step.
    pub fn create_vm(self, vcpus: u8, memory: &GuestMemoryMmap) -> Result<Machine, KvmError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(KvmError::TooManyVcpus { asked: vcpus, most });
        }
        let vm = self.kvm.create_vm().map_err(ioctl("creating a VM"))?;
        disable_counters(&vm)?;
        vm.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(ioctl("placing the identity map page"))?;
        vm.set_tss_address(layout::TSS as usize)
            .map_err(ioctl("placing the TSS pages"))?;
        map_memory(&vm, memory)?;
        vm.create_irq_chip()
            .map_err(ioctl("creating the interrupt controllers"))?;
        route_interrupts(&vm)?;
        Ok(Machine {
            vm,
            supported: self.supported,
            tsc_deadline: self.tsc_deadline,
            vcpus,
        })
    }
}

/// Takes the virtual performance counters away, where KVM can: they cost every context switch of a vCPU.
fn disable_counters(vm: &VmFd) -> Result<(), KvmError> {
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY));
    if u32::try_from(offered).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    cap.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
    vm.enable_cap(&cap)
        .map_err(ioctl("turning the virtual performance counters off"))
}

fn map_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping of exactly this size, and regions do not overlap. The caller of `create_vm`
        // keeps the memory for as long as the machine (`Vm` holds both, and drops its vCPUs first).
        unsafe { vm.set_user_memory_region(description) }
            .map_err(ioctl("giving the guest its memory"))?;
    }
    Ok(())
}

/// Every line goes to the I/O APIC alone: a hardware-reduced guest has no PIC.
fn route_interrupts(vm: &VmFd) -> Result<(), KvmError> {
    let mut entries = Vec::new();
    for gsi in 0..layout::IOAPIC_PINS {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = gsi;
        entries.push(entry);
    }
    let routing = KvmIrqRouting::from_entries(&entries)
        .map_err(|_| KvmError::Capability("room for the interrupt routes"))?;
    vm.set_gsi_routing(&routing)
        .map_err(ioctl("routing the interrupt lines"))
}

/// A virtual machine.
pub struct Machine {
    vm: VmFd,
    supported: CpuId,
    tsc_deadline: bool,
    vcpus: u8,
}

impl Machine {
    /// Makes vCPU `index` with its CPUID and model-specific registers; its other registers are as after a reset.
    ///
    /// # Errors
    /// KVM refuses a step.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(ioctl("creating a vCPU"))?;
        let table = cpuid::for_vcpu(
            self.supported.as_slice(),
            Topology {
                apic_id: index,
                vcpus: self.vcpus,
                tsc_deadline: self.tsc_deadline,
            },
        );
        let table = CpuId::from_entries(&table).map_err(|_| KvmError::Cpuid(table.len()))?;
        vcpu.set_cpuid2(&table)
            .map_err(ioctl("setting a vCPU's CPUID"))?;
        set_msrs(&vcpu)?;
        Ok(vcpu)
    }

    /// An eventfd whose signal raises interrupt line `gsi`.
    ///
    /// # Errors
    /// No eventfd to be had, or KVM refuses it.
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = new_event()?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(ioctl("connecting an interrupt line"))?;
        Ok(event)
    }

    /// Makes KVM signal `event` when the guest writes the 32-bit `value` to `address`, without an exit to us.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn notify_on_write(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(ioctl("connecting a queue's notification"))
    }
}

fn new_event() -> Result<EventFd, KvmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| KvmError::Ioctl {
        what: "making an eventfd",
        source: kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(libc::EIO)),
    })
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let values = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    let entries = values.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Msr(MSR_MISC_ENABLE))?;
    let done = vcpu
        .set_msrs(&msrs)
        .map_err(ioctl("setting a vCPU's model-specific registers"))?;
    match values.get(done) {
        None => Ok(()),
        Some((index, _)) => Err(KvmError::Msr(*index)),
    }
}
