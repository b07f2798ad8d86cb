//! Docker, with its own client: the runtime under test is its daemon's default (docs/engines/docker.md).

use crate::{Test, husk_test, test};

mod build;
mod compose;
mod files;
mod flags;
mod lifecycle;
mod limits;
mod network;
mod page;

pub const TESTS: &[Test] = &[
    test("exit_codes_input_and_settings", lifecycle::run),
    test("terminal_attach_and_exec", lifecycle::terminal),
    test("stop_with_grace_and_logs", lifecycle::stop),
    test("restart_policies_and_healthchecks", lifecycle::restart),
    test("the_default_bridge_and_published_ports", network::bridge),
    test("containers_talk_by_name", network::names),
    husk_test(
        "port_53_is_the_containers_own",
        network::nameserver_of_its_own,
    ),
    test("limits_update_stats_and_pause", limits::limits),
    test("volumes_and_copies", files::volumes),
    test("compose_with_a_web_server_and_a_database", compose::compose),
    test("the_classic_builder", build::classic),
    test("init_udp_and_devices", flags::init_udp_and_devices),
    husk_test(
        "what_is_the_hosts_with_runc_is_the_guests",
        flags::privileged,
    ),
    test("what_docker_refuses_itself", flags::dockers_own),
    husk_test("the_pages_commands", page::commands),
    husk_test("what_cannot_be_is_told", lifecycle::refused),
    husk_test("doctor_tells_the_daemons_mistakes", crate::doctor::docker),
];
