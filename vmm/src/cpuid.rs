//! What the guest's CPUs say they are: the host's CPU as KVM can give it, with our topology and without what a
//! container never needs.
//!
//! One socket, one thread a core, APIC ids counting from zero. Taken away: nested virtualisation and the
//! performance counters, both of which are large surfaces towards the host and cost exits at boot.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What one vCPU needs to know about the machine.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// This vCPU's APIC id.
    pub apic_id: u8,
    /// vCPUs of the VM.
    pub vcpus: u8,
    /// KVM emulates the APIC timer's TSC deadline mode.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of the APIC id that tell the cores of the socket apart.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// Leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: some hypervisor is there, look at 0x4000_0000.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: debug store and perfmon capabilities.
const PDCM: u32 = 1 << 15;
/// Leaf 1, EDX: the logical processor count in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: HTT means cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
/// Leaf 0x8000_0001, ECX: AMD's extended performance counters, for the core, the north bridge and the L2 cache.
const AMD_PERF_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 6, EAX: the APIC timer runs in every sleep state.
const ARAT: u32 = 1 << 2;

/// Leaves that describe the host's topology in ways we do not repeat, or features that the guest does not get:
/// performance counters (0xa, 0x8000_0022), V2 topologies (0x1f, 0x8000_0026), SGX (0x12), SVM (0x8000_000a).
const DROPPED: [u32; 6] = [0xa, 0x12, 0x1f, 0x8000_000a, 0x8000_0022, 0x8000_0026];

/// Builds one vCPU's CPUID table from what KVM supports on this host.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let intel = supported
        .iter()
        .any(|e| e.function == 0 && e.ebx == u32::from_le_bytes(*b"Genu"));
    let mut table: Vec<_> = supported
        .iter()
        .filter(|e| e.function != 0xb && !DROPPED.contains(&e.function))
        .copied()
        .map(|entry| adapt(entry, topology, intel))
        .collect();
    table.extend(x2apic_topology(topology));
    table
}

fn adapt(mut e: kvm_cpuid_entry2, topology: Topology, intel: bool) -> kvm_cpuid_entry2 {
    let vcpus = u32::from(topology.vcpus);
    let apic_id = u32::from(topology.apic_id);
    match e.function {
        // Leaf 0xb is always given below.
        0 => e.eax = e.eax.max(0xb),
        1 => {
            e.ebx = e.ebx & 0xffff | vcpus << 16 | apic_id << 24;
            e.ecx = e.ecx & !(VMX | PDCM) | HYPERVISOR;
            set(&mut e.ecx, TSC_DEADLINE, topology.tsc_deadline);
            set(&mut e.edx, HTT, vcpus > 1);
        }
        4 | 0x8000_001d if e.eax & 0x1f != 0 => share_cache(&mut e, topology),
        6 => (e.eax, e.ebx, e.ecx, e.edx) = (e.eax & ARAT, 0, 0, 0),
        0x8000_0001 => {
            e.ecx &= !(SVM | AMD_PERF_COUNTERS);
            let cores = e.ecx & CMP_LEGACY != 0 && vcpus > 1;
            set(&mut e.ecx, CMP_LEGACY, cores);
        }
        // Id width and number of cores; Intel keeps this register reserved.
        0x8000_0008 if !intel => e.ecx = topology.core_bits() << 12 | vcpus.saturating_sub(1),
        0x8000_001e => (e.eax, e.ebx, e.ecx, e.edx) = (apic_id, apic_id & 0xff, 0, 0),
        _ => {}
    }
    e
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// L1 and L2 belong to a core, L3 to the socket.
fn share_cache(e: &mut kvm_cpuid_entry2, topology: Topology) {
    let ids = !(u32::MAX << topology.core_bits());
    let level = e.eax >> 5 & 0x7;
    let sharers = if level >= 3 { ids } else { 0 };
    e.eax = e.eax & 0x3fff | sharers << 14;
    // Intel alone: the core ids of the package.
    if e.function == 4 {
        e.eax |= ids << 26;
    }
}

/// Leaf 0xb: threads of a core, cores of the socket, end.
fn x2apic_topology(topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: u32::from(topology.apic_id),
        ..Default::default()
    };
    [
        level(0, THREAD, 0, 1),
        level(1, CORE, topology.core_bits(), u32::from(topology.vcpus)),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn topology(apic_id: u8, vcpus: u8) -> Topology {
        Topology {
            apic_id,
            vcpus,
            tsc_deadline: true,
        }
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let host = [leaf(0, 5, 0, 0, 0), leaf(1, 0, 0x4712_0800, VMX, 0)];
        let table = for_vcpu(&host, topology(2, 3));
        let one = find(&table, 1, 0);
        assert_eq!(one.ebx, 0x0203_0800);
        assert_eq!(one.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(one.edx, HTT);
        assert_eq!(find(&table, 0, 0).eax, 0xb);
        for index in 0..3 {
            assert_eq!(find(&table, 0xb, index).edx, 2);
        }
        // Three cores take two bits.
        assert_eq!(find(&table, 0xb, 1).eax, 2);
        assert_eq!(find(&table, 0xb, 1).ebx, 3);
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor() {
        let table = for_vcpu(&[leaf(1, 0, 0, 0, HTT)], topology(0, 1));
        assert_eq!(find(&table, 1, 0).edx, 0);
        assert_eq!(find(&table, 0xb, 1).eax, 0);
    }

    #[test]
    fn nested_virtualisation_and_counters_are_not_offered() {
        let host = [
            leaf(1, 0, 0, VMX | PDCM | 1, 0),
            leaf(0xa, 1, 1, 1, 1),
            leaf(0x8000_0001, 0, 0, SVM | AMD_PERF_COUNTERS | 1, 0),
            leaf(0x8000_000a, 1, 1, 1, 1),
        ];
        let table = for_vcpu(&host, topology(0, 4));
        // Leaf 1, ECX bit 5 and leaf 0x8000_0001, ECX bit 2.
        assert_eq!(find(&table, 1, 0).ecx & (1 << 5 | PDCM | 1), 1);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 1);
        assert!(!table.iter().any(|e| DROPPED.contains(&e.function)));
    }

    #[test]
    fn the_last_level_cache_is_shared() {
        let host = [
            leaf(4, 0xfc00_c121, 0, 0, 0),
            leaf(0x8000_001d, 0x0001_c163, 0, 0, 0),
        ];
        let table = for_vcpu(&host, topology(0, 8));
        assert_eq!(find(&table, 4, 0).eax, 7 << 26 | 0x121);
        assert_eq!(find(&table, 0x8000_001d, 0).eax, 7 << 14 | 0x163);
    }
}
