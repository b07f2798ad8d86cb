//! How the kernel schedules the process: policy, I/O priority, CPU affinity, execution domain.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::personality::{self, Persona};
use nix::unistd::Pid;
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler,
};

use super::error::{LaunchError, Step};
use super::sys::{SchedulerAttributes, ioprio_set, sched_setattr};

/// linux/personality.h: uname says i686.
const PER_LINUX32: i32 = 0x0008;

/// Applies what the process asks for, while it may.
pub(crate) fn apply(
    process: &Process,
    personality: Option<&LinuxPersonality>,
) -> Result<(), LaunchError> {
    if let Some(scheduler) = process.scheduler() {
        sched_setattr(scheduler_attributes(scheduler))
            .spec_step(|| "setting process.scheduler".to_owned())?;
    }
    if let Some(priority) = process.io_priority() {
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u32::try_from(priority.priority())
            .ok()
            .filter(|level| *level <= 7)
            .ok_or_else(|| {
                LaunchError::invalid(format!(
                    "process.ioPriority.priority {} is not in 0-7",
                    priority.priority()
                ))
            })?;
        ioprio_set(class, level).spec_step(|| "setting process.ioPriority".to_owned())?;
    }
    if let Some(personality) = personality {
        let persona = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => Persona::empty(),
            LinuxPersonalityDomain::PerLinux32 => Persona::from_bits_retain(PER_LINUX32),
        };
        personality::set(persona).step(|| "setting linux.personality".to_owned())?;
    }
    Ok(())
}

/// Pins an exec'd process to the CPUs of a list like `0-2,5`; those the guest lacks are left out.
pub(crate) fn set_affinity(list: &str) -> Result<(), LaunchError> {
    let mut set = CpuSet::new();
    for cpu in crate::cgroup::cpu_list::parse(list)
        .ok_or_else(|| LaunchError::invalid(format!("invalid execCPUAffinity {list:?}")))?
    {
        // A CpuSet holds 1024; the guest has far fewer.
        let _ = set.set(cpu as usize);
    }
    sched_setaffinity(Pid::from_raw(0), &set)
        .spec_step(|| format!("setting the CPU affinity to {list}"))
}

fn scheduler_attributes(scheduler: &Scheduler) -> SchedulerAttributes {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler
        .flags()
        .iter()
        .flatten()
        .map(|flag| match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        })
        .fold(0, |flags, flag| flags | flag);
    SchedulerAttributes {
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(scheduler.priority().unwrap_or(0)).unwrap_or(0),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    }
}
