//! What else a kubelet asks for a pod, as CRI says it.

mod cgroup;
mod figures;
mod volumes;

use crate::{Test, husk_test, test};

pub const TESTS: &[Test] = &[
    test("volumes_of_a_user_and_their_parts", volumes::of_a_user),
    husk_test("a_volume_of_huge_pages_is_refused", volumes::huge_pages),
    test("processes_of_a_targeted_container", figures::target),
    test("figures_of_a_pod_and_its_containers", figures::stats),
];
