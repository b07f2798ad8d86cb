//! Pods outlive what happens to containerd, and what happens to pods is told once and leaves nothing behind.

mod clock;
mod containerd;
mod death;
mod disk;
mod quota;
mod slow;

pub use slow::read_ahead_workload;

use husk_tests::{containerd::NEXT, cri::v1};

use crate::{Test, husk_test, test};

/// They do things to containerd, the VM and the host that others would feel.
pub const TESTS: &[Test] = &[
    test("containerd_killed_under_pods", containerd::killed),
    test("containerd_upgraded_under_pods", containerd::upgraded).needs(NEXT),
    test("full_disk_under_a_pod", disk::full),
    test("quota_of_a_user", quota::of_a_user),
    test("ended_in_a_slow_read", slow::ended_in_a_read),
    test("clock_of_a_pod", clock::right),
    husk_test("shim_vmm_and_guest_kernel_die_under_pods", death::each),
    husk_test("what_a_power_cut_left_is_reclaimed", death::power_cut),
];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

/// A mount of a host's directory at `/shared`.
fn shared(dir: &std::path::Path) -> v1::Mount {
    v1::Mount {
        host_path: dir.to_string_lossy().into_owned(),
        container_path: "/shared".into(),
        ..Default::default()
    }
}
