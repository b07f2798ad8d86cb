//! A node that gets husk from the installer's image, as the DaemonSet in `deploy/kubernetes` runs it: by a pod of runc's.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    containerd::Containerd,
    cri::{self, Cri, Ended, Pod, container, security, v1},
    host,
    runtime::Runtime,
};

use crate::{Test, context::Context, husk_test};

/// It installs on the machine itself.
pub const TESTS: &[Test] = &[husk_test("a_node_gets_husk_and_is_rid_of_it", install)];

const ARCHIVE: &str = "/payload/share/husk-installer.tar";
const IMAGE: &str = concat!(
    "docker.io/library/husk-installer:",
    env!("CARGO_PKG_VERSION")
);
const SHIM: &str = "/usr/local/bin/containerd-shim-husk-v2";

fn install(suite: &Context) -> Result<()> {
    let containerd = Containerd::start_with_runtimes(
        Path::new("/run/husk-e2e-node"),
        &suite.bin,
        &[Runtime::Runc],
    )?;
    containerd
        .import_into(cri::NAMESPACE, Path::new(ARCHIVE))
        .context("the installer's image; tests/scripts/image makes it")?;
    let config = containerd.dir().join("config.toml");
    let before = fs::read_to_string(&config)?;
    let runc = Cri::connect(&containerd, Runtime::Runc)?;
    let pod = node_pod(&runc)?;

    // What it does not understand stays as it was.
    let old = containerd.dir().join("old.toml");
    fs::write(&old, "version = 1\n")?;
    let (said, _) = run(&pod, "install", &old, containerd.dir())?;
    ensure!(
        said.code == 1 && said.err.contains("version '1'"),
        "{said:?}"
    );
    ensure!(fs::read_to_string(&old)? == "version = 1\n");

    // A node whose containerd has no configuration yet gets one.
    let fresh = containerd.dir().join("etc/fresh.toml");
    let (said, restarted) = run(&pod, "install", &fresh, containerd.dir())?;
    ensure!(restarted, "{}", said.ok()?);
    let fresh = fresh.to_string_lossy();
    let dump = host::run(&["containerd", "--config", &fresh, "config", "dump"])?;
    ensure!(
        dump.contains(SHIM) && dump.contains("io.containerd.husk.v2"),
        "{dump}"
    );

    // This node's own.
    let (said, restarted) = run(&pod, "install", &config, containerd.dir())?;
    let said = said.ok()?;
    ensure!(
        restarted && said.contains("Runtime: io.containerd.husk.v2"),
        "{said}"
    );
    let (said, restarted) = run(&pod, "install", &config, containerd.dir())?;
    ensure!(!restarted && said.ok()?.contains("up to date"));
    containerd.kill();
    containerd.relaunch()?;
    let husk = Cri::connect(&containerd, Runtime::Husk)?;
    let sandboxed = husk.pod()?;
    ensure!(sandboxed.sh("uname -r")?.ok()?.ends_with("-husk"));
    let shim = host::shim_of(&sandboxed.id).context("the pod has no shim")?;
    ensure!(fs::read_link(format!("/proc/{}/exe", shim.pid))? == Path::new(SHIM));

    // It does not go from under its pods.
    let (said, _) = run(&pod, "remove", &config, containerd.dir())?;
    ensure!(said.code == 1 && said.err.contains("still run"), "{said:?}");
    drop(sandboxed);
    run(&pod, "remove", &config, containerd.dir())?.0.ok()?;
    ensure!(fs::read_to_string(&config)? == before);
    ensure!(!Path::new(SHIM).exists() && !Path::new("/usr/local/lib/husk").exists());
    Ok(())
}

/// A pod that sees the node's processes.
fn node_pod(runc: &Cri) -> Result<Pod<'_>> {
    let mut config = runc.pod_config();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.privileged = true;
    security.namespace_options = Some(node_namespaces());
    runc.run_pod(config)
}

fn node_namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        pid: v1::NamespaceMode::Node.into(),
        ..cri::namespaces()
    }
}

/// Runs the installer's container to its end; also whether it wanted containerd to be restarted. No service manager is here to do it.
fn run(pod: &Pod<'_>, command: &str, config: &Path, dir: &Path) -> Result<(Ended, bool)> {
    let wanted = dir.join("restart-wanted");
    let mut installer = container(&[]);
    installer.image.get_or_insert_default().image = IMAGE.into();
    installer.args = vec![command.into()];
    let restart = format!("touch {}", wanted.display());
    for (key, value) in [
        ("CONTAINERD_CONFIG", config.to_string_lossy().into_owned()),
        ("CONTAINERD_RESTART", restart),
    ] {
        installer.envs.push(v1::KeyValue {
            key: key.into(),
            value,
        });
    }
    installer.mounts.push(v1::Mount {
        host_path: "/".into(),
        container_path: "/host".into(),
        ..Default::default()
    });
    let context = security(&mut installer);
    context.privileged = true;
    context.namespace_options = Some(node_namespaces());
    let ended = pod.start(installer)?.ended()?;
    let restarted = wanted.exists();
    if restarted {
        fs::remove_file(&wanted)?;
    }
    Ok((ended, restarted))
}
