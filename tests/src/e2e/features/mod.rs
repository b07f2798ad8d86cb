//! What else a kubelet asks for a pod, as CRI says it.

mod figures;
mod huge_pages;
mod users;
mod volumes;

pub use huge_pages::map_workload;
pub use users::{own_users_with, own_users_without_image};

use crate::{Test, test};

pub const TESTS: &[Test] = &[
    test("volumes_of_a_user_and_their_parts", volumes::of_a_user),
    test("a_volume_of_huge_pages", huge_pages::volume),
    test("processes_of_a_targeted_container", figures::target),
    test("users_of_a_pod", users::own_users),
    test("figures_of_a_pod_and_its_containers", figures::stats),
];
