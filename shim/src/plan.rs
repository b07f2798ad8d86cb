//! What a pod's VM is to be, and the VMM's place on the host.

use std::path::Path;

use tracing::{debug, warn};

use crate::{
    cgroup::{self, PodCgroup},
    config::Config,
    pod::PodSpec,
    sizing::{self, Bounds, Size},
    state::{PodDir, ProcessId},
    vm::{LaunchPlan, VmError, process},
};

/// Puts the VMM, and this shim, into the pod's cgroup, notes that in the pod's state, and decides how large the VM is. Blocks. Returns the cgroup as
/// well, where the pod has one.
///
/// # Errors
/// An annotation of the pod that does not count, or has no sense.
pub fn place_and_size(
    vmm: u32,
    mut spec: PodSpec,
    config: &Config,
    pod: &PodDir,
    id: String,
) -> Result<(LaunchPlan, Option<PodCgroup>), VmError> {
    // Not the shim's, which is as low as containerd's own.
    let score = spec.oom_score_adj;
    if let Err(error) = process::set_oom_score_adj(vmm, score) {
        warn!(%error, score, "cannot set the VMM's oom_score_adj");
    }
    let cgroup = spec.cgroups_path.as_deref().and_then(cgroup_for);
    let vmm_id = i32::try_from(vmm)
        .ok()
        .and_then(|pid| ProcessId::of(pid).ok());
    let record = |cgroup: Option<&PodCgroup>| {
        let recorded = pod.update(|state| {
            state.vmm = vmm_id;
            state.cgroup = cgroup.map(|c| c.path().to_owned());
        });
        if let Err(error) = recorded {
            warn!(%error, "cannot record the VMM in the pod's state file");
        }
    };
    // Before it is made: a shim that is killed here leaves nothing that nobody knows of.
    let own = cgroup.as_ref().filter(|c| !c.exists());
    record(own);
    let is_own = cgroup.as_ref().is_some_and(|c| place_in_cgroup(c, vmm));
    if own.is_some() != is_own {
        record(cgroup.as_ref().filter(|_| is_own));
    }
    let limit = cgroup.as_ref().and_then(PodCgroup::memory_limit);
    let huge_pages = cgroup.as_ref().and_then(PodCgroup::huge_pages_limit);
    spec.hints.huge_pages = huge_pages.unwrap_or(spec.hints.huge_pages);
    Ok((plan_for(&spec, config, id, limit)?, cgroup))
}

/// Of a pod that says nothing.
pub fn default_size(config: &Config) -> Size {
    Size {
        vcpus: config.default_vcpus,
        memory_mib: config.default_memory_mib,
    }
}

/// Size and parameters, from the pod's limits and annotations, the memory limit of its cgroup (bytes) and the node's settings.
fn plan_for(
    spec: &PodSpec,
    config: &Config,
    id: String,
    cgroup_limit: Option<u64>,
) -> Result<LaunchPlan, VmError> {
    let overrides = config
        .overrides(&spec.annotations)
        .map_err(|e| VmError::Other(e.to_string()))?;
    let bounds = Bounds {
        default: default_size(config),
        max: Size {
            vcpus: config.max_vcpus,
            memory_mib: config.max_memory_mib,
        },
    };
    let mut size = sizing::size(&spec.hints, &bounds);
    size.vcpus = overrides.vcpus.unwrap_or(size.vcpus);
    size.memory_mib = overrides.memory_mib.unwrap_or(size.memory_mib);
    let wanted = size.memory_mib;
    size.memory_mib = sizing::within(wanted, cgroup_limit);
    if size.memory_mib < wanted {
        debug!(
            wanted,
            room = size.memory_mib,
            "the VM is made as small as the memory limit of the pod's cgroup wants it"
        );
    }
    let max = Size {
        vcpus: overrides.max_vcpus.unwrap_or(config.grow_vcpus),
        memory_mib: overrides.max_memory_mib.unwrap_or(config.grow_memory_mib),
    };
    let params: Vec<&str> = [
        Some(config.kernel_params.as_str()),
        overrides.kernel_params.as_deref(),
    ]
    .into_iter()
    .flatten()
    .filter(|p| !p.trim().is_empty())
    .collect();
    Ok(LaunchPlan {
        id,
        size,
        max: max.at_least(size),
        kernel_params: params.join(" "),
        debug_console: overrides.debug_console.unwrap_or(config.debug_console),
        nics: Vec::new(),
    })
}

/// A pod without its cgroup still runs: the engine may have given a path that this host's cgroups do not offer.
fn cgroup_for(path: &Path) -> Option<PodCgroup> {
    if !cgroup::is_unified() {
        warn!("the host has cgroup v1: the VMM stays in the shim's cgroup");
        return None;
    }
    PodCgroup::of_spec(path)
}

/// Returns whether the cgroup is there and husk's own.
fn place_in_cgroup(cgroup: &PodCgroup, vmm: u32) -> bool {
    let path = cgroup.path().display();
    match cgroup.place(vmm) {
        Ok(is_own) => {
            if let Err(error) = cgroup.join() {
                warn!(%error, %path, "the shim stays outside of the pod's cgroup");
            }
            is_own
        }
        Err(error) => {
            warn!(%error, %path, "the VMM stays in the shim's cgroup");
            false
        }
    }
}
